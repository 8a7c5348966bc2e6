"""Checks as they may come out, made up: for tests of what is shown and written."""

from __future__ import annotations

import math
from dataclasses import replace

from budget_figures import elsewhere, measurement

from exitcompiler.budgets.limits import Family, Limit, LimitKind, Metric
from exitcompiler.budgets.outcomes import BlockChange, Causes, CheckReport, ExitChange, Outcome, Verdict
from exitcompiler.statistics import Interval

__all__ = ["failing_check", "inconclusive_check", "outcome_of", "passing_check", "sample_causes"]


def passing_check() -> CheckReport:
    """Three limits without a baseline, all kept."""
    return CheckReport(
        artifact="out/demo/digits.exit",
        outcomes=(
            outcome_of("latency", "mean", "max_ratio", "0.7", (0.583, 0.571, 0.596), now=0.583),
            outcome_of("latency", "p99", "max", "2 ms", (1.312, 1.18, 1.44), now=1.312),
            outcome_of("artifact", "size", "max", "4 MB", (2_345_678.0,) * 3, now=2_345_678.0),
        ),
        causes=None,
        measurement=measurement(),
        baseline=None,
        notes=(),
        seconds=12.34,
        looks=1,
        confidence=0.95,
    )


def failing_check() -> CheckReport:
    """Kernels 20 % slower than in the baseline, which is of another machine; one limit of each verdict."""
    other = "cpu 'a processor', was 'another processor'"
    increase = outcome_of("latency", "mean", "max_increase", "10 %", (0.213, 0.182, 0.245), "FAIL")
    drop = outcome_of("accuracy", "drop", "max_increase", "0.5 points", (0.001,) * 3)
    tolerance = outcome_of("exit_rates", "", "tolerance", "3 points", (0.021, 0.004, 0.038), "INCONCLUSIVE")
    slowdown = outcome_of("latency", "p95", "max_slowdown", "30 %", None, "SKIPPED")
    return replace(
        passing_check(),
        outcomes=(
            replace(increase, now=0.707, before=0.583),
            replace(drop, now=0.009, before=0.008),
            replace(tolerance, now=0.6, before=0.621, note="furthest: early"),
            replace(slowdown, note=f"times are not compared: {other}"),
        ),
        causes=sample_causes(),
        measurement=measurement(slower=1.2),
        baseline=elsewhere(measurement()),
        notes=(f"the baseline is of another place, so only ratios are compared with it: {other}",),
        looks=2,
        confidence=0.95,
    )


def inconclusive_check() -> CheckReport:
    """A single limit, about which one process says nothing."""
    outcome = outcome_of(
        "latency", "mean", "max_ratio", "0.7", (0.583, 0.0, math.inf), "INCONCLUSIVE", now=0.583
    )
    return replace(passing_check(), outcomes=(outcome,), measurement=measurement(processes=1))


def sample_causes() -> Causes:
    """Why latency grew in `failing_check`: one of three blocks."""
    return Causes(
        change=Interval(1.213, 1.182, 1.245),
        kernels=Interval(1.2, 1.17, 1.231),
        exit_mix=Interval(1.011, 1.011, 1.011),
        named=("kernels",),
        summary="Mean latency is 1.21x the baseline's. The kernels got slower.",
        exits=(
            ExitChange("early", 0.6, 0.621, Interval(1.01, 0.98, 1.04)),
            ExitChange("middle", 0.25, 0.229, Interval(1.31, 1.28, 1.34)),
            ExitChange("backbone", 0.15, 0.15, Interval(1.18, 1.15, 1.21)),
        ),
        blocks=(
            BlockChange("first", 190.0, Interval(1.02, 0.99, 1.05)),
            BlockChange("second", 408.0, Interval(1.36, 1.31, 1.41)),
            BlockChange("third", 600.0, Interval(1.0, 0.97, 1.03)),
        ),
    )


def outcome_of(
    family: Family,
    name: str,
    kind: LimitKind,
    text: str,
    found: tuple[float, float, float] | None,
    verdict: Verdict = "PASS",
    now: float | None = None,
) -> Outcome:
    """What came of a limit; nothing of what is shown depends on its value."""
    limit = Limit(Metric(family, name), kind, 1.0, text)
    return Outcome(limit, verdict, None if found is None else Interval(*found), now, None, "")
