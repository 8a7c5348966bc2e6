"""Backends that run on a GPU, and their blocks as engines that take arrays in the host's memory.

A program runs in one launch (`cuda_executor`). While it is compiled, though, blocks are run one by one: to
score rows, and to be timed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np

from exitcompiler.controlflow import ACTION, EngineSignature, ValueSpec
from exitcompiler.runtime.backends import Array, Backend, numpy_dtype
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_executor import DEFAULT_MAX_ROWS
from exitcompiler.runtime.device import (
    Captured,
    DeviceArray,
    DeviceBlocks,
    DeviceEngine,
    keep_alive,
    size_bytes,
    undisturbed,
)
from exitcompiler.runtime.device_program import free_unless_forked
from exitcompiler.runtime.planning import powers_of_two

__all__ = ["MOST_ROWS", "DeviceBackend", "HostArrayEngine", "host_dtype", "launched_rows"]

MOST_ROWS: Final = DEFAULT_MAX_ROWS
"""Rows of one launch, at most, as for a program; larger batches are several launches."""

_WORD_BYTES: Final = 4

TIMED_RUNS: Final = 16
"""How often a stopwatch lets a block run between two events, whose resolution is half a microsecond."""


class DeviceBackend(Backend, DeviceBlocks, Protocol):
    """A backend that runs on a GPU.

    Args of its methods are as in `Backend`; what ``load`` and ``load_block`` give are `HostArrayEngine`s.
    """

    @property
    def driver(self) -> Driver:
        """The device."""
        ...

    @property
    def buckets(self) -> Sequence[int]:
        """The numbers of rows that blocks can be captured for, rising."""
        ...


def host_dtype(spec: ValueSpec) -> np.dtype[np.generic]:
    """What a value is in the host's memory: bfloat16, which numpy does not have, is its bits in uint16.

    Nobody on the host computes with it: such values go from one block of a program to another.
    """
    return np.dtype(np.uint16) if spec.dtype == "bfloat16" else numpy_dtype(spec)


def launched_rows(batch: int) -> tuple[int, ...]:
    """The numbers of rows that a `HostArrayEngine` runs a batch in: in full launches, and one for the rest.

    Returns:
        Rising, each one once.
    """
    whole, rest = divmod(batch, MOST_ROWS)
    last = [next(size for size in powers_of_two(MOST_ROWS) if size >= rest)] if rest else []
    return tuple(sorted({*last, *([MOST_ROWS] if whole else [])}))


class HostArrayEngine:
    """A block on a device that takes and gives arrays in the host's memory; see `Engine`.

    The block is captured for 1, 2, 4, ... rows when it first meets as many; in the place of rows that are not
    there stand zeros, or those of an earlier batch. Larger batches than ``MOST_ROWS`` go in parts. For one
    thread at a time.

    Args:
        engine: The block.
        driver: The device.
    """

    def __init__(self, engine: DeviceEngine, driver: Driver) -> None:
        self.signature: EngineSignature = engine.signature
        self._engine = engine
        self._driver = driver
        self._buckets: dict[int, _Bucket] = {}

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Upload, run, download."""
        rows = self._rows(inputs)
        parts = [
            self._bucket(min(rows - start, MOST_ROWS)).run(
                self._part(inputs, start), min(rows - start, MOST_ROWS)
            )
            for start in range(0, rows, MOST_ROWS)
        ]
        if len(parts) == 1:
            return parts[0]
        return [
            np.concatenate(column) if spec.batch_axis == 0 else column[0]
            for spec, column in zip(self.signature.outputs.values(), zip(*parts, strict=True), strict=True)
        ]

    def runner(self) -> Callable[[Sequence[Array]], Sequence[Array]]:
        """As `run`."""
        return self.run

    def bind(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Callable[[], object]:
        """A call that uploads these inputs, runs, and downloads into these outputs."""

        def call() -> None:
            for buffer, array in zip(outputs, self.run(inputs), strict=True):
                np.copyto(buffer, array)

        return call

    def stopwatch(self, inputs: Sequence[Array]) -> Callable[[], float]:
        """Time on the device alone; see `Engine.stopwatch`.

        The block stands several times in one graph, and the graph is launched twice, of which the second
        one is timed: when it begins, the host has long done its part. Behind a block that decides stand a
        small copy and a condition that is not met, as in a program a kernel that routes and a condition do.
        """
        rows = self._rows(inputs)
        bucket = self._bucket(min(rows, MOST_ROWS))
        bucket.upload(self._part(inputs, 0), min(rows, MOST_ROWS))
        launches = -(-rows // MOST_ROWS)
        return lambda: launches * bucket.run_us()

    def _rows(self, inputs: Sequence[Array]) -> int:
        specs = self.signature.inputs.values()
        return next((len(a) for a, spec in zip(inputs, specs, strict=True) if spec.batch_axis == 0), 1)

    def _part(self, inputs: Sequence[Array], start: int) -> list[Array]:
        return [
            array[start : start + MOST_ROWS] if spec.batch_axis == 0 else array
            for array, spec in zip(inputs, self.signature.inputs.values(), strict=True)
        ]

    def _bucket(self, rows: int) -> _Bucket:
        (size,) = launched_rows(rows)
        if size not in self._buckets:
            self._buckets[size] = _Bucket(self._engine, self._driver, size)
        return self._buckets[size]


class _Bucket:
    """A block captured for one number of rows, with memory of its own, freed when nobody has it any more."""

    def __init__(self, engine: DeviceEngine, driver: Driver, rows: int) -> None:
        self._driver = driver
        self._rows = rows
        signature = engine.signature
        with contextlib.ExitStack() as stack:
            self._stream = driver.stream
            self._inputs = [self._array(spec, stack) for spec in signature.inputs.values()]
            self._outputs = [self._array(spec, stack) for spec in signature.outputs.values()]
            self._specs = tuple(signature.outputs.values())
            decision = dict(zip(signature.outputs, self._outputs, strict=True)).get(ACTION)
            self._decision = None if decision is None else decision.address
            driver.synchronize(self._stream)
            with undisturbed():
                self._captured: Captured = engine.capture(rows, self._inputs, self._outputs)
            if self._captured.destroy is not None:
                stack.callback(self._captured.destroy)
            stack.callback(keep_alive, engine, self._captured)
            self._once = self._executable(1, stack)
            self._often: int | None = None
            self._events: tuple[int, int] | None = None
            self._owned = stack.pop_all()  # nothing runs when it is closed: every call waits for its end
        # Not at the end of the process: the device's memory goes with it.
        weakref.finalize(self, free_unless_forked, self._owned, driver).atexit = False

    def run(self, inputs: Sequence[Array], rows: int) -> list[Array]:
        """The first ``rows`` rows of the answer."""
        self.upload(inputs, rows)
        self._driver.launch(self._once, self._stream)
        results = [np.empty(a.shape, host_dtype(s)) for a, s in zip(self._outputs, self._specs, strict=True)]
        for array, result in zip(self._outputs, results, strict=True):
            self._driver.download(result, array.address, self._stream)
        self._driver.synchronize(self._stream)
        return [
            result[:rows] if spec.batch_axis == 0 else result
            for result, spec in zip(results, self._specs, strict=True)
        ]

    def upload(self, inputs: Sequence[Array], rows: int) -> None:
        """Bring rows to the device; what was there before stays where they are too few."""
        for array, target in zip(inputs, self._inputs, strict=True):
            self._driver.upload(target.address, np.ascontiguousarray(array), self._stream)
        self._driver.synchronize(self._stream)

    def run_us(self) -> float:
        """How long one run takes on the device."""
        driver, stream = self._driver, self._stream
        if self._often is None or self._events is None:
            self._often = self._executable(TIMED_RUNS, self._owned)
            self._events = (self._event(), self._event())
        begin, end = self._events
        driver.launch(self._often, stream)
        driver.record(begin, stream)
        driver.launch(self._often, stream)
        driver.record(end, stream)
        return driver.elapsed_us(begin, end) / TIMED_RUNS

    def _event(self) -> int:
        event = self._driver.create_event()
        self._owned.callback(self._driver.destroy_event, event)
        return event

    def _decide(self, graph: int, after: list[int], action: int, spare: int) -> list[int]:
        """Nodes that cost about what a decision does."""
        copied = self._driver.add_copy(graph, after, spare, action, _WORD_BYTES)
        condition = self._driver.create_condition(graph, 0)
        node, (body,) = self._driver.add_conditional(graph, [copied], "if", condition, 1)
        self._driver.add_copy(body, [], spare, action, _WORD_BYTES)
        return [node]

    def _executable(self, runs: int, stack: contextlib.ExitStack) -> int:
        """The captured block, so many times in a row; what comes of it is for the stopwatch if several."""
        driver = self._driver
        spare = driver.malloc(_WORD_BYTES)
        stack.callback(driver.free, spare)
        graph = driver.create_graph()
        try:
            last: list[int] = []
            for _ in range(runs):
                last = [driver.add_child(graph, last, self._captured.graph)]
                if runs > 1 and self._decision is not None:
                    last = self._decide(graph, last, self._decision, spare)
            executable = driver.instantiate(graph)
        finally:
            driver.destroy_graph(graph)
        stack.callback(driver.destroy_exec, executable)
        driver.upload_exec(executable, self._stream)
        return executable

    def _array(self, spec: ValueSpec, stack: contextlib.ExitStack) -> DeviceArray:
        shape = tuple(
            self._rows if axis == 0 and spec.batch_axis == 0 else int(n) for axis, n in enumerate(spec.shape)
        )
        needed_bytes = size_bytes(shape, spec.dtype)
        address = self._driver.malloc(needed_bytes)
        stack.callback(self._driver.free, address)
        self._driver.fill(address, 0, needed_bytes, self._stream)
        return DeviceArray(address, shape, spec.dtype)
