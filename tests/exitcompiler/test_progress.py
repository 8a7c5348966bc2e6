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


def test_the_time_left_is_told_of_batches_that_take_over_half_a_minute() -> None:
    now = [0.0]
    with reporting(False) as reporter:
        bars = reporter._progress
        bars.disable = False
        bars.get_time = lambda: now[0]
        with reporter.step("fine-tuning", total=10) as step:
            for _ in range(4):
                now[0] += 35.0
                step.advance()
            (bar,) = bars.tasks
            assert bar.time_remaining == pytest.approx(6 * 35.0, rel=0.01)
