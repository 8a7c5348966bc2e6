"""Runs a network of the zoo in a process of its own: refusals, crashes, hangs and full memory told apart."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final

from zoo_compile import Progress, compile_with_exits
from zoo_models import Model, build

from exitcompiler.budgets.memory import peak_resident_bytes
from exitcompiler.errors import ExitCompilerError

__all__ = ["LIMIT_S", "MEMORY_BYTES", "OUTCOMES", "compile_model", "run_apart", "server"]

LIMIT_S: Final = 180.0
MEMORY_BYTES: Final = 14 << 30
"""Of address space, beyond which a process gets no more."""
OUTCOMES: Final = ("works", "refused", "untyped error", "crash", "hang", "memory")
_PRELOADED: Final = ("torch", "torch.onnx", "onnxscript", "onnxruntime", "zoo_process")


def server() -> ForkServerContext:
    """Where processes come from: it has imported what all of them need, and nothing else runs in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def compile_model(model: Model, progress: Progress) -> None:
    """Build a network of the zoo and compile it.

    Args:
        model: Which.
        progress: What is found out goes here.

    Raises:
        ExitCompilerError: It is refused.
    """
    with progress.stage("build"):
        module, inputs = build(model)
    progress.figures["inputs"] = {name: list(value.shape[1:]) for name, value in inputs.items()}
    progress.figures["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    compile_with_exits(module, inputs, progress)


def run_apart(
    model: Model,
    path: Path,
    context: ForkServerContext,
    *,
    job: Callable[[Model, Progress], object] = compile_model,
    limit_s: float = LIMIT_S,
) -> dict[str, Any]:
    """Compile a network in a new process.

    Args:
        model: Which.
        path: Where the process writes what it finds out; what it prints goes beside it.
        context: See `server`.
        job: What the process does.
        limit_s: Seconds until it is stopped.

    Returns:
        The figures of `zoo_compile.Progress`, ``outcome`` (one of ``OUTCOMES``), ``error``, ``where``,
        ``remedy``, ``total_s`` and ``peak_bytes``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    process = context.Process(target=_child, args=(model, path, job), daemon=True)
    began = time.monotonic()
    process.start()
    process.join(limit_s)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else _named(model)
    found["total_s"] = round(time.monotonic() - began, 1)
    if hangs:
        found |= {"outcome": "hang", "error": f"stopped after {limit_s:.0f} s in {found.get('stage')!r}"}
    elif "outcome" not in found:
        code = process.exitcode
        found |= {"outcome": "crash", "error": f"exit status {code} in {found.get('stage')!r}"}
    _write(path, found)
    return found


def _child(model: Model, path: Path, job: Callable[[Model, Progress], object]) -> None:
    _quieten(path)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    progress = Progress(lambda figures: _write(path, figures))
    figures = progress.figures
    figures |= _named(model)
    try:
        job(model, progress)
        figures["outcome"] = "works"
    except ExitCompilerError as error:
        figures |= {
            "outcome": "refused",
            "kind": type(error).__name__,
            "error": error.what,
            "where": error.where,
            "remedy": error.remedy,
            "traceback": traceback.format_exc(),
        }
    except MemoryError:
        figures |= {"outcome": "memory", "error": f"more than {MEMORY_BYTES >> 30} GiB are needed"}
    except Exception as error:
        full = "can't allocate memory" in str(error) or "bad_alloc" in str(error)
        figures |= {
            "outcome": "memory" if full else "untyped error",
            "kind": type(error).__name__,
            "error": str(error),
            "traceback": traceback.format_exc(),
        }
    figures["peak_bytes"] = peak_resident_bytes()
    _write(path, figures)


def _named(model: Model) -> dict[str, Any]:
    return {"library": model.library, "family": model.family, "name": model.name}


def _quieten(path: Path) -> None:
    """What the libraries say goes to a file."""
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)


def _write(path: Path, found: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1))
    unfinished.replace(path)
