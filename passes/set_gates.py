"""set-gates: puts learned gates, and the heads that answer, into a program with exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from exitcompiler.availability import make_available
from exitcompiler.controlflow import Branch, Gate, Jump, Return, Successor, Terminator, successors
from exitcompiler.errors import PassError
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, Program
from exitcompiler.views import reachable

__all__ = ["BranchSetting", "SetGates", "set_gates"]


@dataclass(frozen=True, slots=True)
class BranchSetting:
    """What a block chooses among, and how.

    Args:
        gate: One action per way.
        ways: What stays, in the order of the gate's actions: a return by its exit's name, an edge by its
            target's. At most one return.
        exit: The new name of the return; None if there is none.
    """

    gate: Gate
    ways: tuple[str, ...]
    exit: str | None


def set_gates(program: Program, settings: Mapping[str, BranchSetting]) -> Program:
    """Give blocks their gates and ways; hand every value that a gate reads along to it.

    ::

        branch always 2:                              branch [deep_confidence] . [[9, 0, 0], ...] + ...:
            return "layer1.2/linear" (linear)     =>      return "layer1.2" (deep)
            return "layer1.2/deep" (deep)                 to_layer2_2(h)
            to_layer2_2(h)

    A choice of one is none: the gate goes. Blocks that nothing reaches any more go too.

    Args:
        program: A program with exits inserted.
        settings: Block name -> setting; the other blocks stay as they are.

    Raises:
        PassError: No such block or way, the gate does not fit the ways, or it reads a value that does
            not exist on every way in.
    """
    names = [block.name for block in program.blocks]
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise PassError(f"no block {unknown[0]!r}", remedy=f"blocks: {', '.join(names)}")
    changed: dict[str, Block] = {}
    for name, setting in settings.items():
        block = program.block(name)
        terminator = _set(block, setting)
        if terminator != block.terminator:
            changed[name] = replace(block, terminator=terminator)
    if not changed:
        return program
    program = program.with_blocks(changed)
    # What is gone must not count when it is asked what reaches a gate on every way in.
    live = reachable(program)
    program = replace(program, blocks=tuple(block for block in program.blocks if block.name in live))
    for name in [name for name in changed if name in live]:
        terminator = program.block(name).terminator
        for value in terminator.gate.reads if isinstance(terminator, Branch) else ():
            program = make_available(program, value, name)
    return program


def _set(block: Block, setting: BranchSetting) -> Terminator:
    where = f"block {block.name!r}"
    if setting.gate.actions != len(setting.ways) or not setting.ways:
        raise PassError(f"{setting.gate.actions} actions for {len(setting.ways)} ways", where=where)
    ways = tuple(_find(block, name) for name in setting.ways)
    returns = [way for way in ways if isinstance(way, Return)]
    if len(returns) > 1 or (setting.exit is None) != (not returns):
        raise PassError(
            f"{len(returns)} ways leave, {'none' if setting.exit is None else repr(setting.exit)} is named",
            where=where,
            remedy="keep at most one head, and name the exit where one is kept",
        )
    if setting.exit is not None:
        renamed = replace(returns[0], exit=setting.exit)
        ways = tuple(renamed if isinstance(way, Return) else way for way in ways)
    if len(ways) > 1:
        return Branch(setting.gate, ways)
    return ways[0] if isinstance(ways[0], Return) else Jump(ways[0])


def _find(block: Block, name: str) -> Successor:
    ways = [
        (way.exit if isinstance(way, Return) else way.target, way) for way in successors(block.terminator)
    ]
    found = [way for its_name, way in ways if its_name == name]
    if len(found) != 1:
        count = "several ways lead" if found else "no way leads"
        raise PassError(
            f"{count} to {name!r}",
            where=f"block {block.name!r}",
            remedy=f"ways: {', '.join(its_name for its_name, _ in ways)}",
        )
    return found[0]


@dataclass(frozen=True)
class SetGates:
    """The set-gates pass; see ``set_gates``."""

    name: ClassVar[str] = "set-gates"

    settings: Mapping[str, BranchSetting]

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        changed = set_gates(program, self.settings)
        return PassResult(changed, changed is not program)
