"""insert-exits: attaches exit heads to the ends of blocks, with gates that choose as before."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from exitcompiler.availability import make_available
from exitcompiler.controlflow import (
    Branch,
    ConstantGate,
    LinearGate,
    Return,
    Successor,
    Terminator,
    successors,
)
from exitcompiler.errors import PassError
from exitcompiler.fx_utils import compose_bodies
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, ExitHead, Program
from exitcompiler.views import reachable

__all__ = ["InsertExits", "insert_exits"]


def insert_exits(
    program: Program, heads: Mapping[str, Sequence[ExitHead]], final: Collection[str] = ()
) -> Program:
    """Attach heads at the ends of blocks; several heads at one block give as many ways to leave.

    ::

        stem(x) -> (h):        =>    stem(x) -> (h, stem_logits, stem_confidence):
            jump rest(h)                 branch always 1:
                                             return "stem" (stem_logits)
                                             rest(h)

    The gates choose what was chosen before, so the program computes what it did; prune-constant-gates
    followed by eliminate-dead-code gives the old program back. A head may read values of earlier blocks,
    which are handed along to it. A head without an answer makes values for gates, and no way to leave.

    Where a block is final, every row leaves: its other ways go before what the heads behind it
    read is handed along, and with them the blocks that nothing else reaches.

    Args:
        program: Its blocks named in ``heads`` end otherwise than in a linear gate.
        heads: Block name -> heads; the ways to leave come first, in this order.
        final: Blocks whose other ways go; each needs a head that answers.

    Raises:
        PassError: No such block, its gate has been set, a final block has no head that answers, or a
            head reads what does not exist on every way in.
    """
    names = [block.name for block in program.blocks]
    unknown = [name for name in (*heads, *final) if name not in names]
    if unknown:
        raise PassError(f"no block {unknown[0]!r}", remedy=f"blocks: {', '.join(names)}")
    for name in names:  # in topological order: what decides which values reach a block comes before it
        attached = heads.get(name, ())
        if (attached or name in final) and any(block.name == name for block in program.blocks):
            program = _attach(program, name, attached, final=name in final)
    return program


def _attach(program: Program, name: str, heads: Sequence[ExitHead], *, final: bool) -> Program:
    for head in heads:
        for value in _reads(head):
            program = make_available(program, value, name)
    block = program.block(name)
    body, results = block.body, dict(block.results)
    for head in heads:
        results |= head.results
        body = compose_bodies(body, head.body, {value: value for value in _reads(head)}, list(results))
    answers = tuple(Return(head.answer, head.exit) for head in heads if head.answer)
    terminator = _with_answers(block, answers, final=final)
    program = program.with_blocks({name: replace(block, body=body, results=results, terminator=terminator)})
    if not final:
        return program
    live = reachable(program)
    return replace(program, blocks=tuple(block for block in program.blocks if block.name in live))


def _reads(head: ExitHead) -> list[str]:
    return [node.name for node in head.body.graph.nodes if node.op == "placeholder"]


def _with_answers(block: Block, answers: tuple[Return, ...], *, final: bool) -> Terminator:
    where = f"block {block.name!r}"
    old = block.terminator
    if isinstance(old, Branch) and isinstance(old.gate, LinearGate):
        raise PassError("its gate has been set: exits have to be inserted before", where=where)
    if final and not answers:
        raise PassError("no head answers here, so a row cannot leave", where=where)
    if not answers:
        return old
    if final and len(answers) == 1:
        return answers[0]
    ways: tuple[Successor, ...] = answers if final else (*answers, *successors(old))
    chosen = old.gate.action if isinstance(old, Branch) and isinstance(old.gate, ConstantGate) else 0
    return Branch(ConstantGate(0 if final else len(answers) + chosen, len(ways)), ways)


@dataclass(frozen=True)
class InsertExits:
    """The insert-exits pass; see ``insert_exits``."""

    name: ClassVar[str] = "insert-exits"

    heads: Mapping[str, Sequence[ExitHead]]
    final: Collection[str] = field(default=())

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        changed = insert_exits(program, self.heads, self.final)
        return PassResult(changed, changed is not program)
