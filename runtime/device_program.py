"""A program on a GPU: its memory, its captured blocks, and the one graph that a call launches."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import GATE_WEIGHT, BlockInterface, ControlFlow, ValueSpec
from exitcompiler.errors import DeviceError
from exitcompiler.runtime.backends import Array, numpy_dtype
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_graphs import BuiltGraph, build
from exitcompiler.runtime.cuda_kernels import compile_kernels
from exitcompiler.runtime.device import (
    Captured,
    DeviceArray,
    DeviceEngine,
    keep_alive,
    size_bytes,
    undisturbed,
)
from exitcompiler.runtime.graph_plan import COUNT, EXIT_INDEX, Buffer, Plan, RunBlock, steps_of
from exitcompiler.runtime.plan_checks import verify_plan
from exitcompiler.runtime.planning import plan_program
from exitcompiler.runtime.rows import gate_parameters

__all__ = ["DeviceEngineSource", "DeviceProgram", "free_unless_forked"]

_ALIGNMENT_BYTES: Final = 256

DeviceEngineSource: TypeAlias = Callable[[BlockInterface], DeviceEngine]
"""Gives the engine of a block."""


class DeviceProgram:
    """A program for up to ``capacity`` rows on a device: memory, captured blocks, one executable graph.

    What it holds on the device is freed by `close`, or when nobody has it any more.

    Args:
        flow: The program.
        engines: Block -> engine.
        driver: The device.
        buckets: The numbers of rows that blocks are captured for; the last one is the most that a call has.
        compile_image: Architecture -> the kernels as a module to load.

    Raises:
        LoweringError: A block cannot be captured, or the graph not be built; nothing is left behind.
        DeviceError: The device refuses, or has no memory left; likewise.
    """

    def __init__(
        self,
        flow: ControlFlow,
        engines: DeviceEngineSource,
        driver: Driver,
        buckets: Sequence[int],
        compile_image: Callable[[str], bytes] = compile_kernels,
    ) -> None:
        self.plan: Plan = plan_program(flow, buckets[-1], buckets)
        verify_plan(self.plan, len(flow.outputs))
        self._driver = driver
        with contextlib.ExitStack() as stack:
            self._memory = _Memory(self.plan, driver, stack)
            _upload_parameters(flow, self.plan, self._memory, driver)
            captured = _capture_blocks(flow, self.plan, engines, self._memory, stack)
            module = driver.load_module(compile_image(driver.architecture))
            stack.callback(driver.unload_module, module)
            self.graph: BuiltGraph = build(self.plan, driver, self._memory.addresses, captured, module)
            stack.callback(self.graph.close)
            self._host = _HostSide(self.plan, driver, stack)
            self._stream = driver.stream
            self._events = (_event(driver, stack), _event(driver, stack))
            self._rows = -1
            stack.callback(driver.synchronize, self._stream)  # the first thing to do before all is freed
            resources = stack.pop_all()
        self._finalizer = weakref.finalize(self, free_unless_forked, resources, driver)
        self._finalizer.atexit = False  # the device goes with the process

    @property
    def memory_bytes(self) -> int:
        """Device memory of values and parameters; what blocks work with comes on top."""
        return self._memory.size_bytes

    def close(self) -> None:
        """Free everything on the device."""
        self._finalizer()

    def run(self, inputs: Sequence[Array], rows: int) -> tuple[list[Array], NDArray[np.int32]]:
        """Answer rows in the host's memory: upload, one launch, download; as `BatchExecutor.run`."""
        driver, stream, plan = self._driver, self._stream, self.plan
        with driver.current():
            self._upload(inputs, rows)
            self.graph.launch(stream)
            for name in (*plan.outputs, EXIT_INDEX):
                driver.download(self._host.rows(name, rows), self._memory.addresses[name], stream)
            driver.synchronize(stream)
        outputs = [self._host.rows(name, rows).copy() for name in plan.outputs]
        exits = np.array(self._host.rows(EXIT_INDEX, rows), np.int32)
        if exits.min() < 0:  # what the kernel that routes writes for an action that names no way
            raise DeviceError(
                f"{int((exits < 0).sum())} of {rows} rows were sent nowhere: an engine gave no valid action",
                remedy="run `make gpu-check`, and report this; another backend will do meanwhile",
            )
        return outputs, exits

    def enqueue(self, inputs: Sequence[int], outputs: Sequence[int], rows: int, stream: int) -> None:
        """Answer rows on the device, in the order of a stream; does not wait for it.

        Args:
            inputs: Addresses, C-contiguous, one per program input.
            outputs: Addresses of what is written: the plan's outputs, then the exit index.
            rows: Up to the capacity.
            stream: The caller's; work given to it later sees the outputs.
        """
        driver, own, plan = self._driver, self._stream, self.plan
        before, after = self._events
        with driver.current():
            driver.record(before, stream)
            driver.wait(own, before)
            for name, source in zip(plan.inputs, inputs, strict=True):
                driver.copy(self._memory.addresses[name], source, self._memory.bytes_of(name, rows), own)
            self._set_count(rows)
            self.graph.launch(own)
            for name, target in zip((*plan.outputs, EXIT_INDEX), outputs, strict=True):
                driver.copy(target, self._memory.addresses[name], self._memory.bytes_of(name, rows), own)
            driver.record(after, own)
            driver.wait(stream, after)

    def launch(self, stream: int) -> None:
        """Launch the graph alone, on what the inputs hold now: for measuring.

        On another stream than `Driver.stream` nothing else may run: programs share memory to work in.
        """
        self.graph.launch(stream)

    def stage(self, inputs: Sequence[Array], rows: int) -> None:
        """Bring inputs to the device, for `launch`, and wait until they are there."""
        with self._driver.current():
            self._upload(inputs, rows)
            self._driver.synchronize(self._stream)

    def _upload(self, inputs: Sequence[Array], rows: int) -> None:
        for name, array in zip(self.plan.inputs, inputs, strict=True):
            staged = self._host.rows(name, rows)
            staged[...] = array
            self._driver.upload(self._memory.addresses[name], staged, self._stream)
        self._set_count(rows)

    def _set_count(self, rows: int) -> None:
        if self.plan.capacity > 1 or self._rows != 1:  # of one row it stays as it is
            self._driver.set_word(self._memory.addresses[COUNT], rows, self._stream)
            self._rows = rows


class _Memory:
    """One piece of device memory, and where in it each buffer of a plan lies."""

    def __init__(self, plan: Plan, driver: Driver, stack: contextlib.ExitStack) -> None:
        self._plan = plan
        offsets, total_bytes = {}, 0
        for name, buffer in plan.buffers.items():
            offsets[name] = total_bytes
            total_bytes += -(-_size_bytes(buffer) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.size_bytes = total_bytes
        start = driver.malloc(total_bytes)
        stack.callback(driver.free, start)
        self.addresses = {name: start + offset for name, offset in offsets.items()}
        driver.fill(start, 0, total_bytes, driver.stream)  # rows that are none begin as zeros

    def array(self, name: str, rows: int) -> DeviceArray:
        """The first ``rows`` rows of a buffer, or all of one that has none."""
        buffer = self._plan.buffers[name]
        shape = (rows, *buffer.shape[1:]) if buffer.rows else buffer.shape
        return DeviceArray(self.addresses[name], shape, buffer.dtype)

    def bytes_of(self, name: str, rows: int) -> int:
        """The size of that."""
        return _size_bytes(self._plan.buffers[name], rows)


class _HostSide:
    """Page-locked copies of what crosses between host and device."""

    def __init__(self, plan: Plan, driver: Driver, stack: contextlib.ExitStack) -> None:
        self._plan = plan
        self._views: dict[str, Array] = {}
        self._parts: dict[tuple[str, int], Array] = {}
        for name in (*plan.inputs, *plan.outputs, EXIT_INDEX):
            buffer = plan.buffers[name]
            memory = driver.host_alloc(max(_size_bytes(buffer), 1))
            stack.callback(driver.host_free, memory)
            self._views[name] = memory.view(_dtype(buffer)).reshape(buffer.shape)

    def rows(self, name: str, rows: int) -> Array:
        """The first rows of one, or all of one that has none; the same object every time."""
        key = (name, rows)
        if key not in self._parts:
            view = self._views[name]
            self._parts[key] = view[:rows] if self._plan.buffers[name].rows else view
        return self._parts[key]


def _upload_parameters(flow: ControlFlow, plan: Plan, memory: _Memory, driver: Driver) -> None:
    """Fill what no launch writes, and wait until the memory is as it shall be before blocks are captured."""
    for name, buffer in plan.buffers.items():
        if buffer.parameter is not None:
            block, which = buffer.parameter
            weight, bias = gate_parameters(flow.block(block))
            driver.upload(memory.addresses[name], weight if which == GATE_WEIGHT else bias, driver.stream)
    driver.synchronize(driver.stream)


def _capture_blocks(
    flow: ControlFlow,
    plan: Plan,
    engines: DeviceEngineSource,
    memory: _Memory,
    stack: contextlib.ExitStack,
) -> dict[tuple[str, int], Captured]:
    """Every block for every bucket that the plan runs it in."""
    loaded: dict[str, DeviceEngine] = {}
    captured: dict[tuple[str, int], Captured] = {}
    for step in steps_of(plan.root):
        if not isinstance(step, RunBlock):
            continue
        if step.block not in loaded:
            loaded[step.block] = engines(flow.block(step.block))
        with undisturbed():
            found = loaded[step.block].capture(
                step.rows,
                [memory.array(name, step.rows) for name in step.inputs],
                [memory.array(name, step.rows) for name in step.outputs],
            )
        if found.destroy is not None:
            stack.callback(found.destroy)
        stack.callback(keep_alive, found.keep, loaded[step.block])
        captured[step.block, step.rows] = found
    return captured


def free_unless_forked(resources: contextlib.ExitStack, driver: Driver) -> None:
    """Free what is on the device; in a child process it is the parent's."""
    if not driver.forked:
        resources.close()


def _event(driver: Driver, stack: contextlib.ExitStack) -> int:
    event = driver.create_event()
    stack.callback(driver.destroy_event, event)
    return event


def _dtype(buffer: Buffer) -> np.dtype[np.generic]:
    return numpy_dtype(ValueSpec(buffer.shape, buffer.dtype))


def _size_bytes(buffer: Buffer, rows: int | None = None) -> int:
    shape = buffer.shape if rows is None or not buffer.rows else (rows, *buffer.shape[1:])
    return size_bytes(shape, buffer.dtype)
