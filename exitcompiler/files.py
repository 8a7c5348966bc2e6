"""Writes a file so that it is whole or absent, whatever happens on the way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from exitcompiler.errors import InputError

__all__ = ["write_file"]


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
