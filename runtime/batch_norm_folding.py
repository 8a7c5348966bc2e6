"""Folds batch norms into the convolutions before them: one kernel less on a GPU for each.

ONNX Runtime, OpenVINO and TensorRT do so by themselves; a torch graph that is captured as it stands does not.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch import fx

__all__ = ["fold_batch_norms"]

_CONVOLUTIONS: Final = frozenset(
    getattr(getattr(torch.ops.aten, f"conv{n}d"), overload)
    for n in (1, 2, 3)
    for overload in ("default", "padding")
)
_NORM: Final = torch.ops.aten._native_batch_norm_legit_no_training.default


def fold_batch_norms(body: fx.GraphModule) -> int:
    """Fold every batch norm that alone reads a convolution with constant weights; changes ``body``.

    ::

        c = conv(x, w, b);  y = norm(c, scale, shift, mean, variance)[0]
        ->  y = conv(x, w * k, (b - mean) * k + shift)      where k = scale / sqrt(variance + eps)

    Computed in float64 and rounded once, to the types that the convolution's weights have.

    Args:
        body: Of functional operators.

    Returns:
        How many were folded.

    Source: the definition of batch normalisation, Ioffe and Szegedy 2015, algorithm 1, with the statistics
    fixed as in algorithm 2.
    """
    folded = 0
    for norm in body.graph.find_nodes(op="call_function", target=_NORM):
        found = _convolution_before(norm)
        if found is None:
            continue
        convolution, result = found
        weight, bias = _folded(body, convolution, norm)
        with body.graph.inserting_before(convolution):
            arguments = list(convolution.args)
            arguments[1] = _constant(body, f"folded_weight_{folded}", weight)
            arguments[2:3] = [_constant(body, f"folded_bias_{folded}", bias)]
            convolution.args = tuple(arguments)
        result.replace_all_uses_with(convolution)
        body.graph.erase_node(result)
        body.graph.erase_node(norm)
        folded += 1
    if folded:
        body.graph.eliminate_dead_code()
        body.delete_all_unused_submodules()
        body.recompile()
    return folded


def _convolution_before(norm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The convolution that a norm reads and the norm's one result, if the two can be one."""
    convolution, *parameters = norm.args[:5]
    if not isinstance(convolution, fx.Node) or convolution.target not in _CONVOLUTIONS:
        return None
    constants = [*convolution.args[1:3], *parameters]
    if not all(
        value is None or (isinstance(value, fx.Node) and value.op == "get_attr") for value in constants
    ):
        return None
    users = list(norm.users)
    if set(convolution.users) != {norm} or len(users) != 1:
        return None
    (result,) = users
    if result.target is not operator.getitem or result.args[1] != 0 or convolution.kwargs:
        return None
    return convolution, result


def _folded(body: fx.GraphModule, convolution: fx.Node, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias of both together."""

    def tensor(node: Any, default: float) -> torch.Tensor:
        if node is None:
            return weight.new_full((len(weight),), default)
        value: torch.Tensor = operator.attrgetter(node.target)(body)
        return value.detach().to(torch.float64)

    arguments: tuple[Any, ...] = convolution.args
    original: torch.Tensor = operator.attrgetter(arguments[1].target)(body)
    weight = original.detach().to(torch.float64)
    given = arguments[2] if len(arguments) > 2 else None
    scale, shift, mean, variance = (norm.args[i] for i in range(1, 5))
    epsilon: Any = norm.args[6]
    factor = tensor(scale, 1.0) * (tensor(variance, 1.0) + epsilon).rsqrt()
    bias = (tensor(given, 0.0) - tensor(mean, 0.0)) * factor + tensor(shift, 0.0)
    shaped = factor.reshape(-1, *[1] * (weight.ndim - 1))
    return (weight * shaped).to(original.dtype), bias.to(original.dtype)


def _constant(body: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    body.register_buffer(name, value)
    return body.graph.get_attr(name)
