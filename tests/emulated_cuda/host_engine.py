"""Device engines that run on the host: a block's numpy engine in the place of captured kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emulated_cuda.emulator import Emulator
from exitcompiler.controlflow import EngineSignature
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.device import Captured, DeviceArray

__all__ = ["HostEngine", "allocate_in_capture", "call_host_in_capture", "primary_context"]


class _Engine(Protocol):
    signature: EngineSignature

    def run(self, inputs: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]: ...


class HostEngine:
    """A `DeviceEngine` whose graph is one kernel that calls a numpy engine on the device's memory.

    Args:
        engine: Has ``signature`` and ``run``.
        driver: The device, emulated.
        emulator: What emulates it.
        name: Of the kernel: ``"kernel NAME"`` is what `Emulator.executed` says.
        meddle: Called with the stream during the capture, before the launch.
    """

    def __init__(
        self,
        engine: _Engine,
        driver: Driver,
        emulator: Emulator,
        name: str = "block",
        meddle: Callable[[int], None] | None = None,
    ) -> None:
        self.signature = engine.signature
        self._engine = engine
        self._driver = driver
        self._emulator = emulator
        self._name = name
        self._meddle = meddle
        self.rows_run: list[int] = []
        """Of every run, how many rows it was captured for."""

    def capture(self, rows: int, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> Captured:
        """See `DeviceEngine`."""
        _check(self.signature.inputs, inputs, rows)
        _check(self.signature.outputs, outputs, rows)

        def body() -> None:
            view = self._emulator.view
            results = self._engine.run([np.array(view(a.address, a.shape, a.dtype)) for a in inputs])
            for array, result in zip(outputs, results, strict=True):
                view(array.address, array.shape, array.dtype)[...] = result
            self.rows_run.append(rows)

        function = self._emulator.host_function(body, self._name)
        graph = self._record(function)
        return Captured(graph, keep=self, destroy=lambda: self._driver.destroy_graph(graph))

    def _record(self, function: int) -> int:
        driver = self._driver
        stream = driver.create_stream()
        try:
            driver.begin_capture(stream)
            try:
                if self._meddle is not None:
                    self._meddle(stream)
                with primary_context() as (cuda, _):  # a launch that fails spoils the capture, which says so
                    cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, 0, 0)
            finally:
                graph = driver.end_capture(stream)
            return graph
        finally:
            driver.destroy_stream(stream)


def call_host_in_capture(stream: int) -> None:
    """Record what may not stand in the body of a conditional node: a callback on the host."""
    with primary_context() as (cuda, _):
        cuda.cuLaunchHostFunc(stream, cuda.CUhostFn(0), 0)


def allocate_in_capture(stream: int) -> None:
    """Record what may not stand in the body of a conditional node: an allocation of memory."""
    with primary_context() as (cuda, _):
        cuda.cuMemAllocAsync(256, stream)


@contextmanager
def primary_context() -> Iterator[tuple[ModuleType, Any]]:
    """cuda-bindings, and the device's primary context made current, as PyTorch and TensorRT do."""
    from cuda.bindings import driver as cuda

    _, device = cuda.cuDeviceGet(0)
    _, context = cuda.cuDevicePrimaryCtxRetain(device)
    cuda.cuCtxPushCurrent(context)
    try:
        yield cuda, context
    finally:
        cuda.cuCtxPopCurrent()
        cuda.cuDevicePrimaryCtxRelease(device)


def _check(specs: Any, arrays: Sequence[DeviceArray], rows: int) -> None:
    for (name, spec), array in zip(specs.items(), arrays, strict=True):
        expected = tuple(rows if axis == spec.batch_axis else int(n) for axis, n in enumerate(spec.shape))
        assert array.shape == expected, f"{name}: {array.shape} for {expected}"
        assert array.dtype == spec.dtype, f"{name}: {array.dtype} for {spec.dtype}"
        assert array.address % 256 == 0, f"{name} is not aligned"
