"""Judges limits: is the interval of what was measured on one side of the limit?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.budgets.environment import differences
from exitcompiler.budgets.figures import Answered, Measurement
from exitcompiler.budgets.intervals import (
    contrast_interval,
    exp_interval,
    paired_rate_difference_interval,
    rate_interval,
)
from exitcompiler.budgets.limits import Budget, Family, Limit
from exitcompiler.budgets.outcomes import Outcome, Verdict
from exitcompiler.statistics import Interval

__all__ = ["Series", "judge", "series_of"]

_Array: TypeAlias = NDArray[np.float64]

_EXACT: Final = 1e-12
"""Shares of rows are exact up to this."""


@dataclass(frozen=True, slots=True)
class Series:
    """A metric of every process, as logarithms: ratios are then differences.

    Args:
        program: ``[n]``.
        plain: ``[m]``.
        paired: Whether entry ``i`` of both is of the same process.
    """

    program: _Array
    plain: _Array
    paired: bool

    @property
    def ratio(self) -> tuple[list[_Array], list[_Array]]:
        """Program over plain, as groups whose means are added, and subtracted."""
        return ([self.program - self.plain], []) if self.paired else ([self.program], [self.plain])


@dataclass(frozen=True, slots=True)
class _Found:
    """What a limit is compared with, and what is shown beside it; see `Outcome`."""

    found: Interval | None
    now: float | None = None
    before: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Case:
    """A limit, and all there is to judge it by."""

    limit: Limit
    budget: Budget
    measurement: Measurement
    baseline: Measurement | None
    confidence: float
    seed: int

    @property
    def before(self) -> Measurement:
        """The baseline of a limit that is about a change."""
        assert self.baseline is not None
        return self.baseline

    def factor(self, plus: list[_Array], minus: list[_Array]) -> Interval:
        """The exponential of a contrast of logarithms; an empty group says nothing."""
        if any(not len(group) for group in (*plus, *minus)):
            return Interval(math.nan, -math.inf, math.inf)
        found = contrast_interval(plus, minus, confidence=self.confidence, seed=self.seed)
        return exp_interval(found)


def judge(
    budget: Budget, measurement: Measurement, baseline: Measurement | None, confidence: float, seed: int = 0
) -> tuple[Outcome, ...]:
    """Judge every limit of a budget.

    Args:
        budget: The limits.
        measurement: What was measured.
        baseline: What it was before, on the same rows; None: there is none, and limits on changes are
            skipped.
        confidence: Of each interval over processes, two-sided, in (0, 1). Intervals over rows, which are
            looked at once, have the budget's own.
        seed: Of the bootstrap.

    Returns:
        An outcome for each limit, in their order.
    """
    outcomes = []
    for limit in budget.limits:
        if limit.needs_baseline and baseline is None:
            found = _Found(None, note="there is nothing to compare with yet")
        else:
            level = confidence if limit.metric.is_timed else budget.run.confidence
            found = _JUDGED[limit.metric.family](_Case(limit, budget, measurement, baseline, level, seed))
        outcomes.append(
            Outcome(limit, _verdict(limit, found.found), found.found, found.now, found.before, found.note)
        )
    return tuple(outcomes)


def _verdict(limit: Limit, found: Interval | None) -> Verdict:
    if found is None:
        return "SKIPPED"
    room = _EXACT * max(1.0, abs(limit.value))
    inside, outside = found.upper <= limit.value + room, found.lower > limit.value + room
    if not limit.is_upper:
        inside, outside = found.lower >= limit.value - room, found.upper < limit.value - room
    return "PASS" if inside else "FAIL" if outside else "INCONCLUSIVE"


def series_of(measurement: Measurement, family: Family, name: str) -> Series | None:
    """A metric of every process; None if it was not measured.

    Args:
        measurement: With its processes.
        family: ``"latency"`` and ``"load"`` in milliseconds, ``"throughput"`` in rows per second,
            ``"memory"`` in bytes.
        name: Of the metric in the family.
    """
    processes = measurement.processes
    if family in ("load", "memory"):
        field = "load_ms" if family == "load" else "peak_bytes"
        first: Mapping[str, list[float]] = {"program": [], "plain": []}
        for process in processes:
            first[process.first].append(getattr(process, field))
        return Series(_logs(first["program"]), _logs(first["plain"]), paired=False)
    sides = [(process.program, process.plain) for process in processes]
    if family == "throughput":
        rows = int(name)
        if any(rows not in side.rows_per_second for pair in sides for side in pair):
            return None
        both = [[pair[which].rows_per_second[rows] for pair in sides] for which in (0, 1)]
    else:
        both = [[getattr(pair[which], f"{name}_us") / 1e3 for pair in sides] for which in (0, 1)]
    return Series(_logs(both[0]), _logs(both[1]), paired=True)


def _logs(values: list[float]) -> _Array:
    return np.log(np.asarray(values, np.float64))


def _time_or_memory(case: _Case) -> _Found:
    """Latency, throughput, load time, memory: an interval over processes."""
    limit, metric = case.limit, case.limit.metric
    series = series_of(case.measurement, metric.family, metric.name)
    if series is None or not case.measurement.processes:
        return _Found(None, note="it was not measured")
    plus, minus = series.ratio if limit.kind not in ("max", "min") else ([series.program], [])
    if not limit.needs_baseline:
        found = case.factor(plus, minus)
        return _Found(found, now=_finite(found.value))
    old = series_of(case.before, metric.family, metric.name)
    if old is None or not case.before.processes:
        return _Found(None, note="the baseline lacks it")
    old_plus, old_minus = old.ratio
    if limit.kind == "max_slowdown":
        if differences(case.measurement.environment, case.before.environment):
            return _Found(None, note="the baseline's times are of another place, so they are not compared")
        plus, old_plus = [series.program], [old.program]
        minus = old_minus = list[_Array]()
    factor = case.factor(plus + old_minus, minus + old_plus)
    now, before = case.factor(plus, minus).value, case.factor(old_plus, old_minus).value
    return _Found(_change(limit, factor), now=_finite(now), before=_finite(before))


def _change(limit: Limit, factor: Interval) -> Interval:
    """A factor as an increase, or as a decrease."""
    if limit.kind == "max_decrease":
        return Interval(1.0 - factor.value, 1.0 - factor.upper, 1.0 - factor.lower)
    return Interval(factor.value - 1.0, factor.lower - 1.0, factor.upper - 1.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _artifact(case: _Case) -> _Found:
    size = float(case.measurement.size_bytes)
    if not case.limit.needs_baseline:
        return _Found(_exactly(size), now=size)
    before = float(case.before.size_bytes)
    return _Found(_exactly(size / before - 1.0), size, before)


def _accuracy(case: _Case) -> _Found:
    """The drop, or the disagreement: exact on these rows, an interval for fresh ones."""
    shown = _drop if case.limit.metric.name == "drop" else _disagreement
    now = shown(case.measurement.answered, case.confidence)
    if now is None:
        return _Found(None, note="there are no labels")
    if case.limit.needs_baseline:
        before = shown(case.before.answered, case.confidence)
        if before is None:
            return _Found(None, note="the baseline has no labels")
        return _Found(_exactly(now.value - before.value), now.value, before.value)
    if case.budget.fresh_rows:
        return _Found(now, now.value)
    unit = "points" if case.limit.metric.name == "drop" else "%"
    note = f"for fresh rows it is {100 * now.lower:.2f} to {100 * now.upper:.2f} {unit}"
    right, plain_right = case.measurement.answered.right, case.measurement.answered.plain_right
    if right is not None and plain_right is not None:
        shares = (f"{100 * count / case.measurement.answered.rows:.1f} %" for count in (right, plain_right))
        note += "; {} right, {} without exits".format(*shares)
    return _Found(_exactly(now.value), now.value, note=note)


def _drop(answered: Answered, confidence: float) -> Interval | None:
    if answered.right is None or answered.lost is None or answered.gained is None:
        return None
    both = answered.right - answered.gained
    return paired_rate_difference_interval(both, answered.lost, answered.gained, answered.rows, confidence)


def _disagreement(answered: Answered, confidence: float) -> Interval:
    return rate_interval(answered.disagreements, answered.rows, confidence)


def _exit_rates(case: _Case) -> _Found:
    """Exact: a baseline is one of the same rows."""
    answered, limit, name = case.measurement.answered, case.limit, case.limit.metric.name
    if limit.kind != "tolerance":
        rate = answered.exits[name] / answered.rows
        return _Found(_exactly(rate), now=rate)
    old = case.before.answered
    own = {
        other.metric.name for other in case.budget.limits if other.kind == "tolerance" and other.metric.name
    }
    names = [name] if name else [exit for exit in {**answered.exits, **old.exits} if exit not in own]
    if not names:
        return _Found(None, note="every exit has a tolerance of its own")
    moved = {
        exit: abs(answered.exits.get(exit, 0) / answered.rows - old.exits.get(exit, 0) / old.rows)
        for exit in names
    }
    worst = max(names, key=moved.__getitem__)
    now, before = (part.exits.get(worst, 0) / part.rows for part in (answered, old))
    note = f"furthest: {worst}" if not name and moved[worst] else ""
    return _Found(_exactly(moved[worst]), now, before, note)


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)


_JUDGED: Final[Mapping[Family, Callable[[_Case], _Found]]] = {
    "latency": _time_or_memory,
    "throughput": _time_or_memory,
    "load": _time_or_memory,
    "memory": _time_or_memory,
    "artifact": _artifact,
    "accuracy": _accuracy,
    "exit_rates": _exit_rates,
}
