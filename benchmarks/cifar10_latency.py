"""Wall-clock measurements: the table, the final figure, and how much dispatch costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from cifar10_contenders import PLAIN, Contender, answers
from cifar10_setup import SEED, Array, Job
from prefixes import prefix_block

from exitcompiler.compiler import Details
from exitcompiler.controlflow import engine_signature
from exitcompiler.engines import Engines
from exitcompiler.program import Block, Program
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.single_row import aligned_empty
from exitcompiler.runtime.timing import measure_interleaved
from exitcompiler.statistics import mean_difference_interval, ratio_interval

__all__ = [
    "WARMUP",
    "against_ideal",
    "bound_call",
    "dominating",
    "final_figure",
    "in_turns",
    "table",
]

WARMUP = 20


def table(job: Job, contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Accuracy on all final rows; latency of single rows, all contenders taking turns on the same ones.

    Args:
        job: Final rows.
        contenders: The whole ResNet-56 first: ratios are against it.
    """
    x, y = job.split.final_x, job.split.final_y
    inputs = [(row[None],) for row in job.timed]
    models = {contender.name: contender.model for contender in contenders}
    times_us = measure_interleaved(models, inputs, repeats=len(inputs), warmup=WARMUP, seed=SEED)
    right = {name: answers(model, x)[0] == y for name, model in models.items()}
    rows = []
    for contender in contenders:
        mine, plain = times_us[contender.name], times_us[PLAIN]
        rows.append(
            {
                "name": contender.name,
                "kind": contender.kind,
                "engine": contender.engine,
                "accuracy": float(right[contender.name].mean()),
                "drop": asdict(_drop(right[PLAIN], right[contender.name])),
                "mean_ms": float(mine.mean()) / 1e3,
                "median_ms": float(np.median(mine)) / 1e3,
                "p99_ms": float(np.percentile(mine, 99)) / 1e3,
                "speedup": asdict(ratio_interval(plain, mine, seed=SEED)),
                "median_speedup": float(np.median(plain) / np.median(mine)),
                "exits": list(contender.model.exits),
                "execution": contender.model.execution,
                "chosen": contender.chosen,
                "series": contender.series,
            }
        )
        if contender.beside:
            other = contender.beside
            rows[-1]["beside"] = {
                "name": other,
                "drop": asdict(_drop(right[other], right[contender.name])),
                "speedup": asdict(ratio_interval(times_us[other], mine, seed=SEED)),
            }
    statics = [row for row in rows if row["kind"] not in ("program", "plain")]
    for row in rows:
        row["dominated_by"] = dominating(row, statics) if row["kind"] == "program" else []
    return rows


def dominating(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the others that are both faster in the mean and at least as accurate."""
    return [
        str(other["name"])
        for other in others
        if other["mean_ms"] < row["mean_ms"] and other["accuracy"] >= row["accuracy"]
    ]


def final_figure(job: Job, program: CompiledModel, plain: CompiledModel | None = None) -> dict[str, Any]:
    """The drop on all final rows and the speed-up on many of them, program and plain taking turns.

    Args:
        job: Final rows.
        program: What is measured.
        plain: What it is compared with; None: the program's own plain network.
    """
    x, y = job.split.final_x, job.split.final_y
    plain = program.plain if plain is None else plain
    times_us = in_turns(job, {"program": program, "plain": plain})
    classes, exits = answers(program, x)
    whole, _ = answers(plain, x)
    return {
        "backend": program.backend.name,
        "execution": program.execution,
        "point": program.operating_point.name,
        "timed_rows": len(times_us["plain"]),
        "drop": asdict(_drop(whole == y, classes == y)),
        "accuracy": float((classes == y).mean()),
        "backbone_accuracy": float((whole == y).mean()),
        "exit_rates": {name: float((exits == i).mean()) for i, name in enumerate(program.exits)},
        "speedup": asdict(ratio_interval(times_us["plain"], times_us["program"], seed=SEED)),
        "median_speedup": float(np.median(times_us["plain"]) / np.median(times_us["program"])),
        "program_ms": _summary_ms(times_us["program"]),
        "plain_ms": _summary_ms(times_us["plain"]),
    }


def in_turns(job: Job, calls: Mapping[str, Callable[..., object]]) -> dict[str, Array]:
    """Microseconds of several callables that take turns on the rows of the final figure, one by one."""
    timed = [(row[None],) for row in job.draw(job.effort.headline_rows, SEED + 1)]
    return measure_interleaved(calls, timed, repeats=len(timed), warmup=WARMUP, seed=SEED)


def against_ideal(job: Job, details: Details, program: CompiledModel, batch: int) -> dict[str, Any]:
    """The program's mean time over the sum of exit rate x time of one engine of that exit's prefix.

    A prefix engine holds everything up to an exit, earlier heads included, as one merged block, run
    on buffers bound once. Nothing routes there, so this is what the same arithmetic costs without
    dispatch. All take turns; the rates of a call are those of the very rows that it answers, so that
    the interval is about dispatch and not about which rows were drawn.

    Args:
        job: Final rows.
        details: Holds the program's bodies.
        program: The compiled program that is timed.
        batch: Rows per call.
    """
    repeats = job.effort.timed_rows if batch == 1 else job.effort.batches
    needed = repeats * batch
    rows = np.resize(np.random.default_rng(SEED + batch).permutation(len(job.split.final_x)), needed)
    inputs = [(job.split.final_x[part],) for part in np.split(rows, repeats)]
    source = chosen_program(details)
    prefixes = {name: prefix_block(source, name) for name in source.exits}
    calls: dict[str, Callable[..., object]] = {"program": program}
    calls |= {name: bound_call(block, details.engines, batch) for name, block in prefixes.items()}
    times_us = measure_interleaved(calls, inputs, repeats=repeats, warmup=max(3, WARMUP // batch), seed=SEED)
    taken = np.stack([np.asarray(program.run(*args).exit_index) for args in inputs])
    shares = np.stack([(taken == i).mean(axis=1) for i in range(len(source.exits))])  # [exits, calls]
    ideal_us = (shares * np.stack([times_us[name] for name in source.exits])).sum(axis=0)
    return {
        "batch": batch,
        "calls": repeats,
        "exit_rates": dict(zip(source.exits, shares.mean(axis=1), strict=True)),
        "program_ms": float(times_us["program"].mean()) / 1e3,
        "program_median_ms": float(np.median(times_us["program"])) / 1e3,
        "prefix_ms": {name: float(times_us[name].mean()) / 1e3 for name in source.exits},
        "ideal_ms": float(ideal_us.mean()) / 1e3,
        "latency_ratio": asdict(ratio_interval(times_us["program"], ideal_us, seed=SEED)),
        "throughput_ratio": asdict(ratio_interval(ideal_us, times_us["program"], seed=SEED)),
        "rows_per_second": float(1e6 * batch / times_us["program"].mean()),
    }


def chosen_program(details: Details) -> Program:
    """The program that runs, with bodies: the chosen one, or the whole network where it was refused."""
    if details.selection is None or details.compiled.artifact.report.get("refused"):
        return details.program
    return details.selection.chosen.program


def bound_call(block: Block, engines: Engines, batch: int) -> Callable[[Array], object]:
    """A call that copies rows in and runs the block's engine on buffers bound once."""
    engines.load([block], batch)
    signature = engine_signature(block)
    inputs = [aligned_empty(spec, batch) for spec in signature.inputs.values()]
    outputs = [aligned_empty(spec, batch) for spec in signature.outputs.values()]
    run = engines.engine(block, batch).bind(inputs, outputs)

    def call(x: Array, _alive: object = outputs) -> object:
        inputs[0][...] = x
        return run()

    return call


def _drop(backbone_right: Array, right: Array) -> Any:
    return mean_difference_interval(backbone_right.astype(np.float64), right.astype(np.float64))


def _summary_ms(times_us: Array) -> dict[str, float]:
    return {
        "mean": float(times_us.mean()) / 1e3,
        "median": float(np.median(times_us)) / 1e3,
        "p99": float(np.percentile(times_us, 99)) / 1e3,
    }
