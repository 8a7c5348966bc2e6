"""Draws rows so that every exit is timed, and weights them so that exits count as in all rows."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "ROWS_PER_EXIT",
    "draw_batch",
    "draw_rows",
    "row_weights",
    "stratified_subset",
    "weighted_quantile",
]

Indices: TypeAlias = npt.NDArray[np.intp]
Floats: TypeAlias = npt.NDArray[np.float64]

ROWS_PER_EXIT: Final = 8
"""So many rows of every exit are timed in every process, where there are as many."""


def row_weights(exit_index: npt.NDArray[Any], shares: Floats) -> Floats:
    """How much each row counts, so that exits count by their share (post-stratification).

    Args:
        exit_index: Exit of each row, ``int[n]``.
        shares: Of every exit, ``float64[exits]``; exits without a row here have to have none.

    Returns:
        ``float64[n]``, which sums to one.
    """
    counts = np.bincount(exit_index, minlength=len(shares))
    each: Floats = shares / np.maximum(counts, 1)
    return np.take(each, exit_index)


def draw_rows(exit_index: npt.NDArray[Any], weights: Floats, most: int, rng: np.random.Generator) -> Indices:
    """Rows to be timed one by one: first some of every exit in turn, then others as they come.

    Args:
        exit_index: Exit of each row there is, ``int[n]``.
        weights: How likely each is to be drawn in the second part, ``float64[n]``.
        most: How many, unless ``ROWS_PER_EXIT`` of every exit are more.
        rng: Draws.

    Returns:
        Indices into ``exit_index``. The first part is in rounds of one row of each exit, so that every
        beginning of it is balanced; no row is there twice.
    """
    ranked: list[tuple[int, float, int]] = []
    for index in np.unique(exit_index):
        rows = rng.permutation(np.flatnonzero(exit_index == index))[:ROWS_PER_EXIT]
        ranked += [(turn, float(rng.random()), int(row)) for turn, row in enumerate(rows)]
    first = np.array([row for _, _, row in sorted(ranked)], np.intp)
    left = np.setdiff1d(np.arange(len(exit_index)), first)
    count = min(most - len(first), len(left))
    if count <= 0:
        return first
    chances = weights[left] / weights[left].sum()
    return np.concatenate([first, rng.choice(left, size=count, replace=False, p=chances)])


def draw_batch(weights: Floats, size: int, rng: np.random.Generator) -> Indices:
    """Rows of one batch, as they come; some are there several times only where there are fewer rows.

    Args:
        weights: How likely each row is to be drawn, ``float64[n]``, which sums to one.
        size: Of the batch.
        rng: Draws.
    """
    return rng.choice(len(weights), size=size, replace=size > len(weights), p=weights)


def stratified_subset(exit_index: npt.NDArray[Any], most: int, rng: np.random.Generator) -> Indices:
    """Random rows with exits in about the shares that they have in all, rising.

    Args:
        exit_index: Exit of each row, ``int[n]``.
        most: How many, but for rounding and for ``ROWS_PER_EXIT`` rows of every exit.
        rng: Draws.
    """
    kept = []
    for index in np.unique(exit_index):
        rows = rng.permutation(np.flatnonzero(exit_index == index))
        kept.append(rows[: max(ROWS_PER_EXIT, round(most * len(rows) / len(exit_index)))])
    return np.sort(np.concatenate(kept))


def weighted_quantile(values: Floats, weights: Floats, share: float) -> float:
    """The smallest value such that it and those below it have at least ``share`` of the weight.

    That is the inverse of the weighted distribution function (definition 1 of Hyndman and Fan 1996, The
    American Statistician 50:361-365, with weights).

    Args:
        values: ``float64[n]``, at least one.
        weights: ``float64[n]``, not negative, not all zero.
        share: In (0, 1].
    """
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    # Sums of weights are off by rounding, which must not push a quantile to the next value.
    place = int(np.searchsorted(below, share * below[-1] * (1 - 1e-12)))
    return float(values[order][min(place, len(values) - 1)])
