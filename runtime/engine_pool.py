"""The engines of an artifact, shared by everything that runs it."""

from __future__ import annotations

import threading
from typing import cast

from exitcompiler.controlflow import BlockInterface, Branch, ControlFlow, LinearGate, engine_signature
from exitcompiler.runtime.backends import Backend, Engine
from exitcompiler.runtime.device import DeviceBlocks, DeviceEngine
from exitcompiler.runtime.manifest import MODEL_FILE, Artifact, OperatingPoint
from exitcompiler.runtime.rows import single_file_signature

__all__ = ["EnginePool"]


class EnginePool:
    """The engines of an artifact, made when first needed and shared by its operating points.

    Args:
        artifact: Where the models are.
        backend: What makes engines of them.
    """

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        self.artifact = artifact
        self.backend = backend
        self._engines: dict[tuple[object, ...], Engine] = {}
        self._device_engines: dict[tuple[object, ...], DeviceEngine] = {}
        self._lock = threading.Lock()

    def block(self, point: OperatingPoint, block: BlockInterface, static_batch: int | None) -> Engine:
        """The engine of a block of ``point``."""
        batch = static_batch if self.backend.specialises else None
        key = (*_key(point, block), batch)
        with self._lock:
            if key not in self._engines:
                self._engines[key] = self.backend.load_block(
                    self.artifact.files, point, block, static_batch=batch
                )
            return self._engines[key]

    def device_block(self, point: OperatingPoint, block: BlockInterface) -> DeviceEngine:
        """The engine of a block of ``point``, for a program on a GPU."""
        key = _key(point, block)
        with self._lock:
            if key not in self._device_engines:
                blocks = cast(DeviceBlocks, self.backend)
                self._device_engines[key] = blocks.load_device_block(self.artifact.files, point, block)
            return self._device_engines[key]

    def one_file(self, flow: ControlFlow) -> Engine:
        """The engine of the one-file model, for one row."""
        with self._lock:
            key = (MODEL_FILE,)
            if key not in self._engines:
                model = self.artifact.files[MODEL_FILE]
                self._engines[key] = self.backend.load(model, single_file_signature(flow), static_batch=1)
            return self._engines[key]


def _key(point: OperatingPoint, block: BlockInterface) -> tuple[object, ...]:
    """What makes two blocks have the same engine."""
    signature, terminator = engine_signature(block), block.terminator
    gate = terminator.gate if isinstance(terminator, Branch) else None
    reads = gate.reads if isinstance(gate, LinearGate) else ()
    names = (tuple(signature.inputs), tuple(signature.outputs), tuple(block.results), reads)
    return point.files[block.name], point.torch_files.get(block.name), names
