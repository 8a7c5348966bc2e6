"""Paired latency measurement: candidates take turns, so that a slow phase of the machine hits all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitcompiler.errors import InputError

__all__ = ["measure_interleaved"]


def measure_interleaved(
    candidates: Mapping[str, Callable[..., object]],
    inputs: Sequence[Sequence[Any]],
    *,
    repeats: int,
    warmup: int = 3,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """Time several callables on the same inputs, turn by turn, in a new random order each turn.

    Args:
        candidates: Name -> what to time.
        inputs: Argument tuples; turn ``i`` uses entry ``i % len(inputs)``. An empty tuple calls without.
        repeats: Timed turns.
        warmup: Untimed turns before.
        seed: Of the order.

    Returns:
        Name -> microseconds per turn, ``float64[repeats]``; entry ``i`` of all is the same turn, so
        ratios are paired.

    Raises:
        InputError: Nothing to time, or ``repeats`` is not positive.
    """
    if not candidates or not inputs or repeats < 1:
        raise InputError("nothing to time", where="measure_interleaved")
    names = list(candidates)
    calls = list(candidates.values())
    rng = np.random.default_rng(seed)
    samples_us = np.empty((len(calls), repeats))
    clock = time.perf_counter_ns
    for turn in range(-warmup, repeats):
        arguments = inputs[turn % len(inputs)]
        for which in rng.permutation(len(calls)).tolist():
            call = calls[which]
            start = clock()
            call(*arguments)
            elapsed_us = (clock() - start) / 1e3
            if turn >= 0:
                samples_us[which, turn] = elapsed_us
    return dict(zip(names, samples_us, strict=True))
