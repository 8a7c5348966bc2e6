"""prune-constant-gates: folds every branch whose gate always takes the same edge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from exitcompiler.controlflow import Branch, ConstantGate, Jump, LinearGate, Return, Terminator
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, Program
from exitcompiler.views import reachable

__all__ = ["PruneConstantGates", "prune_constant_gates"]


def prune_constant_gates(program: Program) -> Program:
    """Fold constant branches; blocks that no edge reaches any more go with them.

    A gate that never leaves makes its exit worthless; one that always leaves ends the network there
    (Bolukbasi et al. 2017, section 3: constants are members of every gate's function family, and
    this is how the architecture is discovered). A linear gate whose weights are all equal across
    actions is constant too. ::

        branch always 1:                      branch always 0:
            return "layer1.2" (l)                 return "layer1.2" (l)      =>  return "layer1.2" (l)
            rest(h)              =>  jump rest(h)      rest(h)                   (rest is gone)

    What only the folded exit read is left for eliminate-dead-code.
    """
    blocks: list[Block] = []
    for block in program.blocks:
        terminator = _fold(block.terminator)
        blocks.append(block if terminator is block.terminator else replace(block, terminator=terminator))
    if all(new is old for new, old in zip(blocks, program.blocks, strict=True)):
        return program
    folded = replace(program, blocks=tuple(blocks))
    live = reachable(folded)
    return replace(folded, blocks=tuple(block for block in blocks if block.name in live))


def _fold(terminator: Terminator) -> Terminator:
    if not isinstance(terminator, Branch):
        return terminator
    action = _constant_action(terminator)
    if action is None:
        return terminator
    way = terminator.edges[action]
    return way if isinstance(way, Return) else Jump(way)


def _constant_action(branch: Branch) -> int | None:
    if isinstance(branch.gate, ConstantGate):
        return branch.gate.action
    if len(branch.edges) == 1:
        return 0
    gate: LinearGate = branch.gate
    if all(row == gate.weight[0] for row in gate.weight):
        return gate.bias.index(max(gate.bias))
    return None


@dataclass(frozen=True)
class PruneConstantGates:
    """The prune-constant-gates pass; see ``prune_constant_gates``."""

    name: ClassVar[str] = "prune-constant-gates"

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        pruned = prune_constant_gates(program)
        return PassResult(pruned, pruned is not program)
