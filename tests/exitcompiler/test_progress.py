"""Bars are for terminals."""

from __future__ import annotations

import pytest

from exitcompiler.progress import reporting


def test_a_log_holds_no_bars_even_where_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with reporting() as reporter, reporter.step("measuring", total=2) as step:
        step.advance()
    assert capsys.readouterr().err == ""
    assert reporter.seconds.keys() == {"measuring"}
    with reporting(True) as shown, shown.step("measuring", total=2):
        pass
    assert "measuring" in capsys.readouterr().err
