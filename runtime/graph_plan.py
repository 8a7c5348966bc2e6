"""The plan of a device graph: what one launch of a whole program does, as plain data.

A plan is a tree of scopes, each a list of steps that run in order. A step runs a block's engine, runs one
of five small kernels, or opens scopes under a condition that a kernel has set on the device; the tree is
nested along the program's dominator tree, so that a part of the program that no row reaches costs one
untaken condition. It knows no CUDA: `planning` makes it, `plan_checks` says what makes it well-formed,
`plan_interpreter` runs it in numpy, `cuda_graphs` builds it.

Rows carry three numbers. ``next`` is the block that a row goes to (its index in the program, or ``LEFT``),
``edge`` the one of that block's incoming edges that it took, ``position`` its place among the rows that
its last block ran on, so that whoever comes next knows where in that block's buffers it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

__all__ = [
    "COUNT",
    "EDGE",
    "EXIT_INDEX",
    "LEFT",
    "NEXT",
    "POSITION",
    "Buffer",
    "Compact",
    "Conditional",
    "Gather",
    "Guard",
    "Move",
    "PickBucket",
    "Plan",
    "PlannedWay",
    "Route",
    "RunBlock",
    "Scope",
    "Step",
    "steps_of",
]

LEFT: Final = -1
"""``next`` of a row that has its answer, and of one that is none (a batch may be smaller than its graph)."""

NEXT: Final = "next"
EDGE: Final = "edge"
POSITION: Final = "position"
EXIT_INDEX: Final = "exit_index"
COUNT: Final = "count"
"""Buffers of every plan: ``int32[capacity]`` each, and ``count``, ``int32[1]``: the rows of this call."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory with an address that is final: ``float32[8, 16, 32, 32]``.

    Args:
        dtype: As in `ValueSpec`.
        shape: Whole numbers; a value with rows has the plan's capacity as dim 0, and a block that runs on
            fewer rows uses the first ones.
        rows: Whether dim 0 counts rows.
        parameter: What it is filled with when the program is built, and never written again: (block name,
            ``"gate_weight"`` or ``"gate_bias"``); None: a launch writes it.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: bool
    parameter: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class RunBlock:
    """Run a block's engine on the first ``rows`` rows of its buffers.

    Args:
        block: Its name.
        rows: The bucket: what the engine is captured for.
        inputs: Buffers, in the order of the engine's signature.
        outputs: Likewise.
    """

    block: str
    rows: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlannedWay:
    """What happens to a row that takes one way out of a block.

    Args:
        target: Index of the block it goes to; ``LEFT`` where it leaves.
        edge: Which of the target's incoming edges this is; 0 where it leaves.
        exit: Index of the exit taken; -1 where it goes on.
        copies: (source, target) buffers: the answer, copied from the row's position to the row's place.
        arm: What the route's condition is set to by this way, where it sets one.
    """

    target: int
    edge: int
    exit: int
    copies: tuple[tuple[str, str], ...]
    arm: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """Kernel: send the rows that a block ran on down the ways that their actions name.

    Writes ``next``, ``edge``, ``position`` and ``exit_index`` of these rows (-1: not left yet), and the
    outputs of those that leave. Where the block is the first one, rows beyond ``count`` are marked as
    ``LEFT``, without an exit.

    Args:
        block: Its name.
        action: Buffer, ``int32[capacity]``; None: all rows take the first way.
        ways: In the order of the gate's actions.
        rows: Buffer with the rows that it ran on, in order; None: row ``j`` is at position ``j``.
        count: Buffer with their number.
        condition: What is set to the ``arm`` of the way taken; only in a plan for one row.
    """

    block: str
    action: str | None
    ways: tuple[PlannedWay, ...]
    rows: str | None
    count: str
    condition: str | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """Kernel, for one row: set ``condition`` to 1 where the row goes to block ``target`` next, else to 0."""

    target: int
    condition: str


@dataclass(frozen=True, slots=True)
class Compact:
    """Kernel: list the rows that go to a block next, in order, and count them.

    The rest of the list repeats its first entry, so that a body for more rows than there are has rows to
    run on; if there are none, the list is not written.

    Args:
        target: Index of the block.
        rows: Buffer ``int32[capacity]``.
        count: Buffer ``int32[1]``.
        condition: Set to 1 if there are any, else to 0.
    """

    target: int
    rows: str
    count: str
    condition: str


@dataclass(frozen=True, slots=True)
class PickBucket:
    """Kernel: set ``condition`` to the index of the first of ``buckets`` that is not below ``count``."""

    count: str
    buckets: tuple[int, ...]
    condition: str


@dataclass(frozen=True, slots=True)
class Move:
    """Where a param of a block comes from: by incoming edge, the buffer to read."""

    target: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gather:
    """Kernel: bring the params of the rows in ``list`` together, each from where its last block left it.

    Args:
        block: Whose params they are.
        moves: One for each param that is not read in place.
        list: Buffer with the rows, as `Compact` writes it; None: the one row of a plan for one row.
        rows: How many entries of the list.
    """

    block: str
    moves: tuple[Move, ...]
    list: str | None
    rows: int


@dataclass(frozen=True, slots=True)
class Conditional:
    """Run one of ``bodies``, or none, as a condition says.

    Args:
        kind: ``"if"``: the one body where the condition is not 0; ``"switch"``: the body whose index it is,
            none where it is their number or more.
        condition: Its name; set once before, by a kernel in the same scope.
        bodies: The scopes.
    """

    kind: Literal["if", "switch"]
    condition: str
    bodies: tuple[Scope, ...]


Step: TypeAlias = "RunBlock | Route | Guard | Compact | PickBucket | Gather | Conditional"
Scope: TypeAlias = tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """What one launch does.

    Args:
        capacity: The most rows that a call may have.
        blocks: Names, in the order of the program: what the numbers in ``next`` mean.
        exits: Names: what the numbers in ``exit_index`` mean.
        buffers: By name.
        inputs: Buffers that the caller fills, in the order of the program's inputs.
        outputs: Buffers that answer, in the order of the program's outputs, then of what it carries.
        root: What runs.
    """

    capacity: int
    blocks: tuple[str, ...]
    exits: tuple[str, ...]
    buffers: Mapping[str, Buffer]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    root: Scope


def steps_of(scope: Scope) -> Iterator[Step]:
    """All steps of a scope and of the scopes in it, in order."""
    for step in scope:
        yield step
        if isinstance(step, Conditional):
            for body in step.bodies:
                yield from steps_of(body)
