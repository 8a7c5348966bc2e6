"""What a budget says: limits on metrics, each of one kind, and how to measure. Plain data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

__all__ = ["LATENCIES", "Budget", "Family", "Limit", "LimitKind", "Metric", "RunSettings"]

Family: TypeAlias = Literal["latency", "throughput", "accuracy", "exit_rates", "artifact", "memory", "load"]

LimitKind: TypeAlias = Literal[
    "max", "min", "max_ratio", "min_ratio", "max_increase", "max_decrease", "max_slowdown", "tolerance"
]
"""What a limit is compared with:

- ``max``, ``min``: the figure itself;
- ``max_ratio``, ``min_ratio``: the figure divided by that of the plain backbone, measured in the same run;
- ``max_increase``, ``max_decrease``: how much that ratio has grown or fallen since the baseline; of the
  accuracy drop, in points; of the artifact's size, the size itself;
- ``max_slowdown``: how much a time itself has grown since the baseline, which is judged only on the machine,
  backend and number of threads that the baseline was measured on;
- ``tolerance``: how far an exit rate may be from the baseline's, to either side, in points.
"""

LATENCIES: Final = ("mean", "p50", "p95", "p99")

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
"""What TOML takes as a key without quotes."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What is limited.

    Args:
        family: The table of ``budget.toml`` that it is in.
        name: Within it. latency: one of ``LATENCIES`` (milliseconds per call of one row); throughput: the
            batch size, as text (rows per second); accuracy: ``"drop"`` (plain minus program, 0..1) or
            ``"disagreement"`` (share of rows whose class is another than the plain backbone's); exit_rates:
            the exit, or ``""`` for all of them (0..1); artifact: ``"size"`` (bytes); memory: ``"peak"``
            (bytes);
            load: ``"time"`` (milliseconds).
    """

    family: Family
    name: str

    def __str__(self) -> str:
        return f"{self.family}.{self.name}" if self.name else self.family

    @property
    def is_timed(self) -> bool:
        """Whether it is measured in processes, and so surer the longer that takes."""
        return self.family in ("latency", "throughput", "memory", "load")


@dataclass(frozen=True, slots=True)
class Limit:
    """One line of a budget.

    Args:
        metric: Of what.
        kind: Compared with what.
        value: In the unit of the metric (ms, rows/s, 0..1, bytes); a ratio as it is; an increase, decrease or
            slowdown as a share: 0.1 is 10 %.
        text: As it was written.
    """

    metric: Metric
    kind: LimitKind
    value: float
    text: str

    @property
    def key(self) -> str:
        """As in ``budget.toml``: ``latency.mean.max``, ``memory.max_peak``, ``exit_rates."layer1.0".min``."""
        family, name = self.metric.family, self.metric.name
        if family in ("accuracy", "artifact", "memory", "load"):
            bound, _, rest = self.kind.partition("_")
            return f"{family}.{bound}_{name}" + (f"_{rest}" if rest else "")
        if not _PLAIN_NAME.fullmatch(name):
            name = f'"{name}"' if name else ""
        return ".".join(part for part in (family, name, self.kind) if part)

    @property
    def needs_baseline(self) -> bool:
        """Whether it says something about a change."""
        return self.kind in ("max_increase", "max_decrease", "max_slowdown", "tolerance")

    @property
    def is_upper(self) -> bool:
        """Whether the measured figure has to stay below it."""
        return self.kind not in ("min", "min_ratio")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How to measure; None: what the artifact, or the command line, says.

    Args:
        backend: As for ``exitcompiler.load``.
        threads: Per call.
        operating_point: Its name; None: the selected one.
        max_rows: Of the data, at most.
        confidence: Of the intervals, two-sided.
    """

    backend: str | None = None
    threads: int | None = None
    operating_point: str | None = None
    max_rows: int | None = None
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class Budget:
    """A ``budget.toml``, read.

    Args:
        limits: In the order of the file; at least one.
        run: How to measure.
        fresh_rows: Whether accuracy limits are held for fresh rows like those given, and so by the interval;
            or for these rows, on which the drop is known exactly.
        baseline: The file with what was measured before, or where it will be written; None: none.
    """

    limits: tuple[Limit, ...]
    run: RunSettings = field(default_factory=RunSettings)
    fresh_rows: bool = False
    baseline: Path | None = None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes whose throughput is limited, rising."""
        sizes = {int(limit.metric.name) for limit in self.limits if limit.metric.family == "throughput"}
        return tuple(sorted(sizes))
