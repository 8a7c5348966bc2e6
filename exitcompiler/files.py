"""Writes a file so that it is whole or absent, whatever happens on the way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from exitcompiler.errors import InputError

__all__ = ["require_writable", "write_file"]


def require_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a place where nothing can be written, before the work for it.

    Args:
        path: Of a file or folder to be made.

    Raises:
        InputError: Its folder does not exist or is not writable.
    """
    folder = Path(os.path.abspath(path)).parent
    if not folder.is_dir():
        raise InputError(
            "its folder does not exist", where=f"output {str(path)!r}", remedy="make the folder first"
        )
    if not os.access(folder, os.W_OK):
        raise InputError(
            "its folder is not writable", where=f"output {str(path)!r}", remedy="choose another place"
        )


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file; one that is there is replaced in one step.

    Args:
        path: Its folder must exist.
        content: All of it.

    Raises:
        InputError: It cannot be written.
    """
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}", where=str(target), remedy="choose another path"
        ) from error
