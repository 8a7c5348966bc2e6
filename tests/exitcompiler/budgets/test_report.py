"""What a check says as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from budget_figures import measurement
from sample_check import failing_check, inconclusive_check, outcome_of, passing_check, sample_causes

from exitcompiler.budgets.limits import Metric
from exitcompiler.budgets.outcomes import BlockChange
from exitcompiler.budgets.quantities import format_factor
from exitcompiler.budgets.report import (
    by_growth,
    closing_line,
    format_change,
    format_found,
    remarks,
    report_lines,
    report_to_json,
)
from exitcompiler.statistics import Interval


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (outcome_of("latency", "mean", "max", "2 ms", (1.312, 1.18, 1.44)), "1.31 ms (1.18 to 1.44)"),
        (outcome_of("load", "time", "max", "2 s", (990.0, 980.0, 1040.0)), "990 ms (980 ms to 1.04 s)"),
        (outcome_of("latency", "p50", "max_ratio", "0.7", (0.5, 0.4, 0.6)), "0.500 (0.400 to 0.600)"),
        (outcome_of("latency", "p50", "max_increase", "5 %", (0.2, 0.1, 0.3)), "+20.0 % (+10.0 to +30.0)"),
        (outcome_of("accuracy", "drop", "max", "1 point", (0.004,) * 3), "0.40 points"),
        (outcome_of("latency", "p95", "max_slowdown", "30 %", None), "-"),
        (outcome_of("latency", "mean", "max", "2 ms", (1.312, 0.0, math.inf)), "1.31 ms (? to ?)"),
        (outcome_of("latency", "p50", "max_increase", "5 %", (0.2, -1.0, math.inf)), "+20.0 % (? to ?)"),
        (outcome_of("throughput", "32", "max_decrease", "5 %", (0.2, -math.inf, 1.0)), "20.0 % (? to ?)"),
        (outcome_of("accuracy", "disagreement", "max", "5 %", (0.01, 0.0, 0.5)), "1.00 % (0.00 to 50.0)"),
        (outcome_of("load", "time", "max_ratio", "2", (math.nan, -math.inf, math.inf)), "? (? to ?)"),
    ],
)
def test_what_was_found_has_its_interval_and_one_unit_where_it_can(outcome: Any, text: str) -> None:
    assert format_found(outcome) == text


def test_rounding_does_not_hide_that_a_limit_is_broken() -> None:
    outcome = outcome_of("artifact", "size", "max", "22.4 MB", (22_400_100.0,) * 3, "FAIL")
    outcome = replace(outcome, limit=replace(outcome.limit, value=22.4e6))
    assert format_found(outcome) == "22.4 MB, 0.0004 % above"
    assert format_found(replace(outcome, verdict="PASS")) == "22.4 MB"
    assert format_found(replace(outcome, found=Interval(23e6, 23e6, 23e6))) == "23.0 MB"


def test_a_change_is_shown_in_the_unit_of_the_metric_itself() -> None:
    increase, drop, tolerance, skipped = failing_check().outcomes
    assert format_change(increase) == "0.583 -> 0.707"
    assert format_change(drop) == "0.80 -> 0.90 points"
    assert format_change(tolerance) == "62.1 -> 60.0 %"
    assert format_change(skipped) == format_change(passing_check().outcomes[0]) == ""
    slower = replace(outcome_of("latency", "mean", "max_slowdown", "30 %", None), before=0.98, now=1.2)
    assert format_change(slower) == "0.980 -> 1.20 ms"


def test_factors() -> None:
    assert format_factor(Interval(1.213, 1.182, 1.246)) == "1.21x (1.18 to 1.25)"
    assert format_factor(Interval(1.011, 1.011, 1.011)) == "1.01x"
    assert format_factor(Interval(1.011, 1.0109, 1.0111)) == "1.01x"
    assert format_factor(Interval(1.011, -math.inf, math.inf)) == "1.01x (? to ?)"
    assert format_factor(Interval(1.011, 0.0, math.inf)) == "1.01x (? to ?)"


def test_blocks_that_got_slowest_come_first() -> None:
    assert [block.name for block in by_growth(sample_causes().blocks)] == ["second", "first", "third"]
    unsure = BlockChange("fourth", 1.0, Interval(1.1, 0.1, 9.9))
    assert [block.name for block in by_growth([*sample_causes().blocks, unsure])][:2] == ["second", "fourth"]


def test_lines_say_each_verdict_why_and_what_it_rests_on() -> None:
    lines = report_lines(failing_check())
    assert lines[:4] == [
        "FAIL          latency.mean.max_increase = 10 %: found +21.3 % (+18.2 to +24.5), 0.583 -> 0.707",
        "PASS          accuracy.max_drop_increase = 0.5 points: found +0.10 points, 0.80 -> 0.90 points",
        "INCONCLUSIVE  exit_rates.tolerance = 3 points: found 2.10 points (0.40 to 3.80), 62.1 -> 60.0 %; "
        "furthest: early",
        "SKIPPED       latency.p95.max_slowdown = 30 %: times are not compared: cpu 'a processor', was "
        "'another processor'",
    ]
    text = "\n".join(lines)
    assert "The kernels got slower." in text
    assert [line.split() for line in lines if line.startswith("  second")] == [
        ["second", "0.408", "ms", "1.36x", "(1.31", "to", "1.41)"]
    ]
    assert [line.split()[1:5] for line in lines if line.startswith("  early")] == [
        ["62.1", "->", "60.0", "%"]
    ]
    assert "note: the baseline is of another place" in text
    assert lines[-1] == (
        "FAIL: 4 limits (1 PASS, 1 FAIL, 1 INCONCLUSIVE, 1 SKIPPED); 8 processes, 12 s, 100 rows, 1 thread, "
        "onnxruntime, 95 % intervals"
    )
    assert closing_line(inconclusive_check()).startswith("INCONCLUSIVE: 1 limit (1 INCONCLUSIVE); 1 process,")


def test_remarks_say_what_would_tell() -> None:
    assert remarks(passing_check()) == []
    (too_few,) = remarks(inconclusive_check())
    assert too_few.startswith("latency.mean.max_ratio: these are too few processes")
    needs_rows = remarks(failing_check())[-1]
    assert needs_rows.startswith("exit_rates.tolerance: ")
    assert "rows" in needs_rows
    assert remarks(replace(passing_check(), baseline_written="b.json")) == [
        "the baseline was written to b.json"
    ]


@pytest.mark.parametrize(
    ("now", "before", "remedy"),
    [
        (40, 6, "mostly since the baseline is unsure: write it anew, with --update-baseline"),
        (6, 40, "measure longer (--max-seconds), or where less else runs, or give"),
    ],
)
@pytest.mark.parametrize(
    ("family", "name", "kind"),
    [
        ("latency", "mean", "max_increase"), ("latency", "mean", "max_slowdown"),
        ("throughput", "32", "max_decrease"), ("load", "time", "max_increase"),
    ],
)  # fmt: skip
def test_where_the_baseline_is_unsure_a_better_one_would_tell(
    now: int, before: int, remedy: str, family: Any, name: str, kind: Any
) -> None:
    ends = (0.1, 0.05, 0.15)
    about_change = outcome_of(family, name, kind, "10 %", ends, "INCONCLUSIVE")
    ratio = outcome_of("latency", "mean", "max_ratio", "0.6", (0.6, 0.5, 0.7), "INCONCLUSIVE")
    report = replace(
        passing_check(),
        outcomes=(about_change, ratio),
        measurement=measurement(noise=0.05, processes=now, seed=1),
        baseline=measurement(noise=0.05, processes=before, seed=2),
    )
    told = {key: text for key, _, text in (note.partition(": ") for note in remarks(report))}
    keys = [key for key, text in told.items() if remedy in text]
    assert any(about_change.limit.key in key for key in keys)
    assert any("measure longer" in text for key, text in told.items() if ratio.limit.key in key)


def test_json_holds_everything() -> None:
    read = json.loads(json.dumps(report_to_json(failing_check()), allow_nan=False))
    assert (read["verdict"], read["exit_code"], read["looks"], read["seconds"]) == ("FAIL", 1, 2, 12.34)
    assert read["limits"][0] == {
        "key": "latency.mean.max_increase",
        "limit": "10 %",
        "value": 1.0,
        "verdict": "FAIL",
        "found": {"value": 0.213, "lower": 0.182, "upper": 0.245},
        "now": 0.707,
        "before": 0.583,
        "note": "",
    }
    assert read["limits"][3]["found"] is None
    causes = read["causes"]
    assert causes["named"] == ["kernels"]
    assert causes["exit_mix"] == {"value": 1.011, "lower": 1.011, "upper": 1.011}
    assert causes["exits"][1]["name"] == "middle"
    assert causes["blocks"][1] == {
        "name": "second",
        "now_us": 408.0,
        "time": {"value": 1.36, "lower": 1.31, "upper": 1.41},
    }
    assert read["figures"]["environment"]["cpu"] == "a processor"
    assert read["baseline"]["environment"]["cpu"] == "another processor"
    assert len(read["notes"]) == 1
    assert report_to_json(passing_check())["causes"] is None
    assert report_to_json(passing_check())["baseline"] is None


def test_json_sums_processes_up() -> None:
    figures = report_to_json(passing_check())["figures"]
    assert figures["exit_rates"] == {"early": 0.6, "middle": 0.25, "backbone": 0.15}
    assert (figures["rows"], figures["processes"], figures["disagreement"]) == (100, 8, 0.02)
    assert (figures["accuracy"], figures["plain_accuracy"]) == (0.96, 0.97)
    mean_ms = 0.6 * 0.2 + 0.25 * 0.5 + 0.15 * 1.1
    assert figures["program"]["mean_ms"] == pytest.approx(mean_ms)
    assert figures["program"]["p99_ms"] == pytest.approx(2.5 * mean_ms)
    assert figures["program"]["rows_per_second"] == {"32": pytest.approx(1e3 / mean_ms)}
    assert figures["plain"]["mean_ms"] == pytest.approx(1.0)
    # Of the processes alone that loaded it first.
    assert [figures[side]["load_ms"] for side in ("program", "plain")] == pytest.approx([100.0, 80.0])
    assert [figures[side]["peak_bytes"] for side in ("program", "plain")] == pytest.approx([1.2e8, 1e8])
    assert figures["exits_ms"]["middle"] == pytest.approx(0.5)
    assert figures["blocks_ms"]["third"] == pytest.approx(0.6)


def test_json_is_finite_and_null_where_nothing_was_measured() -> None:
    read = json.loads(json.dumps(report_to_json(inconclusive_check()), allow_nan=False))
    assert read["limits"][0]["found"] == {"value": 0.583, "lower": 0.0, "upper": None}
    assert read["figures"]["plain"]["load_ms"] is None  # the only process loaded the program first
    untimed = replace(passing_check(), measurement=measurement(processes=0))
    figures = json.loads(json.dumps(report_to_json(untimed), allow_nan=False))["figures"]
    assert figures["program"]["mean_ms"] is None
    assert figures["program"]["rows_per_second"] == figures["exits_ms"] == figures["blocks_ms"] == {}


def test_accuracy_is_null_without_labels() -> None:
    found = measurement()
    unlabelled = replace(found.answered, right=None, plain_right=None, lost=None, gained=None)
    report = replace(passing_check(), measurement=replace(found, answered=unlabelled))
    assert report_to_json(report)["figures"]["accuracy"] is None


def test_exit_names_are_shown_as_they_are() -> None:
    outcome = outcome_of("exit_rates", "layer1.0", "min", "40 %", (0.5,) * 3)
    assert outcome.limit.metric == Metric("exit_rates", "layer1.0")
    line = report_lines(replace(passing_check(), outcomes=(outcome,)))[0]
    assert line == 'PASS          exit_rates."layer1.0".min = 40 %: found 50.0 %'
