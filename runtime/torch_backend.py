"""The torch backend: blocks as FX graphs, gates evaluated here. The reference for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import fx

from exitcompiler.controlflow import BlockInterface, EngineSignature, engine_signature
from exitcompiler.errors import LoweringError
from exitcompiler.runtime.backends import (
    Array,
    Engine,
    Form,
    numpy_dtype,
    require_precision,
    require_torch_graph,
)
from exitcompiler.runtime.manifest import OperatingPoint
from exitcompiler.runtime.single_row import bound_stopwatch
from exitcompiler.runtime.torch_bodies import Body, run_block

__all__ = ["TorchBackend", "torch_engine"]

_NAME = "torch"


class TorchBackend:
    """Engines that run a block's graph in torch, in eval mode and without gradients.

    Torch has one thread count per process: every call sets it to ``threads`` and puts it back at its end.
    Torch work in other Python threads meanwhile runs with this count too, and calls with different counts
    at the same time may leave either of them behind.
    """

    name = _NAME
    form: Form = "torch"
    on_device = False
    specialises = False
    channels_last = False

    def __init__(self, *, precision: str = "fp32", threads: int) -> None:
        require_precision(_NAME, precision, ("fp32",))
        self.precision = precision
        self.threads = threads

    def load(self, model: bytes, signature: EngineSignature, *, static_batch: int | None = None) -> Engine:
        """Torch runs no ONNX.

        Raises:
            LoweringError: Always.
        """
        raise LoweringError(
            "the torch backend does not run ONNX models",
            where="backend 'torch'",
            remedy="use backend='onnxruntime' or 'openvino'",
        )

    def load_block(
        self,
        files: Mapping[str, bytes],
        point: OperatingPoint,
        block: BlockInterface,
        *,
        static_batch: int | None = None,
    ) -> Engine:
        """Make an engine of a block's graph and weights in the artifact.

        Raises:
            ArtifactError: The artifact was saved without them.
        """
        from exitcompiler.runtime.torch_graphs import load_body

        graph, weights = require_torch_graph(_NAME, files, point, block)
        return torch_engine(block, load_body(graph, weights), threads=self.threads)

    def load_body(self, block: BlockInterface, body: fx.GraphModule) -> Engine:
        """Make an engine of a block whose graph is at hand."""
        return torch_engine(block, lambda values: body(*values), threads=self.threads)


def torch_engine(block: BlockInterface, body: Body, *, threads: int | None = None) -> Engine:
    """An engine that runs ``body``, and the gate of ``block`` after it.

    Args:
        block: Tells the signature and what the gate reads.
        body: Params to results, as tensors.
        threads: Torch threads during a call, set for the whole process and then put back; None: as they
            are.
    """
    return _TorchEngine(block, body, threads)


class _TorchEngine:
    def __init__(self, block: BlockInterface, body: Body, threads: int | None) -> None:
        self.signature: EngineSignature = engine_signature(block)
        self._block = block
        self._body = body
        self._threads = threads

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        with torch.inference_mode(), _torch_threads(self._threads):
            named = {
                name: torch.from_numpy(np.require(array, requirements=("C", "W")))
                for name, array in zip(self.signature.inputs, inputs, strict=True)
            }
            values = run_block(self._block, self._body, named)
            return [
                np.array(values[name].contiguous().numpy(), numpy_dtype(spec))
                for name, spec in self.signature.outputs.items()
            ]

    def runner(self) -> Callable[[Sequence[Array]], Sequence[Array]]:
        return self.run

    def bind(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Callable[[], object]:
        def call() -> None:
            for buffer, array in zip(outputs, self.run(inputs), strict=True):
                np.copyto(buffer, array)

        return call

    def stopwatch(self, inputs: Sequence[Array]) -> Callable[[], float]:
        return bound_stopwatch(self, inputs)


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Torch's thread count is one per process: set it for a call, then put it back."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
