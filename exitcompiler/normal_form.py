"""Rewrites captured graphs into fewer forms, so that they can be cut, run and lowered anywhere."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["normalise"]

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch writes where it does not know the module."""

_aten = torch.ops.aten
_FILLS: dict[object, int | None] = {
    _aten.zeros_like.default: 0,
    _aten.ones_like.default: 1,
    _aten.empty_like.default: 0,
    _aten.full_like.default: None,
    _aten.new_empty.default: 0,
    _aten.new_zeros.default: 0,
    _aten.new_ones.default: 1,
    _aten.new_full.default: None,
}
"""Operators that use a tensor's shape and dtype alone -> what they fill in (None: an argument)."""


def normalise(graph: fx.GraphModule) -> None:
    """Rewrite a graph in place; it computes what it did."""
    for node in graph.graph.nodes:
        if _NO_MODULE in node.meta.get("nn_module_stack", ()):
            del node.meta["nn_module_stack"]
    _detach(graph)
    _free_strides(graph)
    _fold_attention(graph)
    graph.graph.lint()
    graph.recompile()


def _detach(graph: fx.GraphModule) -> None:
    """Rewrite what asks a tensor for its shape or dtype alone, so that it does not count as using it.

    ``zeros_like(x)`` and its kin become ``full(sizes)``, ``mask.type_as(x)`` becomes ``mask`` in that dtype.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_aten.type_as.default):
        converted = node.args[0]
        if converted.meta["val"].dtype != node.meta["val"].dtype:
            node.target, node.args = _aten._to_copy.default, (converted,)
            node.kwargs = {"dtype": node.meta["val"].dtype}
        else:
            node.replace_all_uses_with(converted)
            graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _FILLS:
            continue
        value = node.meta["val"]
        fill = _FILLS[node.target]
        with graph.graph.inserting_before(node):
            if "_like" in node.target.name():
                sizes = [_size(graph, node.args[0], axis) for axis in range(value.ndim)]
                fill = node.args[1] if fill is None else fill
            else:
                sizes = list(node.args[1])
                fill = node.args[2] if fill is None else fill
            options = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
            full = graph.graph.call_function(_aten.full.default, (sizes, fill), options)
        full.meta = dict(node.meta)
        node.replace_all_uses_with(full)
        graph.graph.erase_node(node)


def _free_strides(graph: fx.GraphModule) -> None:
    """Rewrite ``view`` to ``reshape``: a body meets values whose strides are not those of the example.

    Images in channels-last format, rows that were gathered, a batch of one: where the strides allow a view,
    reshape gives one.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_aten.view.default):
        node.target = _aten.reshape.default


def _size(graph: fx.GraphModule, source: fx.Node, axis: int) -> int | fx.Node:
    size = source.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    node = graph.graph.call_function(_aten.sym_size.int, (source, axis))
    node.meta["val"] = size
    return node


def _fold_attention(graph: fx.GraphModule) -> None:
    """Give attention four dimensions, the only form that ONNX exporters know.

    ::

        attention(q: [b, w, h, n, d], ...)  =>  attention(q.reshape(-1, h, n, d), ...).reshape(b, w, h, n, d)
    """
    for node in graph.graph.find_nodes(op="call_function", target=_aten.scaled_dot_product_attention.default):
        operands, mask = node.args[:3], node.args[3] if len(node.args) > 3 else None
        shapes = [operand.meta["val"].shape for operand in operands]
        rank = len(shapes[0])
        alike = all(shape[:-2] == shapes[0][:-2] for shape in shapes)
        if rank == 4 or not alike or (mask is not None and mask.meta["val"].ndim > 2):
            continue
        heads = shapes[0][-3] if rank > 4 else 1
        with graph.graph.inserting_before(node):
            folded = [
                _reshaped(graph, operand, [-1, heads, *shape[-2:]])
                for operand, shape in zip(operands, shapes, strict=True)
            ]
            sizes = [_size(graph, operands[0], axis) for axis in range(rank - 1)]
        result = node.meta["val"]
        node.args = (*folded, *node.args[3:])
        node.meta["val"] = result.reshape([-1, heads, *result.shape[-2:]])
        with graph.graph.inserting_after(node):
            back = graph.graph.call_function(_aten.reshape.default, (node, [*sizes, result.shape[-1]]))
        back.meta = {**node.meta, "val": result}
        for user in [user for user in node.users if user is not back]:
            user.replace_input_with(node, back)


def _reshaped(graph: fx.GraphModule, source: fx.Node, sizes: list[int]) -> fx.Node:
    node = graph.graph.call_function(_aten.reshape.default, (source, sizes))
    node.meta = {**source.meta, "val": source.meta["val"].reshape(sizes)}
    return node
