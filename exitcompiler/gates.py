"""Learning where and when to leave, on cached scores and measured costs.

The papers' surrogate proposes, the true objective decides. Bolukbasi et al. 2017 (section 3) reduce
a gate whose future is frozen to weighted binary classification, deepest gate first. Their regression
gives directions to score rows by; thresholds, constants and the set of exits are then searched
exactly (``gate_search``), in sweeps over the rows that really arrive at each exit, so that a plain
threshold on the max probability is always within reach and no gate that does not pay survives.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from exitcompiler.costs import CostModel
from exitcompiler.errors import CalibrationError, InputError
from exitcompiler.evaluation import evaluate
from exitcompiler.gate_features import (
    Float64Array,
    Loss,
    cost_plane,
    loss_direction,
    losses,
    max_probability,
    smoothed_losses,
    weighted_direction,
)
from exitcompiler.gate_search import Action, Choices, Direction, Plane, Problem, to_policy
from exitcompiler.policies import Policy
from exitcompiler.scores import HeadKey, ScoreTable
from exitcompiler.site_search import frugal, known_heads, known_sites, search

__all__ = [
    "FEWEST_ROWS",
    "RECIPES",
    "Learner",
    "Recipe",
    "learn_policy",
    "prepare",
    "require_costs",
    "require_learnable",
]

_logger = logging.getLogger(__name__)

FEWEST_ROWS: Final = 100
"""Fewer rows than this cannot tell one threshold from another."""

ROUNDS: Final = 2
"""How often directions are relearned on the rows that arrive; a third round has not helped."""


@dataclass(frozen=True)
class Recipe:
    """A way of learning gates.

    Args:
        loss: "excess" (one-sided) or "net" (signed).
        smoothed: Learn on expected instead of realised losses (``smoothed_losses``).
        linear: Learn directions; without, gates are thresholds on the max probability.
        earlier: Let learned directions read the earlier kept exits' confidences too.
    """

    loss: Loss = "excess"
    smoothed: bool = True
    linear: bool = True
    earlier: bool = True

    def __str__(self) -> str:
        gates = "linear" if self.linear else "threshold"
        parts = (self.loss, "smoothed" if self.smoothed else "realised", gates)
        return " ".join(parts + (("with earlier exits",) if self.linear and self.earlier else ()))


RECIPES: Final = (Recipe("excess"), Recipe("net"), Recipe("excess", linear=False))
"""What is tried by default; rows that were not learned on decide."""


@dataclass(frozen=True, eq=False)
class Learner:
    """All that does not depend on the trade-off, computed once per set of rows.

    Args:
        table: The rows to learn on.
        costs: Measured times.
        recipe: How to learn.
        loss: (exit, head) -> ``float64[n]``: the loss of leaving there.
        directions: (exit, head) -> directions that need no policy to be learned.
        allowed: Per exit whether it may be built.
    """

    table: ScoreTable
    costs: CostModel
    recipe: Recipe
    loss: dict[HeadKey, Float64Array]
    directions: dict[HeadKey, tuple[Direction, ...]]
    allowed: tuple[bool, ...]

    def problem(self, trade_off_us: float) -> Problem:
        """The search problem at one trade-off."""
        penalty_us = {key: trade_off_us * value for key, value in self.loss.items()}
        return Problem(self.table, self.costs, penalty_us, self.directions)

    def learn(self, trade_off_us: float, starts: Sequence[Choices] = ()) -> Choices:
        """The best choices found at one trade-off.

        Args:
            trade_off_us: Microseconds that one unit of loss is worth.
            starts: Choices to start from as well, such as a neighbouring trade-off's.
        """
        problem = self.problem(trade_off_us)
        known = [start for start in starts if self._fits(start)]
        best_us, choices = search(problem, known, self.allowed)
        for _ in range(ROUNDS if self.recipe.linear else 0):
            relearned = self._relearn(problem, choices)
            value_us, trial = search(relearned, (choices,), self.allowed, explore=False)
            if value_us >= best_us:
                break
            best_us, choices, problem = value_us, trial, relearned
        return choices if self.table.topology.tail else frugal(problem, choices, self.allowed)

    def _fits(self, choices: Choices) -> bool:
        sites = zip(choices, self.table.topology.ways, self.allowed, strict=False)
        return all(ok or not (choice.reads or (ways and not choice.targets)) for choice, ways, ok in sites)

    def _relearn(self, problem: Problem, choices: Choices) -> Problem:
        """Directions and planes for the rows that arrive at each site under the current choices."""
        later_us = problem.values_us(choices)
        arrivals = problem.arrivals(choices)
        known = known_sites(problem, choices)
        directions = dict(self.directions)
        planes: dict[str, tuple[Plane, ...]] = {}
        for place, site in enumerate(self.table.exits):
            ways = self.table.topology.ways[place]
            passed = {self.table.exits[before] for before in known[place]}
            if not ways:
                continue
            arrives = arrivals[place] if arrivals[place].any() else ~arrivals[place]
            targets = choices[place].targets or ways
            onward = max(targets, key=lambda way: np.sum(arrives & choices[place].takes(way)))
            earlier = self._earlier(problem, choices, place, known[place], passed)
            for kind in self.table.kinds(site):
                key = (site, kind)
                if not passed.issuperset(self.table.needs(key)):
                    continue
                reads = [(key,), *([(key, *earlier)] if earlier else [])]
                gain_us = later_us[onward] - problem.penalty_us[key]
                fresh = [weighted_direction(self.table, read, gain_us, arrives) for read in reads]
                directions[key] += tuple(direction for direction in fresh if direction is not None)
                if len(ways) > 1:
                    actions: tuple[Action, ...] = (kind, *ways)
                    cost = np.stack([problem.action_us(place, a, later_us) for a in actions], axis=1)
                    found = cost_plane(self.table, actions, reads[-1], cost, arrives)
                    planes[site] = (*planes.get(site, ()), found)
        return replace(problem, directions=directions, planes=planes)

    def _earlier(
        self, problem: Problem, choices: Choices, place: int, known: Collection[int], passed: Collection[str]
    ) -> tuple[HeadKey, ...]:
        """What a site may read of those that every row has passed: their scores, and agreement with them."""
        if not self.recipe.earlier:
            return ()
        site = self.table.exits[place]
        agreements = [key for key in self.table.agreements if key[0] == site]
        return (
            *known_heads(problem, choices, known),
            *(key for key in agreements if set(self.table.needs(key)) <= set(passed)),
        )


def prepare(
    table: ScoreTable, costs: CostModel, recipe: Recipe, allowed: Collection[str] | None = None
) -> Learner:
    """Compute what all trade-offs share: losses and the directions that depend on no policy.

    Args:
        table: The rows to learn on.
        costs: Measured times.
        recipe: How to learn.
        allowed: The exits that may be built; None: all of them.

    Raises:
        CalibrationError: Too few rows, or one class only.
        InputError: The costs do not cover the exits and heads.
    """
    require_learnable(table, FEWEST_ROWS)
    require_costs(table, costs)
    smooth = smoothed_losses if recipe.smoothed else losses
    harm = smooth(table, "excess")
    directions: dict[HeadKey, tuple[Direction, ...]] = {}
    for key in table.heads:
        learned = loss_direction(table, key, harm[key]) if recipe.linear else None
        directions[key] = (max_probability(table, key), *(() if learned is None else (learned,)))
    usable = tuple(allowed is None or name in allowed for name in table.exits)
    return Learner(table, costs, recipe, smooth(table, recipe.loss), directions, usable)


def require_learnable(table: ScoreTable, fewest: int) -> None:
    """Check that gates can be learned from a table.

    Raises:
        CalibrationError: Saying how many rows or classes are needed.
    """
    if table.rows < fewest:
        raise CalibrationError(
            f"{table.rows} rows to learn gates from, at least {fewest} are needed",
            where="calibration data",
            remedy="give more calibration rows; a few thousand make the estimates useful",
        )
    if table.labels is not None and np.unique(table.labels).size < 2:
        raise CalibrationError(
            f"all {table.rows} labels are {int(table.labels[0])}",
            where="calibration data",
            remedy="give rows of at least two classes, in the proportions the model will meet",
        )


def require_costs(table: ScoreTable, costs: CostModel) -> None:
    """Check that every segment and head of a table has a time.

    Raises:
        InputError: Naming what is missing.
    """
    places = table.topology.places
    if len(costs.segment_us) != len(places):
        raise InputError(f"{len(costs.segment_us)} segments for {len(places)} places", where="cost model")
    missing = [key for key in (*table.heads, *table.agreements) if key not in costs.head_us]
    if missing:
        raise InputError(f"no times for the heads {missing}", where="cost model")


def learn_policy(
    learn: ScoreTable,
    tune: ScoreTable,
    costs: CostModel,
    trade_off_us: float,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    allowed: Collection[str] | None = None,
) -> Policy:
    """Learn a policy at one trade-off; rows that were not learned on decide between recipes.

    Args:
        learn: The rows to learn on.
        tune: The rows that decide, by mean time plus trade-off times the net accuracy drop.
        costs: Measured times.
        trade_off_us: Microseconds that one unit of accuracy is worth.
        recipes: The ways to try.
        allowed: The exits that may be built; None: all of them.

    Raises:
        CalibrationError: Too few rows, or one class only.
        InputError: The trade-off is negative or not finite, no recipe is given, or the costs do not
            cover the exits and heads.
    """
    if not math.isfinite(trade_off_us) or trade_off_us < 0:
        raise InputError(f"the trade-off is {trade_off_us}, not a finite number of microseconds")
    if not recipes:
        raise InputError("no recipe to learn gates by", where="recipes")
    judged = []
    for recipe in recipes:
        choices = prepare(learn, costs, recipe, allowed).learn(trade_off_us)
        policy = to_policy(learn.topology, choices)
        result = evaluate(policy, tune, costs)
        judged.append((result.mean_us + trade_off_us * result.accuracy_drop, policy))
        _logger.debug("%s: objective %.1f us on %d tuning rows", recipe, judged[-1][0], tune.rows)
    return min(judged, key=lambda pair: pair[0])[1]
