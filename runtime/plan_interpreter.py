"""Runs a plan in numpy: slow and obvious, so that its logic can be proven where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import BlockInterface, ControlFlow, ValueSpec
from exitcompiler.errors import VerifyError
from exitcompiler.runtime.backends import Array, Engine, numpy_dtype
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
)
from exitcompiler.runtime.plan_checks import buffers_written, describe
from exitcompiler.runtime.rows import gate_parameters

__all__ = ["PlanInterpreter"]

_POISON = 0xA5


class PlanInterpreter:
    """Does what a launch of the plan would do, one step after another.

    Every launch begins with poisoned buffers, and whatever is read has to have been written since: what
    `verify_plan` says of all launches is checked here on this one.

    Args:
        plan: Well-formed.
        flow: The program that it was made from.
        engines: Block -> engine, run on exactly the rows of the bucket.
    """

    def __init__(self, plan: Plan, flow: ControlFlow, engines: Callable[[BlockInterface], Engine]) -> None:
        self._plan = plan
        self._engines = {block.name: engines(block) for block in flow.blocks if _runs(plan.root, block.name)}
        self.buffers: dict[str, Array] = {
            name: np.empty(buffer.shape, numpy_dtype(ValueSpec(buffer.shape, buffer.dtype)))
            for name, buffer in plan.buffers.items()
        }
        self._parameters: dict[str, Array] = {}
        for name, buffer in plan.buffers.items():
            if buffer.parameter is not None:
                block, which = buffer.parameter
                weight, bias = gate_parameters(flow.block(block))
                self._parameters[name] = weight if which == "gate_weight" else bias
        self._written: set[str] = set()
        self._conditions: dict[str, int] = {}
        self.ran: list[tuple[str, int]] = []
        """Which blocks the last launch ran, on how many rows each, padding included."""

    def run(self, inputs: Sequence[Array], rows: int) -> tuple[list[Array], NDArray[np.int32]]:
        """Answer up to ``capacity`` rows; as `BatchExecutor.run`.

        Raises:
            VerifyError: A step reads what nothing has written: a bug of the plan.
        """
        self._begin(inputs, rows)
        self._scope(self._plan.root)
        exits = np.array(self._read(EXIT_INDEX, None)[:rows], np.int32)
        outputs = []
        for name in self._plan.outputs:
            buffer = self.buffers[name]
            outputs.append(np.array(buffer[:rows] if self._plan.buffers[name].rows else buffer))
        return outputs, exits

    def _begin(self, inputs: Sequence[Array], rows: int) -> None:
        self.ran = []
        self._conditions = {}
        for name, buffer in self.buffers.items():
            if name in self._parameters:
                buffer[...] = self._parameters[name]
            else:
                buffer.view(np.uint8).fill(_POISON) if buffer.ndim else buffer.fill(_POISON)
        for name, array in zip(self._plan.inputs, inputs, strict=True):
            if self._plan.buffers[name].rows:
                self.buffers[name][:rows] = array
                self.buffers[name][rows:] = array[0]
            else:
                self.buffers[name][...] = array
        self.buffers[COUNT][0] = rows
        self._written = {*self._parameters, *self._plan.inputs, COUNT}

    def _scope(self, scope: Scope) -> None:
        for step in scope:
            if isinstance(step, Conditional):
                value = self._conditions[step.condition]
                body = (value != 0) - 1 if step.kind == "if" else value
                if 0 <= body < len(step.bodies):
                    self._scope(step.bodies[body])
            else:
                self._step(step)
                self._written.update(buffers_written(step))

    def _step(self, step: Step) -> None:
        match step:
            case RunBlock():
                self._run_block(step)
            case Route():
                self._route(step)
            case Gather():
                self._gather(step)
            case Guard():
                self._conditions[step.condition] = int(self._read(NEXT, step)[0] == step.target)
            case Compact():
                self._compact(step)
            case PickBucket():
                count = int(self._read(step.count, step)[0])
                fitting = [index for index, size in enumerate(step.buckets) if size >= count]
                self._conditions[step.condition] = fitting[0]

    def _run_block(self, step: RunBlock) -> None:
        rows = step.rows
        inputs = [self._first(name, rows, step) for name in step.inputs]
        results = self._engines[step.block].run(inputs)
        for name, result in zip(step.outputs, results, strict=True):
            target = self.buffers[name]
            if self._plan.buffers[name].rows:
                target[:rows] = result
            else:
                target[...] = result
        self.ran.append((step.block, rows))

    def _first(self, name: str, rows: int, step: Step) -> Array:
        buffer = self._read(name, step)
        return buffer[:rows] if self._plan.buffers[name].rows else buffer

    def _route(self, step: Route) -> None:
        count = int(self._read(step.count, step)[0])
        if step.rows is None:
            self.buffers[NEXT][count:] = LEFT
            self.buffers[EXIT_INDEX][count:] = -1
        for position in range(count):
            row = position if step.rows is None else int(self._read(step.rows, step)[position])
            action = 0 if step.action is None else int(self._read(step.action, step)[position])
            way = step.ways[action]
            self.buffers[NEXT][row] = way.target
            self.buffers[EDGE][row] = way.edge
            self.buffers[POSITION][row] = position
            self.buffers[EXIT_INDEX][row] = way.exit
            for source, target in way.copies:
                self._copy_row(source, position, target, row, step)
            if step.condition is not None:
                self._conditions[step.condition] = way.arm

    def _compact(self, step: Compact) -> None:
        waiting = np.flatnonzero(self._read(NEXT, step) == step.target)
        self.buffers[step.count][0] = waiting.size
        if waiting.size:
            listed = self.buffers[step.rows]
            listed[: waiting.size] = waiting
            listed[waiting.size :] = waiting[0]
        self._conditions[step.condition] = int(waiting.size > 0)

    def _gather(self, step: Gather) -> None:
        for place in range(step.rows):
            row = 0 if step.list is None else int(self._read(step.list, step)[place])
            edge, position = int(self._read(EDGE, step)[row]), int(self._read(POSITION, step)[row])
            for move in step.moves:
                self._copy_row(move.sources[edge], position, move.target, place, step)

    def _copy_row(self, source: str, position: int, target: str, row: int, step: Step) -> None:
        value = self._read(source, step)
        if self._plan.buffers[source].rows:
            self.buffers[target][row] = value[position]
        else:
            self.buffers[target][...] = value

    def _read(self, name: str, step: Step | None) -> Array:
        if name not in self._written:
            where = "the end" if step is None else describe(step)
            raise VerifyError(f"{name!r} is read before anything has written it", where=f"plan, {where}")
        return self.buffers[name]


def _runs(scope: Scope, block: str) -> bool:
    return any(
        step.block == block if isinstance(step, RunBlock) else any(_runs(body, block) for body in step.bodies)
        for step in scope
        if isinstance(step, RunBlock | Conditional)
    )
