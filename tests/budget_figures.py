"""Measurements made up for tests of budgets: known latencies, and noise of known size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from exitcompiler.budgets.figures import Answered, Environment, Measurement, ProcessFigures, SideFigures

ENVIRONMENT = Environment("a processor", 2, "Linux-x86_64", "onnxruntime", 1, "fp32", {"python": "3.11.0"})
EXITS = {"early": 60, "middle": 25, "backbone": 15}
TIMES_US = {"early": 200.0, "middle": 500.0, "backbone": 1100.0}
BLOCKS_US = {"first": 190.0, "second": 300.0, "third": 600.0}


def answered(exits: Mapping[str, int] = EXITS, *, fingerprint: str = "f" * 64) -> Answered:
    """Answers with labels: of each hundred rows one is lost and none gained."""
    rows = sum(exits.values())
    lost = rows // 100
    return Answered(rows, fingerprint, exits, 2 * lost, rows - 4 * lost, rows - 3 * lost, lost, 0)


def process(
    number: int,
    answers: Answered,
    *,
    times_us: Mapping[str, float] = TIMES_US,
    blocks_us: Mapping[str, float] = BLOCKS_US,
    plain_us: float = 1000.0,
    noise: float = 0.0,
    generator: np.random.Generator | None = None,
) -> ProcessFigures:
    """One process; ``noise`` is the standard deviation of the logarithm of every time, drawn for each."""
    draw = np.random.default_rng(number) if generator is None else generator

    def noisy(value: float) -> float:
        return value * float(np.exp(noise * draw.standard_normal()))

    common = noisy(1.0)  # a slow phase of the machine
    exits = {name: noisy(us) * common for name, us in times_us.items()}
    mean = sum(count * exits[name] for name, count in answers.exits.items()) / answers.rows
    plain = noisy(plain_us) * common
    return ProcessFigures(
        program=SideFigures(mean, 0.8 * mean, 2.0 * mean, 2.5 * mean, {32: 1e6 / mean}),
        plain=SideFigures(plain, plain, 1.1 * plain, 1.2 * plain, {32: 1e6 / plain}),
        exits_us=exits,
        blocks_us={name: noisy(us) * common for name, us in blocks_us.items()},
        first="plain" if number % 2 else "program",
        load_ms=noisy(80.0 if number % 2 else 100.0),
        peak_bytes=100_000_000 if number % 2 else 120_000_000,
        seconds=1.5,
    )


def measurement(
    *,
    exits: Mapping[str, int] = EXITS,
    slower: float = 1.0,
    slow_block: Mapping[str, float] | None = None,
    noise: float = 0.0,
    processes: int = 8,
    seed: int = 0,
    fingerprint: str = "f" * 64,
) -> Measurement:
    """A measurement whose kernels are ``slower`` times as slow as usual."""
    answers = answered(exits, fingerprint=fingerprint)
    generator = np.random.default_rng(seed)
    times = {name: slower * us for name, us in TIMES_US.items()}
    blocks = {name: slower * us for name, us in BLOCKS_US.items()} | dict(slow_block or {})
    figures = tuple(
        process(number, answers, times_us=times, blocks_us=blocks, noise=noise, generator=generator)
        for number in range(processes)
    )
    return Measurement(ENVIRONMENT, "drop+0.50", 2_000_000, answers, figures)


def elsewhere(found: Measurement) -> Measurement:
    """The same on another machine."""
    return replace(found, environment=replace(found.environment, cpu="another processor"))
