"""Times calls in turns, and leaves out those in which the system gave the processor to somebody else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from exitcompiler.runtime.timing import OwnClock, measure_interleaved

__all__ = ["Timed", "measure_undisturbed", "undisturbed"]

Floats: TypeAlias = npt.NDArray[np.float64]

_MOST_TURNS: Final = 200_000
_LEAST_SHARE: Final = 0.25


@dataclass(frozen=True, slots=True)
class Timed:
    """The calls of one candidate that were timed and kept.

    Args:
        times_us: Microseconds per call, ``float64[calls]``.
        inputs: Which of the inputs each was on, ``int[calls]``.
    """

    times_us: Floats
    inputs: npt.NDArray[np.intp]

    @property
    def mean_us(self) -> float:
        """Of all calls."""
        return float(self.times_us.mean())

    @property
    def midmean_us(self) -> float:
        """Of the calls without the quickest and the slowest quarter: the interquartile mean."""
        cut = len(self.times_us) // 4
        return float(np.sort(self.times_us)[cut : len(self.times_us) - cut].mean())


def measure_undisturbed(
    candidates: Mapping[str, Callable[..., object] | OwnClock],
    inputs: Sequence[Sequence[Any]],
    *,
    strata: npt.NDArray[Any] | None = None,
    limit_s: float,
    minimum: int,
    warmup: int,
    seed: int,
    count: Callable[[], int] | None = None,
) -> dict[str, Timed]:
    """As `measure_interleaved`, without the calls that were interrupted.

    On a machine that is busy, a call that is interrupted takes some milliseconds longer, which another
    process had; a mean of such times says how busy the machine was.

    Args:
        candidates: Name -> what to time, or what times itself.
        inputs: Argument tuples, taken in order and again from the first.
        strata: Of which kind each input is, ``int[inputs]``; of every kind that was timed some calls are
            kept. None: all are of one kind.
        limit_s: Stop after so many seconds,
        minimum: but not before so many turns.
        warmup: Untimed turns before.
        seed: Of the order.
        count: How often this process was interrupted so far; None: as the system counts it.

    Returns:
        Name -> the calls that were kept: those that were not interrupted, or all (of every candidate, so
        that they are treated alike) where these are less than a quarter for some candidate and kind. So few
        are the quick ones, if calls are about as long as what the system lets a process have at once.
    """
    count = _interruptions if count is None else count
    watches = {name: _Watch(call, count) for name, call in candidates.items()}
    times_us = measure_interleaved(
        {name: OwnClock(watch.run_us) for name, watch in watches.items()},
        inputs,
        repeats=_MOST_TURNS // len(candidates),
        warmup=warmup,
        seed=seed,
        limit_s=limit_s,
        minimum=minimum,
    )
    used = np.arange(len(next(iter(times_us.values())))) % len(inputs)
    kinds = np.zeros_like(used) if strata is None else strata[used]
    interrupted = {name: np.array(watch.interrupted[warmup:]) for name, watch in watches.items()}
    kept = undisturbed(interrupted, kinds)
    return {name: Timed(times[kept[name]], used[kept[name]]) for name, times in times_us.items()}


def undisturbed(
    interrupted: Mapping[str, npt.NDArray[np.bool_]], kinds: npt.NDArray[Any]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which calls to keep; see `measure_undisturbed`.

    Args:
        interrupted: Name -> whether it was, per turn, ``bool[turns]``.
        kinds: The kind of each turn, ``int[turns]``.

    Returns:
        Name -> ``bool[turns]``.
    """
    kept = {name: ~calls for name, calls in interrupted.items()}
    for calls in kept.values():
        if any(calls[kinds == kind].mean() < _LEAST_SHARE for kind in np.unique(kinds)):
            return {name: np.ones_like(calls) for name in kept}
    return kept


class _Watch:
    """Times calls, and notes in which ones the processor was taken away."""

    def __init__(self, call: Callable[..., object] | OwnClock, count: Callable[[], int]) -> None:
        self._timed = call.run_us if isinstance(call, OwnClock) else _timed(call)
        self._count = count
        self.interrupted: list[bool] = []

    def run_us(self, *arguments: Any) -> float:
        before = self._count()
        elapsed_us = self._timed(*arguments)
        self.interrupted.append(self._count() != before)
        return elapsed_us


def _timed(call: Callable[..., object]) -> Callable[..., float]:
    def run_us(*arguments: Any) -> float:
        start = time.perf_counter_ns()
        call(*arguments)
        return (time.perf_counter_ns() - start) / 1e3

    return run_us


def _interruptions() -> int:
    """Involuntary context switches of all threads of this process so far; Windows does not count them."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
