"""The cuda backend on an emulated driver: blocks run in torch on the CPU, all else is what runs on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from emulated_cuda import Emulator, emulated_device, kernel_image
from emulated_cuda.host_engine import HostEngine
from torch import fx

from exitcompiler.controlflow import BlockInterface, EngineSignature, engine_signature
from exitcompiler.runtime import backends, cuda_executor
from exitcompiler.runtime.backends import Engine, Form, require_torch_graph
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.device import DeviceEngine
from exitcompiler.runtime.device_engines import MOST_ROWS, HostArrayEngine
from exitcompiler.runtime.manifest import OperatingPoint
from exitcompiler.runtime.planning import powers_of_two
from exitcompiler.runtime.torch_bodies import Body, run_block
from exitcompiler.runtime.torch_graphs import load_body

__all__ = ["EmulatedBackend", "TorchOnHost", "emulated_backend"]


class TorchOnHost:
    """A block as a numpy engine that runs torch on the CPU; bfloat16 values are their bits in uint16."""

    def __init__(self, block: BlockInterface, body: Body) -> None:
        self.signature: EngineSignature = engine_signature(block)
        self._block = block
        self._body = body

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            named = {
                name: _tensor(array, spec.dtype)
                for (name, spec), array in zip(self.signature.inputs.items(), inputs, strict=True)
            }
            values = run_block(self._block, self._body, named)
            return [_array(values[name]) for name in self.signature.outputs]


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.contiguous().numpy()


class _View:
    """An emulator whose views of bfloat16 memory are uint16."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self.host_function = emulator.host_function

    def view(self, address: int, shape: Sequence[int], dtype: str) -> np.ndarray:
        return self._emulator.view(address, shape, "uint16" if dtype == "bfloat16" else dtype)


class EmulatedBackend:
    """As `CudaBackend`, and called like it."""

    name = "cuda"
    form: Form = "torch"
    on_device = True
    specialises = False
    channels_last = False
    buckets = powers_of_two(MOST_ROWS)

    def __init__(self, emulator: Emulator, *, precision: str = "fp32", threads: int = 1) -> None:
        self.precision = precision
        self.threads = threads
        self.driver = Driver.open()
        self._emulator = emulator

    def load(self, model: bytes, signature: EngineSignature, *, static_batch: int | None = None) -> Engine:
        raise NotImplementedError

    def load_body(self, block: BlockInterface, body: fx.GraphModule) -> Engine:
        return HostArrayEngine(self._device_engine(block, lambda values: body(*values)), self.driver)

    def load_block(
        self,
        files: Mapping[str, bytes],
        point: OperatingPoint,
        block: BlockInterface,
        *,
        static_batch: int | None = None,
    ) -> Engine:
        return HostArrayEngine(self.load_device_block(files, point, block), self.driver)

    def load_device_block(
        self, files: Mapping[str, bytes], point: OperatingPoint, block: BlockInterface
    ) -> DeviceEngine:
        return self._device_engine(block, load_body(*require_torch_graph("cuda", files, point, block)))

    def _device_engine(self, block: BlockInterface, body: Body) -> DeviceEngine:
        return HostEngine(TorchOnHost(block, body), self.driver, _View(self._emulator), block.name)  # type: ignore[arg-type]


@contextmanager
def emulated_backend() -> Iterator[Emulator]:
    """While this is open, ``backend="cuda"`` is the emulated one, and installed."""
    with emulated_device() as emulator:
        executor = functools.partial(cuda_executor.DeviceExecutor, compile_image=lambda _: kernel_image())
        entry = backends._Entry("emulated_backend", "unused", (), "", on_device=True)
        with (
            mock.patch.dict(backends._ENTRIES, {"cuda": entry}),
            mock.patch.object(backends, "_has_gpu", return_value=True),
            mock.patch.object(cuda_executor, "DeviceExecutor", executor),
            mock.patch(f"{__name__}.unused", functools.partial(EmulatedBackend, emulator), create=True),
        ):
            yield emulator
