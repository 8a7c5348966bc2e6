"""eliminate-dead-code: removes values, params and operators that no answer and no gate needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from exitcompiler.controlflow import (
    BlockInterface,
    Branch,
    Edge,
    Return,
    Successor,
    Terminator,
    map_successors,
    successors,
)
from exitcompiler.fx_utils import extract_body, nodes_by_name, required_inputs
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, Program
from exitcompiler.views import reachable

__all__ = ["EliminateDeadCode", "eliminate_dead_code"]


def eliminate_dead_code(program: Program) -> Program:
    """Remove what nothing needs, across block borders; a head goes once nothing reads its scores.

    ::

        a: (x) -> (h, unused); jump b(h, unused)     a: (x) -> (h); jump b(h)
        b: (h, u) -> (y); return (y)              => b: (h) -> (y); return (y)

    One walk against the edges finds all: a block comes after those that need its values. The
    program's inputs stay as they are, and every block keeps one param with rows, so that an
    executor always knows which rows are there.
    """
    live = reachable(program)
    params: dict[str, tuple[str, ...]] = {}
    blocks: list[Block] = []
    for block in reversed(program.blocks):
        if block.name not in live:
            continue
        terminator = _drop_arguments(block.terminator, program, params)
        needed = _values_read(terminator)
        results = [name for name in block.results if name in needed]
        kept = _params_needed(block, results, needed, is_entry=block is program.entry)
        params[block.name] = kept
        blocks.append(_shrink(block, kept, results, terminator))
    blocks.reverse()
    if len(blocks) == len(program.blocks) and all(
        new is old for new, old in zip(blocks, program.blocks, strict=True)
    ):
        return program
    return replace(program, blocks=tuple(blocks))


def _drop_arguments(
    terminator: Terminator, program: Program, params: Mapping[str, tuple[str, ...]]
) -> Terminator:
    def drop(way: Successor) -> Successor:
        if isinstance(way, Return):
            return way
        old = program.block(way.target).params
        kept = tuple(v for v, param in zip(way.values, old, strict=True) if param in params[way.target])
        return Edge(way.target, kept)

    return map_successors(terminator, drop)


def _values_read(terminator: Terminator) -> frozenset[str]:
    reads = terminator.gate.reads if isinstance(terminator, Branch) else ()
    return frozenset(reads).union(*(way.values for way in successors(terminator)))


def _params_needed(
    block: Block, results: list[str], needed: frozenset[str], *, is_entry: bool
) -> tuple[str, ...]:
    if is_entry:
        return tuple(block.params)
    used = needed | set(required_inputs(block.body, results))
    kept = tuple(param for param in block.params if param in used)
    if any(block.params[param].batch_axis == 0 for param in kept):
        return kept
    rows = next((param for param, spec in block.params.items() if spec.batch_axis == 0), None)
    return kept if rows is None else tuple(param for param in block.params if param in used or param == rows)


def _shrink(block: Block, params: tuple[str, ...], results: list[str], terminator: Terminator) -> Block:
    interface = BlockInterface(
        block.name,
        {name: block.params[name] for name in params},
        {name: block.results[name] for name in results},
        terminator,
    )
    same = list(interface.params) == list(block.params) and list(interface.results) == list(block.results)
    body = extract_body(block.body, params, results)
    if len(nodes_by_name(body)) == len(nodes_by_name(block.body)) and same:
        return block if terminator == block.terminator else replace(block, terminator=terminator)
    return Block(interface.name, interface.params, interface.results, terminator, body)


@dataclass(frozen=True)
class EliminateDeadCode:
    """The eliminate-dead-code pass; see ``eliminate_dead_code``."""

    name: ClassVar[str] = "eliminate-dead-code"

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        smaller = eliminate_dead_code(program)
        return PassResult(smaller, smaller is not program)
