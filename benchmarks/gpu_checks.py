"""What is checked and not timed: answers, decisions, that nothing is allocated or waited for, and memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from gpu_graphs import device_executor
from gpu_lab import Lab
from gpu_programs import Workload

from exitcompiler.interpreter import interpret
from exitcompiler.program import Program
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_executor import DeviceExecutor

__all__ = [
    "ROWS",
    "Counting",
    "answer_rows",
    "compare_rows",
    "memory",
    "parity",
    "quiet_calls",
    "quiet_launches",
    "watch_calls",
]

ROWS: Final = (1, 2, 3, 4, 8, 16, 31, 32)
"""Batches that parity is checked on: every bucket, and some that lie between two."""

_ALLOCATE: Final = frozenset(
    ("malloc", "host_alloc", "create_stream", "create_event", "create_graph", "instantiate")
)
_WAIT: Final = frozenset(("synchronize", "elapsed_us", "free", "host_free", "unload_module"))


Answers: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Logits, and the exit of each row."""


def answer_rows(program: Program, x: npt.NDArray[np.float32]) -> Answers:
    """What the interpreter answers on the CPU, row by row."""
    found = interpret(program, {next(iter(program.inputs)): torch.from_numpy(x)})
    return next(iter(found.outputs.values())).numpy(), found.exit_index


def parity(
    lab: Lab, program: Program, x: npt.NDArray[np.float32], wanted: Answers, batches: Sequence[int] = ROWS
) -> dict[str, Any]:
    """Answers and decisions on the device against the oracle, for several numbers of rows in a launch.

    Args:
        lab: Where.
        program: What runs on the device, at whatever precision.
        x: As many rows as the largest batch has, or more: ``float32 [n, ...]``.
        wanted: What `answer_rows` answers them with the program in float32.
        batches: Numbers of rows.

    Returns:
        By number of rows as `compare_rows`, over all rows that batches of so many were made of.
    """
    logits, exit_index = wanted
    executor = device_executor(lab, program, max(batches))
    found = {}
    for count in batches:
        parts = [x[start : start + count] for start in range(0, len(x) - count + 1, count)]
        answers = [executor.run([part], len(part)) for part in parts]
        used = count * len(parts)
        found[str(count)] = compare_rows(
            np.concatenate([outputs[0] for outputs, _ in answers]),
            np.concatenate([exits for _, exits in answers]),
            logits[:used],
            exit_index[:used],
        )
    executor.close()
    return found


def compare_rows(
    logits: npt.NDArray[Any],
    exit_index: npt.NDArray[Any],
    wanted_logits: npt.NDArray[Any],
    wanted_exits: npt.NDArray[Any],
) -> dict[str, float | None]:
    """How far answers and decisions agree.

    Returns:
        ``rows``; ``same_exit``, the share that left where they should; of these the largest difference of a
        logit, ``max_abs``, and over the largest logit (at least 1), ``relative`` (both None where an answer
        is no finite number); ``same_class``.
    """
    same = exit_index == wanted_exits
    difference = float(np.abs(logits[same].astype(np.float64) - wanted_logits[same]).max(initial=0.0))
    finite = bool(np.isfinite(logits).all())
    largest = max(1.0, float(np.abs(wanted_logits).max()))
    return {
        "rows": len(exit_index),
        "same_exit": float(same.mean()),
        "same_class": float((logits.argmax(axis=1) == wanted_logits.argmax(axis=1)).mean()),
        "max_abs": difference if finite else None,
        "relative": difference / largest if finite else None,
    }


class Counting:
    """A driver that counts what it is asked for, by the name of the method."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._driver, name)
        if not callable(found):
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return found(*args, **kwargs)

        return counted

    def figures(self) -> dict[str, Any]:
        """``calls`` by name; how many of them ``allocate`` and how many ``wait`` for the device."""
        return {
            "calls": dict(sorted(self.calls.items())),
            "allocate": sum(self.calls[name] for name in _ALLOCATE),
            "wait": sum(self.calls[name] for name in _WAIT),
        }


class TorchCuda(Protocol):
    """What is used of ``torch.cuda``."""

    def synchronize(self) -> None:
        """Wait for everything."""
        ...

    def set_sync_debug_mode(self, debug_mode: str) -> None:
        """Say what happens when PyTorch waits for the device."""
        ...

    def memory_stats(self) -> Mapping[str, Any]:
        """Counts of the allocator."""
        ...


def memory(
    lab: Lab, program: Program, rows: Sequence[int], reserved_bytes: Callable[[], int]
) -> dict[str, Any]:
    """What graphs and all that they hold take on the device, by rows of a launch.

    Args:
        lab: Where.
        program: What runs.
        rows: 1, and the most rows of a launch.
        reserved_bytes: What PyTorch's allocator holds of the device: weights, and what blocks work with.

    Returns:
        ``values_bytes``, ``tables_bytes``, ``torch_bytes``; ``device_bytes``, all that the driver has given
        away meanwhile, its own part of a graph included; ``nodes`` by sort; ``seconds`` to build.
    """
    executor = device_executor(lab, program, max(rows))
    found = {}
    for count in rows:
        free, reserved, began = lab.driver.free_memory_bytes(), reserved_bytes(), time.monotonic()
        built = executor.program(count)
        found[str(count)] = {
            "seconds": time.monotonic() - began,
            "values_bytes": built.memory_bytes,
            "tables_bytes": built.graph.table_bytes,
            "torch_bytes": reserved_bytes() - reserved,
            "device_bytes": free - lab.driver.free_memory_bytes(),
            "nodes": dict(built.graph.node_counts),
        }
    executor.close()
    return found


def quiet_launches(lab: Lab, workload: Workload, rows: Sequence[int], repeats: int = 50) -> dict[str, Any]:
    """What the driver is asked for between a launch and its result, by rows of the batch.

    Args:
        lab: Where.
        workload: What runs.
        rows: Batches.
        repeats: Launches.

    Returns:
        As `Counting.figures`; and ``taken_bytes``, how much less of the device's memory is free afterwards:
        the driver might take some without being asked.
    """
    counting = Counting(lab.driver)
    executor = device_executor(lab, workload.program, max(rows), counting)
    found = {}
    for count in rows:
        program = executor.program(count)
        program.stage([workload.x[:count]], count)
        program.launch(lab.stream)
        lab.wait()
        free_bytes = lab.driver.free_memory_bytes()
        counting.calls.clear()
        for _ in range(repeats):
            program.launch(lab.stream)
        figures = counting.figures()
        lab.wait()
        taken_bytes = free_bytes - lab.driver.free_memory_bytes()
        found[str(count)] = {"launches": repeats, **figures, "taken_bytes": taken_bytes}
    executor.close()
    return found


def quiet_calls(
    lab: Lab,
    workload: Workload,
    rows: Sequence[int],
    cuda: TorchCuda,
    tensor: Callable[[npt.NDArray[np.float32]], Any],
    busy: Callable[[Callable[[], Any]], bool],
    repeats: int = 50,
) -> dict[str, Any]:
    """What a call with tensors on the device asks of the driver and of PyTorch's allocator, by rows.

    Args:
        lab: Where.
        workload: What runs.
        rows: Batches.
        cuda: ``torch.cuda``.
        tensor: An array as a tensor on the device.
        busy: Whether a call came back while the device was still busy with what it was given before.
        repeats: Calls.
    """
    counting = Counting(lab.driver)
    executor = device_executor(lab, workload.program, max(rows), counting)
    found = {}
    for count in rows:
        batch = tensor(workload.x[:count])
        wanted = executor.run([workload.x[:count]], count)
        for _ in range(3):  # the graph is built, PyTorch's allocator has its memory
            outputs, exits = executor.run_device([batch], count)
        came_back = busy(partial(executor.run_device, [batch], count))
        found[str(count)] = {
            "came_back_before_the_device": came_back,
            **watch_calls(executor, batch, count, counting, cuda, repeats),
            **compare_rows(
                outputs[0].cpu().numpy(), exits.cpu().numpy(), np.asarray(wanted[0][0]), wanted[1]
            ),
        }
    executor.close()
    return found


def watch_calls(
    executor: DeviceExecutor, batch: Any, rows: int, counting: Counting, cuda: TorchCuda, repeats: int
) -> dict[str, Any]:
    """Call it often and tell what that asked for.

    Returns:
        As `Counting.figures`; ``device_allocations`` and ``segments``, by how many those of PyTorch's
        allocator have grown; ``torch_waited``, what PyTorch said where it would have waited.
    """
    cuda.synchronize()
    before = dict(cuda.memory_stats())
    counting.calls.clear()
    refused = None
    cuda.set_sync_debug_mode("error")
    try:
        for _ in range(repeats):
            executor.run_device([batch], rows)
    except RuntimeError as error:  # what PyTorch raises instead of waiting
        refused = str(error)
    finally:
        cuda.set_sync_debug_mode("default")
    figures = counting.figures()
    cuda.synchronize()
    after = cuda.memory_stats()
    grown = {
        name: int(after[key]) - int(before[key])
        for name, key in (("device_allocations", "num_device_alloc"), ("segments", "segment.all.allocated"))
        if key in before
    }
    return {"launches": repeats, **figures, **grown, "torch_waited": refused}
