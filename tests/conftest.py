"""What every test run has in common: one thread, and the same Hypothesis examples each time.

One thread, since on a machine that is busy two of them wait for each other longer than they work.
"""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when the first library that uses OpenMP loads

import pytest
import torch

torch.set_num_threads(1)


def _are_here(*packages: str) -> bool:
    """`make gpu-check` runs the GPU tests on machines that have little more than torch and pytest."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


if _are_here("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "exitcompiler",
        derandomize=True,
        deadline=None,
        max_examples=50,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("exitcompiler")


@pytest.fixture(autouse=True)
def no_shared_thread_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep commands run in this process from taking over its ONNX Runtime sessions, which none can undo."""
    monkeypatch.setattr("exitcompiler.runtime.backends.share_threads", lambda backend, threads: None)
