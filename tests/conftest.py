"""What every test run has in common: few threads, and the same Hypothesis examples each time."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read once, when the first library that uses OpenMP loads

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(2)

settings.register_profile(
    "exitcompiler",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("exitcompiler")
