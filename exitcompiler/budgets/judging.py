"""Judges limits: is the interval of what was measured on one side of the limit?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.budgets.environment import differences
from exitcompiler.budgets.figures import Answered, Measurement
from exitcompiler.budgets.intervals import contrast_interval, rate_difference_interval, rate_interval
from exitcompiler.budgets.limits import Budget, Family, Limit
from exitcompiler.budgets.outcomes import Outcome, Verdict
from exitcompiler.statistics import Interval, mean_difference_interval

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


def judge(
    budget: Budget, measurement: Measurement, baseline: Measurement | None, confidence: float, seed: int = 0
) -> tuple[Outcome, ...]:
    """Judge every limit of a budget.

    Args:
        budget: The limits.
        measurement: What was measured.
        baseline: What it was before; None: there is none, and limits on changes are skipped.
        confidence: Of each interval, two-sided, in (0, 1).
        seed: Of the bootstrap.

    Returns:
        An outcome for each limit, in their order.
    """
    outcomes = []
    for limit in budget.limits:
        family = limit.metric.family
        if limit.needs_baseline and baseline is None:
            found = _Found(None, note="there is no baseline yet")
        else:
            judged = _JUDGED.get(family, _time_or_size)
            found = judged(limit, budget, measurement, baseline, _Contrast(confidence, seed))
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


@dataclass(frozen=True, slots=True)
class _Contrast:
    """How intervals are made here."""

    confidence: float
    seed: int

    def __call__(self, plus: list[_Array], minus: list[_Array]) -> Interval:
        """Of a ratio: the exponential of a contrast of logarithms; an empty group says nothing."""
        if any(not len(group) for group in (*plus, *minus)):
            return Interval(math.nan, -math.inf, math.inf)
        interval = contrast_interval(plus, minus, confidence=self.confidence, seed=self.seed)
        return Interval(*(_exp(end) for end in (interval.value, interval.lower, interval.upper)))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf


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


def _time_or_size(
    limit: Limit, budget: Budget, measurement: Measurement, baseline: Measurement | None, contrast: _Contrast
) -> _Found:
    """Latency, throughput, load time, memory."""
    del budget
    metric = limit.metric
    series = series_of(measurement, metric.family, metric.name)
    if series is None or not len(measurement.processes):
        return _Found(None, note="it was not measured")
    if limit.kind in ("max", "min"):
        found = contrast([series.program], [])
        return _Found(found, now=_finite(found.value))
    plus, minus = series.ratio
    old_minus: list[_Array]
    if limit.kind in ("max_ratio", "min_ratio"):
        found = contrast(plus, minus)
        return _Found(found, now=_finite(found.value))
    assert baseline is not None
    old = series_of(baseline, metric.family, metric.name)
    if old is None or not len(baseline.processes):
        return _Found(None, note="the baseline lacks it: write a new one (--update-baseline)")
    if limit.kind == "max_slowdown":
        reasons = differences(measurement.environment, baseline.environment)
        if reasons:
            return _Found(None, note=f"times are not compared: {'; '.join(reasons)}")
        plus, old_plus = [series.program], [old.program]
        minus, old_minus = [], []
    else:
        old_plus, old_minus = old.ratio
    factor = contrast(plus + old_minus, minus + old_plus)
    now, before = contrast(plus, minus).value, contrast(old_plus, old_minus).value
    return _Found(_change(limit, factor), now=_finite(now), before=_finite(before))


def _change(limit: Limit, factor: Interval) -> Interval:
    """A factor as an increase, or as a decrease."""
    if limit.kind == "max_decrease":
        return Interval(1.0 - factor.value, 1.0 - factor.upper, 1.0 - factor.lower)
    return Interval(factor.value - 1.0, factor.lower - 1.0, factor.upper - 1.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _artifact(
    limit: Limit, budget: Budget, measurement: Measurement, baseline: Measurement | None, contrast: _Contrast
) -> _Found:
    del budget, contrast
    size = float(measurement.size_bytes)
    if limit.kind == "max":
        return _Found(_exactly(size), now=size)
    assert baseline is not None
    return _Found(_exactly(size / baseline.size_bytes - 1.0), size, float(baseline.size_bytes))


def _accuracy(
    limit: Limit, budget: Budget, measurement: Measurement, baseline: Measurement | None, contrast: _Contrast
) -> _Found:
    """The drop, or the disagreement: exact on these rows, an interval for fresh ones."""
    answered = measurement.answered
    shown = partial(_drop if limit.metric.name == "drop" else _disagreement, contrast=contrast)
    if limit.needs_baseline:
        assert baseline is not None
        now, before = shown(answered), shown(baseline.answered)
        if now is None or before is None:
            return _Found(None, note="there are no labels" if now is None else "the baseline has no labels")
        if answered.fingerprint != baseline.answered.fingerprint:
            return _Found(None, note="the baseline was measured on other rows: write a new one")
        return _Found(_exactly(now.value - before.value), now.value, before.value)
    now = shown(answered)
    if now is None:
        return _Found(None, note="there are no labels")
    note = f"for fresh rows it is {_points(now.lower)} to {_points(now.upper)} points"
    return _Found(now, now.value) if budget.fresh_rows else _Found(_exactly(now.value), now.value, note=note)


def _drop(answered: Answered, contrast: _Contrast) -> Interval | None:
    if answered.lost is None or answered.gained is None:
        return None
    rows = np.zeros(answered.rows)
    rows[: answered.lost] = 1.0
    rows[answered.rows - answered.gained :] = -1.0
    zeros = np.zeros(answered.rows)
    return mean_difference_interval(rows, zeros, confidence=contrast.confidence, seed=contrast.seed)


def _disagreement(answered: Answered, contrast: _Contrast) -> Interval:
    return rate_interval(answered.disagreements, answered.rows, contrast.confidence)


def _points(share: float) -> str:
    return f"{100.0 * share:.2f}"


def _exit_rates(
    limit: Limit, budget: Budget, measurement: Measurement, baseline: Measurement | None, contrast: _Contrast
) -> _Found:
    answered, name = measurement.answered, limit.metric.name
    if limit.kind != "tolerance":
        rate = answered.exits[name] / answered.rows
        return _Found(_exactly(rate), now=rate)
    assert baseline is not None
    old = baseline.answered
    own = {other.metric.name for other in budget.limits if other.kind == "tolerance" and other.metric.name}
    names = [name] if name else [exit for exit in {**answered.exits, **old.exits} if exit not in own]
    if not names:
        return _Found(None, note="every exit has a tolerance of its own")
    judged = {exit_name: _rate_change(answered, old, exit_name, contrast) for exit_name in names}
    worst = max(names, key=lambda exit_name: judged[exit_name].value)
    if any(found.lower > limit.value for found in judged.values()):
        worst = max(names, key=lambda exit_name: judged[exit_name].lower)
    elif any(found.upper > limit.value for found in judged.values()):
        worst = max(names, key=lambda exit_name: judged[exit_name].upper)
    now, before = (part.exits.get(worst, 0) / part.rows for part in (answered, old))
    note = f"furthest: {worst}" if not name and judged[worst].upper else ""
    return _Found(judged[worst], now, before, note)


def _rate_change(now: Answered, before: Answered, name: str, contrast: _Contrast) -> Interval:
    """How far an exit rate has moved, to either side; exact on the same rows."""
    counts = now.exits.get(name, 0), before.exits.get(name, 0)
    if now.fingerprint == before.fingerprint:
        return _exactly(abs(counts[0] - counts[1]) / now.rows)
    moved = rate_difference_interval(
        rate_interval(counts[0], now.rows, contrast.confidence),
        rate_interval(counts[1], before.rows, contrast.confidence),
    )
    ends = abs(moved.lower), abs(moved.upper)
    return Interval(abs(moved.value), 0.0 if moved.lower < 0.0 < moved.upper else min(ends), max(ends))


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)


_JUDGED: Final[Mapping[str, Callable[..., Any]]] = {
    "artifact": _artifact,
    "accuracy": _accuracy,
    "exit_rates": _exit_rates,
}
