"""Times are compared only where they were measured alike."""

from __future__ import annotations

import platform
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from budget_figures import ENVIRONMENT

import exitcompiler
from exitcompiler.budgets import environment
from exitcompiler.budgets.environment import differences, environment_of, version_changes
from exitcompiler.machine import processor_identity
from exitcompiler.runtime.backends import default_threads


def running_on(**backend: Any) -> Any:
    given = {"name": "onnxruntime", "on_device": False, "threads": 1, "precision": "fp32", **backend}
    return SimpleNamespace(backend=SimpleNamespace(**given))


def test_the_environment_is_that_of_this_process() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    found = environment_of(running_on(threads=3, precision="fp16"))
    assert (found.cpu, found.cores) == (processor_identity(), default_threads())
    assert (found.backend, found.threads, found.precision) == ("onnxruntime", 3, "fp16")
    assert found.system == f"{platform.system()}-{platform.machine()}"
    assert found.versions["python"] == platform.python_version()
    assert found.versions["exitcompiler"] == exitcompiler.__version__
    assert found.versions["onnxruntime"] == onnxruntime.__version__
    assert "torch" not in found.versions
    assert differences(found, found) == version_changes(found, found) == ()


def test_on_a_gpu_the_processor_that_launches_it_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    running = running_on(name="cuda", on_device=True, driver=SimpleNamespace(name="A GPU"))
    monkeypatch.setattr(environment, "processor_identity", lambda: "a processor")
    found = environment_of(running)
    assert found.cpu == "A GPU + a processor"
    assert "torch" in found.versions
    monkeypatch.setattr(environment, "processor_identity", lambda: "")
    assert environment_of(running).cpu == ""


def test_an_unknown_processor_equals_none() -> None:
    unknown = replace(ENVIRONMENT, cpu="")
    (reason,) = differences(unknown, unknown)
    assert reason.startswith("the processor is unknown, and was unknown when")
    assert differences(ENVIRONMENT, unknown) != ()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("cpu", "another", "the processor is another, and was a processor when"),
        ("cpu", "", "the processor is unknown"),
        ("cores", 4, "the number of cores is 4, and was 2"),
        ("system", "Darwin-arm64", "the system is Darwin-arm64"),
        ("backend", "openvino", "the backend is openvino, and was onnxruntime"),
        ("threads", 2, "the number of threads is 2"),
        ("precision", "bf16", "the precision is bf16"),
    ],
)
def test_each_difference_is_a_reason(field: str, value: Any, said: str) -> None:
    (reason,) = differences(replace(ENVIRONMENT, **{field: value}), ENVIRONMENT)
    assert reason.startswith(said)


def test_versions_are_no_reason_but_told() -> None:
    before = replace(ENVIRONMENT, versions={"numpy": "1.26.0", "openvino": "2026.4", "python": "3.11.0"})
    now = replace(ENVIRONMENT, versions={"numpy": "2.4.6", "onnxruntime": "1.31.1", "python": "3.11.0"})
    assert differences(now, before) == ()
    assert version_changes(now, before) == (
        "numpy 1.26.0 -> 2.4.6",
        "onnxruntime none -> 1.31.1",
        "openvino 2026.4 -> none",
    )
