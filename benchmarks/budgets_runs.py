"""Runs ``exitcompiler check`` over and over, each time as a user does, and keeps what came of it."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["CONDITIONS", "UNCHANGED", "Condition", "Run", "Workplace", "plan", "run_all", "spinning"]

logger = logging.getLogger("budgets")

UNCHANGED: Final = "unchanged"
BUDGET: Final = '[latency.mean]\nmax_increase = "10 %"\n'
MAX_SECONDS: Final = 55.0
"""Of measuring: with the start of Python, a run is then within a minute."""


@dataclass(frozen=True)
class Condition:
    """What else the machine does: processes that spin on every other core, or nothing.

    Args:
        busy: While programs are checked.
        baseline_busy: While baselines are measured.
    """

    busy: bool
    baseline_busy: bool


CONDITIONS: Final = {
    "idle": Condition(busy=False, baseline_busy=False),
    "busy": Condition(busy=True, baseline_busy=True),
    "busy now": Condition(busy=True, baseline_busy=False),
}


@dataclass(frozen=True)
class Run:
    """One check.

    Args:
        condition: A key of ``CONDITIONS``.
        kind: Of the program.
        number: Of the run among those of this kind.
    """

    condition: str
    kind: str
    number: int


@dataclass(frozen=True)
class Workplace:
    """Where everything lies.

    Args:
        folder: For what is written.
        artifacts: Kind -> program; that of ``UNCHANGED`` is also the one that baselines are of.
        data: DATA, as on the command line.
        baselines: How many there are for each condition; runs take turns with them.
        max_seconds: Of measuring in a run.
    """

    folder: Path
    artifacts: Mapping[str, Path]
    data: str
    baselines: int
    max_seconds: float = MAX_SECONDS

    def record(self, run: Run) -> Path:
        """Where a run is written."""
        return self._of(run.condition) / f"{run.kind.replace(' ', '-')}-{run.number}.json"

    def baseline(self, condition: str, number: int) -> Path:
        """The baseline that a run is compared with."""
        return self._of(condition) / f"baseline-{number % self.baselines}.json"

    def _of(self, condition: str) -> Path:
        return self.folder / condition.replace(" ", "-")


def plan(condition: str, counts: Mapping[str, int], seed: int = 0) -> list[Run]:
    """All runs of a condition, kinds in random order, so that a slow phase of the machine hits all."""
    runs = [Run(condition, kind, number) for kind, count in counts.items() for number in range(count)]
    random.Random(seed).shuffle(runs)
    return runs


def run_all(workplace: Workplace, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Do what has not been done yet.

    Args:
        workplace: Where.
        runs: Of one condition.

    Returns:
        What is known of each run: ``condition``, ``kind``, ``number``, ``seconds`` (of the whole command),
        ``load`` (the machine's load average before it), and ``report``, as ``check --json`` wrote it.

    Raises:
        RuntimeError: A check came to no verdict.
    """
    budget = workplace.folder / "budget.toml"
    budget.parent.mkdir(parents=True, exist_ok=True)
    budget.write_text(BUDGET)
    left = [run for run in runs if not workplace.record(run).exists()]
    for condition in dict.fromkeys(run.condition for run in left):
        _make_baselines(workplace, budget, condition)
        here = [run for run in left if run.condition == condition]
        with spinning(CONDITIONS[condition].busy):
            for done, run in enumerate(here):
                found = _check(workplace, budget, run)
                _write(workplace.record(run), found)
                logger.info(
                    "%s, %d of %d: %s: %s, %s, %.1f s",
                    *(condition, done + 1, len(here), run.kind, found["report"]["verdict"]),
                    *(found["report"]["causes"]["named"], found["seconds"]),
                )
    return [json.loads(workplace.record(run).read_text()) for run in runs]


def _make_baselines(workplace: Workplace, budget: Path, condition: str) -> None:
    numbers = range(workplace.baselines)
    missing = [n for n in numbers if not workplace.baseline(condition, n).exists()]
    with spinning(CONDITIONS[condition].baseline_busy):
        for number in missing:
            path = workplace.baseline(condition, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            seconds, _ = _call(workplace, UNCHANGED, budget, path, number, "--update-baseline")
            logger.info("%s: baseline %d, %.1f s", condition, number, seconds)


def _check(workplace: Workplace, budget: Path, run: Run) -> dict[str, Any]:
    load = os.getloadavg()[0]
    baseline = workplace.baseline(run.condition, run.number)
    # Another seed than the baseline's, and for each run another: rows come in another order.
    seconds, report = _call(workplace, run.kind, budget, baseline, 1000 + run.number)
    return {
        "condition": run.condition,
        "kind": run.kind,
        "number": run.number,
        "seconds": seconds,
        "load": load,
        "report": report,
    }


def _call(
    workplace: Workplace, kind: str, budget: Path, baseline: Path, seed: int, *more: str
) -> tuple[float, dict[str, Any]]:
    """Seconds and report of one command."""
    command = [
        *(sys.executable, "-P", "-m", "exitcompiler", "check", str(workplace.artifacts[kind])),
        *("--budget", str(budget), "--data", workplace.data, "--baseline", str(baseline)),
        *("--seed", str(seed), "--max-seconds", str(workplace.max_seconds), "--json", *more),
    ]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    report = json.loads(done.stdout)
    if report["exit_code"] != done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}, not {report['exit_code']}")
    return seconds, report


def _write(path: Path, found: Mapping[str, Any]) -> None:
    """All or nothing: what was interrupted is run again."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=1))
    unfinished.replace(path)


@contextmanager
def spinning(busy: bool) -> Iterator[None]:
    """Keep all cores but one busy, if at all."""
    count = len(os.sched_getaffinity(0)) - 1 if busy else 0
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield
