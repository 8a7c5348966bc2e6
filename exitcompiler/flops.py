"""Counts the floating-point operations of a body from the shapes of its values.

A multiplication and an addition count as two; as is usual, only convolutions, matrix products and
attention count. (torch's ``FlopCounterMode`` reports 0 for attention on the CPU.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

__all__ = ["count_flops", "node_flops"]

_aten = torch.ops.aten
_CONVOLUTIONS = frozenset(
    {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.convolution.default}
    | {_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding}
)
_TRANSPOSED = frozenset(
    {_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input}
)
_PRODUCTS = frozenset({_aten.mm.default, _aten.bmm.default, _aten.matmul.default})
_SUMMED_PRODUCTS = frozenset({_aten.addmm.default, _aten.baddbmm.default})


def count_flops(body: fx.GraphModule) -> int:
    """The floating-point operations of a body for one row."""
    return sum(node_flops(node) for node in body.graph.nodes)


def node_flops(node: fx.Node) -> int:
    """The floating-point operations of one node for one row; 0 where only elementwise work is done."""
    output = node.meta.get("val")
    if node.op != "call_function" or not isinstance(output, torch.Tensor):
        return 0
    target = node.target
    if target in _CONVOLUTIONS:
        if target is _aten.convolution.default and _argument(node, 6, "transposed", False):
            return _per_input(node)
        return 2 * _elements(output) * math.prod(_shape(node, 1)[1:])
    if target in _TRANSPOSED:
        return _per_input(node)
    if target is _aten.linear.default or target in _PRODUCTS:
        return 2 * _elements(output) * _shape(node, 0)[-1]
    if target in _SUMMED_PRODUCTS:
        return 2 * _elements(output) * _shape(node, 1)[-1]
    if target is _aten.scaled_dot_product_attention.default:
        query, key, value = (_shape(node, i) for i in range(3))
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _per_input(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node, 0)) * math.prod(_shape(node, 1)[1:])


def _argument(node: fx.Node, index: int, name: str, default: object) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _shape(node: fx.Node, index: int) -> tuple[int, ...]:
    argument = node.args[index]
    assert isinstance(argument, fx.Node)
    return tuple(_for_one_row(size) for size in argument.meta["val"].shape)


def _elements(value: torch.Tensor) -> int:
    return math.prod(_for_one_row(size) for size in value.shape)


def _for_one_row(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))
