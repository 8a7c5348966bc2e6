"""set-gates: puts learned gates, and the heads that answer, into a program with exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from exitcompiler.availability import pass_along
from exitcompiler.controlflow import Branch, Edge, Gate, Return
from exitcompiler.errors import PassError
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, Program

__all__ = ["ExitSetting", "SetGates", "set_gates"]


@dataclass(frozen=True, slots=True)
class ExitSetting:
    """How one exit decides, and which of its heads answers.

    Args:
        gate: Two actions: leave, or go on.
        keep: The way to leave that stays; the exit takes this setting's name.
    """

    gate: Gate
    keep: str


def set_gates(program: Program, settings: Mapping[str, ExitSetting]) -> Program:
    """Give every named exit one head and one gate; hand every value that a gate reads along to it.

    ::

        branch always 2:                              branch [deep_confidence] . [[9, 0, 0], ...] + ...:
            return "layer1.2/linear" (linear)     =>      return "layer1.2" (deep)
            return "layer1.2/deep" (deep)                 to_layer2_2(h)
            to_layer2_2(h)

    Args:
        program: A program with exits inserted.
        settings: New exit name -> setting; the other exits stay as they are.

    Raises:
        PassError: No such way to leave, it does not end a branch that goes on to one block, or a gate
            reads a value that does not exist on every way in.
    """
    for exit_name, setting in settings.items():
        block, branch = _find_branch(program, setting.keep)
        leave = next(way for way in branch.edges if isinstance(way, Return) and way.exit == setting.keep)
        onward = [way for way in branch.edges if isinstance(way, Edge)]
        if len(onward) != 1 or setting.gate.actions != 2:
            raise PassError(
                "an exit is a choice between leaving and one way on", where=f"block {block.name!r}"
            )
        program = _make_available(program, block.name, setting.gate)
        block, branch = _find_branch(program, setting.keep)
        go_on = next(way for way in branch.edges if isinstance(way, Edge))
        terminator = Branch(setting.gate, (replace(leave, exit=exit_name), go_on))
        program = program.with_blocks({block.name: replace(block, terminator=terminator)})
    return program


def _find_branch(program: Program, exit_name: str) -> tuple[Block, Branch]:
    for block in program.blocks:
        if isinstance(block.terminator, Branch) and any(
            isinstance(way, Return) and way.exit == exit_name for way in block.terminator.edges
        ):
            return block, block.terminator
    raise PassError(f"no branch leads to exit {exit_name!r}", remedy=f"exits: {', '.join(program.exits)}")


def _make_available(program: Program, target: str, gate: Gate) -> Program:
    for value in gate.reads:
        if value in program.block(target).values:
            continue
        source = next((block.name for block in program.blocks if value in block.results), None)
        if source is None:
            raise PassError(f"the gate reads {value!r}, which no block makes", where=f"block {target!r}")
        program = pass_along(program, value, source, target)
    return program


@dataclass(frozen=True)
class SetGates:
    """The set-gates pass; see ``set_gates``."""

    name: ClassVar[str] = "set-gates"

    settings: Mapping[str, ExitSetting]

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        changed = set_gates(program, self.settings)
        return PassResult(changed, changed is not program)
