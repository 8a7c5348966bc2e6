"""What share of the rows takes each edge of a program, from what leaves it and what runs its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from exitcompiler.controlflow import ControlFlow, Return, successors

__all__ = ["Way", "edge_shares"]

Way: TypeAlias = tuple[str, int]
"""A way out of a block: the block's name, and the action of its gate."""

_ALL_ROWS = 1e-3


def edge_shares(
    flow: ControlFlow, exit_rates: Mapping[str, float], block_rates: Mapping[str, float]
) -> dict[Way, float]:
    """The shares that follow: as many rows leave a block as arrive at it.

    Wherever all but one of the ways into or out of a block are known, so is the last one; this goes on
    until nothing new follows. With several ways around each other some may stay unknown.

    Args:
        flow: A well-formed program.
        exit_rates: Exit name -> share of the rows. Exits that are missing take none if the others
            together take all rows, else they are unknown.
        block_rates: Block name -> share of the rows that run it, as far as known.

    Returns:
        Share of the rows per way, returns included, as far as known.
    """
    complete = abs(sum(exit_rates.values()) - 1) < _ALL_ROWS
    into: dict[str, list[Way]] = {block.name: [] for block in flow.blocks}
    out: dict[str, list[Way]] = {block.name: [] for block in flow.blocks}
    known: dict[Way, float] = {}
    for block in flow.blocks:
        for action, way in enumerate(successors(block.terminator)):
            out[block.name].append((block.name, action))
            if not isinstance(way, Return):
                into[way.target].append((block.name, action))
            elif complete or way.exit in exit_rates:
                known[block.name, action] = exit_rates.get(way.exit, 0.0)
    running = {**block_rates, flow.entry.name: 1.0}
    before = -1
    while before != len(known) + len(running):
        before = len(known) + len(running)
        for name in into:
            for ways in (into[name], out[name]):
                if ways:
                    _balance(name, ways, known, running)
    return known


def _balance(name: str, ways: list[Way], known: dict[Way, float], running: dict[str, float]) -> None:
    """Add to ``known`` or ``running`` what follows from the ways on one side of a block."""
    missing = [way for way in ways if way not in known]
    total = sum(known.get(way, 0.0) for way in ways)
    if not missing:
        running.setdefault(name, total)
    elif len(missing) == 1 and name in running:
        known[missing[0]] = max(0.0, running[name] - total)  # of shares that were rounded
