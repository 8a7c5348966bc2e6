"""Paired latency measurement: candidates take turns, so that a slow phase of the machine hits all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitcompiler.errors import InputError

__all__ = ["OwnClock", "measure_interleaved"]


@dataclass(frozen=True, slots=True)
class OwnClock:
    """A candidate that takes its own time, as what runs on a GPU does: a call returns before it is done.

    Args:
        run_us: Runs once and returns how many microseconds that took.
    """

    run_us: Callable[..., float]


def measure_interleaved(
    candidates: Mapping[str, Callable[..., object] | OwnClock],
    inputs: Sequence[Sequence[Any]],
    *,
    repeats: int,
    warmup: int = 3,
    seed: int = 0,
    limit_s: float | None = None,
    minimum: int = 30,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, NDArray[np.float64]]:
    """Time several callables on the same inputs, turn by turn, in a new random order each turn.

    Args:
        candidates: Name -> what to time, or what times itself.
        inputs: Argument tuples; turn ``i`` uses entry ``i % len(inputs)``. An empty tuple calls without.
        repeats: Timed turns, at most.
        warmup: Untimed turns before.
        seed: Of the order.
        limit_s: Stop after the turn in which this many seconds have passed, warm-up included; None: never.
        minimum: But not before this many timed turns.
        clock: Nanoseconds, rising.

    Returns:
        Name -> microseconds per turn, ``float64[turns]``, where ``turns`` is ``repeats`` or, at the time
        limit, fewer; entry ``i`` of all is the same turn, so ratios are paired.

    Raises:
        InputError: Nothing to time, or ``repeats`` or ``minimum`` is not positive.
    """
    if not candidates or not inputs or repeats < 1 or minimum < 1:
        raise InputError("nothing to time", where="measure_interleaved")
    names = list(candidates)
    calls = list(candidates.values())
    rng = np.random.default_rng(seed)
    samples_us = np.empty((len(calls), repeats))
    turns = 0
    began = clock()
    for turn in range(-warmup, repeats):
        arguments = inputs[turn % len(inputs)]
        for which in rng.permutation(len(calls)).tolist():
            call = calls[which]
            if isinstance(call, OwnClock):
                elapsed_us = call.run_us(*arguments)
            else:
                start = clock()
                call(*arguments)
                elapsed_us = (clock() - start) / 1e3
            if turn >= 0:
                samples_us[which, turn] = elapsed_us
        turns = turn + 1
        if limit_s is not None and turns >= minimum and clock() - began >= 1e9 * limit_s:
            break
    return dict(zip(names, samples_us[:, :turns], strict=True))
