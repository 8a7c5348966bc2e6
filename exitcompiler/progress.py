"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Reporter", "Step", "reporting"]

logger = logging.getLogger(__name__)

SPEED_SECONDS: Final = 600.0
"""What the time left is estimated from: long enough for batches that take minutes."""


@dataclass
class Step:
    """One bar. Says how far a step has come, and what there is to say about it."""

    _progress: Progress
    _task: TaskID

    def advance(self, count: float = 1, *, note: str | None = None) -> None:
        """Move on by ``count``; replace the note behind the bar."""
        self._progress.advance(self._task, count)
        if note is not None:
            self._progress.update(self._task, note=note)


@dataclass
class Reporter:
    """Opens bars, one after another, and notes how long each was open.

    Args:
        seconds: Description -> seconds so far.
    """

    _progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, description: str, total: float | None = None) -> Iterator[Step]:
        """A bar for the length of a ``with`` block.

        Args:
            description: What is being done.
            total: How much there is to do; None: it cannot be said.
        """
        logger.info("%s", description)
        started = time.monotonic()
        task = self._progress.add_task(description, total=total, note="")
        yield Step(self._progress, task)
        elapsed = time.monotonic() - started
        self.seconds[description] = self.seconds.get(description, 0.0) + elapsed
        finished = self._progress.tasks[task].completed if total is None else total
        self._progress.update(task, total=max(finished, 1), completed=max(finished, 1))


@contextmanager
def reporting(enabled: bool | None = None) -> Iterator[Reporter]:
    """Bars on standard error.

    Args:
        enabled: None: only where standard error is a terminal.
    """
    console = Console(stderr=True)
    # Not console.is_terminal: where a CI forces colours, that is true of its log, and each frame fills it.
    shown = sys.stderr.isatty() if enabled is None else enabled
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, disable=not shown, speed_estimate_period=SPEED_SECONDS
    ) as progress:
        yield Reporter(progress)
