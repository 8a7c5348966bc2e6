"""Makes programs whose mean latency is larger by what was asked for, as measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from budgets_process import Comparison, compare_apart
from budgets_variants import selected, with_careful_gates, with_slower_blocks

from exitcompiler.artifact import save_artifact
from exitcompiler.budgets.answering import gather_rows
from exitcompiler.controlflow import Return, ValueSpec, successors
from exitcompiler.data_sources import load_data
from exitcompiler.runtime.backends import Array
from exitcompiler.runtime.loading import open_artifact
from exitcompiler.runtime.manifest import Artifact
from exitcompiler.runtime.rows import gate_parameters
from exitcompiler.runtime.timing import OwnClock, measure_interleaved

__all__ = ["KINDS", "Effort", "Made", "make_variants"]

logger = logging.getLogger("budgets")

KINDS: Final = ("slower", "slower block", "exit mix")
_COLUMNS: Final = (0, 64, 512)
_WIDEST_SHIFT: Final = 8.0
_HALVINGS: Final = 20


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        slowdown: By what share mean latency is to grow.
        tolerance: How far from it, at most; what was reached is measured again afterwards, and told.
        rounds: Of making and measuring, at most.
        processes: In each round.
        final_processes: Afterwards.
        repeats: Of the timing of blocks.
    """

    slowdown: float = 0.2
    tolerance: float = 0.01
    rounds: int = 4
    processes: int = 5
    final_processes: int = 20
    repeats: int = 400


@dataclass(frozen=True)
class Made:
    """A program that was made.

    Args:
        path: Where.
        block: The block that got slower, if it is one alone.
        ratios: Mean latency over that of the base, by process.
        exits: Exit -> rows of the base that leave there.
        other_exits: The same of this program.
        same_classes: Share of the rows answered alike.
    """

    path: str
    block: str | None
    ratios: list[float]
    exits: Mapping[str, int]
    other_exits: Mapping[str, int]
    same_classes: float


@dataclass(frozen=True)
class _Base:
    """The program that the others are made from, and what is known of it."""

    artifact: Artifact
    path: Path
    data: str
    figures: Comparison
    effort: Effort


def make_variants(base: Artifact, folder: Path, data: str, effort: Effort) -> dict[str, dict[str, Any]]:
    """Write the base and a program of each kind.

    Args:
        base: A program with exits.
        folder: Gets ``base.exit`` and ``slower.exit``, ``slower-block.exit``, ``exit-mix.exit``.
        data: DATA, as on the command line.
        effort: How much is measured.

    Returns:
        Kind -> the fields of `Made`.
    """
    path = folder / "base.exit"
    save_artifact(base, path)
    (figures,) = compare_apart(path, path, data, processes=1)
    known = _Base(base, path, data, figures, effort)
    slower, careful = _Slower(known), _Careful(known)
    makers: dict[str, tuple[Callable[[float], Artifact], str | None]] = {
        "slower": (slower.everywhere, None),
        "slower block": (slower.in_one_block, slower.block),
        "exit mix": (careful.make, None),
    }
    made = {}
    for kind, (make, block) in makers.items():
        target = folder / f"{kind.replace(' ', '-')}.exit"
        _calibrate(known, make, target)
        found = compare_apart(path, target, data, processes=effort.final_processes)
        made[kind] = asdict(_made(target, block, found))
        logger.info("%s: %.3f x", kind, np.mean(made[kind]["ratios"]))
    return made


def _made(path: Path, block: str | None, found: tuple[Comparison, ...]) -> Made:
    return Made(
        str(path),
        block,
        [one.ratio for one in found],
        found[0].exits,
        found[0].other_exits,
        min(one.same_classes for one in found),
    )


def _calibrate(base: _Base, make: Callable[[float], Artifact], target: Path) -> None:
    """Make a program, measure it, and correct it, until it is as slow as it should be."""
    effort, growth = base.effort, base.effort.slowdown
    for _ in range(effort.rounds):
        save_artifact(make(growth), target)
        found = compare_apart(base.path, target, base.data, processes=effort.processes)
        reached = float(np.mean([one.ratio for one in found])) - 1.0
        logger.info("%s: asked for %+.3f, reached %+.3f", target.stem, growth, reached)
        if abs(reached - effort.slowdown) <= effort.tolerance or reached <= 0.0:
            return
        growth *= effort.slowdown / reached


class _Slower:
    """Programs with more work in their blocks."""

    def __init__(self, base: _Base) -> None:
        self._base = base
        point = selected(base.artifact)
        self._times_us = _block_times_us(base.artifact, base.effort.repeats)
        rows = sum(base.figures.exits.values())
        self._reach: dict[str, float] = {}
        left = 0
        for block in point.control_flow.blocks:
            self._reach[block.name] = 1.0 - left / rows
            ways = successors(block.terminator)
            left += sum(base.figures.exits[way.exit] for way in ways if isinstance(way, Return))
        entry = point.control_flow.entry.name
        later = [name for name in self._times_us if name != entry] or [entry]
        self.block = max(later, key=lambda name: self._reach[name] * self._times_us[name][0])

    def everywhere(self, growth: float) -> Artifact:
        """Every block slower by the same share."""
        return self._make({name: growth * times[0] for name, times in self._times_us.items()})

    def in_one_block(self, growth: float) -> Artifact:
        """One block alone slower, by so much that the mean over all rows grows."""
        return self._make({self.block: growth * self._base.figures.base_us / self._reach[self.block]})

    def _make(self, extra_us: Mapping[str, float]) -> Artifact:
        columns = {}
        for name, wanted in extra_us.items():
            slope, fixed = np.polyfit(
                _COLUMNS[1:], np.subtract(self._times_us[name][1:], self._times_us[name][0]), 1
            )
            columns[name] = max(1, round((wanted - fixed) / max(slope, 1e-6)))
        logger.info("columns: %s", columns)
        return with_slower_blocks(self._base.artifact, columns)


def _block_times_us(artifact: Artifact, repeats: int) -> dict[str, list[float]]:
    """Block -> time of one row without extra work, and with that of ``_COLUMNS[1:]``."""
    clocks = {}
    for columns in _COLUMNS:
        blocks = selected(artifact).files
        variant = with_slower_blocks(artifact, dict.fromkeys(blocks, columns)) if columns else artifact
        for name, clock in _clocks(variant):
            clocks[f"{name} {columns}"] = OwnClock(clock)
    timed = measure_interleaved(clocks, [()], repeats=repeats, warmup=20)
    medians = {name: float(np.median(times)) for name, times in timed.items()}
    return {name: [medians[f"{name} {columns}"] for columns in _COLUMNS] for name in selected(artifact).files}


def _clocks(artifact: Artifact) -> Iterator[tuple[str, Callable[[], float]]]:
    """A stopwatch for each block, on random numbers."""
    backend, point = open_artifact(artifact).backend, selected(artifact)
    for block in point.control_flow.blocks:
        if block.name in point.files:
            engine = backend.load_block(artifact.files, point, block)
            rows = [_random(spec) for spec in block.params.values()]
            yield block.name, engine.stopwatch([*rows, *gate_parameters(block)])


def _random(spec: ValueSpec) -> Array:
    shape = [1 if isinstance(size, str) else size for size in spec.shape]
    return np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)


class _Careful:
    """Programs whose gates let fewer rows leave early."""

    def __init__(self, base: _Base) -> None:
        self._base = base
        self._rows = gather_rows(load_data(base.data), None).inputs
        deepest = max(base.figures.exits_us.values())
        self._exits_us = [base.figures.exits_us.get(name, deepest) for name in base.figures.exits]

    def make(self, growth: float) -> Artifact:
        """The smallest shift of the gates with which latency, modelled from that of exits, grows enough."""
        wanted = (1.0 + growth) * self._mean_us(self._base.artifact)
        low, high = 0.0, _WIDEST_SHIFT
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            enough = self._mean_us(with_careful_gates(self._base.artifact, middle)) >= wanted
            low, high = (low, middle) if enough else (middle, high)
        logger.info("shift of the gates: %.4f", high)
        return with_careful_gates(self._base.artifact, high)

    def _mean_us(self, artifact: Artifact) -> float:
        exits = np.asarray(open_artifact(artifact).run(self._rows).exit_index)
        return float(np.take(self._exits_us, exits).mean())
