"""From scores and costs to operating points: the frontier, and rounds of building and relearning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from exitcompiler.candidates import Candidates, build_program
from exitcompiler.costs import CostModel
from exitcompiler.data import Rows
from exitcompiler.engines import Engines
from exitcompiler.errors import InputError
from exitcompiler.frontier import Frontier, FrontierPoint, sweep
from exitcompiler.gates import RECIPES, Recipe
from exitcompiler.passes.pipeline import dump_to
from exitcompiler.policies import widen
from exitcompiler.profile import block_times_us, programs_times_us
from exitcompiler.program import Program
from exitcompiler.progress import Reporter
from exitcompiler.scores import ScoreTable
from exitcompiler.settings import Settings, aimed_at

__all__ = ["Built", "Round", "Selection", "fit_within", "select_points"]

logger = logging.getLogger(__name__)

ROUNDS: Final = 3
SLACK: Final = 1.02
"""How far a re-measured mean latency may be above a budget: about what timing repeats to."""

SHIPPED_DROPS: Final = (-0.005, 0.0, 0.0025, 0.005, 0.01, 0.02, 0.03)
"""The accuracy drops for which an operating point is shipped, next to the one asked for; a cascade may
well be more accurate than its reference."""


@dataclass(frozen=True)
class Built:
    """An operating point as a program, with its blocks measured.

    Args:
        program: Pruned, merged, with its gates.
        point: The policy and what it is expected to do on fresh rows.
        block_us: Block name -> measured time of a row that comes there, in the order of the program.
        rates: Block name -> share of the rows that come there, on the learning rows.
    """

    program: Program
    point: FrontierPoint
    block_us: dict[str, float]
    rates: dict[str, float]

    @property
    def mean_us(self) -> float:
        """Expected time of a row, by the measured blocks."""
        return sum(time * self.rates[name] for name, time in self.block_us.items())

    def retimed(self, times_us: Sequence[float]) -> Built:
        """The same with other times of its blocks, in order."""
        return replace(self, block_us=dict(zip(self.block_us, map(float, times_us), strict=True)))


@dataclass(frozen=True)
class Round:
    """What one round of relearning came to.

    Args:
        exits: The exits that could be built.
        kept: Those that were.
        mean_us: Re-measured mean time of a row.
    """

    exits: tuple[str, ...]
    kept: tuple[str, ...]
    mean_us: float


@dataclass(frozen=True)
class Selection:
    """The outcome of learning.

    Args:
        frontier: The first round's, over all exits.
        chosen: The point asked for.
        shipped: Other points worth shipping, by falling accuracy; none equal to the chosen one.
        rounds: What each round came to.
    """

    frontier: Frontier
    chosen: Built
    shipped: tuple[Built, ...]
    rounds: tuple[Round, ...]


def select_points(
    candidates: Candidates,
    table: ScoreTable,
    costs: CostModel,
    engines: Engines,
    sample: Rows,
    settings: Settings,
    reporter: Reporter,
) -> Selection:
    """Learn gates, build the chosen program, measure it, learn again on what was measured.

    A pruned exit never returns; at most three rounds. Then the programs of all rounds are timed again
    in turns, and the fastest wins (under a latency budget: the most accurate that keeps it).

    Args:
        candidates: Exits and heads.
        table: Scores on the learning rows.
        costs: Of segments and heads apart.
        engines: Of the target.
        sample: Rows to measure on.
        settings: The limit to keep.
        reporter: Progress.

    Raises:
        CalibrationError: The learning rows cannot be used.
        InputError: No operating point keeps the limit.
    """
    bench = _Bench(candidates, table, engines, sample, settings)
    frontier = _sweep(table, costs, settings, reporter, "learning gates")
    current = bench.build(_fit(frontier, settings))
    tried = [current]
    rounds = [Round(table.exits, tuple(current.point.policy.kept), current.mean_us)]
    while len(rounds) < ROUNDS and not current.point.policy.is_plain:
        allowed = tuple(current.point.policy.kept)
        few, measured = _narrowed(candidates, table, costs, current)
        recipes = (frontier.recipe,)
        narrowed = _sweep(few, measured, settings, reporter, "relearning gates", recipes)
        point = _fit(narrowed, settings)
        point = replace(point, policy=widen(point.policy, table.topology))
        current = bench.build(point)
        tried.append(current)
        rounds.append(Round(allowed, tuple(point.policy.kept), current.mean_us))
        if tuple(point.policy.kept) == allowed:
            break
    best = _best(bench.retime(tried), settings)
    shipped = _shipped(frontier, best, bench)
    return Selection(frontier, best, shipped, tuple(rounds))


@dataclass(frozen=True)
class _Bench:
    """Where programs of policies are built and measured: what ``select_points`` is given."""

    candidates: Candidates
    table: ScoreTable
    engines: Engines
    sample: Rows
    settings: Settings

    def build(self, point: FrontierPoint) -> Built:
        """The program of a point, timed."""
        program = self.program(point)
        return self.timed(program, point, self.times_us(program))

    def program(self, point: FrontierPoint) -> Program:
        """The program of a point."""
        observers = () if self.settings.dump is None else (dump_to(self.settings.dump),)
        channels_last = self.engines.backend.channels_last
        return build_program(self.candidates, point.policy, channels_last=channels_last, observers=observers)

    def times_us(self, program: Program) -> list[float]:
        """The time of each of its blocks."""
        return block_times_us(program.blocks, self.engines, self.sample, self.settings.batch_size)

    def retime(self, tried: Sequence[Built]) -> list[Built]:
        """The same programs, timed again in turns: what was timed minutes apart cannot be compared."""
        if len(tried) < 2:
            return list(tried)
        programs = [built.program.blocks for built in tried]
        times = programs_times_us(programs, self.engines, self.sample, self.settings.batch_size)
        return [built.retimed(part) for built, part in zip(tried, times, strict=True)]

    def timed(self, program: Program, point: FrontierPoint, times_us: Sequence[float]) -> Built:
        """A program with the times of its blocks; each ends at the place that it is called after.

        How many rows come to each is told by the policy itself, on the learning rows: the policies of the
        folds, which say how accurate it is, may go other ways.
        """
        block_us = {block.name: float(time) for block, time in zip(program.blocks, times_us, strict=True)}
        place_of = {block: place for place, block in self.candidates.block_of.items()}
        passed, _ = point.policy.walk(self.table)
        rates = dict(zip(self.table.topology.places, passed.mean(axis=0).tolist(), strict=True))
        return Built(program, point, block_us, {name: rates[place_of[name]] for name in block_us})


def _best(tried: Sequence[Built], settings: Settings) -> Built:
    """The fastest of the rounds' programs; under a latency budget the most accurate that keeps it.

    Raises:
        InputError: None keeps the budget once its blocks are measured; says what the fastest takes.
    """
    if settings.budget_us is None:
        return min(tried, key=lambda built: built.mean_us)
    within = [built for built in tried if built.mean_us <= settings.budget_us * SLACK]
    if not within:
        fastest_ms = min(built.mean_us for built in tried) * settings.batch_size / 1000.0
        raise InputError(
            f"no program keeps a mean latency of {settings.latency_budget_ms} ms; "
            f"the fastest that was built takes {fastest_ms:.3f} ms",
            remedy="raise the budget",
        )
    return min(within, key=lambda built: (built.point.accuracy_drop, built.mean_us))


def _sweep(
    table: ScoreTable,
    costs: CostModel,
    settings: Settings,
    reporter: Reporter,
    title: str,
    recipes: Sequence[Recipe] = RECIPES,
) -> Frontier:
    with reporter.step(title, 1.0) as step:
        done = 0.0

        def on_step(count: int, total: int) -> None:
            nonlocal done
            step.advance(count / total - done)
            done = count / total

        return sweep(table, costs, recipes=recipes, seed=settings.seed, on_step=on_step)


def _fit(frontier: Frontier, settings: Settings) -> FrontierPoint:
    if settings.drop_limit is None:
        return frontier.fit(latency_budget_us=settings.budget_us)
    return fit_within(frontier, settings.drop_limit)


def fit_within(frontier: Frontier, limit: float) -> FrontierPoint:
    """The point that keeps an accuracy drop in the mean over fresh rows.

    Args:
        frontier: To fit on.
        limit: The drop allowed, 0 or more; less is aimed at.
    """
    aim = aimed_at(limit)
    if all(point.accuracy_drop > aim for point in frontier.points):
        return frontier.plain  # the margin reaches below a drop of 0, where it alone keeps the limit
    return frontier.fit(max_accuracy_drop=aim)


def _narrowed(
    candidates: Candidates, table: ScoreTable, costs: CostModel, built: Built
) -> tuple[ScoreTable, CostModel]:
    """Scores and costs of the kept sites alone, from the measured blocks; heads apart as before.

    The end of the reference network stays, kept or not: it is what accuracy is compared with.
    """
    policy = built.point.policy
    kept = set(policy.kept) | ({table.exits[-1]} if not table.topology.tail else set())
    few = table.restrict(table.topology.closed(kept))
    unbuilt = costs.restrict(table.topology, few.topology)
    segments: list[float] = []
    for number, place in enumerate(few.topology.places):
        time_us = built.block_us.get(candidates.block_of[place])
        if time_us is not None:
            step = policy.steps[table.topology.places.index(place)]
            segments.append(max(0.0, time_us - costs.overhead_us(step)))
        elif table.topology.tail:  # the last kept exit ends the network: what would come after is as it was
            segments.append(max(0.0, costs.whole_us - sum(segments)))
        else:
            segments.append(unbuilt.segment_us[number])
    heads = {key: cost for key, cost in costs.head_us.items() if key in few.heads or key in few.agreements}
    return few, CostModel(tuple(segments), heads, costs.gate_us, costs.plain_us)


def _shipped(frontier: Frontier, chosen: Built, bench: _Bench) -> tuple[Built, ...]:
    """A handful of other points; those that cannot be had, or are no trade against the rest, are left out."""
    points: list[FrontierPoint] = []
    for drop in SHIPPED_DROPS:
        try:
            point = frontier.fit(max_accuracy_drop=aimed_at(drop))
        except InputError:
            continue
        apart = all(abs(point.accuracy_drop - o.accuracy_drop) > 1e-3 for o in (chosen.point, *points))
        if apart and not point.policy.is_plain:
            points.append(point)
    programs = [bench.program(point) for point in points]
    # All in one export, before they are timed one by one.
    blocks = [block for program in programs for block in program.blocks]
    bench.engines.load(blocks, bench.settings.batch_size)
    return tuple(
        bench.timed(program, point, bench.times_us(program))
        for program, point in zip(programs, points, strict=True)
    )
