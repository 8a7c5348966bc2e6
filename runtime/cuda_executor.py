"""Runs a program on a GPU: one launch a call, every decision made on the device."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import GATE_WEIGHT, BlockInterface, ControlFlow, ValueSpec
from exitcompiler.errors import DeviceError, InputError
from exitcompiler.runtime.backends import Array, numpy_dtype
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_graphs import BuiltGraph, build
from exitcompiler.runtime.cuda_kernels import MOST_ROWS, compile_kernels
from exitcompiler.runtime.device import Captured, DeviceArray, DeviceEngine
from exitcompiler.runtime.graph_plan import COUNT, EXIT_INDEX, Buffer, Plan, RunBlock, steps_of
from exitcompiler.runtime.plan_checks import verify_plan
from exitcompiler.runtime.planning import plan_program
from exitcompiler.runtime.rows import gate_parameters, require_row_outputs

__all__ = ["DEFAULT_MAX_ROWS", "DeviceEngineSource", "DeviceExecutor", "DeviceProgram"]

DEFAULT_MAX_ROWS: Final = 32
"""Rows of one launch, at most, where nobody says otherwise; larger batches are several launches."""

_ALIGNMENT_BYTES: Final = 256

DeviceEngineSource: TypeAlias = Callable[[BlockInterface], DeviceEngine]


class DeviceExecutor:
    """Runs a program on batches, one launch for up to ``max_rows`` rows. For one thread at a time.

    One row has a graph of its own, in which values are read where they were written; for batches there is
    one graph, whose blocks are captured for 1, 2, 4, ... rows. Both are made when they are first needed.

    Args:
        flow: The program.
        engines: Block -> engine, asked once for each block that needs one and each graph.
        driver: The device.
        max_rows: Rows of one launch, at most 1024.
        compile_image: Architecture -> the kernels as a module to load.

    Raises:
        VerifyError: An output has no rows.
        InputError: ``max_rows`` is not in 1..1024.
    """

    def __init__(
        self,
        flow: ControlFlow,
        engines: DeviceEngineSource,
        driver: Driver,
        *,
        max_rows: int = DEFAULT_MAX_ROWS,
        compile_image: Callable[[str], bytes] = compile_kernels,
    ) -> None:
        require_row_outputs(flow)
        if not 1 <= max_rows <= MOST_ROWS:
            raise InputError(f"max_rows={max_rows} is not in 1..{MOST_ROWS}")
        self.max_rows = max_rows
        self._flow = flow
        self._engines = engines
        self._driver = driver
        self._compile_image = compile_image
        self._programs: dict[int, DeviceProgram] = {}

    def run(self, inputs: Sequence[Array], rows: int) -> tuple[list[Array], NDArray[np.int32]]:
        """Answer a batch that lies in the host's memory; as `BatchExecutor.run`.

        Raises:
            LoweringError: A block cannot be captured, or the graph not be built.
            DeviceError: The device refuses, or has no memory left.
        """
        parts = [
            self.program(min(self.max_rows, rows - start)).run(
                self._part(inputs, start, rows), min(self.max_rows, rows - start)
            )
            for start in range(0, rows, self.max_rows)
        ]
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(outputs for outputs, _ in parts), strict=True)
        return [np.concatenate(column) for column in columns], np.concatenate([exits for _, exits in parts])

    def run_device(self, inputs: Sequence[Any], rows: int) -> tuple[list[Any], Any]:
        """Answer a batch of torch tensors on this device, in the order of torch's current stream.

        Returns at once: nothing here waits for the device, and once the graph is built the device's
        allocator is not asked for anything either.

        Args:
            inputs: CUDA tensors, one per program input.
            rows: The batch size.

        Returns:
            The program's outputs, then what it carries; and ``int32[rows]``, each row's exit (-1 where an
            engine went wrong, which `run` would raise for). CUDA tensors that are the caller's own.

        Raises:
            LoweringError: As in `run`.
            DeviceError: As in `run`.
        """
        torch = sys.modules["torch"]  # whoever has a tensor has imported it
        specs = [*self._flow.outputs.values(), *self._flow.carried.values(), ValueSpec((rows,), "int32")]
        results = [
            torch.empty(
                (rows, *map(int, spec.shape[1:])), dtype=getattr(torch, spec.dtype), device=inputs[0].device
            )
            for spec in specs
        ]
        stream = torch.cuda.current_stream(inputs[0].device).cuda_stream
        whole = [tensor.contiguous() for tensor in inputs]
        for start in range(0, rows, self.max_rows):
            count = min(self.max_rows, rows - start)
            sources = [
                tensor[start : start + count] if spec.batch_axis == 0 else tensor
                for spec, tensor in zip(self._flow.inputs.values(), whole, strict=True)
            ]
            targets = [tensor[start : start + count].data_ptr() for tensor in results]
            program = self.program(count)
            program.enqueue([tensor.data_ptr() for tensor in sources], targets, count, stream)
        *outputs, exits = results
        return outputs, exits

    def program(self, rows: int) -> DeviceProgram:
        """What answers that many rows, made now if it is new."""
        capacity = 1 if rows == 1 else self.max_rows
        if capacity not in self._programs:
            self._programs[capacity] = DeviceProgram(
                self._flow, self._engines, self._driver, capacity, self._compile_image
            )
        return self._programs[capacity]

    def close(self) -> None:
        """Free everything on the device; the next call makes it anew."""
        for program in self._programs.values():
            program.close()
        self._programs.clear()

    def _part(self, inputs: Sequence[Array], start: int, rows: int) -> list[Array]:
        if rows <= self.max_rows:
            return list(inputs)
        return [
            array[start : start + self.max_rows] if spec.batch_axis == 0 else array
            for spec, array in zip(self._flow.inputs.values(), inputs, strict=True)
        ]


class DeviceProgram:
    """A program for up to ``capacity`` rows on a device: memory, captured blocks, one executable graph.

    What it holds on the device is freed by `close`, or when nobody has it any more.

    Args:
        flow: The program.
        engines: Block -> engine.
        driver: The device.
        capacity: Rows of a call, at most.
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
        capacity: int,
        compile_image: Callable[[str], bytes] = compile_kernels,
    ) -> None:
        self.plan: Plan = plan_program(flow, capacity)
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
            self._stream = driver.stream  # one for all programs: captured blocks share memory to work in
            self._events = (_event(driver, stack), _event(driver, stack))
            self._rows = -1
            stack.callback(driver.synchronize, self._stream)  # the first thing to do before all is freed
            resources = stack.pop_all()
        self._finalizer = weakref.finalize(self, resources.close)
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
        for name, array in zip(plan.inputs, inputs, strict=True):
            staged = self._host.rows(name, rows)
            staged[...] = array
            driver.upload(self._memory.addresses[name], staged, stream)
        self._set_count(rows)
        self.graph.launch(stream)
        names = (*plan.outputs, EXIT_INDEX)
        for name in names:
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
        """Launch the graph alone, on what the inputs hold now: for measuring."""
        self.graph.launch(stream)

    def stage(self, inputs: Sequence[Array], rows: int) -> None:
        """Bring inputs to the device, for `launch`, and wait until they are there."""
        for name, array in zip(self.plan.inputs, inputs, strict=True):
            staged = self._host.rows(name, rows)
            staged[...] = array
            self._driver.upload(self._memory.addresses[name], staged, self._stream)
        self._set_count(rows)
        self._driver.synchronize(self._stream)

    def _set_count(self, rows: int) -> None:
        if rows != self._rows:
            self._rows = -1  # should this fail
            self._driver.set_word(self._memory.addresses[COUNT], rows, self._stream)
            self._rows = rows


class _Memory:
    """One piece of device memory, and where in it each buffer of a plan lies."""

    def __init__(self, plan: Plan, driver: Driver, stack: contextlib.ExitStack) -> None:
        self._plan = plan
        offsets, size_bytes = {}, 0
        for name, buffer in plan.buffers.items():
            offsets[name] = size_bytes
            size_bytes += -(-_size_bytes(buffer) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.size_bytes = size_bytes
        start = driver.malloc(size_bytes)
        stack.callback(driver.free, start)
        self.addresses = {name: start + offset for name, offset in offsets.items()}
        stream = driver.create_stream()
        try:
            driver.fill(start, 0, size_bytes, stream)  # rows that are none compute with zeros
            driver.synchronize(stream)
        finally:
            driver.destroy_stream(stream)

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
    stream = driver.create_stream()
    try:
        for name, buffer in plan.buffers.items():
            if buffer.parameter is not None:
                block, which = buffer.parameter
                weight, bias = gate_parameters(flow.block(block))
                driver.upload(memory.addresses[name], weight if which == GATE_WEIGHT else bias, stream)
        driver.synchronize(stream)
    finally:
        driver.destroy_stream(stream)


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
        found = loaded[step.block].capture(
            step.rows,
            [memory.array(name, step.rows) for name in step.inputs],
            [memory.array(name, step.rows) for name in step.outputs],
        )
        if found.destroy is not None:
            stack.callback(found.destroy)
        stack.callback(_keep, found.keep, loaded[step.block])
        captured[step.block, step.rows] = found
    return captured


def _keep(*_things: object) -> None:
    """Does nothing: being registered keeps its arguments alive until everything is freed."""


def _event(driver: Driver, stack: contextlib.ExitStack) -> int:
    event = driver.create_event()
    stack.callback(driver.destroy_event, event)
    return event


def _dtype(buffer: Buffer) -> np.dtype[np.generic]:
    return numpy_dtype(ValueSpec(buffer.shape, buffer.dtype))


def _size_bytes(buffer: Buffer, rows: int | None = None) -> int:
    shape = buffer.shape if rows is None or not buffer.rows else (rows, *buffer.shape[1:])
    width = 2 if buffer.dtype == "bfloat16" else _dtype(buffer).itemsize
    return int(np.prod(shape, dtype=np.int64)) * width
