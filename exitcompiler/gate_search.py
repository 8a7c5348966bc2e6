"""Exact search over thresholds and exits, for given score directions.

A direction is one number per row, high where leaving looks safe. For fixed directions the only
unknowns are where each exit cuts its scores and which exits exist; both are searched on the true
objective, mean time plus trade-off times loss, never on a surrogate of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.policies import CostModel, GoOn, Leave, LinearRule, Policy
from exitcompiler.scores import BoolArray, HeadKey, ScoreTable

__all__ = ["Choice", "Choices", "Direction", "Problem", "best_cut", "search", "to_policy"]

Float64Array: TypeAlias = NDArray[np.float64]

SCORE_RESOLUTION = 1e-6
"""Confidences that engines compute may differ by this much; no threshold is put between closer scores."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A linear score of one head's rows.

    Args:
        head: The head that answers where the score is high.
        reads: Whose confidences are scored, own first.
        weight: ``float64[3 * len(reads)]``.
        score: ``float64[n]``: features times weight.
        order: ``int64[n]``: rows by falling score.
        resolution: Scores closer than this count as equal.
    """

    head: HeadKey
    reads: tuple[HeadKey, ...]
    weight: Float64Array
    score: Float64Array
    order: NDArray[np.intp]
    resolution: float

    @classmethod
    def of(cls, table: ScoreTable, reads: tuple[HeadKey, ...], weight: Float64Array) -> Direction:
        """The direction with the given weights on the features of ``reads``."""
        score = table.features(reads).astype(np.float64) @ weight
        resolution = SCORE_RESOLUTION * float(np.abs(weight).sum())
        return cls(reads[0], reads, weight, score, np.argsort(-score, kind="stable"), resolution)


@dataclass(frozen=True, eq=False)
class Choice:
    """What an exit does: all rows leave (no direction), or those whose score reaches the threshold."""

    head: HeadKey
    direction: Direction | None = None
    threshold: float = 0.0

    def leaves(self, rows: int) -> BoolArray:
        """``bool[n]``, for rows that arrive."""
        if self.direction is None:
            return np.ones(rows, np.bool_)
        return np.asarray(self.direction.score >= self.threshold, np.bool_)


Choices: TypeAlias = tuple[Choice | None, ...]
"""One per exit; None goes on."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One trade-off on one set of rows.

    Args:
        table: The rows to learn on.
        costs: Measured times.
        penalty_us: (exit, head) -> ``float64[n]``: trade-off times the loss of leaving there.
        directions: (exit, head) -> the directions to try; they may be replaced while learning.
    """

    table: ScoreTable
    costs: CostModel
    penalty_us: Mapping[HeadKey, Float64Array]
    directions: Mapping[HeadKey, tuple[Direction, ...]]

    def overhead_us(self, choice: Choice) -> float:
        """What the head and the gate cost every row that arrives."""
        gate_us = 0.0 if choice.direction is None else self.costs.gate_us
        return self.costs.head_us[choice.head] + gate_us

    def value_us(self, choice: Choice | None, later_us: Float64Array) -> Float64Array:
        """Time and penalty still to come for a row that arrives at an exit, ``float64[n]``."""
        if choice is None:
            return later_us
        here_us = self.penalty_us[choice.head]
        stay_us = (
            here_us if choice.direction is None else np.where(choice.leaves(len(here_us)), here_us, later_us)
        )
        return stay_us + self.overhead_us(choice)

    def suffixes_us(self, choices: Choices) -> list[Float64Array]:
        """Per exit, the time and penalty still to come for a row that goes on there, ``float64[n]``."""
        segment_us = self.costs.segment_us
        going_on = [np.full(self.table.rows, segment_us[-1])]
        for index in range(len(choices) - 1, 0, -1):
            value = self.value_us(choices[index], going_on[0]) + segment_us[index]
            going_on.insert(0, value)
        return going_on

    def objective_us(self, choices: Choices) -> float:
        """Mean time plus mean penalty, over all rows."""
        if all(choice is None for choice in choices):
            return self.costs.whole_us
        start = self.value_us(choices[0], self.suffixes_us(choices)[0])
        return float(start.mean()) + self.costs.segment_us[0]


def best_cut(direction: Direction, gain_us: Float64Array, arrives: BoolArray) -> tuple[float, float]:
    """The threshold that gains most on the rows that arrive.

    Args:
        direction: Its scores are cut.
        gain_us: What a row gains by leaving, ``float64[n]``; negative where it should go on.
        arrives: ``bool[n]``.

    Returns:
        The total gain and the threshold, in the middle of a gap between scores. Letting all rows go
        on (gain 0, threshold above all scores) is always within reach.
    """
    rows = direction.order[arrives[direction.order]]
    if not len(rows):
        return 0.0, np.inf
    score = direction.score[rows]
    total = np.cumsum(gain_us[rows])
    gap = score[:-1] - score[1:] > direction.resolution
    total[:-1][~gap] = -np.inf
    best = int(total.argmax())
    if total[best] <= 0.0:
        return 0.0, np.inf
    if best == len(rows) - 1:
        return float(total[best]), float(score[-1]) - max(1.0, direction.resolution)
    return float(total[best]), float(score[best] + score[best + 1]) / 2.0


def _choose(
    problem: Problem,
    exit_name: str,
    directions: Sequence[Direction],
    later_us: Float64Array,
    arrives: BoolArray,
) -> Choice | None:
    """The best thing to do at an exit, its past and its future given.

    Constants are members of the family: going on costs nothing, and where all rows leave no gate is paid.
    """
    count = int(arrives.sum())
    best: Choice | None = None
    best_gain = 0.0
    for kind in problem.table.kinds(exit_name):
        key = (exit_name, kind)
        gain_us = later_us - problem.penalty_us[key]
        leave = Choice(key)
        gain = float(gain_us[arrives].sum()) - problem.overhead_us(leave) * count
        if gain > best_gain:
            best, best_gain = leave, gain
        for direction in directions:
            if direction.head != key:
                continue
            gain, threshold = best_cut(direction, gain_us, arrives)
            rule = Choice(key, direction, threshold)
            gain -= problem.overhead_us(rule) * count
            if gain > best_gain and np.isfinite(threshold):
                best, best_gain = rule, gain
    return best


def _readable(choices: Choices, index: int, direction: Direction) -> bool:
    """Whether all that a direction reads is kept before (or at) exit ``index``."""
    kept = {choice.head for choice in choices[:index] if choice is not None}
    return all(key in kept for key in direction.reads[1:])


def _unread(choices: Choices, index: int) -> bool:
    """Whether no later exit reads this one's scores."""
    here = choices[index]
    if here is None:
        return True
    later = (choice.direction for choice in choices[index + 1 :] if choice is not None)
    return not any(here.head in direction.reads for direction in later if direction is not None)


def _sweep(problem: Problem, choices: Choices, allowed: Sequence[bool]) -> Choices:
    """Choose anew at every exit, deepest first; each on the rows that arrive there.

    From no choices at all, where every row arrives everywhere, this is the bottom-up pass of
    Bolukbasi et al. 2017, section 3.

    Args:
        problem: What to minimise.
        choices: Where to start; earlier ones decide who arrives.
        allowed: Per exit whether it may be built.
    """
    names = problem.table.exits
    rows = problem.table.rows
    arrives = [np.ones(rows, np.bool_)]
    for choice in choices[:-1]:
        arrives.append(arrives[-1] if choice is None else arrives[-1] & ~choice.leaves(rows))
    later_us = np.full(rows, problem.costs.segment_us[-1])
    current = list(choices)
    for index in range(len(choices) - 1, -1, -1):
        if not allowed[index]:
            current[index] = None
        elif _unread(tuple(current), index):
            known = [
                d
                for kind in problem.table.kinds(names[index])
                for d in problem.directions[names[index], kind]
            ]
            usable = [d for d in known if _readable(tuple(current), index, d)]
            current[index] = _choose(problem, names[index], usable, later_us, arrives[index])
        else:
            current[index] = _recut(problem, current[index], later_us, arrives[index])
        later_us = problem.value_us(current[index], later_us) + problem.costs.segment_us[index]
    return tuple(current)


def _recut(
    problem: Problem, choice: Choice | None, later_us: Float64Array, arrives: BoolArray
) -> Choice | None:
    """Move the threshold of an exit whose head has to stay."""
    if choice is None or choice.direction is None:
        return choice
    _, threshold = best_cut(choice.direction, later_us - problem.penalty_us[choice.head], arrives)
    return replace(choice, threshold=threshold) if np.isfinite(threshold) else choice


def _settle(
    problem: Problem, choices: Choices, allowed: Sequence[bool], sweeps: int = 6
) -> tuple[float, Choices]:
    """Sweep until the objective no longer falls; the result is never worse than the start."""
    best = problem.objective_us(choices)
    for _ in range(sweeps):
        trial = _sweep(problem, choices, allowed)
        value = problem.objective_us(trial)
        if value >= best - 1e-9 * abs(best):
            break
        best, choices = value, trial
    return best, choices


def search(problem: Problem, starts: Sequence[Choices], allowed: Sequence[bool]) -> tuple[float, Choices]:
    """The best choices found from several starts, by sweeps and by taking single exits out.

    A sweep moves one exit at a time and so cannot see that two exits only pay without each other;
    taking one out and settling the rest can.

    Returns:
        The objective in microseconds, and the choices; never worse than any start, than the best
        single exit, or than building nothing.
    """
    nothing: Choices = (None,) * len(allowed)
    one_by_one = [tuple(i == index and ok for i, ok in enumerate(allowed)) for index in range(len(allowed))]
    singles = [_sweep(problem, nothing, alone) for alone in one_by_one]
    single = min(singles, key=problem.objective_us, default=nothing)
    begun = (_sweep(problem, nothing, allowed), single, *starts)
    best, choices = min((_settle(problem, start, allowed) for start in begun), key=lambda pair: pair[0])
    improved = True
    while improved:
        improved = False
        for index in range(len(choices)):
            if choices[index] is None:
                continue
            without = tuple(i != index and ok for i, ok in enumerate(allowed))
            value, trial = _settle(problem, _without(choices, index), without, 3)
            if value < best - 1e-9 * abs(best):
                best, choices = _settle(problem, trial, allowed)
                improved = True
                break
    plain = problem.objective_us(nothing)
    return (best, choices) if best < plain else (plain, nothing)


def _without(choices: Choices, index: int) -> Choices:
    """Take an exit out, with all exits that read its scores."""
    gone = choices[index]
    left: list[Choice | None] = list(choices)
    left[index] = None
    for later in range(index + 1, len(left)):
        choice = left[later]
        if gone and choice and choice.direction and gone.head in choice.direction.reads:
            left = list(_without(tuple(left), later))
    return tuple(left)


def to_policy(exits: tuple[str, ...], choices: Choices) -> Policy:
    """The policy that choices stand for."""
    decisions: list[GoOn | Leave | LinearRule] = []
    for choice in choices:
        if choice is None:
            decisions.append(GoOn())
        elif choice.direction is None:
            decisions.append(Leave(choice.head[1]))
        else:
            direction = choice.direction
            weight = tuple(float(w) for w in direction.weight)
            decisions.append(LinearRule(choice.head[1], direction.reads, weight, -choice.threshold))
    return Policy(exits, tuple(decisions))
