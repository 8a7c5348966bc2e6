"""Handing a value along: what SSA construction is for block arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from exitcompiler.controlflow import Return, Successor, Terminator, ValueSpec, map_successors
from exitcompiler.errors import PassError
from exitcompiler.fx_utils import BodyBuilder, nodes_by_name, result_nodes
from exitcompiler.program import Block, Program
from exitcompiler.views import between, dominators

__all__ = ["extend_edges", "make_available", "pass_along"]


def extend_edges(terminator: Terminator, more: Mapping[str, tuple[str, ...]]) -> Terminator:
    """The terminator whose edges into the blocks named in ``more`` hand over those values too."""

    def extend(way: Successor) -> Successor:
        if isinstance(way, Return) or way.target not in more:
            return way
        return replace(way, values=way.values + more[way.target])

    return map_successors(terminator, extend)


def make_available(program: Program, value: str, block: str) -> Program:
    """Hand a value along to a block that a head or a gate reads it in; nothing to do where it is there.

    Args:
        program: Left as it is.
        value: A param or result of some block.
        block: Block name.

    Raises:
        PassError: No block has the value, or it does not exist on every way into ``block``.
    """
    if value in program.block(block).values:
        return program
    # In topological order: who makes a value comes before those that it was handed along to.
    source = next((other.name for other in program.blocks if value in other.values), None)
    if source is None:
        raise PassError(f"a gate or a head reads {value!r}, which no block makes", where=f"block {block!r}")
    return pass_along(program, value, source, block)


def pass_along(program: Program, value: str, source: str, target: str) -> Program:
    """Make ``value`` of block ``source`` available in block ``target``, under the same name.

    Every block on the way gets a param more, every edge into them a value more::

        a: (x) -> (h, c); jump b(h)          a: (x) -> (h, c); jump b(h, c)
        b: (h) -> (k);    jump d(k)    =>    b: (h, c) -> (k); jump d(k, c)
        d: (k) -> ...                        d: (k, c) -> ...

    Args:
        program: Where ``source`` dominates ``target`` (the value exists on every way in).
        value: A param or result of ``source``.
        source: Block name.
        target: Block name.

    Raises:
        PassError: ``source`` does not dominate ``target``, or has no such value.
    """
    spec = program.block(source).values.get(value)
    if spec is None:
        raise PassError(f"no value {value!r}", where=f"block {source!r}")
    if not _dominates(program, source, target):
        raise PassError(
            f"{value!r} does not reach block {target!r} on every way in", where=f"block {source!r}"
        )
    missing = {
        name: (value,) for name in between(program, source, target) if value not in program.block(name).values
    }
    like = nodes_by_name(program.block(source).body)[value]
    blocks = [
        replace(
            _with_param(block, value, spec, like) if block.name in missing else block,
            terminator=extend_edges(block.terminator, missing),
        )
        for block in program.blocks
    ]
    return replace(program, blocks=tuple(blocks))


def _with_param(block: Block, name: str, spec: ValueSpec, like: fx.Node) -> Block:
    """The block with one param more, which its body takes and does not use."""
    builder = BodyBuilder()
    nodes = nodes_by_name(block.body)
    copies = {nodes[param]: builder.placeholder(param, nodes[param]) for param in block.params}
    builder.placeholder(name, like)
    for node in nodes.values():
        if node not in copies:
            copies[node] = builder.copy(node, copies, block.body, name=node.name)
    body = builder.finish([copies[node] for node in result_nodes(block.body)])
    return replace(block, params={**block.params, name: spec}, body=body)


def _dominates(program: Program, source: str, target: str) -> bool:
    immediate = dominators(program)
    walk: str | None = target
    while walk is not None:
        if walk == source:
            return True
        walk = immediate.get(walk)
    return False
