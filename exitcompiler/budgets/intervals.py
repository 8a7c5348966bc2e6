"""Intervals over processes: studentised bootstrap of contrasts, and rates of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exitcompiler.errors import InputError
from exitcompiler.statistics import Interval

__all__ = [
    "contrast_interval",
    "exp_interval",
    "level_of_look",
    "paired_rate_difference_interval",
    "rate_interval",
]

_RESAMPLES: Final = 4000
_PER_TAIL: Final = 20
"""Resamples that are to lie beyond an end, so that it is not a matter of the seed."""

_MOST_EXPONENT: Final = 700.0

_Array: TypeAlias = NDArray[np.float64]


def level_of_look(confidence: float, look: int) -> float:
    """The confidence of the intervals at one of several looks at growing data.

    Who looks again and again, and stops when he likes what he sees, is wrong more often than each look is.
    The ``k``-th look therefore gets ``1 / (k (k + 1))`` of the error that is allowed: these shares sum to 1,
    so all looks together are wrong at most that often, however many there are (Bonferroni).

    Args:
        confidence: Of all looks together, in (0, 1).
        look: Which one, from 1.
    """
    return 1.0 - (1.0 - confidence) / (look * (look + 1))


def contrast_interval(
    plus: Sequence[ArrayLike],
    minus: Sequence[ArrayLike] = (),
    *,
    confidence: float,
    seed: int = 0,
) -> Interval:
    """The studentised bootstrap interval of a sum of means minus another.

    Efron and Tibshirani 1993, section 12.5. Each group is resampled on its own. With a handful of samples,
    as there are of processes, percentile intervals are too narrow; the studentised ones hold what they say,
    also where a disturbed process makes the samples skew.

    Args:
        plus: Groups of independent samples, ``[n]`` each.
        minus: Likewise.
        confidence: Two-sided, in (0, 1).
        seed: Of the resampling.

    Returns:
        The contrast; infinite ends where a group has a single sample, or all are too small for this
        confidence: where resamples in which every group is one sample over and over, which say that anything
        is possible, are more frequent than the error.

    Raises:
        InputError: There is no group, a group is empty, or a number is not finite.
    """
    signed = [(1.0, _samples(group)) for group in plus] + [(-1.0, _samples(group)) for group in minus]
    if not signed or not 0.0 < confidence < 1.0:
        raise InputError(f"{len(signed)} groups, confidence {confidence}", where="contrast interval")
    value = math.fsum(sign * float(group.mean()) for sign, group in signed)
    tail = (1.0 - confidence) / 2.0
    # n samples are drawn alike n times in n^(1-n) of all cases.
    alike = math.prod(float(len(group)) ** (1 - len(group)) for _, group in signed)
    if alike > tail or any(len(group) < 2 for _, group in signed):
        return Interval(value, -math.inf, math.inf)
    error = math.sqrt(math.fsum(group.var(ddof=1) / len(group) for _, group in signed))
    if error == 0.0:
        return Interval(value, value, value)
    generator = np.random.default_rng(seed)
    resamples = max(_RESAMPLES, math.ceil(_PER_TAIL / tail))
    values, variances = np.zeros(resamples), np.zeros(resamples)
    for sign, group in signed:
        drawn = group[generator.integers(len(group), size=(resamples, len(group)))]
        values += sign * drawn.mean(axis=1)
        variances += drawn.var(axis=1, ddof=1) / len(group)
    deviations = values - value
    flat = variances <= 1e-24 * error**2
    studentised = np.where(flat, np.copysign(np.inf, deviations), deviations)
    np.divide(deviations, np.sqrt(variances), out=studentised, where=~flat)
    low, high = np.quantile(studentised, [tail, 1.0 - tail], method="inverted_cdf").tolist()
    return Interval(value, value - high * error, value - low * error)


def rate_interval(count: int, rows: int, confidence: float) -> Interval:
    """Wilson's score interval of a rate (Wilson 1927, J. Am. Stat. Assoc. 22:209-212).

    Args:
        count: Rows for which something holds.
        rows: All rows, at least one.
        confidence: Two-sided, in (0, 1).
    """
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    rate, share = count / rows, z * z / rows
    middle = (rate + share / 2.0) / (1.0 + share)
    half = z * math.sqrt(rate * (1.0 - rate) / rows + share / (4.0 * rows)) / (1.0 + share)
    return Interval(rate, max(0.0, middle - half), min(1.0, middle + half))


def paired_rate_difference_interval(
    both: int, first: int, second: int, rows: int, confidence: float
) -> Interval:
    """The interval of a difference of two rates on the same rows.

    Newcombe 1998, Stat. Med. 17:2635-2650, method 10: Wilson's intervals of both rates, put together with the
    correlation of the outcomes. Unlike a bootstrap it has a width also where the two never differed.

    Args:
        both: Rows for which both hold.
        first: Rows for which only the first holds.
        second: Rows for which only the second holds.
        rows: All rows, at least one.
        confidence: Two-sided, in (0, 1).

    Returns:
        The first rate minus the second.
    """
    neither = rows - both - first - second
    one, other = (rate_interval(both + only, rows, confidence) for only in (first, second))
    correlation = _correlation(both, first, second, neither, rows)
    difference = (first - second) / rows

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2.0 * correlation * a * b + b * b))

    lower = difference - distance(one.value - one.lower, other.upper - other.value)
    upper = difference + distance(one.upper - one.value, other.value - other.lower)
    return Interval(difference, max(-1.0, lower), min(1.0, upper))


def _correlation(both: int, first: int, second: int, neither: int, rows: int) -> float:
    """Of two outcomes per row, positive ones corrected for continuity, as Newcombe's method 10 wants it."""
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if not margins:
        return 0.0
    product = float(both * neither - first * second)
    if product > 0.0:
        product = max(product - rows / 2.0, 0.0)
    return product / math.sqrt(margins)


def exp_interval(interval: Interval) -> Interval:
    """The interval of a factor, from that of its logarithm."""
    ends = (interval.value, interval.lower, interval.upper)
    return Interval(*(math.exp(end) if end < _MOST_EXPONENT else math.inf for end in ends))


def _samples(group: ArrayLike) -> _Array:
    samples = np.asarray(group, np.float64)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise InputError(f"{samples.shape} samples, all to be finite", where="contrast interval")
    return samples
