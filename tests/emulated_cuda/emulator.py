"""The emulated CUDA driver as tests see it: loaded under cuda-bindings, looked at and disturbed."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from emulated_cuda.build import build_driver, build_image, compiler
from exitcompiler.runtime.cuda_kernels import kernel_source

__all__ = ["Emulator", "emulated_device", "kernel_image", "load"]

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_ALIVE = ("device allocations", "host allocations", "streams", "events", "modules", "graphs", "executables")


class Emulator:
    """A device named "Emulated", of compute capability 9.0, whose driver is of CUDA 13.0.

    Work is done when somebody waits for it, not before; what no dependency puts in order is done in an order
    drawn by chance. New memory holds bytes of 0xFF.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.emulated_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        library.emulated_fail.argtypes = [ctypes.c_char_p, ctypes.c_longlong, ctypes.c_int]
        library.emulated_count.argtypes = [ctypes.c_char_p]
        library.emulated_count.restype = ctypes.c_longlong
        library.emulated_violations.restype = ctypes.c_char_p
        library.emulated_executed.restype = ctypes.c_char_p
        library.emulated_break_capture.argtypes = [ctypes.c_void_p]
        library.emulated_is_device_memory.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
        library.emulated_host_function.argtypes = [ctypes.c_char_p, _Callback, ctypes.c_void_p]
        library.emulated_host_function.restype = ctypes.c_void_p
        self._callbacks: list[object] = []
        self.raised: list[BaseException] = []
        """What host functions raised."""

    def reset(self, **settings: int) -> None:
        """Forget everything.

        Args:
            settings: ``devices`` (0: there is none), ``driver_version``, ``compute_capability_major``,
                ``compute_capability_minor``, ``total_memory_bytes``, ``seed``.
        """
        self.library.emulated_reset()
        self._callbacks.clear()
        self.raised.clear()
        for name, value in settings.items():
            self.set(name, value)

    def set(self, name: str, value: int) -> None:
        """Change one of the settings of `reset`."""
        self.library.emulated_set(name.encode(), value)

    def fail(self, function: str, error: int, call: int = 1) -> None:
        """Let the n-th call from now on of a function, as ``"cuMemAlloc"``, answer with an error."""
        self.library.emulated_fail(function.encode(), call, int(error))

    def count(self, what: str) -> int:
        """How often a function was called since `reset`, or the host waited (``"host_syncs"``)."""
        return int(self.library.emulated_count(what.encode()))

    def alive(self) -> dict[str, int]:
        """What was made and not freed, by kind: ``{"device allocations": 2}``."""
        counts = {kind: self.count(kind) for kind in (*_ALIVE, "contexts")}
        return {kind: count for kind, count in counts.items() if count}

    def executed(self) -> list[str]:
        """What the last launch of a graph ran, in order.

        ``"kernel route"``, ``"memcpy"``, ``"graph"`` before what is in it; ``"if 1"``, ``"switch 2"``, with
        the condition's value, before what is in the body; ``"if 0 none"`` where no body ran.
        """
        return self.library.emulated_executed().decode().splitlines()

    def take_violations(self) -> list[str]:
        """What was done since the last time that a driver cannot be relied on to notice."""
        return self.library.emulated_violations().decode().splitlines()

    def break_capture(self, stream: int) -> None:
        """Do to a capture what an illegal call would: invalidate it."""
        self.library.emulated_break_capture(stream)

    def host_function(self, body: Callable[[], None], name: str = "host function") -> int:
        """A kernel without parameters that calls Python; where that raises, the launch fails."""

        def call(_: object) -> int:
            try:
                body()
            except BaseException as error:  # must not pass through the driver
                self.raised.append(error)
                return 1
            return 0

        callback = _Callback(call)
        self._callbacks.append(callback)
        return int(self.library.emulated_host_function(name.encode(), callback, None))

    def view(self, address: int, shape: Sequence[int], dtype: str) -> NDArray[np.generic]:
        """Device memory as it is now, for host functions."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if not self.library.emulated_is_device_memory(address, size):
            raise ValueError(f"{size} bytes at {address:#x} are no device memory")
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return raw.view(kind).reshape(tuple(shape))


@functools.lru_cache(maxsize=1)
def load() -> Emulator:
    """Put the emulated driver under cuda-bindings, for as long as this process lives; skips where it cannot.

    Only cuda-bindings gets it: whoever else looks for ``libcuda.so.1`` finds what the machine has. Outside of
    `emulated_device` it answers that there is no device.
    """
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    if compiler() is None:
        pytest.skip("there is no g++ to build the emulated CUDA driver with")
    if _real_device():
        pytest.skip("there is a real CUDA device: nothing is put in its place")
    from cuda.bindings import driver
    from cuda.bindings._internal import driver as internal

    library = ctypes.CDLL(str(build_driver()))
    emulator = Emulator(library)
    emulator.reset(devices=1)
    find = internal.load_nvidia_dynamic_lib
    assert callable(find)
    internal.load_nvidia_dynamic_lib = lambda name: SimpleNamespace(_handle_uint=library._handle)
    try:
        # The bindings look all functions up at the first call of one.
        assert int(driver.cuInit(0)[0]) == 0
    finally:
        internal.load_nvidia_dynamic_lib = find
    assert emulator.count("cuInit") == 1
    emulator.reset(devices=0)
    return emulator


def _real_device() -> bool:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(library.cuInit(0) == 0)


@contextmanager
def emulated_device(**settings: int) -> Iterator[Emulator]:
    """A device, until the end of the block; at the end nothing forbidden may have been done with it.

    Args:
        settings: As of `Emulator.reset`; one device, unless they say something else.
    """
    emulator = load()
    emulator.reset(**{"devices": 1, "seed": 0, **settings})
    raised, violations = [], []
    try:
        yield emulator
        raised, violations = list(emulator.raised), emulator.take_violations()
    finally:
        gc.collect()  # whoever frees things when collected does it now
        violations += emulator.take_violations()
        emulator.reset(devices=0)
    for error in raised:
        raise error
    assert violations == []


@functools.lru_cache(maxsize=1)
def kernel_image() -> bytes:
    """The project's kernels, compiled for the emulated driver: what an NVRTC cubin is for a real one."""
    return build_image(kernel_source())
