"""One body in int8: where values are quantised and weights stored as integers, said in the graph itself.

A value that is quantised is followed by a pair: to ``uint8``, and back to float32 for whoever reads it. A
weight is an ``int8`` constant, and back. That is the form (QDQ) that engines know how to fuse into integer
kernels, that torch runs as it stands, and that can be cut anywhere: what crosses is the ``uint8``.

    real = (integer - zero_point) * scale        (Jacob et al. 2018, section 2.1, equation 1)
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from exitcompiler.fx_utils import BodyBuilder, extract_body, find_attribute, result_nodes
from exitcompiler.runtime.batch_norm_folding import fold_batch_norms

__all__ = [
    "DEQUANTIZE",
    "PRODUCTS",
    "BodyScales",
    "Scale",
    "fold_norms",
    "has_constant_weight",
    "is_quantized",
    "quantize_body",
]

_OPS: Final = torch.ops.quantized_decomposed
_QUANTIZE: Final = _OPS.quantize_per_tensor.default
DEQUANTIZE: Final = _OPS.dequantize_per_tensor.default
_DEQUANTIZE_CHANNELS: Final = _OPS.dequantize_per_channel.default

_NORM: Final = torch.ops.aten._native_batch_norm_legit_no_training.default

_LARGEST: Final = 127
_LARGEST_BIAS: Final = 2**31 - 1

PRODUCTS: Final = frozenset({
    torch.ops.aten.conv1d.default, torch.ops.aten.conv1d.padding,
    torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv3d.default, torch.ops.aten.conv3d.padding,
    torch.ops.aten.linear.default,
})  # fmt: skip
"""Products whose second argument is a weight ``[channels of the result, ...]``, and whose third a bias."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How a value is quantised to ``uint8``.

    Args:
        scale: What one step is worth; positive.
        zero_point: The integer that means 0.0, 0 to 255.
    """

    scale: float
    zero_point: int


@dataclass(frozen=True)
class BodyScales:
    """What is quantised in one body.

    Args:
        values: Name of a node -> how its value is quantised, for all who read it.
        products: Names of the convolutions and linear layers whose weights are integers.
    """

    values: Mapping[str, Scale] = field(default_factory=dict)
    products: frozenset[str] = frozenset()


def has_constant_weight(node: fx.Node) -> bool:
    """Whether a node is a product with a constant weight."""
    return node.target in PRODUCTS and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"


def is_quantized(body: fx.GraphModule) -> bool:
    """Whether anything in a body is computed on integers of 8 bits."""
    return bool(body.graph.find_nodes(op="call_function", target=_QUANTIZE))


def fold_norms(body: fx.GraphModule) -> fx.GraphModule:
    """A copy with batch norms folded into the convolutions before them.

    What is quantised is what an engine computes, and it folds them. A convolution is then called as the value
    of its norm was, whether or not that is a result.
    """
    names = {
        node.args[0].args[0].name: node.name
        for node in body.graph.find_nodes(op="call_function", target=operator.getitem)
        if node.args[0].target is _NORM and node.args[1] == 0
    }
    params = [node.name for node in body.graph.find_nodes(op="placeholder")]
    # A copy that shares no submodule: folding takes out what it has made superfluous.
    folded = extract_body(body, params, [node.name for node in result_nodes(body)])
    fold_batch_norms(folded)
    left = {node.name for node in folded.graph.nodes}
    builder = BodyBuilder()
    copies: dict[fx.Node, fx.Node] = {}
    for node in folded.graph.nodes:
        if node.op == "placeholder":
            copies[node] = builder.placeholder(node.name, node)
        elif node.op != "output":
            name = names.get(node.name, node.name)
            copies[node] = builder.copy(node, copies, folded, name=node.name if name in left else name)
    return builder.finish([copies[node] for node in result_nodes(folded)])


def quantize_body(body: fx.GraphModule, scales: BodyScales, stored: Collection[str]) -> fx.GraphModule:
    """The body with these values quantised, and the weights of these products integers.

    ::

        (h: float32): c = conv(h, w, b); r = relu(c)              h and r are stored
        =>  (h: uint8): h_float32 = dequantize(h)
                        c = conv(h_float32, dequantize(w_int8), dequantize(b_int32))
                        r_float32 = relu(c); r = quantize(r_float32)

    A bias is an integer in steps of the product of its input's scale and its weight's, so that a kernel can
    add it to what it has summed up (Jacob et al. 2018, section 2.4). Params and results keep their names.

    Args:
        body: With batch norms folded; left as it is.
        scales: What is quantised.
        stored: Params and results that come in or go out as ``uint8``; each has a scale.
    """
    return _Quantizer(body, scales, frozenset(stored)).run()


class _Quantizer:
    """Copies a body node by node, with pairs between."""

    def __init__(self, body: fx.GraphModule, scales: BodyScales, stored: frozenset[str]) -> None:
        self._body = body
        self._scales = scales
        self._stored = stored
        self._builder = BodyBuilder(reserved=[node.name for node in body.graph.nodes])
        self._copies: dict[fx.Node, fx.Node] = {}  # as they were: float32
        self._integers: dict[fx.Node, fx.Node] = {}
        self._read: dict[fx.Node, fx.Node] = {}  # what those who read a quantised value get

    def run(self) -> fx.GraphModule:
        """The new body."""
        for node in self._body.graph.nodes:
            if node.op == "placeholder":
                self._add_param(node)
            elif node.op == "call_function":
                self._copies[node] = self._add(node)
        results = result_nodes(self._body)
        handed_out = [
            self._integer(node) if node.name in self._stored else self._value(node) for node in results
        ]
        for node, copied in zip(results, handed_out, strict=True):
            self._builder.hand_over_name(copied, node.name, f"{node.name}_float32")
        return self._builder.finish(handed_out)

    def _add_param(self, node: fx.Node) -> None:
        copied = self._builder.placeholder(node.name, node)
        if node.name in self._stored:
            copied.meta["val"] = node.meta["val"].to(torch.uint8)
            copied.meta.pop("tensor_meta", None)
            self._integers[node] = copied
        else:
            self._copies[node] = copied

    def _add(self, node: fx.Node) -> fx.Node:
        values = {}
        for position, argument in enumerate(node.all_input_nodes):
            of_product = node.name in self._scales.products and position
            values[argument] = self._parameter(node, argument) if of_product else self._value(argument)
        return self._builder.copy(node, values, self._body, name=node.name)

    def _value(self, node: fx.Node) -> fx.Node:
        """What somebody reads who asks for a float; weights are copied when they are."""
        if node.op == "get_attr" and node not in self._copies:
            self._copies[node] = self._builder.copy(node, {}, self._body, name=node.name)
        if node.name not in self._scales.values:
            return self._copies[node]
        if node not in self._read:
            self._read[node] = self._call(DEQUANTIZE, self._integer(node), node, "dequantized")
        return self._read[node]

    def _integer(self, node: fx.Node) -> fx.Node:
        """A quantised value."""
        if node not in self._integers:
            self._integers[node] = self._call(_QUANTIZE, self._copies[node], node, "uint8")
        return self._integers[node]

    def _call(self, target: Any, argument: fx.Node, node: fx.Node, suffix: str) -> fx.Node:
        how = self._scales.values[node.name]
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            value = value.to(torch.uint8 if target is _QUANTIZE else torch.float32)
        arguments = (argument, how.scale, how.zero_point, 0, 255, torch.uint8)
        return self._builder.call(target, arguments, f"{node.name}_{suffix}", value)

    def _tensor(self, node: fx.Node) -> torch.Tensor:
        value: torch.Tensor = find_attribute(self._body, str(node.target))
        return value.detach().to(torch.float64)

    def _parameter(self, product: fx.Node, node: fx.Node) -> fx.Node:
        """A weight or a bias as integers, and back; one that two products share is quantised for each."""
        weight_node = product.args[1]
        assert isinstance(weight_node, fx.Node)
        source = product.args[0]
        assert isinstance(source, fx.Node)
        weight = self._tensor(weight_node)
        bias = product.args[2] if len(product.args) > 2 else None
        source_step = self._scales.values[source.name].scale
        steps = _weight_steps(weight, self._tensor(bias) if isinstance(bias, fx.Node) else None, source_step)
        axis, value, bits, largest = 0, weight, torch.int8, _LARGEST
        if node is not weight_node:
            value, steps = self._tensor(node), steps * source_step
            bits, largest = torch.int32, _LARGEST_BIAS
        shaped = steps.reshape(-1, *[1] * (value.ndim - 1))
        integers = (value / shaped).round().clamp(-largest, largest).to(bits)
        name = f"{product.name}_{'weight' if node is weight_node else 'bias'}"
        parts = [
            self._builder.constant(f"{name}_{what}", tensor, f"{name}_{what}", tensor)
            for what, tensor in (
                (str(bits).removeprefix("torch."), integers),
                ("scale", steps.to(torch.float32)),
                ("zero_point", torch.zeros(len(steps), dtype=torch.int64)),
            )
        ]
        lowest = -largest - 1
        arguments = (*parts, axis, lowest, largest, bits)
        val = torch.empty(value.shape, device="meta")
        return self._builder.call(_DEQUANTIZE_CHANNELS, arguments, name, val)


def _weight_steps(weight: torch.Tensor, bias: torch.Tensor | None, source_step: float) -> torch.Tensor:
    """What one step is worth in each channel of a weight, ``float64 [channels]``; zero stays zero.

    Args:
        weight: ``[channels, ...]``.
        bias: ``[channels]``, which has to fit 32 bits in steps of the product, with room for what is
            summed up.
        source_step: What a step of the product's input is worth.
    """
    steps = weight.abs().amax(dim=list(range(1, weight.ndim))) / _LARGEST
    if bias is not None:
        steps = torch.maximum(steps, bias.abs() / (source_step * _LARGEST_BIAS / 2))
    # A channel of zeros: any step will do, but one whose product with a scale does not underflow.
    return steps.clamp(min=torch.finfo(torch.float32).eps).to(torch.float32).to(torch.float64)
