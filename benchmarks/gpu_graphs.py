"""Contenders that are CUDA graphs: the program in one launch, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gpu_lab import Lab

from exitcompiler.controlflow import (
    ACTION,
    GATE_BIAS,
    GATE_WEIGHT,
    Branch,
    Edge,
    EngineSignature,
    LinearGate,
    Return,
    ValueSpec,
    engine_signature,
    successors,
)
from exitcompiler.program import Block, Program
from exitcompiler.runtime.cuda_executor import DeviceExecutor
from exitcompiler.runtime.device import Captured, DeviceArray, keep_alive
from exitcompiler.runtime.rows import gate_parameters

__all__ = ["Arrays", "ChainGraph", "DeviceProgramCall", "HostBranching", "device_executor"]

Array = npt.NDArray[np.float32]

_BYTES: Final = {"bfloat16": 2}


def device_executor(lab: Lab, program: Program, max_rows: int, driver: Any = None) -> DeviceExecutor:
    """What runs a program; freed with the lab.

    Args:
        lab: Where.
        program: With bodies.
        max_rows: Rows of one launch.
        driver: In the place of the lab's: one that counts what it is asked for.
    """
    executor = DeviceExecutor(
        program,
        lambda block: lab.engine(program.block(block.name)),
        lab.driver if driver is None else driver,
        max_rows=max_rows,
        compile_image=lab.compile_image,
    )
    lab.owned.callback(executor.close)
    return executor


class DeviceProgramCall:
    """The program: one launch, every decision on the device.

    Args:
        lab: Where.
        executor: What runs it.
        rows: Of a batch.
    """

    def __init__(self, lab: Lab, executor: DeviceExecutor, rows: int) -> None:
        self._lab = lab
        self._rows = rows
        self._program = executor.program(rows)

    def stage(self, x: Array) -> None:
        """See `Contender`."""
        self._program.stage([x], self._rows)

    def launch(self) -> None:
        """See `Contender`."""
        self._program.launch(self._lab.stream)


class Arrays:
    """Device memory for the values of a chain of blocks; a param lies where the block before it made it.

    Args:
        lab: Where.
        blocks: A chain, or one block.
        rows: Of a batch, at most.
    """

    def __init__(self, lab: Lab, blocks: Sequence[Block], rows: int) -> None:
        self._lab = lab
        self._rows = rows
        self._specs: dict[tuple[str, str], ValueSpec] = {}
        self._address: dict[tuple[str, str], int] = {}
        named = {block.name: block for block in blocks}
        for block in blocks:
            signature = engine_signature(block)
            for name, spec in (signature.inputs | signature.outputs | dict(block.params)).items():
                self._specs[block.name, name] = spec
                if (block.name, name) not in self._address:
                    self._address[block.name, name] = self._new(block, name, spec)
            for way in successors(block.terminator):
                if isinstance(way, Edge) and way.target in named:
                    for value, param in zip(way.values, named[way.target].params, strict=True):
                        self._address[way.target, param] = self._address[block.name, value]

    def of(self, block: Block, rows: int) -> tuple[list[DeviceArray], list[DeviceArray]]:
        """Inputs and outputs of a block's engine, for this many rows."""
        signature: EngineSignature = engine_signature(block)
        inputs = [self.one(block.name, name, rows) for name in signature.inputs]
        return inputs, [self.one(block.name, name, rows) for name in signature.outputs]

    def one(self, block: str, name: str, rows: int) -> DeviceArray:
        """The first rows of a value."""
        spec = self._specs[block, name]
        return DeviceArray(self._address[block, name], _shape(spec, rows), spec.dtype)

    def _new(self, block: Block, name: str, spec: ValueSpec) -> int:
        driver, stream = self._lab.driver, self._lab.stream
        shape = _shape(spec, self._rows)
        size_bytes = int(np.prod(shape, dtype=np.int64)) * _item_bytes(spec)
        address = driver.malloc(size_bytes)
        self._lab.owned.callback(driver.free, address)
        driver.fill(address, 0, size_bytes, stream)
        if name in (GATE_WEIGHT, GATE_BIAS):
            weight, bias = gate_parameters(block)
            driver.upload(address, weight if name == GATE_WEIGHT else bias, stream)
        self._lab.wait()
        return address


class ChainGraph:
    """Blocks one after another as one plain CUDA graph, nothing decided: a prefix, a whole network, an ideal.

    Args:
        lab: Where.
        blocks: A chain, or one block.
        rows: For each block, how many rows it runs on; the first ones of what it reads, whichever they are.
    """

    def __init__(self, lab: Lab, blocks: Sequence[Block], rows: Sequence[int]) -> None:
        driver = lab.driver
        self._lab = lab
        arrays = Arrays(lab, blocks, max(rows))
        self._input = arrays.one(blocks[0].name, next(iter(blocks[0].params)), rows[0])
        graph = driver.create_graph()
        lab.owned.callback(driver.destroy_graph, graph)
        last: list[int] = []
        for block, count in zip(blocks, rows, strict=True):
            captured = _capture(lab, block, arrays, count)
            last = [driver.add_child(graph, last, captured.graph)]
        self._executable = _instantiate(lab, graph)

    def stage(self, x: Array) -> None:
        """See `Contender`."""
        self._lab.driver.upload(self._input.address, np.ascontiguousarray(x), self._lab.stream)
        self._lab.wait()

    def launch(self) -> None:
        """See `Contender`."""
        self._lab.driver.launch(self._executable, self._lab.stream)


@dataclass(frozen=True)
class _Stop:
    """A block of a program whose host decides: its graph, its action, and the ways on from there."""

    executable: int
    action: int | None
    ways: tuple[str | None, ...]


class HostBranching:
    """A graph a block; after each the host downloads the action, waits for it, and launches the next one.

    Args:
        lab: Where.
        program: A chain.
    """

    def __init__(self, lab: Lab, program: Program) -> None:
        driver = lab.driver
        self._lab = lab
        arrays = Arrays(lab, program.blocks, 1)
        self._input = arrays.one(program.entry.name, next(iter(program.inputs)), 1)
        memory = driver.host_alloc(256)
        lab.owned.callback(driver.host_free, memory)
        self._action = memory[:4].view(np.int32)
        self._entry = program.entry.name
        self._stops: dict[str, _Stop] = {}
        for block in program.blocks:
            captured = _capture(lab, block, arrays, 1)
            ways = tuple(None if isinstance(w, Return) else w.target for w in successors(block.terminator))
            decides = isinstance(block.terminator, Branch) and isinstance(block.terminator.gate, LinearGate)
            action = arrays.one(block.name, ACTION, 1).address if decides else None
            self._stops[block.name] = _Stop(_instantiate(lab, captured.graph), action, ways)

    def stage(self, x: Array) -> None:
        """See `Contender`."""
        self._lab.driver.upload(self._input.address, np.ascontiguousarray(x), self._lab.stream)
        self._lab.wait()

    def launch(self) -> None:
        """See `Contender`; waits for every decision."""
        driver, stream = self._lab.driver, self._lab.stream
        name: str | None = self._entry
        while name is not None:
            stop = self._stops[name]
            driver.launch(stop.executable, stream)
            way = 0
            if stop.action is not None:
                driver.download(self._action, stop.action, stream)
                driver.synchronize(stream)
                way = int(self._action[0])
            name = stop.ways[way]


def _capture(lab: Lab, block: Block, arrays: Arrays, rows: int) -> Captured:
    engine = lab.engine(block)
    captured = engine.capture(rows, *arrays.of(block, rows))
    if captured.destroy is not None:
        lab.owned.callback(captured.destroy)
    lab.owned.callback(keep_alive, block, engine, captured)
    return captured


def _instantiate(lab: Lab, graph: int) -> int:
    driver = lab.driver
    executable = driver.instantiate(graph)
    lab.owned.callback(driver.destroy_exec, executable)
    driver.upload_exec(executable, lab.stream)
    lab.wait()
    return executable


def _shape(spec: ValueSpec, rows: int) -> tuple[int, ...]:
    return tuple(rows if axis == spec.batch_axis else int(size) for axis, size in enumerate(spec.shape))


def _item_bytes(spec: ValueSpec) -> int:
    return _BYTES.get(spec.dtype) or np.dtype(spec.dtype).itemsize
