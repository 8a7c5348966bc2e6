"""The benchmarks' modules, by name; and a small program for the GPU check."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(request.param)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Loads a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture(scope="session")
def workload() -> Any:
    """A `gpu_programs.Workload`: ResNet-8 for CIFAR with two exits, and 32 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        programs, cifar = map(importlib.import_module, ("gpu_programs", "cifar"))
        torch.manual_seed(0)
        return programs.build_workload(cifar.CifarResNet(1), programs.rows_like_images(32, 32), 10)
