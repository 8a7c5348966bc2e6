"""merge-blocks: joins blocks with no decision between them, so that a backend fuses across the seam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from exitcompiler.controlflow import (
    Branch,
    ConstantGate,
    Edge,
    Gate,
    Jump,
    Successor,
    Terminator,
    map_successors,
)
from exitcompiler.fx_utils import compose_bodies, extract_body
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, Program
from exitcompiler.views import incoming_edges

__all__ = ["MergeBlocks", "merge_blocks"]


def merge_blocks(program: Program) -> Program:
    """Merge every block that ends in a jump with its target, where nothing else leads there.

    ::

        a: (x) -> (h); jump b(h)
        b: (k) -> (y); return (y)     =>     b: (x) -> (h, y); return (y)

    The merged block is called like the second one: names say where a block leads to.
    """
    while True:
        pair = _find_pair(program)
        if pair is None:
            return program
        first, second, edge = pair
        merged = _merge(first, second, edge)
        # The merged block stands where the first one stood: all edges into it come from before there.
        blocks = [
            merged if block is first else _retarget(block, first.name, merged.name)
            for block in program.blocks
            if block is not second
        ]
        program = replace(program, blocks=tuple(blocks))


def _find_pair(program: Program) -> tuple[Block, Block, Edge] | None:
    for block in program.blocks:
        if not isinstance(block.terminator, Jump):
            continue
        edge = block.terminator.edge
        if len(list(incoming_edges(program, edge.target))) == 1:
            return block, program.block(edge.target), edge
    return None


def _merge(first: Block, second: Block, edge: Edge) -> Block:
    second = _without_clashes(first, second)
    bound = dict(zip(second.params, edge.values, strict=True))
    results = {**first.results, **second.results}
    return Block(
        name=second.name,
        params=first.params,
        results=results,
        terminator=_substitute(second.terminator, bound),
        body=compose_bodies(first.body, second.body, bound, list(results)),
    )


def _without_clashes(first: Block, second: Block) -> Block:
    """The second block with all its values renamed that are called like another one of the first."""
    taken = first.values.keys() | second.values.keys()
    rename: dict[str, str] = {}
    for name in second.values:
        if name not in first.values:
            continue
        unique, count = name, 0
        while unique in taken or unique in rename.values():
            count += 1
            unique = f"{name}_{count}"
        rename[name] = unique
    if not rename:
        return second
    return Block(
        name=second.name,
        params={rename.get(name, name): spec for name, spec in second.params.items()},
        results={rename.get(name, name): spec for name, spec in second.results.items()},
        terminator=_substitute(second.terminator, rename),
        body=extract_body(second.body, list(second.params), list(second.results), rename=rename),
    )


def _substitute(terminator: Terminator, names: Mapping[str, str]) -> Terminator:
    def substitute(way: Successor) -> Successor:
        return replace(way, values=tuple(names.get(value, value) for value in way.values))

    if isinstance(terminator, Branch):
        terminator = replace(terminator, gate=_substitute_reads(terminator.gate, names))
    return map_successors(terminator, substitute)


def _substitute_reads(gate: Gate, names: Mapping[str, str]) -> Gate:
    if isinstance(gate, ConstantGate):
        return gate
    return replace(gate, reads=tuple(names.get(value, value) for value in gate.reads))


def _retarget(block: Block, old: str, new: str) -> Block:
    def retarget(way: Successor) -> Successor:
        return replace(way, target=new) if isinstance(way, Edge) and way.target == old else way

    return replace(block, terminator=map_successors(block.terminator, retarget))


@dataclass(frozen=True)
class MergeBlocks:
    """The merge-blocks pass; see ``merge_blocks``."""

    name: ClassVar[str] = "merge-blocks"

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        merged = merge_blocks(program)
        return PassResult(merged, merged is not program)
