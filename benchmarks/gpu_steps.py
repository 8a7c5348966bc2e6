"""The steps of the GPU check: what each one measures."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["PARITY", "Record", "run_step"]

_QUIET_ROWS: Final = (1, 20, 32)
PARITY: Final = ("fp32", "tf32", "fp16", "bf16")
"""What answers are checked at: float32 without TF32, float32 as PyTorch has it, and the lower precisions."""
_PACKAGES: Final = (
    "torch", "cuda-bindings", "numpy", "triton", "tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "pytest",
)  # fmt: skip
_ASKED: Final = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
)


class Record:
    """What a step has found so far, on disk after every entry, so that a crash loses only what came after.

    Args:
        path: A JSON file. JSON has no infinities: what is no finite number becomes null.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(json.dumps(_finite(self.values), default=float, allow_nan=False))
        unfinished.replace(self._path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float | np.floating) and not math.isfinite(value) else value


def run_step(name: str, record: Record) -> None:
    """Run a step: ``"nodes"``, or ``"rows resnet56 fp32"``.

    Raises:
        KeyError: There is no such step.
    """
    kind, *arguments = name.split()
    steps: Mapping[str, Callable[..., None]] = {
        "environment": _environment,
        "nodes": _nodes,
        "parity": _parity,
        "rows": _rows,
        "batches": _batches,
        "calls": _calls,
        "torch": _torch,
        "cond": _cond,
        "tensorrt": _tensorrt,
    }
    steps[kind](record, *arguments)
    _let_go()


def _let_go() -> None:
    """Give back what the step held, as the next one is run in this process, too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _environment(record: Record) -> None:
    from exitcompiler.runtime.cuda_driver import Driver

    driver = Driver.open(0)  # this first: where there is no GPU it is told at once
    import torch

    from exitcompiler.runtime.cuda_backend import CudaBackend

    CudaBackend(threads=1)
    record["device"] = driver.name
    record["compute_capability"] = ".".join(map(str, driver.compute_capability))
    record["memory_bytes"] = driver.total_memory_bytes
    record["driver_cuda"] = f"{driver.driver_version // 1000}.{driver.driver_version % 1000 // 10}"
    record["torch_cuda"] = torch.version.cuda
    record["cudnn"] = torch.backends.cudnn.version()
    record["tf32"] = {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products of matrices": torch.backends.cuda.matmul.allow_tf32,
    }
    record["versions"] = {name: found for name in _PACKAGES if (found := _version(name))}
    record["python"] = platform.python_version()
    record["system"] = f"{platform.system()} {platform.release()}"
    record["cpus"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    record["date"] = time.strftime("%Y-%m-%d")
    record["as_found"] = _as_found()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_found() -> dict[str, str]:
    """Driver and clocks as ``nvidia-smi`` tells them; nothing is set."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"not asked: {error}"}
    return dict(zip(_ASKED, (part.strip() for part in told.strip().split(",")), strict=False))


@functools.cache
def _workload(name: str) -> Any:
    """Made once in a process: to trace a network takes many seconds."""
    import torch
    from gpu_programs import MODELS, build_workload, rows_like_images

    recipe = MODELS[name]
    torch.manual_seed(0)
    return build_workload(recipe.network(), rows_like_images(recipe.rows, recipe.side), recipe.classes)


def _nodes(record: Record) -> None:
    from gpu_lab import open_lab
    from gpu_nodes import FLAT, NESTED, measure_nodes

    for name, chains in (("flat", FLAT), ("nested", NESTED)):  # the deep ones last: they are the riskiest
        with open_lab() as lab, lab.part() as part:
            record[name] = measure_nodes(part, chains)


def _parity(record: Record, model: str) -> None:
    from gpu_checks import answer_rows, parity
    from gpu_lab import ieee_float32, open_lab

    from exitcompiler.passes.cast_precision import cast_precision

    workload = _workload(model)
    x = workload.x[:96] if model == "resnet56" else workload.x[:32]
    wanted = answer_rows(workload.program, x)
    with open_lab() as lab:
        for name in PARITY:
            program = cast_precision(workload.program, "fp32" if name == "tf32" else name)
            with lab.part() as part, ieee_float32() if name == "fp32" else nullcontext():
                record[name] = parity(part, program, x, wanted)


def _rows(record: Record, model: str, precision: str) -> None:
    from gpu_lab import open_lab
    from gpu_latency import row_figures

    from exitcompiler.passes.cast_precision import cast_precision

    workload = _workload(model)
    program = cast_precision(workload.program, precision)
    whole = cast_precision(workload.whole, precision)
    with open_lab() as lab, lab.part() as part:
        record["rows"] = row_figures(part, workload, program, whole)


def _batches(record: Record, model: str) -> None:
    from gpu_lab import Effort, open_lab
    from gpu_latency import batch_figures

    workload = _workload(model)
    with open_lab(Effort(turns=200, seconds=2.0, least=20, warm_up=5)) as lab, lab.part() as part:
        record["batches"] = batch_figures(part, workload, workload.program)


def _calls(record: Record, model: str) -> None:
    import torch
    from gpu_checks import memory, quiet_calls, quiet_launches
    from gpu_lab import came_back_early, open_lab

    workload = _workload(model)
    with open_lab() as lab:
        with lab.part() as part:
            record["memory"] = memory(part, workload.program, (1, 32), torch.cuda.memory_reserved)
        with lab.part() as part:
            record["launches"] = quiet_launches(part, workload, _QUIET_ROWS)

        def tensor(array: npt.NDArray[np.float32]) -> torch.Tensor:
            return torch.from_numpy(array).cuda()

        with lab.part() as part, torch.cuda.stream(torch.cuda.Stream()):  # a caller's own stream
            record["calls"] = quiet_calls(part, workload, _QUIET_ROWS, torch.cuda, tensor, came_back_early)


def _torch(record: Record, model: str) -> None:
    import torch
    from gpu_lab import open_lab
    from gpu_latency import compare_single_rows
    from gpu_torch import compiled_network, eager_network

    workload = _workload(model)
    with open_lab() as lab, lab.part() as part:
        x = torch.from_numpy(workload.x[:1]).cuda()
        eager = {"whole network, eager": eager_network(part, workload.network, x.clone())}
        record["eager"] = compare_single_rows(part, workload, workload.program, eager)
        began = time.monotonic()
        compiled = {"whole network, torch.compile": compiled_network(part, workload.network, x.clone())}
        record["compile_seconds"] = time.monotonic() - began
        record["compiled"] = compare_single_rows(part, workload, workload.program, compiled)


def _cond(record: Record, model: str) -> None:
    import torch
    from gpu_lab import open_lab
    from gpu_latency import compare_single_rows
    from gpu_torch import CondGraph, has_cond_in_graphs

    from exitcompiler.interpreter import interpret

    if not has_cond_in_graphs():
        record["absent"] = f"torch {torch.__version__} does not capture torch.cond into CUDA graphs"
        return
    workload = _workload(model)
    with open_lab() as lab, lab.part() as part:
        cond = CondGraph(part, workload.program, torch.from_numpy(workload.x[:1]).cuda())
        worst = 0.0
        for row in range(8):
            x = workload.x[row : row + 1]
            cond.stage(x)
            cond.launch()
            (wanted,) = interpret(
                workload.program, {next(iter(workload.program.inputs)): torch.from_numpy(x)}
            ).outputs.values()
            worst = max(worst, float(np.abs(cond.answer() - wanted.numpy()).max()))
        record["max_abs"] = worst
        others = {"program, torch.cond in a CUDA graph": cond}
        record["cond"] = compare_single_rows(part, workload, workload.program, others)


def _tensorrt(record: Record, model: str) -> None:
    from exitcompiler.runtime.tensorrt_api import installed_flavours

    if not installed_flavours():
        record["absent"] = "TensorRT is not installed"
        return
    if not _version("onnx"):
        record["absent"] = "onnx, which TensorRT's models are written with, is not installed"
        return
    from gpu_graphs import ChainGraph, DeviceProgramCall, device_executor
    from gpu_lab import Contender, open_lab, with_tensorrt
    from gpu_latency import compare_single_rows

    workload = _workload(model)
    with open_lab() as lab, lab.part() as part:
        engines = with_tensorrt(part, 1)
        executor = device_executor(engines, workload.program, 1)
        others: dict[str, Contender] = {
            "whole network, one TensorRT engine": ChainGraph(engines, [workload.whole.entry], [1]),
            "program with TensorRT bodies": DeviceProgramCall(engines, executor, 1),
        }
        record["tensorrt"] = compare_single_rows(part, workload, workload.program, others)
