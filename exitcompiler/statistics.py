"""Bounds, intervals and areas: how sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exitcompiler.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from exitcompiler.scores import BoolArray

__all__ = [
    "Interval",
    "ReliabilityBin",
    "area_difference_interval",
    "clopper_pearson_upper",
    "expected_calibration_error",
    "mean_difference_interval",
    "mean_time_over_drops",
    "ratio_interval",
    "reliability_bins",
    "rows_for_bound",
]

Float64Array: TypeAlias = NDArray[np.float64]

RESAMPLES: Final = 2000
MOST_ROWS: Final = 100_000_000
"""Beyond this many rows a bound counts as out of reach."""


def clopper_pearson_upper(errors: int, rows: int, confidence: float = 0.95) -> float:
    """The one-sided exact upper confidence bound of a rate.

    The largest rate under which seeing ``errors`` or fewer is still as likely as ``1 - confidence``;
    a quantile of the beta distribution (Clopper and Pearson 1934, Biometrika 26:404-413).

    Args:
        errors: How many of the rows erred.
        rows: How many rows, drawn independently.
        confidence: In (0, 1).

    Raises:
        InputError: The numbers make no sense.
    """
    from scipy.stats import beta  # nothing else here needs scipy: benchmarks on a bare GPU machine go without

    _require_confidence(confidence)
    if not 0 <= errors <= rows or rows < 1:
        raise InputError(f"{errors} errors of {rows} rows", where="confidence bound")
    return 1.0 if errors == rows else float(beta.ppf(confidence, errors + 1, rows - errors))


def rows_for_bound(rate: float, bound: float, confidence: float = 0.95) -> int:
    """How many rows it takes for the Clopper-Pearson bound to fall to ``bound`` at an observed rate.

    Args:
        rate: The error rate to expect, in [0, 1).
        bound: What the upper bound has to reach, above ``rate``.
        confidence: In (0, 1).

    Returns:
        The fewest rows (to within the ripples of rounding up to whole errors).

    Raises:
        InputError: No number of rows is enough.
    """
    _require_confidence(confidence)
    if not 0.0 <= rate < bound <= 1.0:
        raise InputError(
            f"an observed rate of {rate:.4f} never has an upper bound of {bound:.4f}",
            where="confidence bound",
            remedy="ask for a bound above the rate, or choose a more careful operating point",
        )

    def reached(rows: int) -> bool:
        return clopper_pearson_upper(min(rows, int(np.ceil(rate * rows))), rows, confidence) <= bound

    high = 1
    while not reached(high):
        high *= 2
        if high > MOST_ROWS:
            raise InputError(f"a bound of {bound:.6f} at a rate of {rate:.6f} needs over {MOST_ROWS} rows")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Interval:
    """A figure and its two-sided bootstrap interval.

    Args:
        value: On all rows.
        lower: The lower percentile.
        upper: The upper percentile.
    """

    value: float
    lower: float
    upper: float


def mean_difference_interval(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The paired percentile bootstrap interval of ``mean(a) - mean(b)`` (Efron 1979, Ann. Stat. 7:1-26).

    Args:
        a: ``[n]``; for an accuracy drop: where the backbone is right.
        b: ``[n]``, on the same rows: where the program is right.
        confidence: In (0, 1).
        resamples: How many.
        seed: Of the resampling.

    Raises:
        InputError: The numbers make no sense.
    """
    first, second = _paired(a, b)
    difference = first - second
    means = _resampled_means(difference[:, None], resamples, seed)
    return _interval(float(difference.mean()), means[:, 0], confidence)


def ratio_interval(
    a: ArrayLike,
    b: ArrayLike,
    confidence: float = 0.95,
    statistic: Literal["mean", "median"] = "mean",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The paired percentile bootstrap interval of ``mean(a) / mean(b)``, or of their medians.

    Args:
        a: ``[n]``; for a speed-up: the plain engine's times.
        b: ``[n]``, paired with ``a`` (measured in turns): the program's times.
        confidence: In (0, 1).
        statistic: "mean" or "median".
        resamples: How many.
        seed: Of the resampling.

    Raises:
        InputError: The numbers make no sense, or a time is not positive.
    """
    first, second = _paired(a, b)
    if min(first.min(), second.min()) <= 0:
        raise InputError("a ratio needs positive numbers", where="bootstrap")
    if statistic == "mean":
        means = _resampled_means(np.column_stack([first, second]), resamples, seed)
        return _interval(float(first.mean() / second.mean()), means[:, 0] / means[:, 1], confidence)
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for index in range(resamples):
        rows = generator.integers(len(first), size=len(first))
        ratios[index] = np.median(first[rows]) / np.median(second[rows])
    return _interval(float(np.median(first) / np.median(second)), ratios, confidence)


def mean_time_over_drops(
    drops: ArrayLike, times_us: ArrayLike, lower: float, upper: float, *, plain_us: float
) -> float:
    """The area under a frontier: the mean, over drops a user may allow, of the least time within them.

    The frontier is a step function: at an allowed drop one takes the fastest point that drops no
    more, and the plain backbone where there is none.

    Args:
        drops: ``[points]``: accuracy drops.
        times_us: ``[points]``.
        lower: The smallest drop allowed.
        upper: The largest, above ``lower``.
        plain_us: The backbone's time, at drop 0.

    Returns:
        Microseconds; less is better.

    Raises:
        InputError: The range is empty or the lengths differ.
    """
    drop, time_us = _paired(drops, times_us)
    if not lower < upper:
        raise InputError(f"no drops from {lower} to {upper}", where="area under the frontier")
    order = np.argsort(drop, kind="stable")
    # The plain backbone bounds the time everywhere, below a drop of 0 too: there nothing else is left.
    least_us = np.minimum(np.minimum.accumulate(time_us[order]), plain_us)
    edges = np.clip(drop[order], lower, upper)
    widths = np.diff(np.concatenate([[lower], edges, [upper]]))
    return float(widths @ np.concatenate([[plain_us], least_us]) / (upper - lower))


def area_difference_interval(
    ours: tuple[Sequence[ArrayLike], Sequence[ArrayLike]],
    theirs: tuple[Sequence[ArrayLike], Sequence[ArrayLike]],
    lower: float,
    upper: float,
    *,
    plain_us: float,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The paired bootstrap interval of the difference between two frontiers' areas.

    Args:
        ours: Per point, ``[n]`` drops row by row (backbone right minus program right), and ``[n]``
            times in microseconds.
        theirs: The same for the other frontier, on the same rows.
        lower: The smallest drop allowed.
        upper: The largest.
        plain_us: The backbone's time.
        confidence: In (0, 1).
        resamples: How many.
        seed: Of the resampling.

    Returns:
        Ours minus theirs, in microseconds: below zero where ours is better.

    Raises:
        InputError: The numbers make no sense.
    """
    stacks = [np.asarray(np.stack([np.asarray(v, np.float64) for v in rows])) for rows in (*ours, *theirs)]
    if len({stack.shape[1] for stack in stacks}) != 1:
        raise InputError("the frontiers were not judged on the same rows", where="area under the frontier")

    def difference(means: Sequence[Float64Array]) -> float:
        first = mean_time_over_drops(means[0], means[1], lower, upper, plain_us=plain_us)
        return first - mean_time_over_drops(means[2], means[3], lower, upper, plain_us=plain_us)

    value = difference([stack.mean(axis=1) for stack in stacks])
    ends = np.cumsum([len(stack) for stack in stacks])[:-1]
    means = _resampled_means(np.concatenate(stacks).T, resamples, seed)
    spread = np.array([difference(np.split(row, ends)) for row in means])
    return _interval(value, spread, confidence)


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of like confidence.

    Args:
        confidence: Their mean confidence.
        accuracy: The share of them that is right.
        count: How many.
    """

    confidence: float
    accuracy: float
    count: int


def reliability_bins(confidence: ArrayLike, correct: BoolArray, bins: int = 15) -> tuple[ReliabilityBin, ...]:
    """Bins of equal mass by rising confidence (Nguyen and O'Connor 2015).

    Args:
        confidence: ``[n]`` in 0..1.
        correct: ``bool[n]``.
        bins: How many; fewer where there are fewer rows.

    Raises:
        CalibrationError: There are no rows, or the lengths differ.
        InputError: There is no bin.
    """
    values = np.asarray(confidence, np.float64)
    if bins < 1:
        raise InputError(f"{bins} bins", where="reliability")
    if values.ndim != 1 or values.shape != correct.shape or not len(values):
        raise CalibrationError(f"{values.shape} confidences for {correct.shape} rows", where="reliability")
    parts = np.array_split(np.argsort(values, kind="stable"), min(bins, len(values)))
    return tuple(
        ReliabilityBin(float(values[rows].mean()), float(correct[rows].mean()), len(rows)) for rows in parts
    )


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """The mean gap between confidence and accuracy, weighted by rows (Naeini et al. 2015)."""
    count = sum(part.count for part in bins)
    return sum(part.count * abs(part.confidence - part.accuracy) for part in bins) / count


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Float64Array, Float64Array]:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise InputError(f"shapes {first.shape} and {second.shape} do not pair", where="statistics")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("numbers must be finite", where="statistics")
    return first, second


def _resampled_means(values: Float64Array, resamples: int, seed: int) -> Float64Array:
    """The mean of each column in each resample of the rows: ``[rows, columns]`` -> ``[resamples, columns]``.

    One resample at a time, so that memory does not grow with their number.
    """
    if resamples < 1:
        raise InputError(f"{resamples} resamples", where="bootstrap")
    generator = np.random.default_rng(seed)
    rows = len(values)
    means = np.empty((resamples, values.shape[1]))
    for index in range(resamples):
        drawn = np.bincount(generator.integers(rows, size=rows), minlength=rows)
        means[index] = drawn.astype(np.float64) @ values / rows
    return means


def _interval(value: float, resampled: Float64Array, confidence: float) -> Interval:
    _require_confidence(confidence)
    tail = (1.0 - confidence) / 2.0
    lower, upper = np.quantile(resampled, [tail, 1.0 - tail])
    return Interval(value, float(lower), float(upper))


def _require_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise InputError(f"a confidence of {confidence}, not between 0 and 1", where="statistics")
