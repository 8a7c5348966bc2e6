"""Tells apart why mean latency changed: kernels that got slower, or rows that leave later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.budgets.environment import differences
from exitcompiler.budgets.figures import Answered, Measurement, ProcessFigures
from exitcompiler.budgets.intervals import contrast_interval, exp_interval
from exitcompiler.budgets.outcomes import BlockChange, Causes, ExitChange
from exitcompiler.budgets.quantities import format_factor
from exitcompiler.statistics import Interval

__all__ = ["find_causes"]

_Array: TypeAlias = NDArray[np.float64]
_Cause: TypeAlias = Literal["kernels", "exit mix"]

_WORTH_NAMING: Final = math.log(1.05)
"""Smaller changes are not named, however sure they are: other work on the machine moves the ratio to the
plain backbone by a few percent from one hour to the next, which no interval of one hour contains."""
_BESIDE_OTHER: Final = 0.25
"""Nor is what is smaller than this share of the other cause; where it works against the other one,"""
_AGAINST_OTHER: Final = 0.5
"""than this share: rows that go further find caches warmer, so a worse mix makes kernels look a little
faster."""


def find_causes(
    measurement: Measurement, baseline: Measurement, confidence: float, seed: int = 0
) -> Causes | None:
    """Split the change of mean latency since the baseline into kernels and exit mix.

    With ``p[e]`` the share of rows that leave at exit ``e`` and ``t[e]`` their latency over the plain
    backbone's, latency is ``L(p, t) = sum p[e] t[e]``. Kernels: ``L(p, t) / L(p, t0)``, exit mix: ``L(p, t0)
    / L(p0, t0)``, with the baseline's ``p0`` and ``t0``; the product is the change. (Volumes valued at old
    prices, and prices at new
    volumes: the indices of Laspeyres and Paasche.) ``p`` is known exactly, ``t`` for each process.

    Args:
        measurement: What is now.
        baseline: What was, on the same rows.
        confidence: Of the intervals, two-sided, in (0, 1).
        seed: Of the bootstrap.

    Returns:
        None where either was not timed, or where their exits have other names: then nothing can be told
        apart.
    """
    now, before = measurement.processes, baseline.processes
    answers = measurement.answered, baseline.answered
    if not now or not before or answers[0].exits.keys() != answers[1].exits.keys():
        return None
    rates, old_rates = (_rates(answered) for answered in answers)

    def contrast(plus: _Array, minus: _Array | None = None) -> Interval:
        groups = [] if minus is None else [minus]
        return exp_interval(contrast_interval([plus], groups, confidence=confidence, seed=seed))

    mixed, old = _latency(now, rates), _latency(before, old_rates)
    remixed = _latency(before, rates)
    change, kernels, mix = contrast(mixed, old), contrast(mixed, remixed), contrast(remixed - old)
    named = _named(kernels, mix)
    exits = tuple(
        ExitChange(
            name,
            rates[name],
            old_rates[name],
            contrast(_latency(now, {name: 1.0}), _latency(before, {name: 1.0})),
        )
        for name in rates
    )
    blocks = tuple(
        BlockChange(name, _mean_block_us(now, name), contrast(_block(now, name), _block(before, name)))
        for name in _common_blocks([*now, *before])
    )
    elsewhere = bool(differences(measurement.environment, baseline.environment))
    summary = _summary(change, kernels, mix, named, elsewhere=elsewhere)
    return Causes(change, kernels, mix, named, summary, exits, blocks)


def _rates(answered: Answered) -> dict[str, float]:
    return {name: count / answered.rows for name, count in answered.exits.items()}


def _latency(processes: Sequence[ProcessFigures], rates: Mapping[str, float]) -> _Array:
    """Logarithm of the mean latency over the plain backbone's, by process."""
    means = [
        sum(rate * process.exits_us[name] for name, rate in rates.items() if rate) / process.plain.mean_us
        for process in processes
    ]
    return np.log(np.asarray(means, np.float64))


def _common_blocks(processes: Sequence[ProcessFigures]) -> list[str]:
    first, *others = processes
    return [name for name in first.blocks_us if all(name in other.blocks_us for other in others)]


def _block(processes: Sequence[ProcessFigures], name: str) -> _Array:
    return np.log([process.blocks_us[name] / process.plain.mean_us for process in processes])


def _mean_block_us(processes: Sequence[ProcessFigures], name: str) -> float:
    return math.exp(float(np.mean(np.log([process.blocks_us[name] for process in processes]))))


def _named(kernels: Interval, mix: Interval) -> tuple[_Cause, ...]:
    causes: tuple[tuple[_Cause, Interval, Interval], ...] = (
        ("kernels", kernels, mix),
        ("exit mix", mix, kernels),
    )
    return tuple(name for name, cause, other in causes if _explains(cause, other))


def _explains(cause: Interval, other: Interval) -> bool:
    size, beside = math.log(cause.value), math.log(other.value)
    share = _BESIDE_OTHER if size * beside >= 0.0 else _AGAINST_OTHER
    sure = cause.lower > 1.0 or cause.upper < 1.0
    return sure and abs(size) >= max(_WORTH_NAMING, share * abs(beside))


def _summary(
    change: Interval, kernels: Interval, mix: Interval, named: tuple[_Cause, ...], *, elsewhere: bool
) -> str:
    sentences = [f"Mean latency over the plain backbone's is {format_factor(change)} the baseline's."]
    if "kernels" in named:
        word = "slower" if kernels.value > 1.0 else "faster"
        word += " (the baseline's are of another place)" if elsewhere else ""
        taken = format_factor(kernels)
        sentences.append(f"The kernels got {word}: a row that leaves at the same exit takes {taken} as long.")
    if "exit mix" in named:
        word = "Fewer" if mix.value > 1.0 else "More"
        sentences.append(f"{word} inputs leave early: the exit mix alone makes it {format_factor(mix)}.")
    if not named:
        sentences.append("Neither the kernels nor the exit mix changed by more than chance and 5 %.")
    elif len(named) == 1:
        other, factor = ("exit mix", mix) if named == ("kernels",) else ("kernels", kernels)
        verb = "is" if other == "exit mix" else "are"
        sentences.append(f"The {other} {verb} not the reason: {format_factor(factor)}.")
    return " ".join(sentences)
