"""What a cascade makes of its networks on final rows, and how far that holds on other splits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar10_frontiers import halves, in_processes, spread
from cifar10_setup import Job

from exitcompiler.cascade_findings import network_shares
from exitcompiler.compiler import Details
from exitcompiler.costs import CostModel
from exitcompiler.evaluation import evaluate
from exitcompiler.frontier import sweep
from exitcompiler.gates import Recipe
from exitcompiler.packaging import point_name
from exitcompiler.scores import ScoreTable
from exitcompiler.selection import Built, fit_within

__all__ = ["resplit_cascade", "resplit_program", "shares"]


def shares(details: Details, judge: ScoreTable) -> list[dict[str, Any]]:
    """Rows run, rows answered and time per network: at the fastest point, the chosen, the most accurate.

    Args:
        details: Of a cascade.
        judge: Scores on the final rows.
    """
    assert details.costs is not None
    assert details.selection is not None
    costs, chosen = details.costs, details.selection.chosen
    built: Sequence[Built] = sorted((chosen, *details.selection.shipped), key=lambda b: b.mean_us)
    found = []
    for place in sorted({0, list(built).index(chosen), len(built) - 1}):
        point = built[place].point
        found.append(
            {
                "point": point_name(point.accuracy_drop),
                "chosen": built[place] is chosen,
                "accuracy_drop": evaluate(point.policy, judge, costs).accuracy_drop,
                "networks": network_shares(point.policy, judge, costs),
            }
        )
    return found


def resplit_cascade(job: Job, details: Details, table: ScoreTable, count: int) -> dict[str, Any]:
    """Learn on a random half of the test rows, judge on the other half; many times, for two limits.

    Times are the measured costs of networks and heads; gates are learned once, without the rounds of
    building and relearning.

    Args:
        job: How many re-splits, how fine a sweep, and the limit; the other one is 0.
        details: Of the cascade; only its measured times count, and the recipe that it came out with.
        table: Scores on all test rows.
        count: How many re-splits.
    """
    assert details.costs is not None
    assert details.selection is not None
    recipes, steps = (details.selection.frontier.recipe,), job.effort.part_steps
    limits = {"asked": job.effort.cascade_drop, "not_lower": 0.0}
    return resplit_program(table, details.costs, count, limits, recipes, steps)


def resplit_program(
    table: ScoreTable,
    costs: CostModel,
    count: int,
    limits: Mapping[str, float],
    recipes: Sequence[Recipe],
    steps: int,
) -> dict[str, Any]:
    """Learn on a random half of the test rows, judge on the other half; many times, for several limits.

    Args:
        table: Scores on all test rows.
        costs: Measured times.
        count: How many re-splits.
        limits: Name -> the accuracy drop to keep, "asked" among them.
        recipes: How gates may be learned.
        steps: Trade-offs of each sweep.
    """
    tasks = [_Task(table, costs, seed, limits, recipes, steps) for seed in range(count)]
    results = in_processes(_resplit, tasks, os.cpu_count() or 1)
    return {
        "resplits": len(results),
        "limit": limits["asked"],
        "steps": steps,
        "recipes": [str(recipe) for recipe in recipes],
        "rows": table.rows // 2,
        "limits": spread(results),
    }


@dataclass(frozen=True)
class _Task:
    table: ScoreTable
    costs: CostModel
    seed: int
    limits: Mapping[str, float]
    recipes: Sequence[Recipe]
    steps: int


def _resplit(task: _Task) -> dict[str, dict[str, float]]:
    costs = task.costs
    learn, judge = halves(task.table, task.seed)
    frontier = sweep(learn, costs, recipes=task.recipes, steps=task.steps, seed=task.seed)
    found = {}
    for name, limit in task.limits.items():
        point = fit_within(frontier, limit)  # as the compiler does
        result = evaluate(point.policy, judge, costs)
        found[name] = {"drop": result.accuracy_drop, "speedup": costs.whole_us / result.mean_us}
        if point.policy.is_plain:  # refused: what is left is the network as it was given
            found[name] = {"drop": 0.0, "speedup": 1.0}
    return found
