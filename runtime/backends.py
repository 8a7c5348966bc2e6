"""Backends: what turns a lowered block into an engine, behind one small interface.

A backend lives in one file and is imported when it is asked for, so that a missing one costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import BlockInterface, EngineSignature, ValueSpec, engine_signature
from exitcompiler.errors import BackendUnavailableError, InputError, LoweringError
from exitcompiler.runtime.manifest import OperatingPoint, block_path

__all__ = [
    "BACKENDS",
    "Array",
    "Backend",
    "Engine",
    "available_backends",
    "create_backend",
    "default_threads",
    "load_onnx_block",
    "numpy_dtype",
    "require_precision",
    "require_signature",
]

Array: TypeAlias = NDArray[np.generic]


class Engine(Protocol):
    """A lowered block that runs.

    Inputs and outputs are in the order of ``signature``; gate parameters are inputs like any other,
    so that one engine serves every operating point that shares the block.
    """

    @property
    def signature(self) -> EngineSignature:
        """Names, order and types of inputs and outputs."""
        ...

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run any batch; the outputs are the caller's own."""
        ...

    def runner(self) -> Callable[[Sequence[Array]], Sequence[Array]]:
        """Like ``run``, without the copy: outputs are valid until the same runner is called again.

        A runner serves one thread at a time; different runners of an engine do not disturb each other.
        """
        ...

    def bind(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Callable[[], object]:
        """A call that reads and writes these C-contiguous buffers, whose shapes are final.

        Whoever uses the call keeps the buffers alive.
        """
        ...


class Backend(Protocol):
    """Makes engines, all at one precision and thread count."""

    @property
    def name(self) -> str:
        """As in ``BACKENDS``."""
        ...

    @property
    def precision(self) -> str:
        """``"fp32"`` or, opted in, ``"bf16"``."""
        ...

    @property
    def threads(self) -> int:
        """How many threads one call uses."""
        ...

    @property
    def specialises(self) -> bool:
        """Whether an engine made for one batch size is faster than one for any."""
        ...

    def load(self, model: bytes, signature: EngineSignature, *, static_batch: int | None = None) -> Engine:
        """Make an engine of an ONNX model.

        Args:
            model: The ONNX file.
            signature: What the model has to take and give.
            static_batch: The only batch size it will see; None: any.

        Raises:
            LoweringError: The backend does not take the model, or its signature is another.
        """
        ...

    def load_block(
        self,
        files: Mapping[str, bytes],
        point: OperatingPoint,
        block: BlockInterface,
        *,
        static_batch: int | None = None,
    ) -> Engine:
        """Make an engine of a block of an artifact.

        Raises:
            LoweringError: The backend does not take it.
            ArtifactError: The artifact does not hold the block in the form this backend needs.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    module: str
    factory: str
    requires: str
    install: str


_ENTRIES: Final = {
    "onnxruntime": _Entry(
        "exitcompiler.runtime.onnxruntime_backend",
        "OnnxRuntimeBackend",
        "onnxruntime",
        "pip install onnxruntime",
    ),
    "openvino": _Entry(
        "exitcompiler.runtime.openvino_backend", "OpenVinoBackend", "openvino", "pip install openvino"
    ),
    "torch": _Entry(
        "exitcompiler.runtime.torch_backend",
        "TorchBackend",
        "torch",
        "pip install torch",
    ),
}

BACKENDS: Final = tuple(_ENTRIES)
"""All backend names, in the order ``"auto"`` tries them where nothing else decides."""


def available_backends() -> tuple[str, ...]:
    """The backends that are installed here (found, not imported)."""
    return tuple(name for name, entry in _ENTRIES.items() if _is_installed(entry.requires))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # blocked, or half removed
        return False


def create_backend(name: str, *, precision: str = "fp32", threads: int | None = None) -> Backend:
    """The backend called ``name``.

    Args:
        name: One of ``BACKENDS``.
        precision: ``"fp32"``, or ``"bf16"`` where the backend has it; never lowered silently.
        threads: Threads per call; None: as many as this process may use.

    Raises:
        InputError: There is no such backend, or the thread count is not positive.
        BackendUnavailableError: It is not installed, or has not got that precision here.
    """
    entry = _ENTRIES.get(name)
    if entry is None:
        raise InputError(
            f"unknown backend {name!r}",
            where="backend",
            remedy=f"choose one of {', '.join(map(repr, BACKENDS))} or 'auto'",
        )
    count = default_threads() if threads is None else threads
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"threads={threads!r} is not a positive whole number", where="threads")
    if not _is_installed(entry.requires):
        raise _not_installed(name, entry, "it is not on the import path")
    try:
        factory = getattr(importlib.import_module(entry.module), entry.factory)
    except ImportError as error:
        raise _not_installed(name, entry, str(error)) from error
    return cast(Backend, factory(precision=precision, threads=count))


def _not_installed(name: str, entry: _Entry, reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"backend {name!r} is not installed: {reason}",
        where="backend",
        remedy=f"{entry.install}; installed here: {', '.join(available_backends()) or 'none'}",
    )


def default_threads() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_precision(backend: str, precision: str, offered: Sequence[str]) -> None:
    """Refuse a precision that a backend has not got.

    Raises:
        BackendUnavailableError: Naming those it has.
    """
    if precision not in offered:
        raise BackendUnavailableError(
            f"backend {backend!r} has no precision {precision!r}",
            where="precision",
            remedy=f"it has {', '.join(offered)}"
            + ("; bf16 needs backend='openvino'" if precision == "bf16" else ""),
        )


def require_signature(backend: str, found: Mapping[str, str], expected: Mapping[str, str], kind: str) -> None:
    """Refuse a model whose inputs or outputs are not those of its block.

    Raises:
        LoweringError: Naming both.
    """
    if found != expected:
        raise LoweringError(
            f"the model's {kind}s are {dict(found)}, the program needs {dict(expected)}",
            where=f"backend {backend!r}",
            remedy="compile the model again",
        )


def load_onnx_block(
    backend: Backend,
    files: Mapping[str, bytes],
    point: OperatingPoint,
    block: BlockInterface,
    static_batch: int | None,
) -> Engine:
    """``Backend.load_block`` for every backend that takes ONNX."""
    model = files[block_path(point.files[block.name])]
    return backend.load(model, engine_signature(block), static_batch=static_batch)


def numpy_dtype(spec: ValueSpec) -> np.dtype[np.generic]:
    """The numpy dtype of a value.

    Raises:
        LoweringError: Numpy has none for it.
    """
    if spec.dtype == "bfloat16":
        raise LoweringError(
            "a value between blocks is bfloat16, which numpy does not have",
            remedy="compile a float32 model; precision='bf16' keeps float32 between blocks",
        )
    return np.dtype(spec.dtype)
