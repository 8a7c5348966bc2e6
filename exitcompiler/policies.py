"""Policies over cached scores: what each exit does, what it costs, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import ConstantGate, Gate, LinearGate
from exitcompiler.errors import InputError
from exitcompiler.scores import BACKBONE, FEATURES, BoolArray, HeadKey, IntArray, ScoreTable

__all__ = [
    "CostModel",
    "Decision",
    "Evaluation",
    "GoOn",
    "Leave",
    "LinearRule",
    "Policy",
    "evaluate",
    "evaluate_routes",
    "gate_of",
    "summarise",
]


@dataclass(frozen=True)
class GoOn:
    """No row leaves: the exit is not built."""


@dataclass(frozen=True)
class Leave:
    """Every row leaves with this head: the network ends here.

    Args:
        head: The kind of head that answers.
    """

    head: str


@dataclass(frozen=True)
class LinearRule:
    """A row leaves where ``weight . features + bias >= 0``.

    As a program's gate: ``LinearGate(reads, weight=(weight, zeros), bias=(bias, 0))``: action 0
    leaves, action 1 goes on, a tie leaves.

    Args:
        head: The kind of head that answers.
        reads: The heads whose confidences are the features: the exit's own first, then those of
            earlier kept exits (with the head they are kept with).
        weight: One number per feature, three for each entry of ``reads``.
        bias: The intercept.
    """

    head: str
    reads: tuple[HeadKey, ...]
    weight: tuple[float, ...]
    bias: float


Decision: TypeAlias = GoOn | Leave | LinearRule


def gate_of(decision: Decision, confidences: Mapping[HeadKey, str]) -> Gate:
    """The program's gate for a decision; edge 0 leaves, edge 1 goes on.

    Args:
        decision: What the exit does.
        confidences: (exit, head) -> the name, in the exit's own block, of that head's confidence
            features ``float32[batch, 3]``; only what a rule reads is looked up.

    Raises:
        InputError: The rule reads a head whose confidences have no name here.
    """
    match decision:
        case GoOn():
            return ConstantGate(action=1, actions=2)
        case Leave():
            return ConstantGate(action=0, actions=2)
        case LinearRule(reads=reads, weight=weight, bias=bias):
            missing = [key for key in reads if key not in confidences]
            if missing:
                raise InputError(f"the confidences of {missing} do not reach the exit", where="gate")
            names = tuple(confidences[key] for key in reads)
            return LinearGate(names, (weight, (0.0,) * len(weight)), (bias, 0.0))


@dataclass(frozen=True)
class CostModel:
    """Measured mean times, in microseconds per row.

    Args:
        segment_us: The backbone's segments: one before each exit and one after the last.
        head_us: (exit, head kind) -> the head alone.
        gate_us: What a kept gate adds: its own arithmetic and the dispatch between two blocks.
        plain_us: The untouched backbone, measured as a whole; None: the sum of the segments.

    Raises:
        InputError: A time is negative, NaN or infinite.
    """

    segment_us: tuple[float, ...]
    head_us: Mapping[HeadKey, float]
    gate_us: float = 0.0
    plain_us: float | None = None

    def __post_init__(self) -> None:
        times = (*self.segment_us, *self.head_us.values(), self.gate_us, self.whole_us)
        if not self.segment_us or not all(math.isfinite(t) and t >= 0 for t in times):
            raise InputError("times must be finite and not negative", where="cost model")

    @property
    def whole_us(self) -> float:
        """The time of the untouched backbone."""
        return sum(self.segment_us) if self.plain_us is None else self.plain_us

    def overhead_us(self, exit_name: str, decision: Decision) -> float:
        """What an exit's head and gate cost each row that arrives there."""
        match decision:
            case GoOn():
                return 0.0
            case Leave(head):
                return self.head_us[exit_name, head]
            case LinearRule(head=head):
                return self.head_us[exit_name, head] + self.gate_us

    def leave_us(self, policy: Policy) -> NDArray[np.float64]:
        """The time of a row that leaves at each exit, and of one that never leaves.

        Args:
            policy: Over as many exits as there are segments, less one.

        Returns:
            ``float64[K + 1]``; the entry of an exit that is not kept is the time to pass it.

        Raises:
            InputError: The number of exits does not fit the segments.
        """
        if len(policy.exits) + 1 != len(self.segment_us):
            raise InputError(
                f"{len(self.segment_us)} segments for {len(policy.exits)} exits", where="cost model"
            )
        if not policy.kept:
            passing = np.cumsum(self.segment_us)
            passing[-1] = self.whole_us
            return passing
        overheads = [self.overhead_us(n, d) for n, d in zip(policy.exits, policy.decisions, strict=True)]
        return np.cumsum(np.asarray(self.segment_us) + np.asarray([*overheads, 0.0]))


@dataclass(frozen=True)
class Policy:
    """What to do at each exit.

    Args:
        exits: Names, in the order of the program.
        decisions: One per exit.

    Raises:
        InputError: A rule reads what the program does not have there.
    """

    exits: tuple[str, ...]
    decisions: tuple[Decision, ...]

    def __post_init__(self) -> None:
        if len(self.exits) != len(self.decisions):
            raise InputError(f"{len(self.decisions)} decisions for {len(self.exits)} exits", where="policy")
        kept: set[HeadKey] = set()
        for name, decision in zip(self.exits, self.decisions, strict=True):
            if isinstance(decision, GoOn):
                continue
            kept.add((name, decision.head))
            if isinstance(decision, LinearRule):
                _require_rule(name, decision, kept)

    @classmethod
    def plain(cls, exits: tuple[str, ...]) -> Policy:
        """The policy that never leaves."""
        return cls(exits, (GoOn(),) * len(exits))

    @property
    def kept(self) -> dict[str, Leave | LinearRule]:
        """The exits to build, in order: up to the first where every row leaves."""
        return dict(self._kept())

    def _kept(self) -> Iterator[tuple[str, Leave | LinearRule]]:
        for name, decision in zip(self.exits, self.decisions, strict=True):
            if isinstance(decision, GoOn):
                continue
            yield name, decision
            if isinstance(decision, Leave):
                return

    def route(self, table: ScoreTable) -> IntArray:
        """Where each row leaves.

        Returns:
            ``int64[n]``: an index into ``exits``, or ``len(exits)`` for the backbone.

        Raises:
            InputError: The table has other exits.
        """
        self._require_exits(table)
        place = {name: index for index, name in enumerate(self.exits)}
        left = np.full(table.rows, len(self.exits), np.int64)
        for name, decision in self.kept.items():
            open_rows = left == len(self.exits)
            if isinstance(decision, LinearRule):
                features = table.features(decision.reads).astype(np.float64)
                open_rows &= features @ np.asarray(decision.weight) + decision.bias >= 0.0
            left[open_rows] = place[name]
        return left

    def _require_exits(self, table: ScoreTable) -> None:
        if table.exits != self.exits:
            raise InputError(f"the table has exits {list(table.exits)}, the policy {list(self.exits)}")


def _require_rule(name: str, rule: LinearRule, kept: set[HeadKey]) -> None:
    where = f"rule of exit {name!r}"
    if not rule.reads or rule.reads[0] != (name, rule.head):
        raise InputError(f"must read its own head first, reads {list(rule.reads)}", where=where)
    missing = [key for key in rule.reads if key not in kept]
    if missing:
        raise InputError(f"reads {missing}, not kept at or before this exit", where=where)
    if len(rule.weight) != FEATURES * len(rule.reads):
        raise InputError(f"{len(rule.weight)} weights for {len(rule.reads)} heads of 3 features", where=where)
    if not all(map(math.isfinite, (*rule.weight, rule.bias))):
        raise InputError("weights must be finite", where=where)


@dataclass(frozen=True)
class Evaluation:
    """How a policy does on a table.

    Args:
        accuracy: Of the program.
        backbone_accuracy: Of the backbone on the same rows.
        excess_error: Share of rows where the program is wrong and the backbone is right.
        mean_us: Mean time per row.
        exit_rates: Place -> share of rows that leave there; the last is the backbone.
        exit_accuracy: Place -> accuracy on the rows that leave there; None where none does.
        exit_index: Where each row leaves, ``int64[n]``.
        correct: ``bool[n]``.
        backbone_correct: ``bool[n]``.
        time_us: ``float64[n]``.
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

    @property
    def accuracy_drop(self) -> float:
        """Net: the backbone's accuracy minus the program's; negative where the program is better."""
        return self.backbone_accuracy - self.accuracy


def evaluate(policy: Policy, table: ScoreTable, costs: CostModel) -> Evaluation:
    """Judge a policy on cached scores.

    Raises:
        InputError: The policy, the table and the costs are not about the same exits.
    """
    heads = [None if isinstance(d, GoOn) else d.head for d in policy.decisions]
    return evaluate_routes(policy.route(table), heads, costs.leave_us(policy), table)


def evaluate_routes(
    exit_index: IntArray,
    heads: Sequence[str | None],
    leave_us: NDArray[np.float64],
    table: ScoreTable,
) -> Evaluation:
    """Judge given places to leave.

    Args:
        exit_index: ``int64[n]``, ``len(exits)`` for the backbone.
        heads: Per exit the head that answers; None where nobody leaves.
        leave_us: Per exit, then for the backbone, the time of a row that leaves there.
        table: The scores.
    """
    correct = table.backbone_correct.copy()
    for index, (name, head) in enumerate(zip(table.exits, heads, strict=True)):
        here = exit_index == index
        if head is not None and here.any():
            correct[here] = table.correct((name, head))[here]
    names = (*table.exits, BACKBONE)
    return summarise(names, exit_index, correct, table.backbone_correct, leave_us[exit_index])


def summarise(
    places: Sequence[str],
    exit_index: IntArray,
    correct: BoolArray,
    backbone_correct: BoolArray,
    time_us: NDArray[np.float64],
) -> Evaluation:
    """The evaluation that per-row results add up to.

    Args:
        places: The exits' names, then the backbone's.
        exit_index: ``int64[n]``, into ``places``.
        correct: ``bool[n]``.
        backbone_correct: ``bool[n]``.
        time_us: ``float64[n]``.
    """
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
    )
