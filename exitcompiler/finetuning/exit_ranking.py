"""Ranks sets of exits by what one shared threshold reaches with them, on scores and measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from exitcompiler.baselines import best_on, exit_sets, shared_threshold
from exitcompiler.costs import CostModel
from exitcompiler.scores import ScoreTable

__all__ = ["JudgedSet", "rank_sets"]

LOOSER: Final = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
"""Accuracy drops to compare at where no set is fast enough within the one asked for."""

FAST_ENOUGH: Final = 2.0
"""What tuned programs are for. Early heads gain most by tuning (ResNet-56: from 70 to 85 % in four passes,
those half-way from 85 to 89 %), so at the drop asked for frozen ones speak for exits that come too late; sets
are compared where as many rows leave as shall leave once they are tuned."""

NEARLY: Final = 0.95
"""Where no set is fast enough at any drop, one that gains as much as this of what the loosest allows has
to do: further on the earliest exit with the cheapest head would win, whatever it knows."""

SAME: Final = 0.99
"""Sets whose speed-ups differ by less than this are as good as each other; the fewest exits win."""


@dataclass(frozen=True, slots=True)
class JudgedSet:
    """A set of exits, at the fastest shared threshold that keeps the accuracy.

    Args:
        exits: Names of the cuts, in order.
        speedup: Mean time of the whole network over that of the program, as measured.
        accuracy_drop: Net, on the judged rows.
    """

    exits: tuple[str, ...]
    speedup: float
    accuracy_drop: float


def rank_sets(table: ScoreTable, costs: CostModel, limit: float, most: int) -> tuple[list[JudgedSet], float]:
    """All sets of exits: the one to choose first, the others from fast to slow.

    The choice is the set with the fewest exits among those that are about as fast as the fastest. Sets are
    compared at the tightest drop, from the limit on, at which one of them is fast enough, or nearly as fast
    as any gets at the loosest: with frozen features the limit itself is rarely enough.

    Args:
        table: Scores of one head per exit.
        costs: Measured times.
        limit: The accuracy drop to keep.
        most: How many exits a set may have.

    Returns:
        The sets, those left out that do not keep the accuracy at any threshold tried; and the drop they
        keep, 1 where none keeps any.
    """
    frontiers = {
        tuple(name for name, _ in exits): [
            (judged.accuracy_drop, costs.whole_us / judged.mean_us)
            for _, judged in best_on(shared_threshold(table, [exits], "max_probability"), table, costs)
        ]
        for exits in exit_sets(table)
        if len(exits) <= most
    }
    at_drops = {drop: _ranked_within(frontiers, drop) for drop in (limit, *LOOSER) if drop >= limit}
    at_drops = {drop: ranked for drop, ranked in at_drops.items() if ranked}
    at_drops = at_drops or {1.0: _ranked_within(frontiers, 1.0)}  # no head knows anything
    enough = min(FAST_ENOUGH, NEARLY * at_drops[max(at_drops)][0].speedup)
    within = min(drop for drop, ranked in at_drops.items() if ranked[0].speedup >= enough)
    ranked = at_drops[within]
    about_as_fast = [judged for judged in ranked if judged.speedup >= SAME * ranked[0].speedup]
    best = min(about_as_fast, key=lambda judged: len(judged.exits))
    return [best, *(judged for judged in ranked if judged is not best)], within


def _ranked_within(
    frontiers: Mapping[tuple[str, ...], Sequence[tuple[float, float]]], within: float
) -> list[JudgedSet]:
    """The sets that keep a drop, each at its fastest, from fast to slow.

    Args:
        frontiers: Per set its (accuracy drop, speed-up) at some thresholds.
        within: The drop.
    """
    ranked = []
    for exits, points in frontiers.items():
        kept = [(speedup, drop) for drop, speedup in points if drop <= within]
        if kept:
            ranked.append(JudgedSet(exits, *max(kept)))
    return sorted(ranked, key=lambda judged: (-judged.speedup, len(judged.exits)))
