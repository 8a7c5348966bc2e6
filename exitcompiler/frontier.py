"""The frontier of accuracy against latency, judged on rows that no gate was learned on.

Every point is learned several times, each time on all folds but one, and judged on that fold. What
is shipped is learned on all rows; its estimate is the folds'. Thresholds that are searched exactly
look better on their own rows than they are (half a point on a few thousand rows), folds do not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from exitcompiler.costs import CostModel
from exitcompiler.errors import InputError
from exitcompiler.evaluation import Evaluation, evaluate, evaluate_plain, summarise, undominated
from exitcompiler.gate_search import Choices, to_policy
from exitcompiler.gates import FEWEST_ROWS, RECIPES, Learner, Recipe, prepare, require_learnable
from exitcompiler.policies import Policy
from exitcompiler.scores import ScoreTable
from exitcompiler.statistics import mean_time_over_drops
from exitcompiler.topology import Topology

__all__ = ["CrossFit", "Frontier", "FrontierPoint", "learn_all", "sweep", "trade_offs"]

_logger = logging.getLogger(__name__)

Float64Array: TypeAlias = NDArray[np.float64]

STEPS: Final = 20
FOLDS: Final = 5
SPAN: Final = (0.5, 100.0)
"""The trade-offs of a chain of exits, in the backbone's times per unit of accuracy: at the upper end a point
of accuracy is worth the whole backbone, and no exit is left that costs any."""

CASCADE_SPAN: Final = (0.5, 400.0)
"""Those of a cascade, which goes on to gain where several networks answer together."""

WIDEST_DROP: Final = 0.03
"""Recipes are compared over accuracy drops from 0 to this."""


@dataclass(frozen=True, eq=False)
class FrontierPoint:
    """One operating point.

    Args:
        trade_off_us: Microseconds that one unit of accuracy was worth; infinite for the plain backbone.
        policy: Learned on all rows.
        accuracy_drop: Net; expected on fresh rows: the folds' estimate, monotone along the trade-off.
        mean_us: Expected on fresh rows, likewise.
        estimate: The folds' evaluation, out of fold, in the order of the table's rows.
    """

    trade_off_us: float
    policy: Policy
    accuracy_drop: float
    mean_us: float
    estimate: Evaluation


@dataclass(frozen=True, eq=False)
class CrossFit:
    """One recipe, prepared on every set of all folds but one.

    Args:
        recipe: How the gates are learned.
        learners: One per fold, on the rows outside it.
        held_out: The rows of each fold.
        rows: ``int64`` positions of each fold's rows in the whole table.
    """

    recipe: Recipe
    learners: tuple[Learner, ...]
    held_out: tuple[ScoreTable, ...]
    rows: tuple[NDArray[np.intp], ...]

    def judge(
        self, trade_off_us: float, starts: Sequence[Choices] = ()
    ) -> tuple[Evaluation, tuple[Choices, ...]]:
        """Learn without each fold, judge on it.

        Args:
            trade_off_us: Microseconds that one unit of loss is worth.
            starts: Per fold, where to start from as well.

        Returns:
            The evaluation on all rows, and each fold's choices.
        """
        found, results = [], []
        for index, (learner, table) in enumerate(zip(self.learners, self.held_out, strict=True)):
            choices = learner.learn(trade_off_us, starts[index : index + 1])
            found.append(choices)
            results.append(evaluate(to_policy(table.topology, choices), table, learner.costs))
        return _join(results, self.rows, self.held_out[0].topology), tuple(found)


@dataclass(frozen=True, eq=False)
class Frontier:
    """The operating points that no other one beats on both accuracy and latency.

    Args:
        plain: The backbone, or the reference network, alone.
        points: By falling mean time and rising accuracy drop.
        recipe: How the gates were learned.
        learner: Learns policies on all rows.
        cross_fit: Judges them.
        trade_offs_us: ``float64[steps]``, rising.
        drops: ``float64[steps]``: the folds' accuracy drop at each, made not to rise.
        times_us: ``float64[steps]``: the folds' mean time at each, made not to fall.
    """

    plain: FrontierPoint
    points: tuple[FrontierPoint, ...]
    recipe: Recipe
    learner: Learner
    cross_fit: CrossFit
    trade_offs_us: Float64Array
    drops: Float64Array
    times_us: Float64Array

    def select(
        self, *, max_accuracy_drop: float | None = None, latency_budget_us: float | None = None
    ) -> FrontierPoint:
        """The fastest point within an accuracy drop, or the most accurate within a mean latency.

        Raises:
            InputError: Not exactly one limit is given, or no point keeps it; says what is nearest.
        """
        if _by_drop(max_accuracy_drop, latency_budget_us):
            assert max_accuracy_drop is not None
            within = [point for point in self.points if point.accuracy_drop <= max_accuracy_drop]
            if not within:
                nearest = min(point.accuracy_drop for point in self.points)
                raise InputError(
                    f"no point drops at most {max_accuracy_drop:.4f}; the nearest drops {nearest:.4f}",
                    remedy="allow at least a drop of 0: the plain backbone",
                )
            return min(within, key=lambda point: point.mean_us)
        assert latency_budget_us is not None
        within = [point for point in self.points if point.mean_us <= latency_budget_us]
        if not within:
            fastest = min(point.mean_us for point in self.points)
            raise InputError(
                f"no point takes at most {latency_budget_us:.0f} us; the fastest takes {fastest:.0f} us",
                remedy="raise the budget, or give cheaper heads or earlier exits",
            )
        return min(within, key=lambda point: point.accuracy_drop)

    def fit(
        self, *, max_accuracy_drop: float | None = None, latency_budget_us: float | None = None
    ) -> FrontierPoint:
        """Learn a point that sits just within a limit, between the points of the sweep.

        The trade-off is interpolated on the monotone curve of the folds, which is not the fastest of
        many noisy points and so does not promise more than fresh rows keep.

        Raises:
            InputError: Not exactly one limit is given, or nothing keeps it.
        """
        chosen = self.select(max_accuracy_drop=max_accuracy_drop, latency_budget_us=latency_budget_us)
        by_drop = _by_drop(max_accuracy_drop, latency_budget_us)
        limit = max_accuracy_drop if by_drop else latency_budget_us
        assert limit is not None
        # Both read along the trade-off: drops fall, and times rise, as accuracy is worth more.
        values, target = (-self.drops, -limit) if by_drop else (self.times_us, limit)
        inside = int(np.searchsorted(values, target, side="left" if by_drop else "right"))
        low, high = inside - 1, inside
        if not 0 < inside < len(values):
            return chosen
        span = values[high] - values[low]
        share = float((target - values[low]) / span) if span > 0 else float(by_drop)
        log_trade_off = np.log(self.trade_offs_us[[low, high]]) @ [1.0 - share, share]
        trade_off_us = float(np.exp(log_trade_off))
        drop = float(self.drops[[low, high]] @ [1.0 - share, share])
        mean_us = float(self.times_us[[low, high]] @ [1.0 - share, share])
        # Interpolated to the limit, up to rounding: what was made for a limit has to keep it exactly.
        if by_drop:
            drop = min(drop, limit)
        else:
            mean_us = min(mean_us, limit)
        estimate, _ = self.cross_fit.judge(trade_off_us)
        starts = [self.learner.learn(float(self.trade_offs_us[index])) for index in (low, high)]
        policy = to_policy(self.learner.table.topology, self.learner.learn(trade_off_us, starts))
        return FrontierPoint(trade_off_us, policy, drop, mean_us, estimate)


def _by_drop(max_accuracy_drop: float | None, latency_budget_us: float | None) -> bool:
    given = [limit for limit in (max_accuracy_drop, latency_budget_us) if limit is not None]
    if len(given) != 1 or not math.isfinite(given[0]):
        raise InputError("give either max_accuracy_drop or latency_budget_us, as a finite number")
    return max_accuracy_drop is not None


def sweep(
    table: ScoreTable,
    costs: CostModel,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    allowed: Collection[str] | None = None,
    steps: int = STEPS,
    folds: int = FOLDS,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Frontier:
    """Learn the frontier: a geometric sweep of the trade-off between time and accuracy.

    Args:
        table: Rows that neither the backbone nor the heads were trained on.
        costs: Measured times.
        recipes: The ways of learning to try; the folds decide.
        allowed: The exits that may be built; None: all of them.
        steps: How many trade-offs.
        folds: How many folds.
        seed: Of the folds.
        on_step: Called with (steps done, steps in all), for a progress bar.

    Raises:
        CalibrationError: Too few rows, or one class only.
        InputError: The settings make no sense, or the costs do not cover the exits and heads.
    """
    if steps < 2 or folds < 2 or not recipes:
        raise InputError(f"{steps} steps, {folds} folds, {len(recipes)} recipes", where="frontier sweep")
    require_learnable(table, math.ceil(FEWEST_ROWS * folds / (folds - 1)))
    trade_offs_us = trade_offs(table.topology, costs, steps)
    total = (len(recipes) + 1) * steps
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    rows = _fold_rows(table.rows, folds, seed)
    curves = []
    for recipe in recipes:
        cross_fit = _cross_fit(table, costs, recipe, allowed, rows)
        estimates = _walk(cross_fit, trade_offs_us, tick)
        drops, times_us = _monotone(estimates)
        worth = mean_time_over_drops(drops, times_us, 0.0, WIDEST_DROP, plain_us=costs.whole_us)
        _logger.info("%s: mean time over drops up to %.0f%%: %.1f us", recipe, 100 * WIDEST_DROP, worth)
        curves.append((worth, cross_fit, estimates, drops, times_us))
    _, cross_fit, estimates, drops, times_us = min(curves, key=lambda curve: curve[0])
    learner = prepare(table, costs, cross_fit.recipe, allowed)
    policies = []
    for policy in learn_all(learner, trade_offs_us):
        policies.append(policy)
        tick()
    alone = Policy.plain(table.topology)
    whole = evaluate_plain(table, costs)
    plain = FrontierPoint(math.inf, alone, whole.accuracy_drop, costs.whole_us, whole)
    points = [
        FrontierPoint(float(trade_offs_us[i]), policies[i], float(drops[i]), float(times_us[i]), estimates[i])
        for i in range(steps)
        # Of a tuned network the whole is not the plain one, and no point: it is as slow, and not as given.
        if table.original_logits is None or not policies[i].is_plain
    ]
    return Frontier(
        plain,
        undominated([plain, *points], lambda point: point),
        cross_fit.recipe,
        learner,
        cross_fit,
        trade_offs_us,
        drops,
        times_us,
    )


def trade_offs(topology: Topology, costs: CostModel, steps: int) -> Float64Array:
    """A geometric sweep of what a unit of accuracy may be worth, ``float64[steps]`` microseconds."""
    return np.geomspace(*(SPAN if topology.tail else CASCADE_SPAN), steps) * costs.whole_us


def learn_all(learner: Learner, trade_offs_us: Iterable[float]) -> Iterator[Policy]:
    """A policy for every trade-off, each started from its neighbour's choices as well."""
    previous: tuple[Choices, ...] = ()
    for trade_off_us in trade_offs_us:
        previous = (learner.learn(float(trade_off_us), previous),)
        yield to_policy(learner.table.topology, previous[0])


def _fold_rows(rows: int, folds: int, seed: int) -> tuple[NDArray[np.intp], ...]:
    shuffled = np.random.default_rng(seed).permutation(rows)
    return tuple(np.sort(part) for part in np.array_split(shuffled, folds))


def _cross_fit(
    table: ScoreTable,
    costs: CostModel,
    recipe: Recipe,
    allowed: Collection[str] | None,
    rows: tuple[NDArray[np.intp], ...],
) -> CrossFit:
    everything = np.arange(table.rows)
    learners = [prepare(table.take(np.setdiff1d(everything, part)), costs, recipe, allowed) for part in rows]
    return CrossFit(recipe, tuple(learners), tuple(table.take(part) for part in rows), rows)


def _walk(cross_fit: CrossFit, trade_offs_us: Float64Array, tick: Callable[[], None]) -> list[Evaluation]:
    """Judge every trade-off, each started from its neighbour's choices as well."""
    estimates = []
    choices: tuple[Choices, ...] = ()
    for trade_off_us in trade_offs_us:
        estimate, choices = cross_fit.judge(float(trade_off_us), choices)
        estimates.append(estimate)
        tick()
    return estimates


def _monotone(estimates: Sequence[Evaluation]) -> tuple[Float64Array, Float64Array]:
    """The folds' drops and times, pooled where they run against the trade-off (isotonic regression)."""
    drops = isotonic_regression([e.accuracy_drop for e in estimates], increasing=False).x
    times_us = isotonic_regression([e.mean_us for e in estimates], increasing=True).x
    return np.asarray(drops, np.float64), np.asarray(times_us, np.float64)


def _join(results: Sequence[Evaluation], rows: Sequence[NDArray[np.intp]], topology: Topology) -> Evaluation:
    """One evaluation of all rows from those of the folds."""
    back = np.argsort(np.concatenate(rows))
    exit_index = np.concatenate([r.exit_index for r in results])[back]
    correct = np.concatenate([r.correct for r in results])[back]
    backbone_correct = np.concatenate([r.backbone_correct for r in results])[back]
    time_us = np.concatenate([r.time_us for r in results])[back]
    passed = np.concatenate([r.passed for r in results])[back]
    return summarise(topology, exit_index, correct, backbone_correct, time_us, passed)
