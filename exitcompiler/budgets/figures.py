"""What was measured: answers to all rows, latencies in fresh processes. A baseline is one of these, saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Answered", "Environment", "Measurement", "ProcessFigures", "SideFigures", "Which"]

Which: TypeAlias = Literal["program", "plain"]


@dataclass(frozen=True, slots=True)
class Environment:
    """Where it was measured. Times are compared only where all of the first six are equal.

    Args:
        cpu: The processor, after the GPU if there is one; empty: not known, and then equal to no other.
        cores: That the process may use.
        system: ``"Linux-x86_64"``.
        backend: What ran it.
        threads: Per call.
        precision: ``"fp32"``, ...
        versions: Package -> version, of Python, exitcompiler and the backend.
    """

    cpu: str
    cores: int
    system: str
    backend: str
    threads: int
    precision: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answered:
    """What the program and the plain backbone answered, on all rows.

    Args:
        rows: How many.
        fingerprint: SHA-256 of the rows and their labels.
        exits: Exit -> rows that left there, in the order of the program, zeros included.
        disagreements: Rows whose class is another than the plain backbone's.
        right: Rows that the program answers right; None without labels, as the next three.
        plain_right: Rows that the plain backbone answers right.
        lost: Rows that only the plain backbone answers right.
        gained: Rows that only the program answers right.
    """

    rows: int
    fingerprint: str
    exits: Mapping[str, int]
    disagreements: int
    right: int | None = None
    plain_right: int | None = None
    lost: int | None = None
    gained: int | None = None


@dataclass(frozen=True, slots=True)
class SideFigures:
    """One of the two programs in one process.

    Args:
        mean_us: Microseconds per call of one row; rows count by how many of all leave at their exit.
        p50_us: Median, likewise.
        p95_us: Likewise.
        p99_us: Likewise.
        rows_per_second: Batch size -> throughput, of the middle half of the batches.
    """

    mean_us: float
    p50_us: float
    p95_us: float
    p99_us: float
    rows_per_second: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """What one fresh process measured, the program and the plain backbone taking turns.

    Args:
        program: Of the program.
        plain: Of the plain backbone.
        exits_us: Exit -> mean microseconds of a row that leaves there; where none does, of rows forced to.
            The program's ``mean_us`` is the mean of these, weighted by the rows that leave there.
        blocks_us: Block -> mean microseconds of one row, as an engine of its own; empty where blocks cannot
            be timed alone.
        first: Which of the two was loaded first, and so is the one that ``load_ms`` and ``peak_bytes`` are
            of.
        load_ms: From the call of ``exitcompiler.load`` to the first answer.
        peak_bytes: Highest resident memory of the process until the first answers (to single rows, then to
            the largest batch) were there, before the other one was loaded.
        seconds: How long the process took in all.
    """

    program: SideFigures
    plain: SideFigures
    exits_us: Mapping[str, float]
    blocks_us: Mapping[str, float]
    first: Which
    load_ms: float
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One artifact at one operating point, measured.

    Args:
        environment: Where.
        point: The operating point's name.
        size_bytes: Of the artifact's files.
        answered: What came out, and where rows left.
        processes: In the order in which they ran.
    """

    environment: Environment
    point: str
    size_bytes: int
    answered: Answered
    processes: tuple[ProcessFigures, ...]
