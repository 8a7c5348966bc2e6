"""What the learned cascade is compared with on cached scores: picked on some rows, judged on others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

from cifar10_frontiers import WIDEST, area_us, at_limit, in_processes, learned_points, point_figures, rows_of
from cifar10_setup import SEED

from exitcompiler.baselines import Baseline, ThresholdPolicy, best_on, random_routing
from exitcompiler.cascade_baselines import RATES, Part, myopic, network_alone, oracle, parts
from exitcompiler.costs import CostModel
from exitcompiler.errors import InputError
from exitcompiler.evaluation import Evaluation, evaluate
from exitcompiler.frontier import Frontier, sweep, trade_offs
from exitcompiler.gates import Recipe
from exitcompiler.naming import OWN
from exitcompiler.policies import Policy
from exitcompiler.scores import ScoreTable
from exitcompiler.statistics import area_difference_interval
from exitcompiler.topology import Topology

__all__ = ["LIMITS", "Families", "all_families", "compare_areas", "part_title"]

LIMITS: Final = tuple(round(0.0015 * step, 4) for step in range(-5, 21))
"""Drops that a user may allow: every family picks one point for each, on the learning rows. Some are
below 0, since a cascade may be more accurate than its reference."""

MYOPIC_STEPS: Final = 28

Families: TypeAlias = Mapping[str, Sequence[Evaluation]]
"""Name -> a point for each limit, or fewer, judged on the final rows."""


@dataclass(frozen=True)
class _OnPart:
    """A rule of some networks, by their own answers, judged on the scores of the whole cascade."""

    part: Part
    rule: Baseline

    def evaluate(self, table: ScoreTable, costs: CostModel) -> Evaluation:
        """How it does on a table."""
        own = self.part.table(table, own=True)
        return self.rule.evaluate(own, costs.restrict(table.topology, self.part.topology))


def all_families(
    frontier: Frontier, learn: ScoreTable, judge: ScoreTable, costs: CostModel, steps: int
) -> dict[str, dict[str, list[Evaluation]]]:
    """All families, chosen on the learning rows at the same limits and judged on the final rows.

    Args:
        frontier: Of the whole cascade, learned on ``learn``.
        learn: Scores on the learning rows.
        judge: Scores on the final rows.
        costs: Measured times.
        steps: Trade-offs of each sub-topology's sweep.

    Returns:
        "policies": learned, myopic, uniform and the soft oracle, by name; "topologies": every
        sub-topology; "networks": each network alone.
    """
    topology = learn.topology
    return {
        "policies": {
            "learned": learned_points(frontier, LIMITS, judge, costs),
            "myopic": _picked(_thresholds(learn, costs), learn, judge, costs),
            "uniform": _picked(_chance(learn), learn, judge, costs),
            "soft oracle": _oracle(learn, judge, costs),
        },
        "topologies": _sub_topologies(learn, judge, costs, frontier.recipe, steps),
        "networks": {name: [network_alone(judge, costs, name)] for name in _ends(topology)},
    }


def _ends(topology: Topology) -> list[str]:
    return [network[-1] for network in topology.networks]


def _picked(
    rules: Sequence[Baseline], learn: ScoreTable, judge: ScoreTable, costs: CostModel
) -> list[Evaluation]:
    curve = best_on(rules, learn, costs)
    return [at_limit(curve, limit, judge, costs) for limit in LIMITS]


def _thresholds(learn: ScoreTable, costs: CostModel) -> list[Baseline]:
    trade_offs_us = trade_offs(learn.topology, costs, MYOPIC_STEPS)
    return [_OnPart(part, ThresholdPolicy(policy)) for part, policy in myopic(learn, costs, trade_offs_us)]


def _chance(learn: ScoreTable) -> list[Baseline]:
    return [
        _OnPart(part, rule)
        for part in parts(learn.topology, chains=True, inner=False)
        for rule in random_routing([tuple((name, OWN) for name in part.names)], RATES, SEED)
    ]


def _oracle(learn: ScoreTable, judge: ScoreTable, costs: CostModel) -> list[Evaluation]:
    """The soft oracle that starts with the network that serves it best at each limit on the learning rows."""
    chains = list(zip(oracle(learn, costs), oracle(judge, costs), strict=True))
    found = []
    for limit in LIMITS:
        within = [pair for pair in chains if pair[0].accuracy_drop <= limit]
        if within:  # it is never more accurate than the reference
            found.append(min(within, key=lambda pair: pair[0].mean_us)[1])
    return found


def _sub_topologies(
    learn: ScoreTable, judge: ScoreTable, costs: CostModel, recipe: Recipe, steps: int
) -> dict[str, list[Evaluation]]:
    """Every sub-topology, learned the same way as the whole."""
    networks = len(learn.topology.networks)
    jumping = [p for p in parts(learn.topology, chains=False, inner=True) if len(p.names) < networks]
    straight = [p for p in parts(learn.topology, chains=True, inner=True) if len(p.names) > 2]
    found = [*jumping, *straight]
    tasks = [(part, learn, judge, costs, recipe, steps) for part in found]
    points = in_processes(_learn_part, tasks, os.cpu_count() or 1)
    return {part_title(part): evaluations for part, evaluations in zip(found, points, strict=True)}


def part_title(part: Part) -> str:
    """The networks of a sub-topology, in order, and whether some may be jumped over."""
    chain = len(part.topology.edges) < len(part.names)
    return " > ".join(part.names) + ("" if chain else ", with jumps")


def _learn_part(task: tuple[Part, ScoreTable, ScoreTable, CostModel, Recipe, int]) -> list[Evaluation]:
    part, learn, judge, costs, recipe, steps = task
    times = costs.restrict(learn.topology, part.topology)
    frontier = sweep(part.table(learn), times, recipes=(recipe,), steps=steps, seed=SEED)
    few, found = part.table(judge), []
    for limit in LIMITS:
        try:
            point = frontier.fit(max_accuracy_drop=limit)
        except InputError:  # nothing of this part keeps the limit
            point = None
        if point is None or point.policy.is_plain:
            found.append(evaluate(Policy.plain(judge.topology), judge, costs))
        else:
            found.append(evaluate(point.policy, few, times))
    return found


def compare_areas(families: Families, others: Families, costs: CostModel) -> dict[str, Any]:
    """Every family's points and area, and how much less the learned policy's area is.

    The area under a frontier is the mean, over allowed drops from 0 to 3 points, of the least time of
    the family's points whose drop on the final rows is within them; the interval is a paired
    bootstrap over final rows.

    Args:
        families: With "learned" among them.
        others: More of them.
        costs: Measured times.
    """
    ours = rows_of(families["learned"])
    figures: dict[str, Any] = {}
    for name, points in {**families, **others}.items():
        difference = area_difference_interval(
            ours, rows_of(points), 0.0, WIDEST, plain_us=costs.whole_us, seed=SEED
        )
        figures[name] = {
            **point_figures(points, costs),
            "area_us": area_us(points, costs),
            "learned_minus_this_us": asdict(difference),
        }
    return figures
