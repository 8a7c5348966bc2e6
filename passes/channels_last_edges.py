"""channels-last-edges: feature maps in int8 go from block to block as convolutions lay them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import fx

from exitcompiler.controlflow import Edge, Successor, ValueSpec, map_successors
from exitcompiler.fx_utils import BodyBuilder, nodes_by_name
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, Program

__all__ = ["ChannelsLastEdges", "channels_last_edges"]

_TO_LAST: Final = (0, 2, 3, 1)
_TO_FIRST: Final = (0, 3, 1, 2)
_PERMUTE: Final = torch.ops.aten.permute.default


def channels_last_edges(program: Program) -> Program:
    """Hand feature maps in uint8 on as ``[batch, H, W, C]``; programs without any stay as they are.

    ::

        stem(x) -> (h: uint8[batch, 16, 32, 32]):     stem(x) -> (h_last: uint8[batch, 32, 32, 16]):
            jump rest(h)                          =>      jump rest(h_last)
        rest(h: uint8[batch, 16, 32, 32])             rest(h: uint8[batch, 32, 32, 16])

    ONNX Runtime computes convolutions in int8 channels last, and moves the transposes that this takes along
    the graph until they cancel. From a block that is given a feature map channels first they cannot be moved
    past a residual connection which reads it, so that every convolution behind it transposes twice. Inside
    blocks values keep their order; the transposes put in here cancel with those.

    What a block no longer hands on is left for eliminate-dead-code.
    """
    laid = {block.name: _feature_maps(block) for block in program.blocks if block is not program.entry}
    done = any(_is_laid_out(program.block(block), name) for block, names in laid.items() for name in names)
    if done or not any(laid.values()):
        return program
    return replace(program, blocks=tuple(_lay_out(block, program, laid) for block in program.blocks))


def _feature_maps(block: Block) -> frozenset[str]:
    """Names of the params that are feature maps in uint8."""
    specs = block.params.items()
    return frozenset(
        name
        for name, spec in specs
        if spec.dtype == "uint8" and len(spec.shape) == 4 and spec.batch_axis == 0
    )


def _is_laid_out(block: Block, param: str) -> bool:
    users = nodes_by_name(block.body)[param].users
    return bool(users) and all(
        user.target is _PERMUTE and user.args[1:] == (list(_TO_FIRST),) for user in users
    )


def _lay_out(block: Block, program: Program, laid: Mapping[str, frozenset[str]]) -> Block:
    own = laid.get(block.name, frozenset())
    handed: dict[str, str] = {}  # value that goes on channels last -> its name then
    taken = {*nodes_by_name(block.body), *block.params}

    def change(way: Successor) -> Successor:
        if not isinstance(way, Edge):
            return way
        values = []
        for value, param in zip(way.values, program.block(way.target).params, strict=True):
            if param in laid[way.target] and value not in own:
                if value not in handed:
                    handed[value] = _free_name(f"{value}_last", taken)
                value = handed[value]
            values.append(value)
        return Edge(way.target, tuple(values))

    terminator = map_successors(block.terminator, change)
    if not own and not handed:
        return block
    params = {name: _permuted(spec, _TO_LAST) if name in own else spec for name, spec in block.params.items()}
    made = {name: _permuted(block.values[value], _TO_LAST) for value, name in handed.items()}
    first = {name: _free_name(f"{name}_first", taken) for name in block.params if name in own}
    return Block(block.name, params, {**block.results, **made}, terminator, _body(block, first, handed))


def _body(block: Block, first: Mapping[str, str], handed: Mapping[str, str]) -> fx.GraphModule:
    """The body with params that come in channels last, and values that go on so.

    Args:
        block: As it was.
        first: Param that comes in channels last -> what it is called channels first.
        handed: Value that goes on channels last -> what it is called so.
    """
    builder = BodyBuilder()
    nodes = nodes_by_name(block.body)
    values = {nodes[name]: builder.placeholder(name, nodes[name]) for name in block.params}
    for name, inner in first.items():
        param = values[nodes[name]]
        param.meta = {"val": nodes[name].meta["val"].permute(_TO_LAST)}
        values[nodes[name]] = _permute(builder, param, _TO_FIRST, inner)
    for node in nodes.values():
        if node not in values:
            values[node] = builder.copy(node, values, block.body)
    results = [values[nodes[name]] for name in block.results]
    results += [_permute(builder, values[nodes[value]], _TO_LAST, name) for value, name in handed.items()]
    return builder.finish(results)


def _permute(builder: BodyBuilder, node: fx.Node, order: tuple[int, ...], name: str) -> fx.Node:
    return builder.call(_PERMUTE, (node, list(order)), name, node.meta["val"].permute(order))


def _permuted(spec: ValueSpec, order: tuple[int, ...]) -> ValueSpec:
    return ValueSpec(tuple(spec.shape[axis] for axis in order), spec.dtype)


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


@dataclass(frozen=True)
class ChannelsLastEdges:
    """The channels-last-edges pass; see ``channels_last_edges``."""

    name: ClassVar[str] = "channels-last-edges"

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        changed = channels_last_edges(program)
        return PassResult(changed, changed is not program)
