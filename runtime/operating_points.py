"""The operating points of an artifact, and how one is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from exitcompiler.errors import InputError
from exitcompiler.runtime.manifest import OperatingPoint

__all__ = ["OperatingPoints"]


class OperatingPoints(Sequence[OperatingPoint]):
    """The shipped frontier."""

    def __init__(self, points: Sequence[OperatingPoint]) -> None:
        self._points = tuple(points)

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[OperatingPoint]:
        return iter(self._points)

    @overload
    def __getitem__(self, index: int) -> OperatingPoint: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[OperatingPoint]: ...

    def __getitem__(self, index: int | slice) -> OperatingPoint | Sequence[OperatingPoint]:
        return self._points[index]

    def __repr__(self) -> str:
        return f"OperatingPoints({[point.name for point in self._points]})"

    def select(
        self,
        *,
        max_accuracy_drop: float | None = None,
        latency_budget_ms: float | None = None,
        name: str | None = None,
    ) -> OperatingPoint:
        """Choose a point by exactly one criterion.

        Args:
            max_accuracy_drop: The fastest point that drops at most this much (net, 0..1).
            latency_budget_ms: The most accurate point whose mean latency is at most this.
            name: The point of this name.

        Raises:
            InputError: No point meets it, or not exactly one criterion is given.
        """
        if sum(value is not None for value in (max_accuracy_drop, latency_budget_ms, name)) != 1:
            raise InputError("give exactly one of max_accuracy_drop, latency_budget_ms and name")
        if name is not None:
            chosen = [point for point in self if point.name == name]
            nearest = f"choose one of {[point.name for point in self]}"
        elif max_accuracy_drop is not None:
            chosen = sorted(
                (p for p in self if p.estimate.accuracy_drop <= max_accuracy_drop),
                key=lambda p: (p.estimate.mean_latency_ms, p.estimate.accuracy_drop),
            )
            nearest = f"the smallest drop on offer is {min(p.estimate.accuracy_drop for p in self):.4g}"
        else:
            assert latency_budget_ms is not None
            chosen = sorted(
                (p for p in self if p.estimate.mean_latency_ms <= latency_budget_ms),
                key=lambda p: (p.estimate.accuracy_drop, p.estimate.mean_latency_ms),
            )
            nearest = f"the fastest takes {min(p.estimate.mean_latency_ms for p in self):.4g} ms in the mean"
        if not chosen:
            raise InputError("no operating point meets this", where="select", remedy=nearest)
        return chosen[0]
