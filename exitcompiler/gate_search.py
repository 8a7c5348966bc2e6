"""Exact search over thresholds, ways and sites, for given score directions.

A direction is one number per row, high where answering looks safe. For a fixed direction the only
unknowns are where a site cuts its scores, and what rows do between the cuts; both are found on the true
objective, mean time plus trade-off times loss, never on a surrogate of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.costs import CostModel, Step, running_places
from exitcompiler.policies import Decision, GoOn, Leave, LinearRule, Policy
from exitcompiler.scores import BoolArray, HeadKey, IntArray, ScoreTable
from exitcompiler.topology import Topology

__all__ = [
    "Action",
    "Choice",
    "Choices",
    "Direction",
    "Plane",
    "Problem",
    "best_cuts",
    "best_shifts",
    "cut",
    "to_policy",
]

Float64Array: TypeAlias = NDArray[np.float64]

Action: TypeAlias = "str | int"
"""What a site may do with a row: answer with this kind of head, or send it on to this place."""

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
    """What a site does: one action for all rows, or a linear rule among several.

    Args:
        actions: What there is to choose among.
        reads: What a rule reads; empty where one action is for all.
        weight: ``float64[actions, 3 * len(reads)]``.
        bias: ``float64[actions]``.
        action: Which of the actions each row of the learning table takes, ``int64[n]``.
        direction: The direction that a rule cuts, where there is one.
    """

    actions: tuple[Action, ...]
    reads: tuple[HeadKey, ...] = ()
    weight: Float64Array | None = None
    bias: Float64Array | None = None
    action: IntArray | None = None
    direction: Direction | None = None

    @property
    def targets(self) -> tuple[int, ...]:
        """The places that rows may go on to."""
        return tuple(action for action in self.actions if isinstance(action, int))

    def step(self, site: str) -> Step:
        """What happens at the site."""
        heads = [(site, action) for action in self.actions if isinstance(action, str)]
        heads += [key for key in self.reads if key[0] == site]
        return Step(self.targets, tuple(dict.fromkeys(heads)), gated=bool(self.reads))

    def takes(self, action: Action) -> BoolArray | bool:
        """Which rows take an action: ``bool[n]``, or all or none of them."""
        if self.action is None:
            return action in self.actions
        if action not in self.actions:
            return False
        return np.asarray(self.action == self.actions.index(action), np.bool_)


Choices: TypeAlias = tuple[Choice, ...]
"""One per site."""


def cut(direction: Direction, actions: Sequence[Action], thresholds: Sequence[float]) -> Choice | None:
    """The rule that takes the first action above the first threshold, the next above the second, ...

    As an argmax of linear scores: every action's slope along the direction is one steeper than the
    next one's, so neighbours meet at their threshold.

    Args:
        direction: Scores the rows.
        actions: From high scores to low ones.
        thresholds: One between each two actions, falling; actions with no room between theirs are left out.

    Returns:
        None where a single action takes all rows.
    """
    borders = [np.inf, *thresholds, -np.inf]
    taken = [number for number in range(len(actions)) if borders[number] > borders[number + 1]]
    if len(taken) < 2:
        return None
    actions, thresholds = [actions[n] for n in taken], [borders[n] for n in taken[1:]]
    last = len(actions) - 1
    slope = np.arange(last, -1, -1, dtype=np.float64)
    bias = np.append(-np.cumsum(np.asarray(thresholds, np.float64)[::-1])[::-1], 0.0)
    action = np.zeros(len(direction.score), np.int64)
    for threshold in thresholds:
        action += direction.score < threshold
    return Choice(tuple(actions), direction.reads, np.outer(slope, direction.weight), bias, action, direction)


@dataclass(frozen=True, eq=False)
class Plane:
    """A linear score for each of several actions: what they are expected to cost, negated.

    Args:
        actions: Three or more.
        reads: Whose confidences are scored, one of the site's own first.
        weight: ``float64[actions, 3 * len(reads)]``.
        bias: ``float64[actions]``: to start from.
        scores: ``float64[n, actions]``, biases included.
    """

    actions: tuple[Action, ...]
    reads: tuple[HeadKey, ...]
    weight: Float64Array
    bias: Float64Array
    scores: Float64Array

    @property
    def resolution(self) -> float:
        """Differences between two actions' scores that are closer than this count as equal."""
        steepest = np.abs(self.weight[:, None] - self.weight[None]).sum(axis=2).max()
        return SCORE_RESOLUTION * float(steepest)

    def shifted(self, action_us: Float64Array, arrives: BoolArray) -> tuple[float, Choice | None]:
        """The rule with the best biases, and what it costs on the rows that arrive.

        Args:
            action_us: ``float64[n, actions]``: what each action costs each row.
            arrives: ``bool[n]``.

        Returns:
            No rule where a single action takes all rows.
        """
        total, shift = best_shifts(self.scores, action_us, arrives, self.resolution)
        scores = self.scores + shift
        taken = np.unique(scores[arrives].argmax(axis=1))
        if len(taken) < 2:
            return total, None
        actions = tuple(self.actions[number] for number in taken)
        bias = (self.bias + shift)[taken]
        return total, Choice(actions, self.reads, self.weight[taken], bias, scores[:, taken].argmax(axis=1))


@dataclass(frozen=True, eq=False)
class Problem:
    """One trade-off on one set of rows.

    Args:
        table: The rows to learn on.
        costs: Measured times.
        penalty_us: (site, head) -> ``float64[n]``: trade-off times the loss of leaving there.
        directions: (site, head) -> the directions to try; they may be replaced while learning.
        planes: Site -> the linear scores of several actions to try.
    """

    table: ScoreTable
    costs: CostModel
    penalty_us: Mapping[HeadKey, Float64Array]
    directions: Mapping[HeadKey, tuple[Direction, ...]]
    planes: Mapping[str, tuple[Plane, ...]] = field(default_factory=dict)

    @cached_property
    def nothing(self) -> Choices:
        """The choices of the backbone, or the reference network, alone."""
        topology = self.table.topology
        onward = dict(zip(topology.reference, topology.reference[1:], strict=False))
        choices = []
        for place, site in enumerate(topology.sites):
            following = [way for way in topology.ways[place] if topology.follows[way] == place]
            first = [onward[place]] if place in onward else following or list(topology.ways[place][:1])
            choices.append(Choice((first[0] if first else self.table.kinds(site)[0],)))
        return tuple(choices)

    def steps(self, choices: Choices) -> list[Step]:
        """What happens at each place."""
        sites = self.table.topology.sites
        steps = [choice.step(site) for site, choice in zip(sites, choices, strict=True)]
        return [*steps, Step()] if self.table.topology.tail else steps

    def running(self, choices: Choices) -> list[bool]:
        """Per place, whether a row that passes has its network run."""
        return running_places(self.table.topology, self.steps(choices))

    def action_us(self, place: int, action: Action, later_us: Sequence[Float64Array]) -> Float64Array:
        """What an action brings with it, once the site has been passed, ``float64[n]``."""
        if isinstance(action, int):
            return later_us[action]
        return self.penalty_us[self.table.topology.sites[place], action]

    def value_us(
        self, place: int, choice: Choice, later_us: Sequence[Float64Array], running: bool
    ) -> Float64Array:
        """Time and penalty still to come for a row that comes to a site, ``float64[n]``.

        Args:
            place: The site.
            choice: What is done there.
            later_us: The same, for later places.
            running: Whether its network is run.
        """
        step = choice.step(self.table.topology.sites[place])
        paid_us = self.costs.step_us(place, step) if running else 0.0
        if choice.action is None:
            return self.action_us(place, choice.actions[0], later_us) + paid_us
        ways = np.stack([self.action_us(place, action, later_us) for action in choice.actions])
        return np.asarray(ways[choice.action, np.arange(self.table.rows)]) + paid_us

    def values_us(self, choices: Choices) -> list[Float64Array]:
        """Per place, the time and penalty still to come for a row that comes there, ``float64[n]``."""
        running = self.running(choices)
        values = [np.full(self.table.rows, self.costs.segment_us[-1])] * len(running)
        for place in reversed(range(len(choices))):
            values[place] = self.value_us(place, choices[place], values, running[place])
        return values

    def objective_us(self, choices: Choices) -> float:
        """Mean time plus mean penalty, over all rows."""
        if self.table.topology.tail and not any(step.heads for step in self.steps(choices)):
            return self.costs.whole_us
        return float(self.values_us(choices)[0].mean())

    def arrivals(self, choices: Choices) -> list[BoolArray]:
        """Per place, which rows come there, ``bool[n]``."""
        arrives = [np.zeros(self.table.rows, np.bool_) for _ in self.table.topology.places]
        arrives[0][:] = True
        for place, choice in enumerate(choices):
            for target in choice.targets:
                arrives[target] |= arrives[place] & choice.takes(target)
        return arrives


def best_cuts(
    direction: Direction, action_us: Sequence[Float64Array], arrives: BoolArray
) -> tuple[float, list[float]]:
    """The thresholds that cost least on the rows that arrive.

    Rows by falling score are divided into one stretch per action; the best division is found exactly,
    by dynamic programming over the places to cut.

    Args:
        direction: Its scores are cut.
        action_us: What each action costs each row, ``float64[n]``, from the action of high scores to
            that of low ones.
        arrives: ``bool[n]``.

    Returns:
        The total cost, and a falling threshold between each two actions, in the middle of a gap between
        scores; infinite where the actions on one side of it take no row.
    """
    rows = direction.order[arrives[direction.order]]
    score = direction.score[rows]
    legal = np.ones(len(rows) + 1, np.bool_)
    legal[1:-1] = score[:-1] - score[1:] > direction.resolution
    totals = [np.append(0.0, np.cumsum(cost[rows])) for cost in action_us]
    best = totals[0]
    starts = []
    for total in totals[1:]:
        before = np.where(legal, best - total, np.inf)
        starts.append(before)
        best = total + np.minimum.accumulate(before)
    end = len(rows)
    cuts: list[int] = []
    for before in reversed(starts):
        end = int(before[: end + 1].argmin())
        cuts.insert(0, end)
    return float(best[-1]), [_threshold(score, place) for place in cuts]


def _threshold(score: Float64Array, place: int) -> float:
    """A number between the scores on both sides of a cut."""
    if place == 0:
        return np.inf
    return -np.inf if place == len(score) else float(score[place - 1] + score[place]) / 2.0


def best_shifts(
    scores: Float64Array,
    action_us: Float64Array,
    arrives: BoolArray,
    resolution: float = SCORE_RESOLUTION,
    sweeps: int = 2,
) -> tuple[float, Float64Array]:
    """Biases for given linear scores, one action at a time, each the best that there is for the others.

    Args:
        scores: ``float64[n, actions]``: a row takes the action of the highest one.
        action_us: ``float64[n, actions]``: what each action costs each row.
        arrives: ``bool[n]``.
        resolution: No bias is put between leads that are closer than this.
        sweeps: How often all actions get their turn.

    Returns:
        The total cost, and the biases ``float64[actions]``.
    """
    scores, action_us = scores[arrives], action_us[arrives]
    rows, actions = np.arange(len(scores)), scores.shape[1]
    bias = np.zeros(actions)
    best = float(action_us[rows, scores.argmax(axis=1)].sum())
    for _ in range(sweeps):
        before = best
        for action in range(actions):
            shifted = scores + bias
            shifted[:, action] = -np.inf
            rival = shifted.argmax(axis=1)
            lead = scores[:, action] - shifted[rows, rival]
            gain = action_us[rows, rival] - action_us[:, action]
            order = np.argsort(-lead, kind="stable")
            total = np.append(0.0, np.cumsum(gain[order]))
            sorted_lead = lead[order]
            close = sorted_lead[:-1] - sorted_lead[1:] <= resolution
            total[1:-1][close] = -np.inf
            place = int(total.argmax())
            cost = float(action_us[rows, rival].sum() - total[place])
            if cost < best - 1e-9 * abs(best):
                best, bias[action] = cost, _shift(sorted_lead, place)
        if best >= before:
            break
    return best, bias


def _shift(lead: Float64Array, place: int) -> float:
    """The bias that lets an action win on the rows of the ``place`` largest leads."""
    if place == 0:
        return -float(lead[0]) - 1.0
    if place == len(lead):
        return -float(lead[-1]) + 1.0
    return -float(lead[place - 1] + lead[place]) / 2.0


def to_policy(topology: Topology, choices: Choices) -> Policy:
    """The policy that choices stand for."""
    decisions: list[Decision] = []
    for place, choice in enumerate(choices):
        actions = tuple(_action(topology, place, action) for action in choice.actions)
        if choice.weight is None or choice.bias is None:
            decisions.append(actions[0])
            continue
        weight = tuple(tuple(float(w) for w in row) for row in choice.weight)
        decisions.append(LinearRule(actions, choice.reads, weight, tuple(float(b) for b in choice.bias)))
    return Policy(topology, tuple(decisions))


def _action(topology: Topology, place: int, action: Action) -> Leave | GoOn:
    if isinstance(action, str):
        return Leave(action)
    return GoOn() if topology.follows[action] == place else GoOn(topology.places[action])
