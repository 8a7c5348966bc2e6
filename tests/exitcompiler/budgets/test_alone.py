"""One check at a time; what keeps a check from knowing that it is alone is told."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from pathlib import Path

import pytest

from exitcompiler.budgets import alone as module
from exitcompiler.budgets.alone import alone
from exitcompiler.errors import MeasurementError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock is."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"exitcompiler-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def test_a_second_check_waits_for_the_first() -> None:
    events: list[str] = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with alone():
            events.append("second")

    with alone():
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait(60)
        thread.join(0.3)  # it would be through by now
        events.append("first")
    thread.join(60)
    assert events == ["first", "second"]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    with alone(), pytest.raises(MeasurementError, match="another check has been running") as raised, alone():
        pass
    assert str(folder) in str(raised.value.where)


def test_the_lock_ends_with_an_error_of_the_check_which_is_raised_as_it_is() -> None:
    with pytest.raises(sqlite3.OperationalError, match="of the check"), alone():
        raise sqlite3.OperationalError("of the check")
    with alone():
        pass


def test_what_cannot_be_locked_is_told(folder: Path) -> None:
    folder.mkdir()
    (folder / "check.lock").mkdir()
    with pytest.raises(MeasurementError, match="cannot be locked: unable to open"), alone():
        pass


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="elsewhere temporary folders are the user's own")
def test_a_folder_that_another_user_made_is_not_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alone():
        assert folder.stat().st_mode & 0o077 == 0
    user = os.getuid()
    folder.rename(tmp_path / f"exitcompiler-{user + 1}")
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(MeasurementError, match="another user's"), alone():
        pass
    monkeypatch.setattr(os, "getuid", lambda: user)
    folder.symlink_to(tmp_path)
    with pytest.raises(MeasurementError, match="another user's"), alone():
        pass
    folder.unlink()
    folder.write_text("a file")
    with pytest.raises(MeasurementError, match="cannot be made"), alone():
        pass
