"""How much slower one artifact is than another, measured in fresh processes, both in the same one."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import exitcompiler
from exitcompiler.data_sources import batches_of, load_data
from exitcompiler.runtime.timing import measure_interleaved

__all__ = ["Comparison", "compare_apart"]

_WARMUP = 30


@dataclass(frozen=True)
class Comparison:
    """What one process found.

    Args:
        ratio: Mean latency of the other over that of the base, both on all rows.
        base_us: Mean latency of the base.
        exits_us: Exit -> mean latency of the base's rows that leave there.
        exits: Exit -> rows of the base that leave there.
        other_exits: The same of the other.
        same_classes: Share of the rows that both answer alike.
    """

    ratio: float
    base_us: float
    exits_us: dict[str, float]
    exits: dict[str, int]
    other_exits: dict[str, int]
    same_classes: float


def compare_apart(
    base: Path, other: Path, data: str, *, processes: int, passes: int = 5
) -> tuple[Comparison, ...]:
    """Compare two artifacts in one fresh process after another.

    Args:
        base: The one.
        other: The other.
        data: DATA, as on the command line.
        processes: How many.
        passes: How often each runs every row; the median of a row's times counts.
    """
    jobs = [(base, other, data, passes, seed) for seed in range(processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return tuple(pool.map(_compare, *zip(*jobs, strict=True)))


def _compare(base: Path, other: Path, data: str, passes: int, seed: int) -> Comparison:
    paths = [("base", base), ("other", other)]
    models = {name: exitcompiler.load(path) for name, path in (paths if seed % 2 else reversed(paths))}
    (rows, _), *_ = batches_of(load_data(data), 1 << 30)
    assert isinstance(rows, np.ndarray)  # a program with several inputs has not been compared yet
    order = np.random.default_rng(seed).permutation(len(rows))
    calls = {**models, "plain": models["base"].plain}  # as in a check, where it takes turns too
    inputs = [(rows[row : row + 1],) for row in order]
    timed = measure_interleaved(calls, inputs, repeats=passes * len(rows), warmup=_WARMUP, seed=seed)
    us = {name: np.median(times.reshape(passes, -1), axis=0) for name, times in timed.items()}
    answers = {name: model.run(rows) for name, model in models.items()}
    exits = {name: np.asarray(answer.exit_index) for name, answer in answers.items()}
    logits = [np.asarray(answer.outputs) for answer in answers.values()]
    names = models["base"].exits
    counts = {
        name: dict(zip(names, np.bincount(found, minlength=len(names)).tolist(), strict=True))
        for name, found in exits.items()
    }
    left = exits["base"][order]
    return Comparison(
        ratio=float(us["other"].mean() / us["base"].mean()),
        base_us=float(us["base"].mean()),
        exits_us={
            name: float(us["base"][left == index].mean())
            for index, name in enumerate(names)
            if (left == index).any()
        },
        exits=counts["base"],
        other_exits=counts["other"],
        same_classes=float((logits[0].argmax(1) == logits[1].argmax(1)).mean()),
    )
