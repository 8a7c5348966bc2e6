"""Lets one check run at a time: two that measure at once disturb one another."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from exitcompiler.errors import MeasurementError
from exitcompiler.progress import reporting

__all__ = ["alone"]

_PATIENCE_S: Final = 3600.0
_REMEDY: Final = "see what runs there, or give another folder for it (TMPDIR)"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process of this user is in here.

    A transaction of SQLite is a lock that every system has, and that ends with its process.

    Raises:
        MeasurementError: Another check has held it for an hour, or there can be no such lock.
    """
    path = _own_folder() / "check.lock"
    with contextlib.ExitStack() as stack:
        try:
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(path, isolation_level=None)))
            _begin(connection)
        except sqlite3.Error as error:
            busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            what = (
                f"another check has been running for {_PATIENCE_S / 3600:.0f} h"
                if busy
                else f"this file cannot be locked: {error}"
            )
            raise MeasurementError(what, where=str(path), remedy=_REMEDY) from error
        yield


def _begin(connection: sqlite3.Connection) -> None:
    """Take the lock, and tell where that takes long."""
    connection.execute("PRAGMA busy_timeout = 100")
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        connection.execute(f"PRAGMA busy_timeout = {round(1e3 * _PATIENCE_S)}")
        with reporting() as reporter, reporter.step("waiting for another check to end"):
            connection.execute("BEGIN EXCLUSIVE")


def _own_folder() -> Path:
    """A folder that nobody else can write to.

    Raises:
        MeasurementError: It cannot be made, or another user has made it.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"exitcompiler-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        what = f"this folder cannot be made: {error.strerror}"
        raise MeasurementError(what, where=str(folder), remedy=_REMEDY) from error
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode)):
        raise MeasurementError("this folder is another user's", where=str(folder), remedy=_REMEDY)
    return folder
