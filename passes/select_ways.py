"""select-ways: keeps some of the ways out of a block, before anything is decided row by row."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from exitcompiler.controlflow import Branch, ConstantGate, Jump, Return, Successor, Terminator, successors
from exitcompiler.errors import PassError
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Program
from exitcompiler.views import reachable

__all__ = ["SelectWays", "select_ways"]


def select_ways(program: Program, ways: Mapping[str, Collection[str]]) -> Program:
    """Keep, of the ways out of some blocks, the named ones; blocks that nothing reaches any more go.

    ::

        small: branch always 0:      select_ways(program, {"small": ["large"]})
            medium(x)                    =>     small: jump large(x)
            large(x)                            (medium is gone, if nothing else led there)

    What is left out early decides what exists on every way in, and so what later passes may hand along.
    A branch that is left with one way becomes a jump or a return.

    Args:
        program: The branches of its blocks named in ``ways`` have constant gates.
        ways: Block name -> target blocks, and exit names of returns, that stay; other blocks keep all.

    Raises:
        PassError: No such block or way, nothing would be left, or a gate is not constant.
    """
    blocks = {block.name: block for block in program.blocks}
    unknown = [name for name in ways if name not in blocks]
    if unknown:
        raise PassError(f"no blocks {unknown}", remedy=f"blocks: {', '.join(blocks)}")
    changed = {
        name: replace(blocks[name], terminator=terminator)
        for name, kept in ways.items()
        if (terminator := _select(blocks[name].terminator, kept, name)) is not blocks[name].terminator
    }
    if not changed:
        return program
    selected = program.with_blocks(changed)
    live = reachable(selected)
    return replace(selected, blocks=tuple(block for block in selected.blocks if block.name in live))


def _select(terminator: Terminator, kept: Collection[str], block: str) -> Terminator:
    where = f"block {block!r}"
    if isinstance(terminator, Branch) and not isinstance(terminator.gate, ConstantGate):
        raise PassError("its gate has been set: ways have to be selected before", where=where)
    ways = successors(terminator)
    names = [_name(way) for way in ways]
    unknown = [name for name in kept if name not in names]
    if unknown or not kept:
        raise PassError(
            f"no way leads to {unknown}" if unknown else "no way out would be left",
            where=where,
            remedy=f"ways: {', '.join(names)}",
        )
    chosen = tuple(index for index, name in enumerate(names) if name in kept)
    if len(chosen) == len(ways):
        return terminator
    if len(chosen) == 1:
        way = ways[chosen[0]]
        return way if isinstance(way, Return) else Jump(way)
    assert isinstance(terminator, Branch)
    action = terminator.gate.action if isinstance(terminator.gate, ConstantGate) else 0
    gate = ConstantGate(chosen.index(action) if action in chosen else 0, len(chosen))
    return Branch(gate, tuple(ways[index] for index in chosen))


def _name(way: Successor) -> str:
    return way.exit if isinstance(way, Return) else way.target


@dataclass(frozen=True)
class SelectWays:
    """The select-ways pass; see ``select_ways``."""

    name: ClassVar[str] = "select-ways"

    ways: Mapping[str, Collection[str]]

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        selected = select_ways(program, self.ways)
        return PassResult(selected, selected is not program)
