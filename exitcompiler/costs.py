"""Measured times, and what a row pays at every place that it passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exitcompiler.errors import InputError
from exitcompiler.naming import OWN
from exitcompiler.scores import HeadKey
from exitcompiler.topology import Topology

__all__ = ["CostModel", "Step", "running_places", "runs_at"]


@dataclass(frozen=True, slots=True)
class Step:
    """What happens at a place.

    Args:
        targets: Where rows go on to, places.
        heads: The heads that are computed; none where nothing is decided and nobody answers.
        gated: Whether a gate decides, row by row.
    """

    targets: tuple[int, ...] = ()
    heads: tuple[HeadKey, ...] = ()
    gated: bool = False


@dataclass(frozen=True)
class CostModel:
    """Measured mean times, in microseconds per row.

    Args:
        segment_us: Per place of a topology, the part of its network that ends there: from the place
            before in the same network, or from the network's start.
        head_us: (site, head kind) -> the head alone.
        gate_us: What a kept gate adds: its own arithmetic and the dispatch between two blocks.
        plain_us: The untouched backbone, in a cascade the reference network, measured as a whole; None:
            the sum of the segments.

    Raises:
        InputError: A time is negative, NaN or infinite.
    """

    segment_us: tuple[float, ...]
    head_us: Mapping[HeadKey, float]
    gate_us: float = 0.0
    plain_us: float | None = None

    def __post_init__(self) -> None:
        times = (*self.segment_us, *self.head_us.values(), self.gate_us, self.whole_us)
        if not self.segment_us or not all(math.isfinite(t) and t >= 0 for t in times):
            raise InputError("times must be finite and not negative", where="cost model")

    @property
    def whole_us(self) -> float:
        """The time of the untouched backbone."""
        return sum(self.segment_us) if self.plain_us is None else self.plain_us

    def reach_us(self, topology: Topology, name: str) -> float:
        """The time of a network from its start to a place, with nothing decided in between."""
        place: int | None = topology.places.index(name)
        total = 0.0
        while place is not None:
            total += self.segment_us[place]
            place = topology.follows[place]
        return total

    def restrict(self, topology: Topology, few: Topology) -> CostModel:
        """The times of some of the sites: those that are left out cost what passing them costs.

        Args:
            topology: Of these times.
            few: Some of its sites.
        """
        segments = []
        for place, name in enumerate(few.places):
            follows = few.follows[place]
            before_us = 0.0 if follows is None else self.reach_us(topology, few.places[follows])
            segments.append(self.reach_us(topology, name) - before_us)
        return replace(self, segment_us=tuple(segments))

    def step_us(self, place: int, step: Step) -> float:
        """What a row pays at a place where something is decided or answered."""
        return self.segment_us[place] + self.overhead_us(step)

    def overhead_us(self, step: Step) -> float:
        """What heads and gate cost a row, beyond its network.

        Where every row leaves with a network's own answer, nobody asks how sure it is.
        """
        computed = [key for key in step.heads if step.gated or key[1] != OWN]
        return sum(self.head_us[key] for key in computed) + self.gate_us * step.gated

    def times_us(self, topology: Topology, steps: Sequence[Step]) -> NDArray[np.float64]:
        """What a row pays at each place that it passes.

        Where nothing is decided a network only runs if it is needed further on: a network that every
        row skips costs nothing.

        Args:
            topology: The places.
            steps: What happens at each.

        Returns:
            ``float64[places]``.

        Raises:
            InputError: The times or the steps are about other places.
        """
        if not len(topology.places) == len(self.segment_us) == len(steps):
            raise InputError(
                f"{len(self.segment_us)} segments and {len(steps)} steps for {len(topology.places)} places",
                where="cost model",
            )
        times = np.zeros(len(steps))
        if topology.tail and not any(step.heads for step in steps):
            times[-1] = self.whole_us
            return times
        for place, running in enumerate(running_places(topology, steps)):
            if running:
                times[place] = self.step_us(place, steps[place])
        return times


def running_places(topology: Topology, steps: Sequence[Step]) -> list[bool]:
    """Where a row that passes has its network run: something is decided there, or further on in it."""
    running = [False] * len(steps)
    for place in reversed(range(len(steps))):
        running[place] = runs_at(topology, place, steps[place], running)
    return running


def runs_at(topology: Topology, place: int, step: Step, running: Sequence[bool]) -> bool:
    """Whether a row that passes a place has its network run there.

    Args:
        topology: The places.
        place: One of them.
        step: What happens there.
        running: Per place, whether its network runs; of the later ones it has to be known.
    """
    if step.heads or not step.targets:
        return True
    return any(topology.follows[target] == place and running[target] for target in step.targets)
