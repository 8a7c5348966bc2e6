"""channels-last-edges: feature maps in int8 go from block to block as convolutions lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import fx

from exitcompiler.controlflow import (
    Edge,
    Return,
    Successor,
    ValueSpec,
    map_successors,
    successors,
    taken_along,
)
from exitcompiler.fx_utils import BodyBuilder, is_symbolic_size, nodes_by_name
from exitcompiler.naming import free_name
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, Program
from exitcompiler.quantized_body import DEQUANTIZE

__all__ = ["ChannelsLastEdges", "channels_last_edges"]

_TO_LAST: Final = (0, 2, 3, 1)
_TO_FIRST: Final = (0, 3, 1, 2)
_PERMUTE: Final = torch.ops.aten.permute.default
_CONVOLUTIONS: Final = frozenset({torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding})


def channels_last_edges(program: Program) -> Program:
    """Hand feature maps in uint8 on as ``[batch, H, W, C]``; programs without any stay as they are.

    ::

        stem(x) -> (h: uint8[batch, 16, 32, 32]):     stem(x) -> (h_last: uint8[batch, 32, 32, 16]):
            jump rest(h)                          =>      jump rest(h_last)
        rest(h: uint8[batch, 16, 32, 32])             rest(h_last: uint8[batch, 32, 32, 16])

    ONNX Runtime computes convolutions in int8 channels last, and moves the transposes that this takes along
    the graph until they cancel. From a block that is given a feature map channels first they cannot be moved
    past a residual connection which reads it, so that many convolutions behind it transpose twice. Inside
    blocks values keep their order; the transposes put in here cancel with those.

    A feature map is a value that some block makes, and that an integer convolution reads in another. Inputs
    of the program, and what some row leaves with, stay as they are. What a block no longer hands on is left
    for eliminate-dead-code.
    """
    laid = _feature_maps(program)
    if not any(laid.values()):
        return program
    return replace(program, blocks=tuple(_lay_out(block, program, laid) for block in program.blocks))


def _feature_maps(program: Program) -> dict[str, frozenset[str]]:
    """Block name -> its params that come in channels last: the most for which all ways agree."""
    laid: dict[str, frozenset[str]] = {block.name: frozenset() for block in program.blocks}
    for block in program.blocks[1:]:
        laid[block.name] = frozenset(
            n for n, spec in block.params.items() if _may_be_laid_out(block, n, spec)
        )
    while True:
        refused = _refused(program, laid)
        if not refused:
            return laid
        laid = {name: params - {p for block, p in refused if block == name} for name, params in laid.items()}


def _may_be_laid_out(block: Block, name: str, spec: ValueSpec) -> bool:
    if spec.dtype != "uint8" or len(spec.shape) != 4 or spec.batch_axis != 0:
        return False
    readers = _readers(block, name)
    return all(node.target is DEQUANTIZE for node in readers) and (not readers or _is_convolved(readers))


def _readers(block: Block, name: str) -> list[fx.Node]:
    """What reads a param itself, and not only how many rows it has."""
    return [node for node in nodes_by_name(block.body)[name].users if not is_symbolic_size(node)]


def _is_convolved(readers: Iterable[fx.Node]) -> bool:
    return any(user.target in _CONVOLUTIONS for node in readers for user in node.users)


def _refused(program: Program, laid: Mapping[str, frozenset[str]]) -> set[tuple[str, str]]:
    """(block, param) of those that cannot come in channels last after all, or gain nothing by it."""
    refused: set[tuple[str, str]] = set()
    useful = {(block.name, n) for block in program.blocks for n in laid[block.name] if _readers(block, n)}
    for block in program.blocks:
        own = laid[block.name]
        for way in successors(block.terminator):
            if isinstance(way, Return):
                refused |= {(block.name, value) for value in taken_along(way) if value in own}
                continue
            for value, param in zip(way.values, program.block(way.target).params, strict=True):
                there = param in laid[way.target]
                if there and value not in own and value not in block.results:
                    refused.add((way.target, param))
                if value in own and not there:
                    refused.add((block.name, value))
                if value in own and there:
                    useful.add((block.name, value))
    everything = {(block, name) for block, params in laid.items() for name in params}
    return refused | (everything - useful)


def _lay_out(block: Block, program: Program, laid: Mapping[str, frozenset[str]]) -> Block:
    taken = {*nodes_by_name(block.body), *block.params}
    # Param, or result, channels first -> what it is called channels last.
    arriving = {name: free_name(f"{name}_last", taken) for name in block.params if name in laid[block.name]}
    handed: dict[str, str] = {}

    def change(way: Successor) -> Successor:
        if not isinstance(way, Edge):
            return way
        values = []
        for value, param in zip(way.values, program.block(way.target).params, strict=True):
            if param in laid[way.target] and value not in arriving and value not in handed:
                handed[value] = free_name(f"{value}_last", taken)
            values.append((arriving | handed).get(value, value) if param in laid[way.target] else value)
        return Edge(way.target, tuple(values))

    terminator = map_successors(block.terminator, change)
    if not arriving and not handed:
        return block
    params = {
        arriving.get(name, name): _to_last(spec) if name in arriving else spec
        for name, spec in block.params.items()
    }
    made = {name: _to_last(block.results[value]) for value, name in handed.items()}
    body = _body(block, arriving, handed)
    return Block(block.name, params, {**block.results, **made}, terminator, body)


def _body(block: Block, arriving: Mapping[str, str], handed: Mapping[str, str]) -> fx.GraphModule:
    builder = BodyBuilder()
    nodes = nodes_by_name(block.body)
    values: dict[fx.Node, fx.Node] = {}
    for name in block.params:
        values[nodes[name]] = builder.placeholder(arriving.get(name, name), nodes[name])
    for name in arriving:
        param = values[nodes[name]]
        param.meta = {"val": nodes[name].meta["val"].permute(_TO_LAST)}
        values[nodes[name]] = _permute(builder, param, _TO_FIRST, name)
    for node in nodes.values():
        if node not in values:
            values[node] = builder.copy(node, values, block.body)
    results = [values[nodes[name]] for name in block.results]
    results += [_permute(builder, values[nodes[value]], _TO_LAST, name) for value, name in handed.items()]
    return builder.finish(results)


def _permute(builder: BodyBuilder, node: fx.Node, order: tuple[int, ...], name: str) -> fx.Node:
    return builder.call(_PERMUTE, (node, list(order)), name, node.meta["val"].permute(order))


def _to_last(spec: ValueSpec) -> ValueSpec:
    return ValueSpec(tuple(spec.shape[axis] for axis in _TO_LAST), spec.dtype)


@dataclass(frozen=True)
class ChannelsLastEdges:
    """The channels-last-edges pass; see ``channels_last_edges``."""

    name: ClassVar[str] = "channels-last-edges"

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        changed = channels_last_edges(program)
        return PassResult(changed, changed is not program)
