"""Checked calls of the CUDA driver: the package and the device found, every error turned into a typed one.

A context is current only while a call runs: whoever shares the thread keeps the device that they chose.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

from exitcompiler.errors import BackendUnavailableError, DeviceError, ExitCompilerError

__all__ = ["CUDA_INSTALL_COMMAND", "DriverCalls", "load_bindings"]

CUDA_INSTALL_COMMAND: Final = "pip install 'exitcompiler[cuda]' ([cuda12] for a driver of CUDA 12)"

_OLDEST_DRIVER: Final = 12080
_OUT_OF_MEMORY: Final = "CUDA_ERROR_OUT_OF_MEMORY"
# After one of these the context answers nothing any more.
_LOST: Final = {
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
}


def load_bindings() -> ModuleType:
    """The module ``cuda.bindings.driver``.

    Raises:
        BackendUnavailableError: It is not installed, or older than 12.8.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendUnavailableError(
            "the package cuda-bindings is not installed", remedy=CUDA_INSTALL_COMMAND
        ) from error
    cuda: ModuleType = driver
    if not hasattr(cuda.CUgraphConditionalNodeType, "CU_GRAPH_COND_TYPE_SWITCH"):
        raise BackendUnavailableError(
            "the installed cuda-bindings are older than 12.8", remedy=CUDA_INSTALL_COMMAND
        )
    return cuda


class DriverCalls:
    """A device, and calls for it that raise.

    Args:
        cuda: The module ``cuda.bindings.driver``.
        ordinal: Which device.

    Attributes:
        cuda: The module.
        context: The device's primary context, which is retained.
        driver_version: The CUDA version of the driver: ``13000`` is 13.0.
        device: The device's handle.

    Raises:
        BackendUnavailableError: There is no driver, it is too old, or there is no such device.
    """

    def __init__(self, cuda: ModuleType, ordinal: int) -> None:
        self.cuda = cuda
        try:
            self.driver_version = int(self.ask("cuDriverGetVersion"))
        except RuntimeError as error:  # this is how the bindings say that libcuda is not there
            raise BackendUnavailableError(
                "there is no NVIDIA driver here (libcuda cannot be loaded)",
                remedy="install an NVIDIA driver of release 570 or later, or choose another backend",
            ) from error
        if self.driver_version < _OLDEST_DRIVER:
            major, minor = self.driver_version // 1000, self.driver_version % 1000 // 10
            raise BackendUnavailableError(
                f"the NVIDIA driver is made for CUDA {major}.{minor}; 12.8 or later is needed",
                remedy="install an NVIDIA driver of release 570 or later",
            )
        self.ask("cuInit", 0)
        devices = self.ask("cuDeviceGetCount")
        if not 0 <= ordinal < devices:
            raise BackendUnavailableError(
                f"there is no CUDA device {ordinal}: the driver shows {devices}",
                remedy="compare `nvidia-smi`, and CUDA_VISIBLE_DEVICES",
            )
        self.device = self.ask("cuDeviceGet", ordinal)
        self.context = self.ask("cuDevicePrimaryCtxRetain", self.device)
        self._process = os.getpid()
        self._local = threading.local()  # how often the context was made current here, by thread

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call what needs no context, while the device is looked for.

        Raises:
            BackendUnavailableError: The driver refuses.
        """
        status, *results = getattr(self.cuda, name)(*arguments)
        if int(status) != 0:
            code, meaning = self._describe(status)
            raise BackendUnavailableError(
                f"the NVIDIA driver does not work: {name} says {code} ({meaning})",
                remedy="see whether `nvidia-smi` shows a device, and compare CUDA_VISIBLE_DEVICES",
            )
        return results[0] if len(results) == 1 else results

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that opened the device: it cannot use it."""
        return os.getpid() != self._process

    def call(
        self,
        doing: str,
        name: str,
        *arguments: Any,
        about: tuple[object, ...] = (),
        error: type[ExitCompilerError] = DeviceError,
    ) -> Any:
        """Call the driver in the device's context.

        Args:
            doing: What is tried, as in "cannot ...", with a place for everything in ``about``.
            name: The function.
            arguments: What it takes.
            about: What ``doing`` leaves out; put there only if something goes wrong.
            error: What is raised, unless memory is missing.

        Returns:
            What it gives: nothing as an empty list, one thing as it is, several as a list.

        Raises:
            ExitCompilerError: ``error``, or `DeviceError` for want of memory, or after a fork.
            BackendUnavailableError: The driver does not know the function.
        """
        if not self._entered():
            with self.current():
                return self.call(doing, name, *arguments, about=about, error=error)
        try:
            status, *results = getattr(self.cuda, name)(*arguments)
            if int(status) != 0:
                raise self._failure(doing.format(*about), status, error)
        except RuntimeError as missing:  # this is how the bindings say that the driver has no such function
            raise BackendUnavailableError(
                f"cannot {doing.format(*about)}: {missing}",
                remedy="install a newer NVIDIA driver, or cuda-bindings no newer than the driver's CUDA",
            ) from missing
        return results[0] if len(results) == 1 else results

    def _entered(self) -> bool:
        return getattr(self._local, "depth", 0) > 0

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current for a while: for other libraries, and once for several calls."""
        if self.forked:
            raise DeviceError(
                "a GPU cannot be used in a process that was forked after it was",
                remedy="load the program in the new process, and start that with 'spawn'",
            )
        self.ask("cuCtxPushCurrent", self.context)
        self._local.depth = getattr(self._local, "depth", 0) + 1
        try:
            yield
        finally:
            self._local.depth -= 1
            self.ask("cuCtxPopCurrent")

    def release(self) -> None:
        """Let go of the context."""
        self.ask("cuDevicePrimaryCtxRelease", self.device)

    def _failure(self, doing: str, status: Any, error: type[ExitCompilerError]) -> ExitCompilerError:
        code, meaning = self._describe(status)
        what = f"cannot {doing}: {code} ({meaning})"
        if code == _OUT_OF_MEMORY:
            refused, free, total = self.cuda.cuMemGetInfo()
            if int(refused) == 0:
                what += f"; {free:,} of {total:,} bytes are free"
            return DeviceError(
                what, remedy="let go of other memory on the device, or take a smaller batch size"
            )
        if code in _LOST:
            return DeviceError(what, remedy="this process can no longer use the device: start another one")
        return error(what)

    def _describe(self, status: Any) -> tuple[str, str]:
        """The name of an error, and what the driver says that it means."""
        texts = []
        for function in (self.cuda.cuGetErrorName, self.cuda.cuGetErrorString):
            unknown, text = function(status)
            texts.append(f"error {int(status)}" if int(unknown) or not text else bytes(text).decode())
        return texts[0], texts[1]
