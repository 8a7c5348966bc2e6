"""What learned gates have to beat: thresholds, patience, chance; and the oracle nobody beats.

All of them work on the same scores, costs and rows as the learned gates. Where a baseline has a
choice (threshold, exits), it is made on the learning rows, over every subset of exits: whoever uses
thresholds chooses placements as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.costs import CostModel
from exitcompiler.errors import InputError
from exitcompiler.evaluation import Evaluation, evaluate, evaluate_routes, undominated
from exitcompiler.gate_features import losses, max_probability
from exitcompiler.gate_search import Choices, Problem, to_policy
from exitcompiler.gates import require_costs
from exitcompiler.policies import Decision, GoOn, Policy, leave_above
from exitcompiler.scores import HeadKey, IntArray, ScoreTable
from exitcompiler.site_search import search

__all__ = [
    "Baseline",
    "ExitSet",
    "PatiencePolicy",
    "RandomPolicy",
    "ThresholdPolicy",
    "best_on",
    "exit_sets",
    "patience",
    "per_exit_thresholds",
    "random_routing",
    "shared_threshold",
    "soft_oracle",
]

ExitSet: TypeAlias = tuple[HeadKey, ...]
"""The exits that are built, each with its head, in the order of the program."""

Measure: TypeAlias = Literal["max_probability", "entropy"]

THRESHOLDS: Final = 48
MOST_EXITS: Final = 10
"""More exits than this have too many subsets to try them all."""


class Baseline(Protocol):
    """Anything that can be judged on a table as a policy can."""

    def evaluate(self, table: ScoreTable, costs: CostModel) -> Evaluation:
        """How it does on a table."""


@dataclass(frozen=True)
class ThresholdPolicy:
    """Thresholds, as a policy of linear rules that look at one feature each.

    Args:
        policy: The rules.
    """

    policy: Policy

    def evaluate(self, table: ScoreTable, costs: CostModel) -> Evaluation:
        """How it does on a table."""
        return evaluate(self.policy, table, costs)


@dataclass(frozen=True)
class PatiencePolicy:
    """Leave where enough exits in a row agree (PABEE: Zhou et al. 2020).

    Args:
        exits: What is built.
        patience: How many exits in a row, after the first, have to repeat the same class.
    """

    exits: ExitSet
    patience: int

    def evaluate(self, table: ScoreTable, costs: CostModel) -> Evaluation:
        """How it does on a table."""
        left = np.full(table.rows, len(table.exits), np.int64)
        streak = np.zeros(table.rows, np.int64)
        previous: IntArray | None = None
        for key in self.exits:
            prediction = table.heads[key].prediction
            if previous is not None:
                streak = np.where(prediction == previous, streak + 1, 0)
            left[(left == len(table.exits)) & (streak >= self.patience)] = table.exits.index(key[0])
            previous = prediction
        return evaluate_routes(left, self.exits, table, costs)


@dataclass(frozen=True)
class RandomPolicy:
    """Leave by chance: the same share of rows at every exit, whatever the input.

    Args:
        exits: What is built.
        rate: The share of the rows arriving at an exit that leave there.
        seed: Of the draws.
    """

    exits: ExitSet
    rate: float
    seed: int = 0

    def evaluate(self, table: ScoreTable, costs: CostModel) -> Evaluation:
        """How it does on a table."""
        generator = np.random.default_rng(self.seed)
        left = np.full(table.rows, _end(table, self.exits), np.int64)
        stays = np.ones(table.rows, np.bool_)
        for name, _ in self.exits:
            goes = generator.random(table.rows) < self.rate
            left[stays & goes] = table.exits.index(name)
            stays &= ~goes
        return evaluate_routes(left, self.exits, table, costs)


def _end(table: ScoreTable, exits: ExitSet) -> int:
    """The place where rows are answered that leave nowhere before."""
    return len(table.exits) if table.topology.tail else table.exits.index(exits[-1][0])


def _rule(name: str, head: str | None, threshold: float, feature: int, sign: float) -> Decision:
    """Leave where ``sign * feature >= threshold``."""
    if head is None:
        return GoOn()
    weight = tuple(sign if index == feature else 0.0 for index in range(3))
    return leave_above(head, ((name, head),), weight, -threshold)


def exit_sets(table: ScoreTable, heads: Mapping[str, str] | None = None) -> tuple[ExitSet, ...]:
    """Every subset of the exits, the empty one left out.

    Args:
        table: Its exits.
        heads: Exit -> the kind of head it has; None: the last kind listed (the deepest head).

    Raises:
        InputError: There are too many exits to try all subsets, or a head does not exist.
    """
    if len(table.exits) > MOST_EXITS:
        raise InputError(f"{len(table.exits)} exits have too many subsets; at most {MOST_EXITS}")
    kinds = {name: table.kinds(name)[-1] for name in table.exits} if heads is None else dict(heads)
    keys = [(name, kinds[name]) for name in table.exits if name in kinds]
    missing = [key for key in keys if key not in table.heads]
    if missing:
        raise InputError(f"no scores for the heads {missing}", where="baselines")
    sizes = range(1, len(keys) + 1)
    return tuple(subset for size in sizes for subset in itertools.combinations(keys, size))


def shared_threshold(
    table: ScoreTable, sets: Sequence[ExitSet], measure: Measure, steps: int = THRESHOLDS
) -> Iterator[ThresholdPolicy]:
    """One threshold for all exits: on the max probability, or on the entropy (BranchyNet).

    Teerapittayanon et al. 2016 leave where the entropy is low.

    Args:
        table: Its confidences say which thresholds to try: the quantiles over all exits.
        sets: The sets of exits to try.
        measure: What is compared with the threshold.
        steps: How many thresholds.
    """
    feature, sign = (0, 1.0) if measure == "max_probability" else (2, -1.0)
    for exits in sets:
        values = sign * np.concatenate([table.heads[key].confidence[:, feature] for key in exits])
        heads = dict(exits)
        for threshold in np.unique(np.quantile(values.astype(np.float64), np.linspace(0.0, 1.0, steps))):
            rules = [_rule(n, heads.get(n), float(threshold), feature, sign) for n in table.exits]
            yield ThresholdPolicy(Policy(table.topology, tuple(rules)))


def per_exit_thresholds(
    table: ScoreTable, costs: CostModel, trade_offs_us: NDArray[np.float64]
) -> Iterator[ThresholdPolicy]:
    """A max-probability threshold of its own for every exit, and the exits chosen with them.

    Minimises mean time plus trade-off times the realised accuracy drop, as one does who tunes
    thresholds on calibration rows.

    Args:
        table: The rows to choose on.
        costs: Measured times.
        trade_offs_us: ``float64[steps]``: one policy for each.

    Raises:
        InputError: The costs do not cover the exits and heads.
    """
    require_costs(table, costs)
    drop = losses(table, "net")
    directions = {key: (max_probability(table, key),) for key in table.heads}
    start: tuple[Choices, ...] = ()
    for trade_off_us in trade_offs_us:
        penalty_us = {key: float(trade_off_us) * value for key, value in drop.items()}
        problem = Problem(table, costs, penalty_us, directions)
        _, choices = search(problem, start, (True,) * len(table.exits))
        start = (choices,)
        yield ThresholdPolicy(to_policy(table.topology, choices))


def patience(sets: Sequence[ExitSet]) -> Iterator[PatiencePolicy]:
    """Every patience that a set of exits can show."""
    for exits in sets:
        for count in range(1, len(exits)):
            yield PatiencePolicy(exits, count)


def random_routing(sets: Sequence[ExitSet], rates: Sequence[float], seed: int = 0) -> Iterator[RandomPolicy]:
    """Chance at every rate; read between the rates for one that matches a budget."""
    for exits in sets:
        for rate in rates:
            yield RandomPolicy(exits, rate, seed)


def soft_oracle(table: ScoreTable, costs: CostModel, exits: ExitSet) -> Evaluation:
    """Knows the labels, and still may not do everything (Bolukbasi et al. 2017, experiments).

    It follows the program and pays for every head on the way; and it leaves at an exit only where
    all later exits and the backbone are right as well, so that it cannot mend the backbone's mistakes.

    Args:
        table: The rows.
        costs: Measured times.
        exits: What is built.
    """
    left = np.full(table.rows, _end(table, exits), np.int64)
    right = table.backbone_correct.copy() if table.topology.tail else np.ones(table.rows, np.bool_)
    for key in reversed(exits):
        right &= table.correct(key)
        left[right] = table.exits.index(key[0])
    return evaluate_routes(left, exits, table, costs)


def best_on(
    candidates: Iterator[Baseline] | Sequence[Baseline], table: ScoreTable, costs: CostModel
) -> tuple[tuple[Baseline, Evaluation], ...]:
    """The candidates that no other one beats on the given rows, by rising accuracy drop.

    Choose on the learning rows, then judge with ``evaluate`` on fresh ones.
    """
    judged = [(candidate, candidate.evaluate(table, costs)) for candidate in candidates]
    return undominated(judged, lambda pair: pair[1])
