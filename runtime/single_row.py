"""Runs a program on one row: buffers wired once, one engine call per block, nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from exitcompiler.controlflow import (
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    EngineSignature,
    Return,
    Successor,
    ValueSpec,
    engine_signature,
    successors,
    taken_along,
)
from exitcompiler.runtime.backends import Array, Engine, numpy_dtype
from exitcompiler.runtime.rows import EngineSource, gate_parameters, require_row_outputs

__all__ = ["OneFileExecutor", "SingleRowExecutor", "aligned_empty", "bound_stopwatch"]

_ALIGNMENT_BYTES = 64


def aligned_empty(spec: ValueSpec, rows: int) -> Array:
    """An uninitialised C-contiguous array whose memory starts at a cache line.

    Args:
        spec: Its type.
        rows: What "batch" stands for.
    """
    shape = [rows if axis == 0 and spec.batch_axis == 0 else int(n) for axis, n in enumerate(spec.shape)]
    dtype = numpy_dtype(spec)
    size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[start : start + size_bytes].view(dtype).reshape(shape)


def bound_stopwatch(engine: Engine, inputs: Sequence[Array]) -> Callable[[], float]:
    """`Engine.stopwatch` for every engine on the CPU: a bound call, on the clock of the host."""
    signature = engine.signature
    specs = signature.inputs.values()
    rows = next((len(array) for array, spec in zip(inputs, specs, strict=True) if spec.batch_axis == 0), 1)
    sources = [aligned_empty(spec, rows) for spec in specs]
    for buffer, array in zip(sources, inputs, strict=True):
        buffer[...] = array
    targets = [aligned_empty(spec, rows) for spec in signature.outputs.values()]
    call = engine.bind(sources, targets)

    def run_us(_kept_alive: object = (sources, targets)) -> float:
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e3

    return run_us


@dataclass(slots=True)
class _Way:
    """An edge, wired: copy what a join needs, then go to ``step``, or answer with ``outputs``."""

    copies: tuple[tuple[Array, Array], ...] = ()
    step: _Step | None = None
    outputs: tuple[Array, ...] = ()
    exit_index: int = -1


@dataclass(slots=True)
class _Step:
    run: Callable[[], object] | None
    action: Callable[[], int] | None  # None: always the first way
    ways: tuple[_Way, ...]
    buffers: tuple[Array, ...]  # kept alive: engines know them by address


@dataclass(slots=True)
class _Wiring:
    """The buffer of every value, by block. Blocks with one way in read what the block before wrote."""

    params: dict[str, list[Array]] = field(default_factory=dict)
    values: dict[str, dict[str, Array]] = field(default_factory=dict)


class SingleRowExecutor:
    """Runs a program on one row at a time. For one thread at a time.

    The row goes into ``inputs``; what `run` returns are internal buffers, valid until it is called
    again.

    Args:
        flow: The program.
        engines: Where engines come from; asked once for each block that needs one.

    Raises:
        VerifyError: An output has no rows.
    """

    def __init__(self, flow: ControlFlow, engines: EngineSource) -> None:
        require_row_outputs(flow)
        wiring = _wire(flow)
        self.inputs: tuple[Array, ...] = tuple(wiring.params[flow.entry.name])
        exits = {name: i for i, name in enumerate(flow.exits)}
        steps: dict[str, _Step] = {}
        for block in reversed(flow.blocks):  # targets before sources
            values = wiring.values[block.name]
            signature = engine_signature(block)
            sources = [values[name] for name in block.params] + gate_parameters(block)
            targets = [values[name] for name in signature.outputs]
            run = engines(block, 1).bind(sources, targets) if signature.outputs else None
            taken, action = successors(block.terminator), None
            if isinstance(block.terminator, Branch):
                gate = block.terminator.gate
                if isinstance(gate, ConstantGate):
                    taken = (taken[gate.action],)
                else:
                    action = values[tuple(signature.outputs)[-1]].item
            ways = tuple(_connect(way, values, wiring, steps, exits) for way in taken)
            steps[block.name] = _Step(run, action, ways, (*sources, *targets))
        self._entry = steps[flow.entry.name]
        self._steps = tuple(steps.values())

    def run(self) -> tuple[tuple[Array, ...], int]:
        """Answer the row in ``inputs``.

        Returns:
            The outputs, then what the exit carries (internal buffers with a batch of 1), and the index of
            the exit taken.
        """
        step: _Step | None = self._entry
        while step is not None:
            if step.run is not None:
                step.run()
            way = step.ways[0 if step.action is None else step.action()]
            for target, source in way.copies:
                target[...] = source
            step = way.step
        return way.outputs, way.exit_index


def _wire(flow: ControlFlow) -> _Wiring:
    wiring = _Wiring()
    wiring.params[flow.entry.name] = [aligned_empty(spec, 1) for spec in flow.inputs.values()]
    arriving: dict[str, list[list[Array]]] = {}
    for block in flow.blocks:
        if block.name not in wiring.params:
            columns = zip(block.params.values(), zip(*arriving[block.name], strict=True), strict=True)
            wiring.params[block.name] = [
                sources[0] if all(s is sources[0] for s in sources) else aligned_empty(spec, 1)
                for spec, sources in columns
            ]
        values = dict(zip(block.params, wiring.params[block.name], strict=True))
        signature: EngineSignature = engine_signature(block)
        values.update({name: aligned_empty(spec, 1) for name, spec in signature.outputs.items()})
        wiring.values[block.name] = values
        for way in successors(block.terminator):
            if isinstance(way, Edge):
                arriving.setdefault(way.target, []).append([values[name] for name in way.values])
    return wiring


def _connect(
    way: Successor,
    values: Mapping[str, Array],
    wiring: _Wiring,
    steps: Mapping[str, _Step],
    exits: Mapping[str, int],
) -> _Way:
    sources: Sequence[Array] = [values[name] for name in taken_along(way)]
    if isinstance(way, Return):
        return _Way(outputs=tuple(sources), exit_index=exits[way.exit])
    targets = wiring.params[way.target]
    copies = tuple((t, s) for t, s in zip(targets, sources, strict=True) if t is not s)
    return _Way(copies=copies, step=steps[way.target])


class OneFileExecutor:
    """Runs a whole program as one engine on one row. For one thread at a time.

    Args:
        engine: Of the one-file model: the program's outputs, then the exit index.
    """

    def __init__(self, engine: Engine) -> None:
        signature = engine.signature
        self.inputs: tuple[Array, ...] = tuple(aligned_empty(spec, 1) for spec in signature.inputs.values())
        *outputs, exit_index = (aligned_empty(spec, 1) for spec in signature.outputs.values())
        self._outputs: tuple[Array, ...] = tuple(outputs)
        self._call = engine.bind(self.inputs, [*outputs, exit_index])
        self._exit_index = exit_index

    def run(self) -> tuple[tuple[Array, ...], int]:
        """Answer the row in ``inputs``; see `SingleRowExecutor.run`."""
        self._call()
        return self._outputs, int(self._exit_index.item())
