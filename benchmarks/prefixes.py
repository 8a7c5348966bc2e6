"""Everything up to an exit as one block: what the ideal of a benchmark is measured on."""

from __future__ import annotations

from exitcompiler.controlflow import Branch, Jump, LinearGate, Return, successors
from exitcompiler.passes.eliminate_dead_code import eliminate_dead_code
from exitcompiler.passes.merge_blocks import merge_blocks
from exitcompiler.program import Block, Program

__all__ = ["answer_block", "prefix_block"]


def prefix_block(program: Program, exit_name: str) -> Block:
    """Everything up to an exit as one block that hands out all that heads and gates made on the way.

    Args:
        program: A chain.
        exit_name: Where it ends.
    """
    blocks: list[Block] = []
    wanted: list[str] = []
    for block in program.blocks:
        answers_here = [way for way in successors(block.terminator) if isinstance(way, Return)]
        made = [value for way in answers_here for value in way.values]  # of one way at most: it is a chain
        if isinstance(block.terminator, Branch) and isinstance(block.terminator.gate, LinearGate):
            made += [name for name in block.terminator.gate.reads if name in block.results]
        wanted += made
        if any(way.exit == exit_name for way in answers_here):
            end = Return(answers_here[0].values, exit_name)
            blocks.append(Block(block.name, block.params, block.results, end, block.body))
            break
        onward = next(way for way in successors(block.terminator) if not isinstance(way, Return))
        blocks.append(Block(block.name, block.params, block.results, Jump(onward), block.body))
    (merged,) = merge_blocks(Program(program.inputs, program.outputs, tuple(blocks))).blocks
    lost = [name for name in wanted if name not in merged.results]
    assert not lost, f"merging renamed {lost}"
    return Block(
        f"prefix-{exit_name}", merged.params, merged.results, Return(tuple(wanted), exit_name), merged.body
    )


def answer_block(program: Program, exit_name: str) -> Block:
    """Only what an exit's answer needs, as one block: no earlier head, no score, no decision.

    Args:
        program: A chain.
        exit_name: Whose answer.
    """
    whole = prefix_block(program, exit_name)
    (answer,) = (
        way
        for block in program.blocks
        for way in successors(block.terminator)
        if isinstance(way, Return) and way.exit == exit_name
    )
    end = Return(answer.values, exit_name)
    block = Block(f"answer-{exit_name}", whole.params, whole.results, end, whole.body)
    (needed,) = eliminate_dead_code(Program(program.inputs, program.outputs, (block,))).blocks
    return needed
