"""What the device executor and the backends that capture blocks for it agree on."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from exitcompiler.controlflow import BlockInterface, EngineSignature
from exitcompiler.runtime.manifest import OperatingPoint

__all__ = [
    "Captured",
    "DeviceArray",
    "DeviceBlocks",
    "DeviceEngine",
    "keep_alive",
    "size_bytes",
    "undisturbed",
]


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """C-contiguous memory on the device whose owner outlives whoever was given this.

    Args:
        address: Where it is; a multiple of 256 bytes.
        shape: Whole numbers.
        dtype: As in `ValueSpec`.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Captured:
    """A block captured into a CUDA graph of its own.

    Args:
        graph: The handle (``CUgraph``); it is copied where it is used.
        keep: What has to live as long as the program that it is used in.
        destroy: Frees the handle, if ``keep`` does not own it.
    """

    graph: int
    keep: object = None
    destroy: Callable[[], None] | None = None


def size_bytes(shape: Sequence[int], dtype: str) -> int:
    """How much memory a value takes.

    Args:
        shape: Whole numbers.
        dtype: As in `ValueSpec`; bfloat16, which numpy does not have, among them.
    """
    width = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    return math.prod(shape) * width


class DeviceEngine(Protocol):
    """A lowered block on a device."""

    @property
    def signature(self) -> EngineSignature:
        """Names, order and types of inputs and outputs."""
        ...

    def capture(self, rows: int, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> Captured:
        """A graph that reads and writes these arrays, for exactly ``rows`` rows.

        Args:
            rows: Dim 0 of every array that belongs to rows.
            inputs: In the order of ``signature``.
            outputs: Likewise.

        Raises:
            LoweringError: It cannot be captured; says why.
        """
        ...


class DeviceBlocks(Protocol):
    """Makes device engines of the blocks of an artifact."""

    def load_device_block(
        self, files: Mapping[str, bytes], point: OperatingPoint, block: BlockInterface
    ) -> DeviceEngine:
        """The engine of a block.

        Raises:
            LoweringError: The backend does not take it.
            ArtifactError: The artifact does not hold the block in the form that this backend needs.
        """
        ...


@contextmanager
def undisturbed() -> Iterator[None]:
    """Collect no garbage meanwhile: what frees device memory in the middle of a capture spoils it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_alive(*_things: object) -> None:
    """Does nothing: as a callback of an exit stack it keeps its arguments alive until that is closed."""
