"""What is checked before a compiled program is handed over: parity, certificate, paired speed-up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import networkx as nx
import numpy as np
import torch

from exitcompiler.benchmarking import logits_of, summarize_ms
from exitcompiler.data import Inputs, Rows
from exitcompiler.errors import InputError, LoweringError
from exitcompiler.program import Program
from exitcompiler.runtime.backends import Array
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.timing import measure_interleaved
from exitcompiler.statistics import (
    clopper_pearson_upper,
    mean_difference_interval,
    ratio_interval,
    rows_for_bound,
)
from exitcompiler.views import block_graph

__all__ = [
    "TOLERANCE",
    "Certified",
    "ForcedDifference",
    "answers_of",
    "certify",
    "check_one_file",
    "check_parity",
    "forced_differences",
    "measure_speedup",
    "run_to_exit",
]

TOLERANCE: Final = {"fp32": 1e-4, "tf32": 0.01, "fp16": 0.03, "bf16": 0.15, "int8": 0.15}
"""Largest difference between a backend's outputs and torch's float32 on the CPU (in int8: those of the same
quantised graph, where a sum that lies between two steps may fall to either), relative to the largest output
where that is above 1. A GPU at precision "fp32" may multiply in TF32, which has float16's digits."""

CONFIDENCE: Final = 0.95
PARITY_ROWS: Final = 16
MOST_ROUTES: Final = 32
BATCH_SIZE: Final = 32
LIMIT_S: Final = 30.0
"""How long a comparison may measure; a large network gets fewer turns, and so a wider interval."""


Certified = dict[str, Any]


def check_parity(
    compiled: CompiledModel, program: Program, rows: Rows, precision: str, *, count: int = PARITY_ROWS
) -> float:
    """Send rows to each exit in turn, by every way that leads there, and compare the outputs with torch's.

    Of more than ``MOST_ROUTES`` ways to one exit the others are left out.

    Args:
        compiled: The lowered program.
        program: The same with its bodies.
        rows: Real rows.
        precision: Says how much difference is tolerated.
        count: How many rows to use.

    Returns:
        The largest absolute difference, relative to the largest output where that is above 1.

    Raises:
        LoweringError: A difference is above the tolerance; names the exit and the way.
    """
    tolerance = _tolerance(compiled, precision)
    worst = 0.0
    for found in forced_differences(compiled, program, rows, count=count):
        where = f"exit {found.exit!r} by {' > '.join(found.route)} on {compiled.backend.name} {precision}"
        worst = max(worst, _tolerated(found.difference, found.largest, tolerance, where))
    return worst


@dataclass(frozen=True)
class ForcedDifference:
    """How far a lowered program's outputs lie from torch's where every row is sent to one exit.

    Args:
        exit: The exit's name.
        route: The blocks that are passed.
        rows: Of the batch.
        difference: The largest, absolute; NaN where an output is.
        largest: The largest output of torch, absolute.
    """

    exit: str
    route: tuple[str, ...]
    rows: int
    difference: float
    largest: float


def forced_differences(
    compiled: CompiledModel, program: Program, rows: Rows, *, count: int = PARITY_ROWS
) -> Iterator[ForcedDifference]:
    """Send rows to each exit in turn, by every way that leads there, in one batch and one row alone.

    Args:
        compiled: The lowered program.
        program: The same with its bodies.
        rows: Real rows.
        count: How many rows the batch has.
    """
    part = rows.take(slice(0, count))
    arrays = _arrays(part.inputs)
    alone = {name: array[:1] for name, array in arrays.items()}
    for exit_name, route in _routes(program):
        expected = run_to_exit(program, exit_name, part.inputs, route).numpy()
        forced = compiled.forced(exit_name, route)
        for batch in (arrays, alone):
            found = logits_of(forced(batch))
            wanted = expected[: len(found)]
            difference = float(np.abs(found - wanted).max())
            largest = float(np.abs(wanted).max())
            yield ForcedDifference(exit_name, tuple(route), len(found), difference, largest)


def check_one_file(single: CompiledModel, blocks: CompiledModel, rows: Rows, precision: str) -> None:
    """Compare the one-file model, as it runs single rows, with an engine per block.

    Args:
        single: Runs single rows by the one-file model.
        blocks: The same program, an engine per block.
        rows: Real rows.
        precision: Says how much difference is tolerated.

    Raises:
        LoweringError: Outputs differ where both took the same exit, or exits differ on more than one row
            in ten (a score on the edge of a threshold may fall to either side).
    """
    where = f"model.onnx on {single.backend.name} {precision}"
    moved = 0
    for inputs, _ in rows.take(slice(0, PARITY_ROWS)).batches(1):
        row = _arrays(inputs)
        one, other = single.run(row), blocks.run(row)
        if int(one.exit_index[0]) != int(other.exit_index[0]):
            moved += 1
            continue
        found, expected = logits_of(one.outputs), logits_of(other.outputs)
        difference, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
        _tolerated(difference, largest, TOLERANCE[precision], where)
    if moved > min(len(rows), PARITY_ROWS) * 0.1:
        raise LoweringError(
            f"{moved} of {PARITY_ROWS} rows take another exit than block by block",
            where=where,
            remedy="choose another backend, and report this",
        )


def _tolerance(compiled: CompiledModel, precision: str) -> float:
    return TOLERANCE["tf32" if compiled.backend.on_device and precision == "fp32" else precision]


def _tolerated(difference: float, largest: float, tolerance: float, where: str) -> float:
    """The difference relative to the largest output where that is above 1, if it is tolerated."""
    scale = max(1.0, largest)
    tolerated = tolerance * scale
    if not difference <= tolerated:
        raise LoweringError(
            f"outputs differ by {difference:.2g}, {tolerated:.2g} is tolerated",
            where=where,
            remedy="try another backend, or precision='fp32'",
        )
    return difference / scale


def _arrays(inputs: Inputs) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def _routes(program: Program) -> Iterator[tuple[str, list[str]]]:
    """Every exit with the ways that lead there, as the blocks that are passed; of very many the first."""
    graph: nx.DiGraph[Any] = nx.DiGraph(block_graph(program))
    for exit_name in program.exits:
        ways = nx.all_simple_paths(graph, program.entry.name, f"return:{exit_name}")
        for way in itertools.islice(ways, MOST_ROUTES):
            yield exit_name, way[:-1]


@torch.no_grad()
def run_to_exit(
    program: Program,
    exit_name: str,
    inputs: Mapping[str, torch.Tensor],
    route: Sequence[str] | None = None,
) -> torch.Tensor:
    """The first output of a program of torch bodies when every row goes to one exit.

    Args:
        program: With bodies.
        exit_name: One of its exits.
        inputs: Input name -> rows.
        route: The blocks to pass; None: the shortest way.
    """
    graph = block_graph(program)
    end = f"return:{exit_name}"
    way = nx.shortest_path(graph, program.entry.name, end) if route is None else [*route, end]
    values = dict(inputs)
    for name, following in itertools.pairwise(way):
        block = program.block(name)
        values = {**values, **block.run(values)}
        handed_on = next(iter(graph.get_edge_data(name, following).values()))["values"]
        if following != end:
            params = program.block(following).params
            values = dict(zip(params, (values[value] for value in handed_on), strict=True))
    return values[handed_on[0]]


def certify(
    compiled: CompiledModel, backbone: Array, rows: Rows, limit: float | None
) -> tuple[Certified, dict[str, Any]]:
    """Run rows that nothing was chosen on, and bound the excess error.

    Excess error (wrong where the backbone was right) is a mean of independent 0/1 outcomes, so its
    exact upper bound is Clopper and Pearson's; the net drop is at most the excess error.

    Args:
        compiled: The program as it will run.
        backbone: The class that the untouched backbone gives every row, ``int64[rows]``.
        rows: The certify rows.
        limit: The accuracy drop asked for, to say how many rows a certificate of that would need.

    Returns:
        The certificate, and what was seen on these rows (exit rates, accuracy per exit).
    """
    answers, exit_index = answers_of(compiled, rows)
    targets = backbone if rows.labels is None else rows.labels
    right, backbone_right = answers == targets, backbone == targets
    excess = int((backbone_right & ~right).sum())
    drop = mean_difference_interval(backbone_right.astype(np.float64), right.astype(np.float64))
    bound = clopper_pearson_upper(excess, len(rows), CONFIDENCE)
    certificate: Certified = {
        "kind": "clopper-pearson",
        "point": compiled.operating_point.name,
        "bounds": "excess error",
        "confidence": CONFIDENCE,
        "rows": len(rows),
        "errors": excess,
        "bound": bound,
        "accuracy": float(right.mean()),
        "backbone_accuracy": float(backbone_right.mean()),
        "accuracy_drop": {"value": drop.value, "lower": drop.lower, "upper": drop.upper},
        **_rows_needed(excess / len(rows), limit),
    }
    seen: dict[str, Any] = {"exit_rates": {}, "exit_accuracy": {}}
    for index, name in enumerate(compiled.exits):
        left = exit_index == index
        seen["exit_rates"][name] = float(left.mean())
        seen["exit_accuracy"][name] = float(right[left].mean()) if left.any() else None
    return certificate, seen


def answers_of(compiled: CompiledModel, rows: Rows) -> tuple[Array, Array]:
    """Predicted class ``int64 [rows]`` and exit ``int32 [rows]`` of every row."""
    classes, exits = [], []
    for inputs, _ in rows.batches(BATCH_SIZE):
        result = compiled.run(_arrays(inputs))
        classes.append(logits_of(result.outputs).argmax(axis=1))
        exits.append(result.exit_index)
    return np.concatenate(classes), np.concatenate(exits)


def _rows_needed(rate: float, limit: float | None) -> dict[str, Any]:
    """How many rows would certify the limit at this rate; without a limit, 1.25 times the rate."""
    target = 1.25 * rate + 0.001 if limit is None else limit
    try:
        return {"target": target, "rows_needed": rows_for_bound(rate, target, CONFIDENCE)}
    except InputError:  # the rate is at or above the target: no number of rows is enough
        return {"target": target}


def measure_speedup(
    compiled: CompiledModel, plain: CompiledModel, rows: Rows, batch_size: int, *, repeats: int, seed: int
) -> dict[str, Any]:
    """Time the program and the plain engine in turns on the same real rows.

    Args:
        compiled: The program.
        plain: The plain engine it has to beat.
        rows: Real rows, whose mix of easy and hard is the user's.
        batch_size: How many rows a call has.
        repeats: Timed turns, at most; fewer where they would take longer than half a minute.
        seed: Of the choice of rows, the order in a turn, and the bootstrap.

    Returns:
        Mean, p50, p95 and p99 in milliseconds per call for both, and the speed-up (ratio of mean times) with
        its 95 % interval.
    """
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, max(1, len(rows) - batch_size + 1), size=min(repeats, 4096))
    inputs = [(_arrays(rows.take(slice(start, start + batch_size)).inputs),) for start in starts.tolist()]
    times = measure_interleaved(
        {"program": compiled, "plain": plain},
        inputs,
        repeats=repeats,
        warmup=20,
        seed=seed,
        limit_s=LIMIT_S,
    )
    speedup = ratio_interval(times["plain"], times["program"], seed=seed)
    return {
        "program": summarize_ms(times["program"] / 1e3),
        "plain": summarize_ms(times["plain"] / 1e3),
        "speedup": {**asdict(speedup), "median": speedup.value},
    }
