"""Reads an artifact's files from a folder or a zip, trusting neither.

Nothing outside the artifact is opened, no link is followed, nothing is unpickled, and no more is read
than the manifest says there is.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from exitcompiler.errors import ArtifactError
from exitcompiler.runtime.json_reader import parse_json
from exitcompiler.runtime.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    REPORT_FILE,
    Artifact,
    FileEntry,
    Manifest,
    block_path,
    torch_paths,
)
from exitcompiler.runtime.manifest_json import manifest_from_json

__all__ = ["previous_path", "read_artifact"]

_KNOWN = re.compile(
    rf"{re.escape(MANIFEST_FILE)}|{re.escape(MODEL_FILE)}|{re.escape(REPORT_FILE)}"
    r"|blocks/[0-9a-f]{64}\.onnx|torch/[0-9a-f]{64}\.(json|safetensors)"
)
_FOLDERS = frozenset({"blocks", "torch"})
_PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy")

_MANIFEST_LIMIT_BYTES = 64 * 2**20
_ENTRY_LIMIT = 10_000
_RATIO_LIMIT = 200  # deflate reaches 1032; a report as text reaches 20
_RATIO_FREE_BYTES = 2**20

_AGAIN = "the artifact is damaged; save it again, or fetch it again from where it came"
_UNSAFE = "do not use it unless you trust where it came from"


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact and check names, sizes and hashes of everything in it.

    Where a save was killed between moving the old folder away and the new one in, the old one is read.

    Args:
        path: A folder, or the same zipped.

    Raises:
        ArtifactError: It is not there, truncated, changed, of a newer schema, or unsafe.
    """
    root = Path(os.path.abspath(path))
    try:
        with _open(root) as source:
            manifest = manifest_from_json(source.read(MANIFEST_FILE, _MANIFEST_LIMIT_BYTES))
            _check_names(source.names(), manifest)
            files = {name: _read_checked(source, name, entry) for name, entry in manifest.files.items()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"cannot be read: {error}", where=str(root), remedy=_AGAIN) from error
    except ArtifactError as error:
        raise ArtifactError(error.what, where=f"{root}, {error.where}", remedy=error.remedy) from error
    report = parse_json(files.pop(REPORT_FILE), REPORT_FILE) if REPORT_FILE in files else {}
    if not isinstance(report, dict):
        raise ArtifactError("expected an object", where=f"{root}, {REPORT_FILE}", remedy=_AGAIN)
    return Artifact(manifest, files, report)


def previous_path(root: Path) -> Path:
    """Where `save` keeps what was there for the moment between two renames."""
    return root.with_name(f".{root.name}.previous")


class _Source(Protocol):
    def names(self) -> list[str]: ...

    def read(self, name: str, limit_bytes: int) -> bytes: ...


@contextmanager
def _open(root: Path) -> Iterator[_Source]:
    if not root.exists() and previous_path(root).exists():
        root = previous_path(root)
    if root.is_dir():
        yield _Folder(root)
    elif root.exists():
        if not zipfile.is_zipfile(root):
            raise ArtifactError("neither a folder nor a complete zip file", where="the file", remedy=_AGAIN)
        with zipfile.ZipFile(root) as archive:
            yield _Zip(archive)
    else:
        raise ArtifactError("there is nothing here", where="the path", remedy="check the path")


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        """Files, with a slash between folders; refuses links and devices."""
        found: list[str] = []
        for folder, folders, files in os.walk(self._root):
            for name in (*folders, *files):
                full = os.path.join(folder, name)
                relative = os.path.relpath(full, self._root).replace(os.sep, "/")
                mode = os.lstat(full).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise ArtifactError("a link or a device, not a file", where=relative, remedy=_UNSAFE)
                if stat.S_ISREG(mode):
                    found.append(relative)
                elif relative not in _FOLDERS:
                    raise _unexpected(relative)
        return found

    def read(self, name: str, limit_bytes: int) -> bytes:
        """At most one byte more than the limit; never through a link."""
        parent = self._root
        for part in name.split("/")[:-1]:
            parent = parent / part
            if parent.is_symlink():
                raise ArtifactError("a link, not a folder", where=name, remedy=_UNSAFE)
        try:
            handle = os.open(self._root / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError as error:
            raise ArtifactError("the file is missing", where=name, remedy=_AGAIN) from error
        except OSError as error:
            raise ArtifactError(f"cannot be opened: {error.strerror}", where=name, remedy=_UNSAFE) from error
        with os.fdopen(handle, "rb") as file:
            return file.read(limit_bytes + 1)


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def names(self) -> list[str]:
        """Entries that are files; refuses links, encryption, bombs and the same name twice."""
        entries = self._archive.infolist()
        if len(entries) > _ENTRY_LIMIT:
            raise ArtifactError(f"{len(entries)} entries", where="the zip file", remedy=_UNSAFE)
        found: list[str] = []
        for entry in entries:
            name = entry.filename
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise ArtifactError("a link, not a file", where=name, remedy=_UNSAFE)
            if entry.flag_bits & 1:
                raise ArtifactError("the entry is encrypted", where=name, remedy=_UNSAFE)
            if entry.file_size > max(_RATIO_FREE_BYTES, _RATIO_LIMIT * entry.compress_size):
                raise ArtifactError(
                    f"{entry.compress_size} bytes unpack to {entry.file_size}", where=name, remedy=_UNSAFE
                )
            if entry.is_dir() and name.rstrip("/") in _FOLDERS:
                continue
            if name in found:
                raise ArtifactError("the name is there twice", where=name, remedy=_UNSAFE)
            found.append(name)
        return found

    def read(self, name: str, limit_bytes: int) -> bytes:
        """At most one byte more than the limit."""
        try:
            with self._archive.open(name) as file:
                return file.read(limit_bytes + 1)
        except KeyError as error:
            raise ArtifactError("the file is missing", where=name, remedy=_AGAIN) from error
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise ArtifactError(f"cannot be unpacked: {error}", where=name, remedy=_AGAIN) from error


def _unexpected(name: str) -> ArtifactError:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in name:
        return ArtifactError("the name leads out of the artifact", where=name, remedy=_UNSAFE)
    if name.lower().endswith(_PICKLE_SUFFIXES):
        return ArtifactError(
            "a pickle: loading one can run any code, so an artifact never holds one",
            where=name,
            remedy=_UNSAFE,
        )
    return ArtifactError("not a file that an artifact holds", where=name, remedy=f"delete it; or {_UNSAFE}")


def _check_names(found: list[str], manifest: Manifest) -> None:
    """What is there is known and listed, what is listed is known, and what is needed is listed."""
    for name in (*found, *manifest.files):
        if not _KNOWN.fullmatch(name):
            raise _unexpected(name)
    for name in found:
        if name != MANIFEST_FILE and name not in manifest.files:
            raise ArtifactError("the manifest does not list it", where=name, remedy=_AGAIN)
    needed: set[str] = set() if manifest.one_file is None else {MODEL_FILE}
    for point in manifest.operating_points:
        needed.update(block_path(file) for file in point.files.values())
        for stem in point.torch_files.values():
            needed.update(torch_paths(stem))
    for name in sorted(needed):
        if not _KNOWN.fullmatch(name):
            raise _unexpected(name)
        if name not in manifest.files:
            raise ArtifactError(
                "an operating point needs it, but it is not listed", where=name, remedy=_AGAIN
            )


def _read_checked(source: _Source, name: str, entry: FileEntry) -> bytes:
    content = source.read(name, entry.size_bytes)
    if len(content) != entry.size_bytes:
        state = "truncated" if len(content) < entry.size_bytes else "too long"
        raise ArtifactError(f"{state}: the manifest says {entry.size_bytes} bytes", where=name, remedy=_AGAIN)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ArtifactError("changed: its SHA-256 is not the one in the manifest", where=name, remedy=_AGAIN)
    if name.startswith("blocks/") and name != block_path(f"{entry.sha256}.onnx"):
        raise ArtifactError("a block is named by its SHA-256, and this is another", where=name, remedy=_AGAIN)
    if _looks_pickled(content):
        raise ArtifactError("a pickle in disguise: loading one can run any code", where=name, remedy=_UNSAFE)
    return content


def _looks_pickled(content: bytes) -> bool:
    """Whether it starts as a pickle of protocol 2 to 5, or as the zip that ``torch.save`` writes.

    A safetensors file starts with the length of its header, which may look the same: there the header
    itself tells, a JSON object from byte 8 on.
    """
    if content[8:9] == b"{" and content[2:8] == bytes(6):
        return False
    return content[:4] == b"PK\x03\x04" or (content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05")
