"""Measures a program and the plain backbone in this process: load, memory, latency, throughput, blocks."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

import exitcompiler
from exitcompiler.budgets.block_times import time_blocks
from exitcompiler.budgets.figures import ProcessFigures, SideFigures, Which
from exitcompiler.budgets.jobs import Job, Order, Rows
from exitcompiler.budgets.memory import peak_resident_bytes
from exitcompiler.budgets.sampling import (
    ROWS_PER_EXIT,
    draw_batch,
    draw_rows,
    row_weights,
    weighted_quantile,
)
from exitcompiler.budgets.undisturbed import measure_undisturbed
from exitcompiler.errors import ExitCompilerError, MeasurementError
from exitcompiler.runtime import backends

if TYPE_CHECKING:
    from exitcompiler.runtime.compiled import CompiledModel

__all__ = ["LEAST_TURNS", "Latencies", "measure_process", "time_single_rows"]

Floats: TypeAlias = npt.NDArray[np.float64]

LEAST_TURNS: Final = 30
_LEAST_BATCHES: Final = 5
_WARM_UP_TURNS: Final = 5
_FIRST_ROWS: Final = 8

_MOST_ROWS: Final = 2048  # of those in memory at once, and
_MOST_BYTES: Final = 64 * 2**20  # so many bytes
_MOST_BATCHES: Final = 32

# Of the time for single rows, so much for
_THROUGHPUT: Final = 0.4  # each batch size,
_BLOCKS: Final = 0.2  # all blocks,
_FORCED: Final = 0.1  # all exits that no row takes


@dataclass(frozen=True, slots=True)
class Latencies:
    """Calls of one of the two programs with single rows.

    Args:
        times_us: Microseconds of each, ``float64[calls]``.
        exit_index: Where the program lets its row leave, ``int[calls]``.
        shares: Exit -> share of all rows that leave there, ``float64[exits]``; none for exits without a call.
    """

    times_us: Floats
    exit_index: npt.NDArray[Any]
    shares: Floats

    def exit_means_us(self) -> dict[int, float]:
        """Exit -> mean of its calls; only exits that some row takes."""
        return {
            int(index): float(self.times_us[self.exit_index == index].mean())
            for index in np.unique(self.exit_index)
        }

    def summarize(self, rows_per_second: Mapping[int, float]) -> SideFigures:
        """Mean and percentiles of all rows, from those that were timed; and what else is known.

        Args:
            rows_per_second: Batch size -> throughput.
        """
        weights = row_weights(self.exit_index, self.shares)
        p50, p95, p99 = (weighted_quantile(self.times_us, weights, share) for share in (0.5, 0.95, 0.99))
        mean_us = sum(float(self.shares[index]) * mean for index, mean in self.exit_means_us().items())
        return SideFigures(mean_us, p50, p95, p99, dict(rows_per_second))


def measure_process(order: Order, rows: Rows) -> ProcessFigures:
    """Measure all there is to measure in one process, which has loaded nothing yet.

    Args:
        order: What to measure.
        rows: On which rows.

    Returns:
        The figures; ``seconds`` from the beginning of this call.

    Raises:
        ExitCompilerError: The artifact cannot be loaded or run.
    """
    began = time.perf_counter()
    job = order.job
    rng = np.random.default_rng([job.seed, order.number])
    shares = np.array(list(order.exits.values()), np.float64) / sum(order.exits.values())
    weights = row_weights(rows.exit_index, shares)
    first: Which = "plain" if order.number % 2 else "program"
    compiled, load_ms, peak_bytes = _load(job, first, rows, weights, rng)
    program, plain = compiled, compiled.plain
    with _no_garbage_collection():
        latencies = time_single_rows(program, plain, rows, shares, job.seconds, rng)
        rates = {
            size: _throughput(program, plain, rows, weights, size, _THROUGHPUT * job.seconds, rng)
            for size in job.batch_sizes
        }
        some = _drawn(rows, draw_batch(weights, ROWS_PER_EXIT, rng))
        unused = [name for name, count in order.exits.items() if count == 0]
        names = tuple(order.exits)
        exits_us = {names[at]: mean for at, mean in latencies["program"].exit_means_us().items()}
        exits_us.update(_forced(program, unused, some, _FORCED * job.seconds, rng))
        blocks_us = time_blocks(
            program,
            some[0] if rows.names is not None else dict.fromkeys(program.manifest.inputs, some[0]),
            limit_s=_BLOCKS * job.seconds,
            minimum=LEAST_TURNS,
            seed=_seed(rng),
        )
    return ProcessFigures(
        program=latencies["program"].summarize({size: rate[0] for size, rate in rates.items()}),
        plain=latencies["plain"].summarize({size: rate[1] for size, rate in rates.items()}),
        exits_us={name: exits_us[name] for name in order.exits},
        blocks_us=blocks_us,
        first=first,
        load_ms=load_ms,
        peak_bytes=peak_bytes,
        seconds=time.perf_counter() - began,
    )


def time_single_rows(
    program: CompiledModel,
    plain: CompiledModel,
    rows: Rows,
    shares: Floats,
    seconds: float,
    rng: np.random.Generator,
) -> dict[str, Latencies]:
    """Time both on the same rows, one at a time and in turns.

    Args:
        program: One,
        plain: and the other.
        rows: To draw from.
        shares: Exit -> share of all rows.
        seconds: How long, but at least ``LEAST_TURNS`` turns and ``ROWS_PER_EXIT`` rows of every exit.
        rng: Draws rows and orders.

    Returns:
        ``"program"`` and ``"plain"``.
    """
    most = int(min(_MOST_ROWS, max(LEAST_TURNS, _MOST_BYTES // rows.row_bytes)))
    drawn = draw_rows(rows.exit_index, row_weights(rows.exit_index, shares), most, rng)
    counts = np.bincount(rows.exit_index)
    least = max(LEAST_TURNS, int(np.minimum(counts, ROWS_PER_EXIT).sum()))
    timed = measure_undisturbed(
        {"program": program, "plain": plain},
        [(row,) for row in _drawn(rows, drawn)],
        strata=rows.exit_index[drawn],
        limit_s=seconds,
        minimum=least,
        warmup=_WARM_UP_TURNS,
        seed=_seed(rng),
    )
    return {
        name: Latencies(calls.times_us, rows.exit_index[drawn[calls.inputs]], shares)
        for name, calls in timed.items()
    }


def _load(
    job: Job, first: Which, rows: Rows, weights: Floats, rng: np.random.Generator
) -> tuple[CompiledModel, float, int]:
    """Load the artifact and answer some rows with one of the two.

    Returns:
        The program (whichever answered), milliseconds to the first answer, and peak memory afterwards.
    """
    some = _drawn(rows, draw_batch(weights, min(_FIRST_ROWS, len(weights)), rng))
    batch = rows.take(draw_batch(weights, max(job.batch_sizes), rng)) if job.batch_sizes else None
    load = exitcompiler.load
    began = time.perf_counter()
    # As the command line does; after the clock has started, since this imports ONNX Runtime.
    backends.share_threads(job.backend, job.threads)
    compiled = load(job.artifact, job.backend, threads=job.threads)
    if job.operating_point is not None:
        compiled = compiled.select(name=job.operating_point)
    chosen = compiled if first == "program" else compiled.plain
    chosen(some[0])
    load_ms = 1e3 * (time.perf_counter() - began)
    for row in some[1:]:
        chosen(row)
    if batch is not None:
        _answer_batch(chosen, batch, max(job.batch_sizes))
    return compiled, load_ms, peak_resident_bytes()


def _answer_batch(program: CompiledModel, batch: Any, size: int) -> None:
    """Answer the largest batch.

    Raises:
        MeasurementError: The backend cannot, mostly since memory is short.
    """
    try:
        program(batch)
    except ExitCompilerError:
        raise
    except Exception as error:  # what a backend raises is of no type of ours
        raise MeasurementError(
            f"a batch of {size} rows could not be answered: {type(error).__name__}: {str(error)[:200]}",
            where=f"throughput.{size}",
            remedy="limit the throughput of smaller batches, or give it more memory",
        ) from error


def _throughput(
    program: CompiledModel,
    plain: CompiledModel,
    rows: Rows,
    weights: Floats,
    size: int,
    seconds: float,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Rows per second of the program and of the plain backbone, on batches of rows as they come.

    Of about ten batches, which last longer than the system leaves a process alone, so that none is
    undisturbed. A single long stall would be most of their mean (the ratio of a process was off by a factor
    of ten); the median throws away so many that the ratio of a calm process scatters more than with the mean
    (by 6.8 % against 6.1 %, ResNet of the demonstration). Without the quickest and the slowest quarter it is
    4.7 %, and a stall of seconds in one batch leaves it there.
    """
    count = int(min(_MOST_BATCHES, max(_LEAST_BATCHES, _MOST_BYTES // (size * rows.row_bytes))))
    batches = [(rows.take(draw_batch(weights, size, rng)),) for _ in range(count)]
    timed = measure_undisturbed(
        {"program": program, "plain": plain},
        batches,
        limit_s=seconds,
        minimum=_LEAST_BATCHES,
        warmup=1,
        seed=_seed(rng),
    )
    return 1e6 * size / timed["program"].midmean_us, 1e6 * size / timed["plain"].midmean_us


def _forced(
    program: CompiledModel, exits: list[str], some: list[Any], seconds: float, rng: np.random.Generator
) -> dict[str, float]:
    """Exit -> mean microseconds of rows that are made to leave there."""
    if not exits:
        return {}
    timed = measure_undisturbed(
        {name: program.forced(name) for name in exits},
        [(row,) for row in some],
        limit_s=seconds,
        minimum=len(some),
        warmup=2,
        seed=_seed(rng),
    )
    return {name: calls.mean_us for name, calls in timed.items()}


def _drawn(rows: Rows, drawn: npt.NDArray[np.intp]) -> list[Any]:
    """Batches of one row each."""
    return [rows.take(drawn[i : i + 1]) for i in range(len(drawn))]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now, and then not until the end."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
