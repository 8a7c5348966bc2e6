"""Which TensorRT is there, what it can do, what it says; and what a plan's first bytes tell."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
from fake_tensorrt import FakeTensorRt

from exitcompiler.errors import BackendUnavailableError
from exitcompiler.runtime.tensorrt_api import (
    TENSORRT_FLAVOURS,
    installed_flavours,
    load_tensorrt,
    plan_origin,
    version_numbers,
)


@pytest.fixture
def neither(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No TensorRT at all; a test puts in what it needs."""
    for name in TENSORRT_FLAVOURS:
        monkeypatch.setitem(sys.modules, name, None)
    return monkeypatch


def put(monkeypatch: pytest.MonkeyPatch, module: FakeTensorRt) -> FakeTensorRt:
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_without_any_the_install_commands_are_named(neither: pytest.MonkeyPatch) -> None:
    assert installed_flavours() == ()
    with pytest.raises(BackendUnavailableError, match=r"pip install tensorrt.*pip install tensorrt_rtx"):
        load_tensorrt()


def test_tensorrt_goes_before_tensorrt_rtx_and_a_named_one_is_the_one_that_is_taken(
    neither: pytest.MonkeyPatch,
) -> None:
    put(neither, FakeTensorRt("tensorrt_rtx", "1.7.1.116"))
    assert load_tensorrt().flavour == "tensorrt_rtx"
    put(neither, FakeTensorRt("tensorrt", "11.4.0.106"))
    assert installed_flavours() == ("tensorrt", "tensorrt_rtx")
    assert load_tensorrt().version == "11.4.0.106"
    assert load_tensorrt("tensorrt_rtx").version == "1.7.1.116"


def test_a_named_one_that_is_missing_is_an_error(neither: pytest.MonkeyPatch) -> None:
    put(neither, FakeTensorRt("tensorrt_rtx", "1.7.1.116"))
    with pytest.raises(BackendUnavailableError, match="tensorrt cannot be imported"):
        load_tensorrt("tensorrt")


def test_one_that_is_too_old_is_named_with_what_it_lacks(neither: pytest.MonkeyPatch) -> None:
    module = put(neither, FakeTensorRt("tensorrt", "8.6.1"))
    module.IExecutionContext = object
    with pytest.raises(
        BackendUnavailableError, match=r"tensorrt 8.6.1 .* no IExecutionContext.set_device_memory"
    ):
        load_tensorrt()


def test_what_it_can_do_is_asked_of_it(neither: pytest.MonkeyPatch) -> None:
    put(neither, FakeTensorRt("tensorrt", "10.16.1.11"))
    put(neither, FakeTensorRt("tensorrt_rtx", "1.7.1.116"))
    enterprise, rtx = load_tensorrt("tensorrt"), load_tensorrt("tensorrt_rtx")
    assert enterprise.has_timing_cache
    assert not enterprise.builds_for_named_devices
    assert not enterprise.compiles_when_loading
    assert enterprise.module.calls == ["plugins"]
    assert not rtx.has_timing_cache
    assert rtx.compiles_when_loading
    assert rtx.compute_capability((8, 9)).name == "SM89"
    assert rtx.compute_capability((9, 0)) is None


def test_there_is_one_logger_per_process(neither: pytest.MonkeyPatch) -> None:
    put(neither, FakeTensorRt())
    assert load_tensorrt().logger is load_tensorrt().logger


def test_messages_are_heard_while_somebody_listens_and_logged(
    neither: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = put(neither, FakeTensorRt())
    trt = load_tensorrt()
    severities: Any = module.Severity
    caplog.set_level(logging.DEBUG)
    with trt.messages() as heard, trt.messages(everything=True) as all_of_it:
        trt.logger.log(severities.ERROR, "conv.0 failed")
        trt.logger.log(severities.VERBOSE, "Layers:")
    trt.logger.log(severities.ERROR, "later")
    assert heard.text == "conv.0 failed"
    assert all_of_it.text == "conv.0 failed\nLayers:"
    assert heard.errors == "conv.0 failed"
    assert not heard.out_of_memory
    assert [r.levelno for r in caplog.records if "conv.0" in r.message] == [logging.INFO]


@pytest.mark.parametrize(
    ("text", "is_memory"),
    [
        ("Cuda Runtime (out of memory)", True),
        ("OutOfMemory (Requested size was 4 bytes.)", True),
        ("cudaErrorMemoryAllocation", True),
        ("CUDA_ERROR_OUT_OF_MEMORY", True),
        ("memory format mismatch", False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(
    neither: pytest.MonkeyPatch, text: str, is_memory: bool
) -> None:
    module = put(neither, FakeTensorRt())
    trt = load_tensorrt()
    with trt.messages() as heard:
        trt.logger.log(module.Severity["ERROR"], text)
    assert heard.out_of_memory == is_memory


def test_silence_is_said(neither: pytest.MonkeyPatch) -> None:
    put(neither, FakeTensorRt())
    with load_tensorrt().messages() as heard:
        pass
    assert "gives no reason" in heard.errors
    assert not heard.out_of_memory


def test_a_plan_says_what_made_it() -> None:
    assert plan_origin(FakeTensorRt("tensorrt", "10.16.1.11").header()) == ("tensorrt", (10, 16, 1, 11))
    rtx = FakeTensorRt("tensorrt_rtx", "1.7.1.116").header() + b"more"
    assert plan_origin(rtx) == ("tensorrt_rtx", (1, 7, 1, 116))


@pytest.mark.parametrize("content", [b"", b"ftrt", b"PK\x03\x04" + bytes(40), b"ftrt\x01" + bytes(40)])
def test_what_is_no_plan_of_a_known_form_is_none(content: bytes) -> None:
    assert plan_origin(content) is None


def test_versions_are_numbers_up_to_the_first_that_is_none() -> None:
    assert version_numbers("10.16.1.11") == (10, 16, 1, 11)
    assert version_numbers("11.0.0rc1") == (11, 0)
