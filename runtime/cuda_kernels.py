"""The small kernels of a device graph: how their arguments lie in memory, and their compilation.

A kernel takes one structure by value and, where it sets a condition, the condition's handle as a second
argument. The structures hold numbers and addresses, some of tables in device memory. ``kernels.cu`` declares
the same ones, in the same order::

    kernel       structure     tables         blocks                     threads
    route        ROUTE         WAY, COPY      capacity x shares          128
    guard        GUARD                        1                          1
    compact      COMPACT                      1                          capacity, in whole warps
    pick_bucket  PICK_BUCKET   int32          1                          1
    gather       GATHER        MOVE, int64    shares x rows x moves      256

A share is a part of a row's bytes: large rows are copied by several blocks.
"""

from __future__ import annotations

import functools
from importlib import resources
from types import ModuleType
from typing import Any, Final

import numpy as np

from exitcompiler.errors import BackendUnavailableError, LoweringError
from exitcompiler.runtime.cuda_calls import CUDA_INSTALL_COMMAND

__all__ = [
    "COMPACT",
    "COPY",
    "GATHER",
    "GATHER_THREADS",
    "GUARD",
    "KERNELS",
    "MOST_ROWS",
    "MOST_ROW_BYTES",
    "MOVE",
    "PICK_BUCKET",
    "ROUTE",
    "ROUTE_THREADS",
    "SHARE_BYTES",
    "WAY",
    "compile_kernels",
    "kernel_source",
]

KERNELS: Final = ("route", "guard", "compact", "pick_bucket", "gather")
MOST_ROWS: Final = 1024
"""The largest capacity of a plan: ``compact`` is one block of threads."""
ROUTE_THREADS: Final = 128
GATHER_THREADS: Final = 256
MOST_ROW_BYTES: Final = 2**31 - 1
"""The largest row, or value without rows, that is copied."""
SHARE_BYTES: Final = 16384
"""What one block of threads copies of a row, at least, before another one helps."""

_ADDRESS: Final = np.uint64

COPY: Final = np.dtype(
    [("source", _ADDRESS), ("target", _ADDRESS), ("stride_bytes", np.int64), ("size_bytes", np.uint32)],
    align=True,
)
"""A value to copy when a row leaves. ``stride_bytes``: from row to row; 0: it does not belong to rows."""

WAY: Final = np.dtype(
    [(name, np.int32) for name in ("target", "edge", "exit", "arm", "first_copy", "copies")], align=True
)
"""As `PlannedWay`; ``copies`` of them from ``first_copy`` on, in a table of `COPY`."""

MOVE: Final = np.dtype(
    [
        ("target", _ADDRESS),
        ("stride_bytes", np.int64),
        ("size_bytes", np.uint32),
        ("first_source", np.int32),
    ],
    align=True,
)
"""As `Move`; ``first_source`` is where, in a table of addresses, that of incoming edge 0 lies."""

ROUTE: Final = np.dtype(
    [
        ("ways", _ADDRESS),
        ("copies", _ADDRESS),
        ("action", _ADDRESS),
        ("rows", _ADDRESS),
        ("count", _ADDRESS),
        ("next", _ADDRESS),
        ("edge", _ADDRESS),
        ("position", _ADDRESS),
        ("exit_index", _ADDRESS),
        ("way_count", np.int32),
        ("sets_condition", np.int32),
    ],
    align=True,
)
"""As `Route`; an address of 0 is None. An action that names no way lets its row leave at exit -1."""

GUARD: Final = np.dtype([("next", _ADDRESS), ("target", np.int32)], align=True)

COMPACT: Final = np.dtype(
    [
        ("next", _ADDRESS),
        ("rows", _ADDRESS),
        ("count", _ADDRESS),
        ("capacity", np.int32),
        ("target", np.int32),
    ],
    align=True,
)

PICK_BUCKET: Final = np.dtype(
    [("count", _ADDRESS), ("buckets", _ADDRESS), ("bucket_count", np.int32)], align=True
)

GATHER: Final = np.dtype(
    [(name, _ADDRESS) for name in ("moves", "sources", "list", "edge", "position")], align=True
)


def kernel_source() -> str:
    """The text of ``kernels.cu``."""
    return resources.files("exitcompiler.runtime").joinpath("kernels.cu").read_text(encoding="utf-8")


@functools.lru_cache
def compile_kernels(architecture: str) -> bytes:
    """Compile the kernels to a cubin; no device is needed.

    Args:
        architecture: ``"sm_90"``.

    Raises:
        BackendUnavailableError: NVRTC is not installed.
        LoweringError: NVRTC refuses; with its log.
    """
    nvrtc = _load_nvrtc()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(kernel_source().encode(), b"kernels.cu", 0, [], []))
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise LoweringError(
                f"NVRTC cannot compile the kernels: {_name(nvrtc, status)}\n{log.rstrip(bytes(1)).decode()}",
                where=f"kernels.cu for {architecture}",
                remedy="if the device is newer than NVRTC: pip install -U nvidia-cuda-nvrtc",
            )
        image = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, image))
        return bytes(image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _load_nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the library itself is looked for at the first call
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"NVRTC, the compiler of CUDA kernels, is not installed ({error})", remedy=CUDA_INSTALL_COMMAND
        ) from error
    module: ModuleType = nvrtc
    return module


def _checked(nvrtc: ModuleType, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise LoweringError(f"NVRTC fails: {_name(nvrtc, status)}", where="kernels.cu")
    return values[0] if values else None


def _name(nvrtc: ModuleType, status: Any) -> str:
    _, text = nvrtc.nvrtcGetErrorString(status)
    return bytes(text).decode()
