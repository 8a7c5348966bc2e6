"""How long networks were trained in all, over calls that may have been stopped half-way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["TimedBatches", "TrainingClock"]

EVERY_SECONDS: Final = 20.0


class TrainingClock:
    """The time from the first batch that a call draws to the last one; a file keeps it for all calls.

    What is drawn before the training, to probe places for exits, counts as well. The file is written on
    the way, so that a call that was killed is not forgotten.

    Args:
        path: The JSON file: ``calls``, and ``wall_s`` and ``cpu_s`` summed over them.
        facts: What else to say of this call.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._before: list[dict[str, Any]] = []
        if path.exists():
            self._before = json.loads(path.read_text())["calls"]
        self._facts = dict(facts)
        self._began: tuple[float, float] | None = None
        self._last = (0.0, 0.0)
        self._written = 0.0

    def over(self, batches: Iterable[Any]) -> TimedBatches:
        """The same batches; the clock runs while they are drawn."""
        return TimedBatches(batches, self)

    def tick(self) -> None:
        """A batch is drawn, or was used."""
        self._last = time.monotonic(), time.process_time()
        if self._began is None:
            self._began = self._last
            self._facts["started"] = time.strftime("%Y-%m-%d %H:%M:%S")
        if self._last[0] - self._written > EVERY_SECONDS:
            self.write()

    def stop(self, *, trained: bool) -> None:
        """The call is over; it is forgotten where it found its training complete."""
        if not trained:
            self._began = None
        self._facts["complete"] = True
        self.write()

    def read(self) -> dict[str, Any]:
        """All calls, and their sums."""
        calls = list(self._before)
        if self._began is not None:
            wall_s, cpu_s = (last - first for last, first in zip(self._last, self._began, strict=True))
            calls.append({**self._facts, "wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1)})
        return {"calls": calls, **{key: sum(call[key] for call in calls) for key in ("wall_s", "cpu_s")}}

    def write(self) -> None:
        """Bring the file up to date."""
        found = self.read()
        if found["calls"]:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(found, indent=1))
        elif self._path.exists():  # what this call wrote before it found that there was nothing to train
            self._path.unlink()
        self._written = time.monotonic()


class TimedBatches:
    """Batches whose drawing runs a clock.

    Args:
        batches: Has a length, and can be gone through several times.
        clock: Ticks at each.
    """

    def __init__(self, batches: Any, clock: TrainingClock) -> None:
        self._batches = batches
        self._clock = clock

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._clock.tick()
            yield batch
            self._clock.tick()
