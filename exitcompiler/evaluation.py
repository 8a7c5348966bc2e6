"""How good a policy is, on cached scores and measured times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from exitcompiler.costs import CostModel, Step
from exitcompiler.policies import Policy
from exitcompiler.scores import BoolArray, HeadKey, IntArray, ScoreTable
from exitcompiler.topology import Topology

__all__ = [
    "Evaluation",
    "Judged",
    "evaluate",
    "evaluate_plain",
    "evaluate_routes",
    "summarise",
    "undominated",
]


@dataclass(frozen=True)
class Evaluation:
    """How a policy does on a table.

    Args:
        accuracy: Of the program.
        backbone_accuracy: Of the backbone on the same rows; in a cascade of the reference network.
        excess_error: Share of rows where the program is wrong and the backbone is right.
        mean_us: Mean time per row.
        exit_rates: Place -> share of rows that leave there.
        exit_accuracy: Place -> accuracy on the rows that leave there; None where none does.
        exit_index: Where each row leaves, ``int64[n]``.
        correct: ``bool[n]``.
        backbone_correct: ``bool[n]``.
        time_us: ``float64[n]``.
        passed: Which places each row passes, ``bool[n, places]``.
    """

    accuracy: float
    backbone_accuracy: float
    excess_error: float
    mean_us: float
    exit_rates: Mapping[str, float]
    exit_accuracy: Mapping[str, float | None]
    exit_index: IntArray
    correct: BoolArray
    backbone_correct: BoolArray
    time_us: NDArray[np.float64]
    passed: BoolArray

    @property
    def accuracy_drop(self) -> float:
        """Net: the backbone's accuracy minus the program's; negative where the program is better."""
        return self.backbone_accuracy - self.accuracy

    @property
    def pass_rates(self) -> dict[str, float]:
        """Place -> share of rows that pass it."""
        return {
            name: float(rate) for name, rate in zip(self.exit_rates, self.passed.mean(axis=0), strict=True)
        }


def evaluate(policy: Policy, table: ScoreTable, costs: CostModel) -> Evaluation:
    """Judge a policy on cached scores.

    Raises:
        InputError: The policy, the table and the costs are not about the same sites.
    """
    passed, answered = policy.walk(table)
    correct = table.backbone_correct.copy()
    for site, decision in policy.kept.items():
        here = answered == table.exits.index(site)
        if here.any():
            correct[here] = table.correct((site, decision.head))[here]
    times = costs.times_us(policy.topology, policy.steps)
    return summarise(policy.topology, answered, correct, table.reference_correct, passed @ times, passed)


def evaluate_plain(table: ScoreTable, costs: CostModel) -> Evaluation:
    """The backbone alone, as it was given: tuned or not, it is what comes back where no exit pays.

    In the precision that runs: where it is quantised it may well differ from what drops are counted from.
    """
    alone = evaluate(Policy.plain(table.topology), table, costs)
    right, reference = table.plain_correct, table.reference_correct
    return summarise(table.topology, alone.exit_index, right, reference, alone.time_us, alone.passed)


def evaluate_routes(
    answered: IntArray, heads: Sequence[HeadKey], table: ScoreTable, costs: CostModel
) -> Evaluation:
    """Judge given places to leave, on one way through some sites.

    Args:
        answered: Where each row is answered, ``int64[n]``: a place; the backbone's, or a site of ``heads``.
        heads: The sites on the way, in order, each with the head that answers there; every row pays for
            all heads and gates until it is answered.
        table: The scores.
        costs: Measured times.
    """
    topology = table.topology
    places = [topology.sites.index(site) for site, _ in heads]
    way = places + ([len(topology.sites)] if topology.tail else [])
    steps = [_passing(topology, place) for place in range(len(topology.places))]
    for place, key in zip(places, heads, strict=True):
        steps[place] = Step(steps[place].targets, (key,), gated=place != way[-1])
    times = costs.times_us(topology, steps)
    correct = table.backbone_correct.copy()
    for place, key in zip(places, heads, strict=True):
        here = answered == place
        correct[here] = table.correct(key)[here]
    passed = np.zeros((table.rows, len(steps)), np.bool_)
    for place in _places_on(topology, way):
        passed[:, place] = answered >= place
    return summarise(topology, answered, correct, table.reference_correct, passed @ times, passed)


def _passing(topology: Topology, place: int) -> Step:
    """Going on within the same network, where it goes on."""
    return Step(tuple(way for way in topology.ways[place] if topology.follows[way] == place))


def _places_on(topology: Topology, way: Sequence[int]) -> list[int]:
    """The places on a way, with those of the same networks that are passed without stopping."""
    found: list[int] = []
    for stop in way:
        before: int | None = stop
        stretch = []
        while before is not None and before not in found:
            stretch.append(before)
            before = topology.follows[before]
        found += reversed(stretch)
    return found


def summarise(
    topology: Topology,
    exit_index: IntArray,
    correct: BoolArray,
    backbone_correct: BoolArray,
    time_us: NDArray[np.float64],
    passed: BoolArray,
) -> Evaluation:
    """The evaluation that per-row results add up to.

    Args:
        topology: The places.
        exit_index: ``int64[n]``, into its places.
        correct: ``bool[n]``.
        backbone_correct: ``bool[n]``.
        time_us: ``float64[n]``.
        passed: ``bool[n, places]``.
    """
    places = topology.places
    counts = np.bincount(exit_index, minlength=len(places))
    right = np.bincount(exit_index, weights=correct, minlength=len(places))
    return Evaluation(
        accuracy=float(correct.mean()),
        backbone_accuracy=float(backbone_correct.mean()),
        excess_error=float((backbone_correct & ~correct).mean()),
        mean_us=float(time_us.mean()),
        exit_rates={n: float(c / len(correct)) for n, c in zip(places, counts, strict=True)},
        exit_accuracy={n: float(r / c) if c else None for n, c, r in zip(places, counts, right, strict=True)},
        exit_index=exit_index,
        correct=correct,
        backbone_correct=backbone_correct,
        time_us=time_us,
        passed=passed,
    )


class Judged(Protocol):
    """Whatever has an accuracy drop and a mean time."""

    @property
    def accuracy_drop(self) -> float:
        """Net."""

    @property
    def mean_us(self) -> float:
        """Per row."""


_Entry = TypeVar("_Entry")


def undominated(entries: Iterable[_Entry], judged: Callable[[_Entry], Judged]) -> tuple[_Entry, ...]:
    """The entries that no other one beats, by rising accuracy drop and falling mean time.

    Of equal ones the first counts.

    Args:
        entries: Anything.
        judged: What is to be compared of each.
    """
    kept: list[_Entry] = []
    least_us = math.inf
    for entry in sorted(entries, key=lambda e: (judged(e).accuracy_drop, judged(e).mean_us)):
        if judged(entry).mean_us < least_us:
            kept.append(entry)
            least_us = judged(entry).mean_us
    return tuple(kept)
