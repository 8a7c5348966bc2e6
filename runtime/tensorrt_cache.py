"""Keeps engines and timings from one run to the next, and gives back only what was made for the same case.

An entry is one file: a line of JSON that says what it was made from and what it has to be, then the
content. It appears by one rename, so that it is whole or not there, whoever else writes it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from exitcompiler.errors import InputError
from exitcompiler.runtime.manifest import Json

__all__ = ["EngineCache", "user_cache_folder"]

_log = logging.getLogger(__name__)

_FORMAT: Final = "exitcompiler cache 1"
_HEADER_LIMIT_BYTES: Final = 2**16


def user_cache_folder() -> Path:
    """Where this user's programs keep what can be made again; not made here.

    Raises:
        InputError: The user has no home folder, and no variable says where else.
    """
    variable, usual = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    base = os.environ.get(variable)
    try:
        folder = Path(base) if base else Path.home() / usual
    except RuntimeError as error:
        raise InputError(
            "there is no home folder to keep engines in",
            where="cache",
            remedy=f"set {variable} to a folder, or pass one as cache=",
        ) from error
    return folder / "exitcompiler" / "tensorrt"


class EngineCache:
    """A folder of entries.

    Engines are run as they are: whoever may write here may run code as whoever reads. The folder is made
    for its owner alone.

    Args:
        folder: Made when something is first written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.abspath(folder))

    def path(self, kind: str, facts: Mapping[str, Json]) -> Path:
        """Where an entry is, or would be.

        Args:
            kind: What it is: ``"engine"``, ``"timings"``.
            facts: What it was made from.
        """
        return self.folder / f"{hashlib.sha256(_canonical(facts)).hexdigest()[:40]}.{kind}"

    def read(self, kind: str, facts: Mapping[str, Json]) -> bytes | None:
        """An entry, if it is there, whole, and made from exactly these facts.

        One that is not is left alone (the next `write` replaces it), and the log says why.

        Args:
            kind: As in `path`.
            facts: Likewise.
        """
        path = self.path(kind, facts)
        try:
            with open(path, "rb") as file:
                header = file.readline(_HEADER_LIMIT_BYTES)
                content = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s cannot be read (%s), so it is made again", path, error.strerror)
            return None
        reason = _stale(header, content, facts)
        if reason is not None:
            _log.warning("%s is not used: %s; it is made again", path, reason)
            return None
        return content

    def write(self, kind: str, facts: Mapping[str, Json], content: bytes) -> None:
        """Keep an entry; one that is there is replaced in one step.

        A folder that cannot be written is no error, as the content is there: the log says so.

        Args:
            kind: As in `path`.
            facts: Likewise.
            content: All of it.
        """
        path = self.path(kind, facts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_header(facts, content))
                    file.write(content)
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            _log.warning("%s cannot be kept for the next time: %s", path, error.strerror)


def _canonical(facts: Mapping[str, Json]) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _header(facts: Mapping[str, Json], content: bytes) -> bytes:
    return (
        _canonical(
            {
                "format": _FORMAT,
                "facts": dict(facts),
                "sha256": hashlib.sha256(content).hexdigest(),
                "size_bytes": len(content),
            }
        )
        + b"\n"
    )


def _stale(header: bytes, content: bytes, facts: Mapping[str, Json]) -> str | None:
    """Why an entry is not what is looked for; None: it is."""
    try:
        found = json.loads(header)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return "it does not say what it is"
    made_from = found.get("facts")
    if made_from != json.loads(_canonical(facts)):
        if not isinstance(made_from, dict):
            return "it does not say what it was made from"
        differing = sorted(k for k in {*facts, *made_from} if made_from.get(k) != facts.get(k))
        return f"it was made for another case ({', '.join(differing)})"
    if found.get("size_bytes") != len(content):
        return f"it has {len(content)} bytes instead of {found.get('size_bytes')}"
    if found.get("sha256") != hashlib.sha256(content).hexdigest():
        return "its content has changed"
    return None
