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

__all__ = ["contrast_interval", "level_of_look", "rate_difference_interval", "rate_interval"]

RESAMPLES: Final = 4000

_Array: TypeAlias = NDArray[np.float64]


def level_of_look(confidence: float, look: int) -> float:
    """The confidence of the intervals at one of several looks at growing data.

    Who looks again and again, and stops when he likes what he sees, is wrong more often than each look is.
    The ``k``-th look therefore gets ``2**-k`` of the error that is allowed: however many there are, all of
    them together are wrong at most that often (Bonferroni; the shares sum to less than 1).

    Args:
        confidence: Of all looks together, in (0, 1).
        look: Which one, from 1.
    """
    return 1.0 - (1.0 - confidence) * 2.0**-look


def contrast_interval(
    plus: Sequence[ArrayLike],
    minus: Sequence[ArrayLike] = (),
    *,
    confidence: float,
    resamples: int = RESAMPLES,
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
        resamples: How many.
        seed: Of the resampling.

    Returns:
        The contrast; infinite ends where a group has a single sample, or too few for this confidence.

    Raises:
        InputError: There is no group, a group is empty, or a number is not finite.
    """
    signed = [(1.0, _samples(group)) for group in plus] + [(-1.0, _samples(group)) for group in minus]
    if not signed or not 0.0 < confidence < 1.0:
        raise InputError(f"{len(signed)} groups, confidence {confidence}", where="contrast interval")
    value = math.fsum(sign * float(group.mean()) for sign, group in signed)
    if any(len(group) < 2 for _, group in signed):
        return Interval(value, -math.inf, math.inf)
    error = math.sqrt(math.fsum(group.var(ddof=1) / len(group) for _, group in signed))
    if error == 0.0:
        return Interval(value, value, value)
    generator = np.random.default_rng(seed)
    values, variances = np.zeros(resamples), np.zeros(resamples)
    for sign, group in signed:
        drawn = group[generator.integers(len(group), size=(resamples, len(group)))]
        values += sign * drawn.mean(axis=1)
        variances += drawn.var(axis=1, ddof=1) / len(group)
    deviations = values - value
    # A resample of one and the same sample says that anything is possible: its t is infinite.
    flat = variances <= 1e-24 * error**2
    studentised = np.where(flat, np.copysign(np.inf, deviations), deviations)
    np.divide(deviations, np.sqrt(variances), out=studentised, where=~flat)
    tail = (1.0 - confidence) / 2.0
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


def rate_difference_interval(now: Interval, before: Interval) -> Interval:
    """The interval of a difference of two independent rates.

    Newcombe 1998, Stat. Med. 17:873-890, method 10.

    Args:
        now: Wilson's interval of the one rate.
        before: Of the other, at the same confidence.
    """
    difference = now.value - before.value
    lower = math.hypot(now.value - now.lower, before.upper - before.value)
    upper = math.hypot(now.upper - now.value, before.value - before.lower)
    return Interval(difference, difference - lower, difference + upper)


def _samples(group: ArrayLike) -> _Array:
    samples = np.asarray(group, np.float64)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise InputError(f"{samples.shape} samples, all to be finite", where="contrast interval")
    return samples
