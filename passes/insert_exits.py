"""insert-exits: attaches exit heads to the ends of blocks, with gates that never leave yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from exitcompiler.controlflow import Branch, ConstantGate, Jump, Return
from exitcompiler.errors import PassError
from exitcompiler.fx_utils import compose_bodies
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, ExitHead, Program

__all__ = ["InsertExits", "insert_exits"]


def insert_exits(program: Program, heads: Mapping[str, Sequence[ExitHead]]) -> Program:
    """Attach heads at the ends of blocks; several heads at one block give as many ways to leave.

    ::

        stem(x) -> (h):        =>    stem(x) -> (h, stem_logits, stem_confidence):
            jump rest(h)                 branch always 1:
                                             return "stem" (stem_logits)
                                             rest(h)

    The gates always go on, so the program computes what it did; prune-constant-gates followed by
    eliminate-dead-code gives the old program back.

    Args:
        program: Its blocks named in ``heads`` end in a jump.
        heads: Block name -> heads, in the order of the gate's actions.

    Raises:
        PassError: No such block, or it ends otherwise than in a jump.
    """
    changed = {name: _attach(program, name, attached) for name, attached in heads.items() if attached}
    return program.with_blocks(changed) if changed else program


def _attach(program: Program, name: str, heads: Sequence[ExitHead]) -> Block:
    try:
        block = program.block(name)
    except KeyError:
        blocks = ", ".join(block.name for block in program.blocks)
        raise PassError(f"no block {name!r}", remedy=f"blocks: {blocks}") from None
    if not isinstance(block.terminator, Jump):
        raise PassError("an exit can only be put where a block ends in a jump", where=f"block {name!r}")
    body, results = block.body, dict(block.results)
    for head in heads:
        results |= head.results
        reads = [node.name for node in head.body.graph.nodes if node.op == "placeholder"]
        body = compose_bodies(body, head.body, {value: value for value in reads}, list(results))
    ways = tuple(Return(head.answer, head.exit) for head in heads)
    gate = ConstantGate(len(ways), len(ways) + 1)
    return replace(block, body=body, results=results, terminator=Branch(gate, (*ways, block.terminator.edge)))


@dataclass(frozen=True)
class InsertExits:
    """The insert-exits pass; see ``insert_exits``."""

    name: ClassVar[str] = "insert-exits"

    heads: Mapping[str, Sequence[ExitHead]]

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        changed = insert_exits(program, self.heads)
        return PassResult(changed, changed is not program)
