"""Backends: what turns a lowered block into an engine, behind one small interface.

A backend lives in one file and is imported when it is asked for, so that a missing one costs nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import BlockInterface, EngineSignature, ValueSpec, engine_signature
from exitcompiler.errors import ArtifactError, BackendUnavailableError, InputError, LoweringError
from exitcompiler.runtime.manifest import OperatingPoint, block_path, torch_paths

__all__ = [
    "BACKENDS",
    "DEVICE_BACKENDS",
    "TORCH_BACKENDS",
    "Array",
    "Backend",
    "Engine",
    "Form",
    "available_backends",
    "create_backend",
    "default_threads",
    "is_installed",
    "load_onnx_block",
    "numpy_dtype",
    "require_precision",
    "require_signature",
    "require_torch_graph",
    "share_threads",
    "unavailable_reason",
]

Array: TypeAlias = NDArray[np.generic]

Form: TypeAlias = Literal["onnx", "torch"]
"""What a backend makes engines of: ONNX models, or torch graphs."""


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

    def stopwatch(self, inputs: Sequence[Array]) -> Callable[[], float]:
        """A call that runs these inputs once and returns how many microseconds that took.

        On a GPU that is time on the device: nothing is uploaded or downloaded, as between the blocks of a
        program.
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
        """``"fp32"`` or, opted in, ``"fp16"``, ``"bf16"`` or ``"int8"``."""
        ...

    @property
    def form(self) -> Form:
        """What it makes engines of."""
        ...

    @property
    def on_device(self) -> bool:
        """Whether it runs programs on a GPU, in one launch: then it is a `DeviceBackend`, too.

        Such a backend computes in the types that a block has, so a lower precision is one of the program.
        """
        ...

    @property
    def threads(self) -> int:
        """How many threads one call uses."""
        ...

    @property
    def specialises(self) -> bool:
        """Whether an engine made for one batch size is faster than one for any."""
        ...

    @property
    def channels_last(self) -> bool:
        """Whether feature maps in int8 should go from engine to engine as ``[batch, H, W, C]``."""
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
    """Where a backend is, and what it needs: of each group of packages, one."""

    module: str
    factory: str
    requires: tuple[tuple[str, ...], ...]
    install: str
    on_device: bool = False


_ENTRIES: Final = {
    "onnxruntime": _Entry(
        "exitcompiler.runtime.onnxruntime_backend",
        "OnnxRuntimeBackend",
        (("onnxruntime",),),
        "pip install onnxruntime",
    ),
    "openvino": _Entry(
        "exitcompiler.runtime.openvino_backend", "OpenVinoBackend", (("openvino",),), "pip install openvino"
    ),
    "torch": _Entry(
        "exitcompiler.runtime.torch_backend",
        "TorchBackend",
        (("torch",),),
        "pip install torch",
    ),
    "cuda": _Entry(
        "exitcompiler.runtime.cuda_backend",
        "CudaBackend",
        (("torch",), ("cuda.bindings",), ("safetensors",)),
        "pip install 'exitcompiler[cuda]' ([cuda12] for a driver of CUDA 12), and a CUDA build of torch",
        on_device=True,
    ),
    "tensorrt": _Entry(
        "exitcompiler.runtime.tensorrt_backend",
        "TensorRtBackend",
        (("tensorrt", "tensorrt_rtx"), ("cuda.bindings",)),
        "pip install 'exitcompiler[cuda,tensorrt]' ([cuda12,tensorrt] for a driver of CUDA 12)",
        on_device=True,
    ),
}

BACKENDS: Final = tuple(_ENTRIES)
"""All backend names, in the order ``"auto"`` tries them where nothing else decides."""

DEVICE_BACKENDS: Final = frozenset(name for name, entry in _ENTRIES.items() if entry.on_device)
"""Those that run on a GPU."""

TORCH_BACKENDS: Final = frozenset({"torch", "cuda"})
"""Those that run torch graphs, and not ONNX models."""


def available_backends() -> tuple[str, ...]:
    """The backends that are installed here (found, not imported); those for a GPU if there is one."""
    return tuple(name for name in BACKENDS if unavailable_reason(name) is None)


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot be had here, as far as can be told without importing it; None: it can."""
    entry = _ENTRIES[name]
    if missing := _missing(entry):
        return f"{name} is not installed" + (f" ({' and '.join(missing)})" if missing != [name] else "")
    if entry.on_device and not _has_gpu():
        return f"{name} needs an NVIDIA GPU, and there is none here"
    return None


def _missing(entry: _Entry) -> list[str]:
    """The packages that a backend lacks."""
    return [" or ".join(group) for group in entry.requires if not any(map(is_installed, group))]


def is_installed(package: str) -> bool:
    """Whether a package is found; it is not imported, though those that it is part of are."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # blocked, or half removed
        return False


def _has_gpu() -> bool:
    """Whether the NVIDIA driver shows a device: quick, whatever is installed or not."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        answered = library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        return False
    return answered and count.value > 0


def create_backend(name: str, *, precision: str = "fp32", threads: int | None = None) -> Backend:
    """The backend called ``name``.

    Args:
        name: One of ``BACKENDS``.
        precision: ``"fp32"``, or ``"fp16"``, ``"bf16"`` or ``"int8"`` where the backend has it; never lowered
            silently.
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
    if missing := _missing(entry):
        raise _not_installed(name, entry, f"{' and '.join(missing)} cannot be imported")
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


def share_threads(backend: str, threads: int | None) -> None:
    """Give all ONNX Runtime sessions one pool: only for a process that is ours (docs/backends.md).

    Args:
        backend: As for ``exitcompiler.load``.
        threads: Per call; None: as many as this process may use.
    """
    count = default_threads() if threads is None else threads
    if count > 1 and backend in ("auto", "onnxruntime") and "onnxruntime" in available_backends():
        from exitcompiler.runtime.onnxruntime_backend import share_thread_pool

        share_thread_pool(count)


_HAVING: Final = {
    "fp16": "'cuda' or 'tensorrt'",
    "bf16": "'openvino', 'cuda' or 'tensorrt'",
    "int8": "'onnxruntime' or 'openvino'",
}


def require_precision(backend: str, precision: str, offered: Sequence[str]) -> None:
    """Refuse a precision that a backend has not got.

    Raises:
        BackendUnavailableError: Naming those it has.
    """
    if precision not in offered:
        having = _HAVING.get(precision)
        raise BackendUnavailableError(
            f"backend {backend!r} has no precision {precision!r}",
            where="precision",
            remedy=f"it has {', '.join(offered)}"
            + (f"; {precision} needs backend={having}" if having else ""),
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


def require_torch_graph(
    backend: str, files: Mapping[str, bytes], point: OperatingPoint, block: BlockInterface
) -> tuple[bytes, bytes]:
    """A block's graph and its weights, for backends that run torch graphs.

    Raises:
        ArtifactError: The artifact was saved without them.
    """
    if block.name not in point.torch_files:
        raise ArtifactError(
            f"the artifact holds no torch graph of block {block.name!r}",
            where=f"backend {backend!r}",
            remedy="save it with save(path, torch=True) where it was compiled, or use another backend",
        )
    graph, weights = torch_paths(point.torch_files[block.name])
    return files[graph], files[weights]


def numpy_dtype(spec: ValueSpec) -> np.dtype[np.generic]:
    """The numpy dtype of a value.

    Raises:
        LoweringError: Numpy has none for it.
    """
    if spec.dtype == "bfloat16":
        raise LoweringError(
            "a value between blocks is bfloat16, which numpy does not have",
            remedy="run it on a GPU (backend='cuda' or 'tensorrt'), or compile it at another precision",
        )
    return np.dtype(spec.dtype)
