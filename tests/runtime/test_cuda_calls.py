"""What becomes of the driver's errors, with bindings that answer as they are told."""

from __future__ import annotations

import sys
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from exitcompiler.errors import (
    BackendUnavailableError,
    DeviceError,
    ExitCompilerError,
    InputError,
    LoweringError,
)
from exitcompiler.runtime.cuda_calls import DriverCalls, load_bindings
from exitcompiler.runtime.cuda_driver import Driver


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OURS, THEIRS = 11, 22
FINE = Status.CUDA_SUCCESS


class Bindings(ModuleType):
    """Stands in for ``cuda.bindings.driver``: each function answers what ``answers`` says."""

    def __init__(self, **answers: Any) -> None:
        super().__init__("driver")
        self.contexts = [THEIRS]
        self.calls: list[str] = []
        self.seen: list[int] = []  # the context that was current when something was done
        self.answers = {
            "cuDriverGetVersion": (FINE, 13000),
            "cuInit": (FINE,),
            "cuDeviceGetCount": (FINE, 1),
            "cuDeviceGet": (FINE, 0),
            "cuDeviceGetName": (FINE, b"A GPU\0\0"),
            "cuDeviceTotalMem": (FINE, 1000),
            "cuDeviceGetAttribute": (FINE, 9),
            "cuDevicePrimaryCtxRetain": (FINE, OURS),
            "cuDevicePrimaryCtxRelease": (FINE,),
            "cuMemGetInfo": (FINE, 1234, 5678901),
            **answers,
        }

    def cuCtxGetCurrent(self) -> tuple[Status, int]:  # noqa: N802 (as the driver calls it)
        return FINE, self.contexts[-1]

    def cuCtxPushCurrent(self, context: int) -> tuple[Status]:  # noqa: N802
        self.contexts.append(context)
        return (FINE,)

    def cuCtxPopCurrent(self) -> tuple[Status, int]:  # noqa: N802
        return FINE, self.contexts.pop()

    def cuGetErrorName(self, status: Status) -> tuple[Status, bytes | None]:  # noqa: N802
        known = isinstance(status, Status)
        return (FINE, status.name.encode()) if known else (Status.CUDA_ERROR_INVALID_VALUE, None)

    def cuGetErrorString(self, status: Status) -> tuple[Status, bytes | None]:  # noqa: N802
        known = isinstance(status, Status)
        return (FINE, b"what it means") if known else (Status.CUDA_ERROR_INVALID_VALUE, None)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments: object) -> Any:
            self.calls.append(name)
            self.seen.append(self.contexts[-1])
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return function

    CUdevice_attribute = IntEnum(
        "Attribute",
        ["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"],
    )


def failing(status: Any, **answers: Any) -> DriverCalls:
    return DriverCalls(Bindings(cuWork=(status, None), **answers), 0)


def test_a_device_is_found_and_described() -> None:
    bindings = Bindings()
    driver = Driver(DriverCalls(bindings, 0))
    assert (driver.name, driver.compute_capability, driver.architecture) == ("A GPU", (9, 9), "sm_99")
    assert (driver.driver_version, driver.total_memory_bytes) == (13000, 1000)
    driver.close()
    assert bindings.calls[-1] == "cuDevicePrimaryCtxRelease"


@pytest.mark.parametrize(
    ("answers", "ordinal", "message"),
    [
        ({"cuDriverGetVersion": RuntimeError("no libcuda.so.1")}, 0, "no NVIDIA driver here.*570 or later"),
        ({"cuDriverGetVersion": (FINE, 12040)}, 0, r"made for CUDA 12\.4; 12\.8 or later.*release 570"),
        (
            {"cuInit": (Status.CUDA_ERROR_NO_DEVICE,)},
            0,
            r"cuInit says CUDA_ERROR_NO_DEVICE \(what it means\)",
        ),
        ({"cuDeviceGetCount": (FINE, 0)}, 0, "no CUDA device 0: the driver shows 0"),
        ({}, 1, "no CUDA device 1: the driver shows 1"),
        ({}, -1, "no CUDA device -1"),
        ({"cuDevicePrimaryCtxRetain": (Status.CUDA_ERROR_OUT_OF_MEMORY, 0)}, 0, "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_what_is_missing_is_said(answers: dict[str, Any], ordinal: int, message: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"(?s){message}"):
        DriverCalls(Bindings(**answers), ordinal)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(
        BackendUnavailableError, match=r"(?s)not installed.*pip install 'exitcompiler\[cuda\]'"
    ):
        Driver.open()


def test_old_bindings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    monkeypatch.setattr(driver, "CUgraphConditionalNodeType", IntEnum("Kind", ["CU_GRAPH_COND_TYPE_IF"]))
    with pytest.raises(BackendUnavailableError, match=r"older than 12\.8"):
        load_bindings()


def test_a_call_happens_in_the_devices_context_and_leaves_the_callers() -> None:
    bindings = Bindings(cuWork=(FINE, 5))
    calls = DriverCalls(bindings, 0)
    assert calls.call("work", "cuWork") == 5
    assert (bindings.seen[-1], bindings.contexts) == (OURS, [THEIRS])
    bindings.answers["cuWork"] = (Status.CUDA_ERROR_INVALID_VALUE,)
    with pytest.raises(DeviceError):
        calls.call("work", "cuWork")
    assert bindings.contexts == [THEIRS]


def test_what_a_call_gives() -> None:
    bindings = Bindings(cuOne=(FINE, 5), cuNone=(FINE,), cuTwo=(FINE, 5, 6))
    calls = DriverCalls(bindings, 0)
    assert calls.call("work", "cuOne") == 5
    assert calls.call("work", "cuNone") == []
    assert calls.call("work", "cuTwo") == [5, 6]


@pytest.mark.parametrize("error", [DeviceError, LoweringError])
def test_a_refusal_says_what_was_tried_and_what_cuda_calls_it(error: type[ExitCompilerError]) -> None:
    calls = failing(Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
    with pytest.raises(
        error, match=r"cannot end it: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED \(what it means\)"
    ):
        calls.call("end it", "cuWork", error=error)


def test_an_error_that_the_driver_does_not_know_is_said_as_a_number() -> None:
    with pytest.raises(DeviceError, match=r"cannot work: error 9999"):
        failing(9999).call("work", "cuWork")


def test_missing_memory_says_how_much_is_asked_for_and_free_whatever_was_tried() -> None:
    calls = failing(Status.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_OUT_OF_MEMORY.*; 1,234 of 5,678,901 bytes are free"):
        calls.call("instantiate", "cuWork", error=LoweringError)
    bindings = Bindings(cuMemAlloc=(Status.CUDA_ERROR_OUT_OF_MEMORY, 0))
    driver = Driver(DriverCalls(bindings, 0))
    with pytest.raises(
        DeviceError, match=r"(?s)allocate 65,536 bytes.*1,234 of 5,678,901.*smaller batch size"
    ):
        driver.malloc(65536)


def test_a_lost_context_is_said_to_be_lost() -> None:
    with pytest.raises(DeviceError, match=r"(?s)CUDA_ERROR_ILLEGAL_ADDRESS.*start another"):
        failing(Status.CUDA_ERROR_ILLEGAL_ADDRESS).call("work", "cuWork", error=LoweringError)


def test_a_function_that_the_driver_lacks_is_a_version_too_old() -> None:
    calls = DriverCalls(Bindings(cuWork=RuntimeError('Function "cuWork" not found')), 0)
    with pytest.raises(BackendUnavailableError, match=r'(?s)"cuWork" not found.*newer NVIDIA driver'):
        calls.call("work", "cuWork")


def test_only_whole_arrays_are_copied() -> None:
    driver = Driver(DriverCalls(Bindings(), 0))
    array = np.zeros((4, 4), np.float32)[:, ::2]
    with pytest.raises(InputError, match="C-contiguous"):
        driver.upload(0, array, 0)
    with pytest.raises(InputError, match="C-contiguous"):
        driver.download(array, 0, 0)
