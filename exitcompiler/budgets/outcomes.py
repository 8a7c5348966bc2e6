"""What a check found: a verdict for each limit, why latency changed, and all of it together. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from exitcompiler.budgets.figures import Measurement
from exitcompiler.budgets.limits import Limit
from exitcompiler.statistics import Interval

__all__ = ["BlockChange", "Causes", "CheckReport", "ExitChange", "Outcome", "Verdict"]

Verdict: TypeAlias = Literal["PASS", "FAIL", "INCONCLUSIVE", "SKIPPED"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one limit.

    Args:
        limit: The limit.
        verdict: ``"INCONCLUSIVE"`` where the interval straddles the limit, ``"SKIPPED"`` where nothing can be
            compared.
        found: In the unit of ``limit.value``, with its interval; both ends equal where it is known exactly;
            None if skipped.
        now: The metric itself, in its own unit (with ``max_ratio`` and ``max_increase`` of times: the ratio
            to plain).
        before: The same in the baseline, where the limit is about a change.
        note: What a reader has to know, or why it was skipped; may be empty.
    """

    limit: Limit
    verdict: Verdict
    found: Interval | None
    now: float | None
    before: float | None
    note: str


@dataclass(frozen=True, slots=True)
class ExitChange:
    """An exit now and in the baseline.

    Args:
        name: Of the exit.
        rate: Share of the rows that leave there.
        before: The same in the baseline.
        time: Its latency divided by the plain backbone's, now over baseline: 1.2 is 20 % slower.
    """

    name: str
    rate: float
    before: float
    time: Interval


@dataclass(frozen=True, slots=True)
class BlockChange:
    """A block now and in the baseline.

    Args:
        name: Of the block.
        now_us: Microseconds of one row, now.
        time: Its latency divided by the plain backbone's, now over baseline.
    """

    name: str
    now_us: float
    time: Interval


@dataclass(frozen=True, slots=True)
class Causes:
    """Why mean latency over the plain backbone's has changed: ``change = kernels x exit mix``.

    Args:
        change: Now over baseline.
        kernels: How much slower rows are that leave at the same exits.
        exit_mix: How much slower the baseline's kernels would be with the exit rates of now.
        named: Which of the two explain a change that is more than chance: ``"kernels"``, ``"exit mix"``.
        summary: The same in a sentence or two.
        exits: Each exit that both have.
        blocks: Each block that both have.
    """

    change: Interval
    kernels: Interval
    exit_mix: Interval
    named: tuple[Literal["kernels", "exit mix"], ...]
    summary: str
    exits: tuple[ExitChange, ...]
    blocks: tuple[BlockChange, ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """A whole check.

    Args:
        artifact: Which program, as it was named.
        outcomes: One for each limit, in the order of the budget.
        causes: None without a baseline, or where its exits are others.
        measurement: What was measured.
        baseline: What it was compared with.
        notes: What a reader has to know, for example that the baseline is of another machine.
        seconds: How long it took.
        looks: How often intervals were looked at; each look has its share of what may go wrong.
        confidence: Of all looks at an interval together.
        baseline_written: Where a new baseline was written; None: nowhere.
    """

    artifact: str
    outcomes: tuple[Outcome, ...]
    causes: Causes | None
    measurement: Measurement
    baseline: Measurement | None
    notes: tuple[str, ...]
    seconds: float
    looks: int
    confidence: float
    baseline_written: str | None = None

    @property
    def verdict(self) -> Verdict:
        """``"FAIL"`` if a limit is broken, else ``"INCONCLUSIVE"`` if one is, else ``"PASS"``."""
        verdicts = [outcome.verdict for outcome in self.outcomes]
        return next((verdict for verdict in ("FAIL", "INCONCLUSIVE") if verdict in verdicts), "PASS")

    @property
    def exit_code(self) -> int:
        """0: passed, 1: failed, 2: inconclusive."""
        return {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2, "SKIPPED": 0}[self.verdict]
