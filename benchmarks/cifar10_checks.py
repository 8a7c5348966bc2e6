"""What has to hold besides speed: parity with torch, exits at any batch size, a quick start without torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from cifar10_contenders import answers
from cifar10_setup import Array, Job

from exitcompiler.benchmarking import logits_of
from exitcompiler.certify import run_to_exit
from exitcompiler.compiler import Details
from exitcompiler.packaging import environment
from exitcompiler.program import Program
from exitcompiler.runtime.compiled import CompiledModel

__all__ = ["exit_agreement", "parity", "start_without_torch", "surroundings"]

PARITY_ROWS: Final = 64

_START: Final = """
import sys, time
started = time.perf_counter()
sys.modules["torch"] = None  # any import of it fails
import numpy
import exitcompiler
compiled = exitcompiler.load(sys.argv[1])
compiled(numpy.zeros((1, 3, 32, 32), numpy.float32))
print(time.perf_counter() - started)
"""


def parity(job: Job, details: Details) -> dict[str, Any]:
    """Force rows to every exit of every shipped point and compare with torch's float32.

    Returns:
        Point -> exit -> the largest absolute difference, as a batch and one by one.
    """
    x = job.split.final_x[:PARITY_ROWS]
    found: dict[str, dict[str, float]] = {}
    for point, program in _programs(details).items():
        model = details.compiled.select(name=point)
        found[point] = {name: _difference(model, program, name, x) for name in program.exits}
    worst = max(value for exits in found.values() for value in exits.values())
    return {"rows": len(x), "points": found, "max_abs": worst}


def _programs(details: Details) -> dict[str, Program]:
    """Operating point -> program with bodies, for the points that were shipped."""
    compiled = details.compiled
    programs = {compiled.plain.operating_point.name: details.program}
    if details.selection is not None and not compiled.artifact.report.get("refused"):
        points = (details.selection.chosen, *details.selection.shipped)
        names = [point.name for point in compiled.operating_points]
        programs |= {name: built.program for name, built in zip(names, points, strict=False)}
    return programs


def _difference(model: CompiledModel, program: Program, exit_name: str, x: Array) -> float:
    inputs = {next(iter(program.inputs)): torch.from_numpy(x)}
    expected = run_to_exit(program, exit_name, inputs).numpy()
    forced = model.forced(exit_name)
    together = logits_of(forced(x))
    alone = np.concatenate([logits_of(forced(row[None])) for row in x])
    return float(max(np.abs(together - expected).max(), np.abs(alone - expected).max()))


def exit_agreement(job: Job, program: CompiledModel) -> dict[str, Any]:
    """On which share of the final rows the exit at batch 64 is the exit at batch 1."""
    x = job.split.final_x
    classes, exits = answers(program, x, batch=64)
    classes_alone, exits_alone = answers(program, x, batch=1)
    return {
        "rows": len(x),
        "same_exit": float((exits == exits_alone).mean()),
        "other_exit_rows": int((exits != exits_alone).sum()),
        "same_class": float((classes == classes_alone).mean()),
    }


def start_without_torch(path: Path, starts: int) -> dict[str, Any]:
    """Load and answer one row in fresh processes where torch cannot be imported.

    The seconds count from before the first import (numpy and the backend included); those of the
    whole process also hold the start of Python.
    """
    inside, whole = [], []
    for _ in range(starts):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-P", "-c", _START, str(path)], capture_output=True, text=True, check=True
        )
        whole.append(time.perf_counter() - started)
        inside.append(float(done.stdout.split()[-1]))
    return {
        "starts": starts,
        "seconds": float(np.median(inside)),
        "process_seconds": float(np.median(whole)),
        "all_seconds": inside,
    }


def surroundings() -> dict[str, Any]:
    """Versions, machine and date."""
    return {**environment(), "torch_threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
