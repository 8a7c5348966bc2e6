"""Where on the frontier who is faster: the least time at a given accuracy, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from cifar10_setup import SEED, Array

__all__ = ["ACCURACIES", "RowsOf", "domination", "oracle_distance", "resampled_least_us"]

ACCURACIES: Final = tuple(round(0.917 + 0.001 * step, 3) for step in range(18))
"""From ResNet-20's to where only the largest networks are."""

RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95
ROUNDING: Final = 1e-9
LEAST_US: Final = 1e-6
"""Differences of times below this are rounding."""

RowsOf: TypeAlias = "tuple[Sequence[Array], Sequence[Array]]"
"""Per point of a family ``[n]`` drops row by row, and ``[n]`` times in microseconds."""


def resampled_least_us(
    families: Mapping[str, RowsOf],
    drops: Sequence[float],
    plain_us: float,
    resamples: int = RESAMPLES,
    *,
    mixed: bool = False,
) -> dict[str, Array]:
    """The least time of each family's points within given drops, in each resample of the rows.

    The same resamples for all, so that differences are paired. Where no point keeps a drop, the
    reference network is what is left.

    Args:
        families: All on the same rows.
        drops: Allowed drops.
        plain_us: The reference network's time.
        resamples: How many.
        mixed: Two points may share the rows between them, at random: what lies on the line from one to
            the other can be had as well.

    Returns:
        Name -> ``float64[1 + resamples, drops]``; the first line is of the rows as they are.
    """
    rows = len(next(iter(families.values()))[0][0])
    generator = np.random.default_rng(SEED)
    drawn = [np.bincount(generator.integers(rows, size=rows), minlength=rows) for _ in range(resamples)]
    weights = np.stack([np.ones(rows), *drawn]) / rows
    found = {}
    for name, (drop_rows, time_rows) in families.items():
        mean_drops = weights @ np.stack(drop_rows, axis=1).astype(np.float64)  # [1 + resamples, points]
        times_us = weights @ np.stack(time_rows, axis=1).astype(np.float64)
        least = [np.where(mean_drops <= drop + ROUNDING, times_us, plain_us).min(axis=1) for drop in drops]
        if mixed:
            shared = [_least_of_two(mean_drops, times_us, drop) for drop in drops]
            least = [np.minimum(*pair) for pair in zip(least, shared, strict=True)]
        found[name] = np.minimum(np.stack(least, axis=1), plain_us)
    return found


def _least_of_two(drops: Array, times_us: Array, drop: float) -> Array:
    """The least time of two points that share the rows and keep the drop: ``[n, points]`` -> ``[n]``."""
    within = drops[:, :, None] <= drop
    apart = drops[:, None, :] - drops[:, :, None]
    share = np.where(within & (apart > drop - drops[:, :, None]), drop - drops[:, :, None], 0.0)
    share = share / np.where(apart > 0.0, apart, 1.0)  # of the rows that the second one answers
    time_us = (1.0 - share) * times_us[:, :, None] + share * times_us[:, None, :]
    least: Array = np.where(within, time_us, np.inf).min(axis=(1, 2))
    return least


def domination(
    ours: str,
    families: Mapping[str, RowsOf],
    reference_accuracy: float,
    plain_us: float,
    *,
    mixed: bool = False,
) -> dict[str, Any]:
    """Where others are faster at the same accuracy or a higher one.

    Args:
        ours: The name of the family that shall not be dominated.
        families: All of them, on the same rows.
        reference_accuracy: Of the reference network, on these rows.
        plain_us: Its time.
        mixed: As for ``resampled_least_us``.

    Returns:
        ``accuracies``; ``ours_us``, the least time at each; ``families``: of every other one the least
        times, by how much it is faster at each (``gains_us``, with intervals), at how many accuracies it
        is faster (``faster``), at how many with an interval wholly on that side (``surely_faster``), and
        the accuracy, gain and interval where it is ahead most.
    """
    drops = [reference_accuracy - accuracy for accuracy in ACCURACIES]
    least = resampled_least_us(families, drops, plain_us, mixed=mixed)
    others: dict[str, Any] = {}
    for name, times_us in least.items():
        if name == ours:
            continue
        gain = least[ours] - times_us  # [1 + resamples, accuracies]: above 0 where the other one is faster
        lower, upper = _bounds(gain[1:])
        worst = int(gain[0].argmax())
        others[name] = {
            "least_us": times_us[0],
            "gains_us": {"value": gain[0], "lower": lower, "upper": upper},
            "faster": int((gain[0] > LEAST_US).sum()),
            "as_fast": int((np.abs(gain[0]) <= LEAST_US).sum()),
            "surely_faster": int((lower > LEAST_US).sum()),
            "at": ACCURACIES[worst],
            "gain_us": {"value": gain[0, worst], "lower": lower[worst], "upper": upper[worst]},
        }
    return {"accuracies": ACCURACIES, "ours_us": least[ours][0], "families": others}


def oracle_distance(families: Mapping[str, RowsOf], drop: float, plain_us: float) -> dict[str, Any]:
    """How far the learned policy and myopic thresholds are from the soft oracle, at an allowed drop.

    Args:
        families: With "learned", "myopic" and "soft oracle" among them.
        drop: The drop.
        plain_us: The reference network's time.

    Returns:
        ``learned_us`` and ``myopic_us``, with intervals; ``ratio``, unless thresholds reach the oracle.
    """
    names = ("learned", "myopic", "soft oracle")
    least = resampled_least_us({name: families[name] for name in names}, [drop], plain_us)
    learned, myopic, oracle = (least[name][:, 0] for name in names)
    figures = {"learned_us": learned - oracle, "myopic_us": myopic - oracle}
    if (myopic - oracle).min() > LEAST_US:  # else nothing is left to be halved
        figures["ratio"] = (learned - oracle) / (myopic - oracle)
    return {"drop": drop, "oracle_us": oracle[0], **{name: _figure(v) for name, v in figures.items()}}


def _figure(values: Array) -> dict[str, float]:
    lower, upper = _bounds(values[1:, None])
    return {"value": float(values[0]), "lower": float(lower[0]), "upper": float(upper[0])}


def _bounds(resampled: Array) -> tuple[Array, Array]:
    tail = (1.0 - CONFIDENCE) / 2.0
    lower, upper = np.quantile(resampled, [tail, 1.0 - tail], axis=0)
    return lower, upper
