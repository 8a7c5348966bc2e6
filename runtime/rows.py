"""Runs any program on any batch: gather, run, route, scatter.

Blocks are visited in topological order, each once, on all the rows that arrived there. A row's answer
is what it would have got in a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import (
    BATCH,
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    EngineSignature,
    LinearGate,
    Return,
    Successor,
    ValueSpec,
    engine_signature,
    successors,
    taken_along,
)
from exitcompiler.errors import VerifyError
from exitcompiler.runtime.backends import Array, Engine, numpy_dtype

__all__ = [
    "EXIT_INDEX",
    "BatchExecutor",
    "EngineSource",
    "gate_parameters",
    "require_row_outputs",
    "single_file_signature",
]

EXIT_INDEX = "exit_index"

EngineSource: TypeAlias = Callable[[BlockInterface, "int | None"], Engine]
"""Gives the engine of a block, for one batch size or for any (None)."""

_Runner: TypeAlias = Callable[[Sequence[Array]], Sequence[Array]]
_Rows: TypeAlias = "NDArray[np.intp] | None"


@dataclass(frozen=True, slots=True)
class _Arrivals:
    """Rows that come to a block together: which ones (None: all, in order), and the params they bring."""

    rows: _Rows
    values: list[Array]


@dataclass(slots=True)
class _Step:
    block: BlockInterface
    run: _Runner | None
    outputs: tuple[str, ...]
    gate: list[Array]
    ways: tuple[Successor, ...]
    fixed: int | None  # the edge every row takes, if there is one
    arrivals: list[_Arrivals] = field(default_factory=list)


class BatchExecutor:
    """Runs a program on batches of any size. For one thread at a time.

    Buffers for gathered rows are kept and grow to the largest batch seen; what is returned is fresh.

    Args:
        flow: The program.
        engines: Where engines come from; asked once for each block that needs one.

    Raises:
        VerifyError: An output has no rows.
    """

    def __init__(self, flow: ControlFlow, engines: EngineSource) -> None:
        require_row_outputs(flow)
        self._flow = flow
        self._steps = [_step(block, engines) for block in flow.blocks]
        self._by_name = {step.block.name: step for step in self._steps}
        self._exit_index = {name: i for i, name in enumerate(flow.exits)}
        self._buffers: dict[tuple[str, int, int], Array] = {}

    def run(self, inputs: Sequence[Array], rows: int) -> tuple[list[Array], NDArray[np.int32]]:
        """Answer a batch.

        Args:
            inputs: One array per program input, in order, checked.
            rows: The batch size, at least 1.

        Returns:
            The program's outputs, in order, then what it carries, where only the rows that left at an exit
            that carries are set; and the index of each row's exit, ``int32[rows]``.
        """
        outputs: list[Array] = [
            np.empty((rows, *map(int, spec.shape[1:])), numpy_dtype(spec))
            for spec in (*self._flow.outputs.values(), *self._flow.carried.values())
        ]
        exit_index = np.empty(rows, np.int32)
        for step in self._steps:
            step.arrivals.clear()
        self._steps[0].arrivals.append(_Arrivals(None, list(inputs)))
        for step in self._steps:
            groups = _merge(step, rows)
            step.arrivals = []  # keeps nobody's rows alive longer than needed
            for number, group in enumerate(groups):
                values = dict(zip(step.block.params, group.values, strict=True))
                if step.run is not None:
                    results = step.run([*group.values, *step.gate])
                    if len(groups) > 1:
                        results = [np.array(result) for result in results]
                    values.update(zip(step.outputs, results, strict=True))
                self._route(step, number, group.rows, values, outputs, exit_index)
        return outputs, exit_index

    def _route(
        self,
        step: _Step,
        group: int,
        rows: _Rows,
        values: Mapping[str, Array],
        outputs: Sequence[Array],
        exit_index: NDArray[np.int32],
    ) -> None:
        """Send each row down the edge its action names."""
        if step.fixed is not None:
            way = step.ways[step.fixed]
            self._follow(way, rows, [values[name] for name in taken_along(way)], outputs, exit_index)
            return
        action = values[step.outputs[-1]]
        for index, way in enumerate(step.ways):
            chosen = np.flatnonzero(action == index)
            if chosen.size == 0:
                continue
            names = taken_along(way)
            sent = [values[name] for name in names]
            if chosen.size == action.size:
                self._follow(way, rows, sent, outputs, exit_index)
                continue
            specs = step.block.values
            taken = [
                self._take((step.block.name, group * len(step.ways) + index, position), value, chosen)
                if specs[name].batch_axis == 0
                else value
                for position, (name, value) in enumerate(zip(names, sent, strict=True))
            ]
            self._follow(way, chosen if rows is None else rows[chosen], taken, outputs, exit_index)

    def _follow(
        self,
        way: Successor,
        rows: _Rows,
        values: list[Array],
        outputs: Sequence[Array],
        exit_index: NDArray[np.int32],
    ) -> None:
        if not isinstance(way, Return):
            self._by_name[way.target].arrivals.append(_Arrivals(rows, values))
            return
        where: slice | NDArray[np.intp] = slice(None) if rows is None else rows
        for output, value in zip(outputs, values, strict=False):  # not every exit carries something
            output[where] = value
        exit_index[where] = self._exit_index[way.exit]

    def _take(self, key: tuple[str, int, int], value: Array, chosen: NDArray[np.intp]) -> Array:
        """Gather rows into a kept buffer: a fresh one would pay a page fault for every 4 kB."""
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < len(value):
            buffer = self._buffers[key] = np.empty(value.shape, value.dtype)
        # "clip" lets numpy write straight into `out`; the indices are in range anyway.
        return np.take(value, chosen, axis=0, out=buffer[: chosen.size], mode="clip")


def _step(block: BlockInterface, engines: EngineSource) -> _Step:
    signature = engine_signature(block)
    terminator = block.terminator
    ways = successors(terminator)
    fixed: int | None = 0
    if isinstance(terminator, Branch):
        fixed = terminator.gate.action if isinstance(terminator.gate, ConstantGate) else None
    return _Step(
        block=block,
        run=engines(block, None).runner() if signature.outputs else None,
        outputs=tuple(signature.outputs),
        gate=gate_parameters(block),
        ways=ways,
        fixed=fixed,
    )


def gate_parameters(block: BlockInterface) -> list[Array]:
    """What a block's engine takes after its params: ``[weight, bias]`` in float32, or nothing."""
    terminator = block.terminator
    if isinstance(terminator, Branch) and isinstance(terminator.gate, LinearGate):
        gate = terminator.gate
        weight = np.array(gate.weight, np.float32).reshape(gate.actions, -1)
        return [weight, np.array(gate.bias, np.float32)]
    return []


def require_row_outputs(flow: ControlFlow) -> None:
    """Refuse a program that returns something that does not belong to rows.

    Raises:
        VerifyError: Naming the output.
    """
    for name, spec in flow.outputs.items():
        if spec.batch_axis != 0:
            raise VerifyError(f"output {name!r}: {spec} has no batch dimension, so rows cannot differ in it")


def single_file_signature(flow: ControlFlow) -> EngineSignature:
    """What the one-file model takes and gives: the program's outputs, then each row's exit."""
    return EngineSignature(dict(flow.inputs), {**flow.outputs, EXIT_INDEX: ValueSpec((BATCH,), "int32")})


def _merge(step: _Step, rows: int) -> list[_Arrivals]:
    """Rows from several edges as one group, in row order.

    Only groups that bring different values for a param without rows stay apart.
    """
    arrivals = step.arrivals
    if len(arrivals) < 2:
        return arrivals
    shared = [i for i, spec in enumerate(step.block.params.values()) if spec.batch_axis is None]
    groups: list[list[_Arrivals]] = []
    for arrival in arrivals:
        for group in groups:
            if all(_same(group[0].values[i], arrival.values[i]) for i in shared):
                group.append(arrival)
                break
        else:
            groups.append([arrival])
    return [_join(group, shared, rows) for group in groups]


def _same(a: Array, b: Array) -> bool:
    return a is b or np.array_equal(a, b)


def _join(group: Sequence[_Arrivals], shared: Sequence[int], rows: int) -> _Arrivals:
    if len(group) == 1:
        return group[0]
    parts = [part.rows for part in group if part.rows is not None]  # all rows come alone
    together = np.sort(np.concatenate(parts))
    places = [np.searchsorted(together, part) for part in parts]
    values: list[Array] = []
    for i, first in enumerate(group[0].values):
        if i in shared:
            values.append(first)
            continue
        merged = np.empty((together.size, *first.shape[1:]), first.dtype)
        for arrival, place in zip(group, places, strict=True):
            merged[place] = arrival.values[i]
        values.append(merged)
    return _Arrivals(None if together.size == rows else together, values)
