"""Says what makes a plan well-formed: whatever a row reads has been written for it in the same launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from exitcompiler.errors import VerifyError
from exitcompiler.runtime.graph_plan import (
    COUNT,
    EDGE,
    EXIT_INDEX,
    LEFT,
    NEXT,
    POSITION,
    Compact,
    Conditional,
    Gather,
    Guard,
    PickBucket,
    Plan,
    Route,
    RunBlock,
    Scope,
    Step,
    steps_of,
)

__all__ = ["buffers_read", "buffers_written", "condition_set", "describe", "verify_plan", "writers"]

_STATE = (NEXT, EDGE, POSITION)


def verify_plan(plan: Plan, returned: int | None = None) -> None:
    """Check a plan.

    - buffers exist, those with rows hold ``capacity`` of them, buckets fit;
    - a condition is set by one kernel and used by one conditional, both in the same scope, in this order,
      and has a body for every value that opens one;
    - a buffer has one writer, but for the numbers that all routes write and the program's outputs;
      parameters have none;
    - on every way that a row can take, each step that it meets reads only what was written before in the
      same launch, and at the end it has left, with its answer.

    Args:
        plan: Of one row or many.
        returned: How many of the outputs every exit has to write; None: all (fewer for a near part of a
            split program, whose last outputs are written by the exits that hand rows over).

    Raises:
        VerifyError: Naming the step; always a bug of what made the plan.
    """
    _check_buffers(plan)
    _check_conditions(plan, plan.root, set())
    _check_writers(plan)
    walk = _Walk(plan)
    ends = walk.scope(plan.root, {_Place(None, 0): frozenset((*plan.inputs, COUNT))})
    answers = plan.outputs[: len(plan.outputs) if returned is None else returned]
    for place, written in ends.items():
        if place.next != LEFT:
            _fail(f"a row that goes to block {_block(plan, place.next)!r} never gets there")
        if missing := [name for name in (*answers, EXIT_INDEX) if name not in written]:
            _fail(f"a row leaves at {plan.exits[place.edge]!r} without {missing}")


def buffers_read(step: Step) -> tuple[str, ...]:
    """What a step may read; a gather and a route read only what belongs to the ways that rows took."""
    match step:
        case RunBlock():
            return step.inputs
        case Route():
            optional = (name for name in (step.action, step.rows) if name is not None)
            return (step.count, *optional, *(source for way in step.ways for source, _ in way.copies))
        case Gather():
            listed = () if step.list is None else (step.list,)
            return (EDGE, POSITION, *listed, *(name for move in step.moves for name in move.sources))
        case Guard():
            return (NEXT,)
        case Compact():
            return (NEXT, COUNT)
        case PickBucket():
            return (step.count,)
        case Conditional():
            return ()


def buffers_written(step: Step) -> tuple[str, ...]:
    """What a step may write."""
    match step:
        case RunBlock():
            return step.outputs
        case Route():
            targets = dict.fromkeys(target for way in step.ways for _, target in way.copies)
            return (*_STATE, EXIT_INDEX, *targets)
        case Gather():
            return tuple(move.target for move in step.moves)
        case Compact():
            return (step.rows, step.count)
        case Guard() | PickBucket() | Conditional():
            return ()


def condition_set(step: Step) -> str | None:
    """The condition that a step sets."""
    return None if isinstance(step, RunBlock | Gather | Conditional) else step.condition


def writers(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Buffer -> what writes it, in words, in the order of the plan; the caller fills inputs and ``count``."""
    found: dict[str, list[str]] = {name: [] for name in plan.buffers}
    for name in (*plan.inputs, COUNT):
        found[name].append("the caller")
    for step in steps_of(plan.root):
        for name in buffers_written(step):
            if describe(step) not in found[name]:
                found[name].append(describe(step))
    return {name: tuple(steps) for name, steps in found.items()}


def describe(step: Step) -> str:
    """A step in a few words; a block in several buckets is one and the same."""
    match step:
        case RunBlock() | Route() | Gather():
            what = {RunBlock: "run", Route: "route", Gather: "gather"}[type(step)]
            return f"{what} {step.block!r}"
        case Guard() | Compact():
            return f"{type(step).__name__.lower()} rows to block {step.target}"
        case PickBucket():
            return f"pick a bucket by {step.count!r}"
        case Conditional():
            return f"{step.kind} {step.condition!r}"


def _check_buffers(plan: Plan) -> None:
    for step in steps_of(plan.root):
        for name in (*buffers_read(step), *buffers_written(step)):
            if name not in plan.buffers:
                _fail(f"no buffer {name!r}", step)
        rows = step.rows if isinstance(step, RunBlock | Gather) else 1
        if not 1 <= rows <= plan.capacity:
            _fail(f"{rows} rows in a plan for {plan.capacity}", step)
        if isinstance(step, Gather):
            for move in step.moves:
                like = plan.buffers[move.target]
                for source in move.sources:
                    if (plan.buffers[source].shape, plan.buffers[source].dtype) != (like.shape, like.dtype):
                        _fail(f"{source!r} is of another type than {move.target!r}", step)
    for name, buffer in plan.buffers.items():
        if buffer.rows and (not buffer.shape or buffer.shape[0] != plan.capacity):
            _fail(f"buffer {name!r} does not hold {plan.capacity} rows")
    for name in (*plan.inputs, *plan.outputs, *_STATE, COUNT, EXIT_INDEX):
        if name not in plan.buffers:
            _fail(f"no buffer {name!r}")


def _check_conditions(plan: Plan, scope: Scope, seen: set[str]) -> None:
    here: dict[str, Step] = {}
    for step in scope:
        condition = condition_set(step)
        if condition is not None:
            if condition in seen:
                _fail(f"condition {condition!r} is set twice", step)
            seen.add(condition)
            here[condition] = step
        if isinstance(step, Conditional):
            setter = here.pop(step.condition, None)
            if setter is None:
                _fail(f"condition {step.condition!r} is not set before, in the same scope", step)
            if isinstance(setter, PickBucket) and (
                step.kind != "switch" or len(setter.buckets) != len(step.bodies)
            ):
                _fail(f"{len(step.bodies)} bodies for {len(setter.buckets)} buckets", step)
            if step.kind == "if" and len(step.bodies) != 1:
                _fail("one body is needed", step)
            if isinstance(setter, Route) and plan.capacity > 1:
                _fail("a route cannot set a condition for many rows", setter)
            for body in step.bodies:
                _check_conditions(plan, body, seen)
    if here:
        _fail(f"conditions {sorted(here)} are set and not used")


def _check_writers(plan: Plan) -> None:
    shared = {*_STATE, EXIT_INDEX, *plan.outputs}
    for name, steps in writers(plan).items():
        if plan.buffers[name].parameter is not None and steps:
            _fail(f"parameter {name!r} is written by {steps[0]}")
        if len(steps) > 1 and name not in shared:
            _fail(f"buffer {name!r} has several writers: {', '.join(steps)}")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row is: the block it goes to next (None: the first one) and by which of its edges.

    Of a row that has left, ``edge`` is the exit. ``opens`` is what the last route has set for it.
    """

    next: int | None
    edge: int
    opens: tuple[str, int] | None = None


_Written: TypeAlias = frozenset[str]
_Rows: TypeAlias = Mapping[_Place, _Written]


@dataclass(frozen=True)
class _Walk:
    """Follows one row, any row, through the plan: where it may be, and what was surely written for it."""

    plan: Plan

    def scope(self, scope: Scope, rows: _Rows) -> dict[_Place, _Written]:
        setters: dict[str, Step] = {}
        now = dict(rows)
        for step in scope:
            if (condition := condition_set(step)) is not None:
                setters[condition] = step
            if isinstance(step, Conditional):
                now = self._conditional(step, setters[step.condition], now)
            else:
                now = self._kernel(step, now)
        return now

    def _kernel(self, step: Step, rows: _Rows) -> dict[_Place, _Written]:
        after: dict[_Place, _Written] = {}
        for place, written in rows.items():
            for there, more in self._one(step, place, written):
                after[there] = after[there] & more if there in after else more
        return after

    def _one(self, step: Step, place: _Place, written: _Written) -> Iterator[tuple[_Place, _Written]]:
        """What a step does for a row at ``place``: where it is afterwards, and what is written."""
        if isinstance(step, Compact | Guard):
            if NEXT not in written:
                _fail("next is not written yet", step)
            found = buffers_written(step) if place.next == step.target else ()
            yield place, written | {*found}
            return
        if isinstance(step, RunBlock | Gather | Route) and self._at(place) != step.block:
            yield place, written  # others' rows are not touched
            return
        reads = set(buffers_read(step))
        if isinstance(step, Gather):
            reads -= {name for move in step.moves for name in move.sources}
            reads |= {move.sources[place.edge] for move in step.moves}
        if isinstance(step, Route):
            reads -= {source for way in step.ways for source, _ in way.copies}
        parameters = {name for name in reads if self.plan.buffers[name].parameter is not None}
        if missing := sorted(reads - parameters - written):
            _fail(f"reads {missing}, which nothing has written on a way to here", step)
        if not isinstance(step, Route):
            yield place, written | {*buffers_written(step)}
            return
        for way in step.ways:
            if missing := [source for source, _ in way.copies if source not in written]:
                _fail(f"returns {missing}, which nothing has written on a way to here", step)
            left = way.target == LEFT
            opens = None if step.condition is None else (step.condition, way.arm)
            more = {target for _, target in way.copies} | ({EXIT_INDEX} if left else set())
            there = _Place(way.target, way.exit if left else way.edge, opens)
            yield there, written | {*_STATE} | more

    def _conditional(self, step: Conditional, setter: Step, rows: _Rows) -> dict[_Place, _Written]:
        after: dict[_Place, _Written] = {}

        def add(found: _Rows) -> None:
            for place, written in found.items():
                after[place] = after[place] & written if place in after else written

        if isinstance(setter, PickBucket):
            for body in step.bodies:  # whichever it is
                add(self.scope(body, rows))
            return after
        for place, written in rows.items():
            opened = self._body(step, setter, place)
            add({place: written} if opened is None else self.scope(step.bodies[opened], {place: written}))
        return after

    def _body(self, step: Conditional, setter: Step, place: _Place) -> int | None:
        """The body that a row opens; None: none by itself (what others open does not touch it)."""
        if isinstance(setter, Guard | Compact):
            return 0 if place.next == setter.target else None
        if place.opens is None or place.opens[0] != step.condition:
            return None
        value = place.opens[1]
        if step.kind == "if":
            return 0 if value else None
        return value if value < len(step.bodies) else None

    def _at(self, place: _Place) -> str:
        return _block(self.plan, 0 if place.next is None else place.next)


def _block(plan: Plan, index: int | None) -> str:
    return "" if index is None or index == LEFT else plan.blocks[index]


def _fail(what: str, step: Step | None = None) -> NoReturn:
    raise VerifyError(what, where="plan" if step is None else f"plan, {describe(step)}")
