"""Small things about ONNX graphs that lowering and assembling have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exitcompiler.controlflow import ValueSpec
from exitcompiler.errors import LoweringError

__all__ = [
    "IR_VERSION",
    "MODEL_BYTES",
    "PRODUCTS",
    "GraphIndex",
    "element_type",
    "keep_constants",
    "make_model",
    "renamed_node",
    "require_model_size",
    "round_weights",
    "value_info",
]

IR_VERSION: Final = 10
"""The ONNX IR version that belongs to opset 20."""

MODEL_BYTES: Final = (1 << 31) - (1 << 24)
"""Weights of one model have to stay below this: protobuf knows no message of 2 GiB or more."""

_OPSET: Final = 20
PRODUCTS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ELEMENT_TYPES: Final = {"float32": "FLOAT", "float64": "DOUBLE"}  # others are spelled alike


def element_type(spec: ValueSpec) -> int:
    """The ``onnx.TensorProto`` data type of a value."""
    element: int = onnx.TensorProto.DataType.Value(_ELEMENT_TYPES.get(spec.dtype, spec.dtype.upper()))
    return element


def value_info(name: str, spec: ValueSpec) -> onnx.ValueInfoProto:
    """The declaration of an input or output."""
    return helper.make_tensor_value_info(name, element_type(spec), spec.shape)


def make_model(graph: onnx.GraphProto, opsets: dict[str, int]) -> onnx.ModelProto:
    """A model around ``graph``, without anything that varies between two runs.

    Args:
        graph: The graph.
        opsets: Domain -> operator set version; empty: the graph has none but the plainest operators.
    """
    versions = opsets or {"": _OPSET}
    imports = [helper.make_opsetid(domain, version) for domain, version in sorted(versions.items())]
    return helper.make_model(
        graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="exitcompiler"
    )


def require_model_size(size_bytes: int, where: str) -> None:
    """Check that weights fit one model.

    Raises:
        LoweringError: They do not.
    """
    if size_bytes >= MODEL_BYTES:
        raise LoweringError(
            f"weights of {size_bytes / 1e9:.1f} GB do not fit an ONNX model, which holds less than 2.1",
            where=where,
            remedy="choose a smaller variant of the network: larger ones are not supported",
        )


def keep_constants(model: Any) -> None:
    """Make initialisers of constants that are used but belong to nobody.

    onnxscript 0.7 forgets some: where it joins two clips it names the bounds after the value clipped, and two
    such pairs on one value push each other out.

    Args:
        model: An ``onnx_ir.Model``.
    """
    graph = model.graph
    for node in list(graph.all_nodes()):
        for value in node.inputs:
            stray = value is not None and value.producer() is None and value.const_value is not None
            if stray and graph.initializers.get(value.name) is not value and not value.is_graph_input():
                value.name = f"{value.name}.kept.{len(graph.initializers)}"
                graph.initializers[value.name] = value


@dataclass(frozen=True)
class GraphIndex:
    """A model's nodes and initialisers by the name of the value."""

    producers: dict[str, onnx.NodeProto]
    initializers: dict[str, onnx.TensorProto]
    opsets: dict[str, int]

    @staticmethod
    def of(model: onnx.ModelProto) -> GraphIndex:
        """Index ``model``."""
        return GraphIndex(
            {value: node for node in model.graph.node for value in node.output if value},
            {tensor.name: tensor for tensor in model.graph.initializer},
            {opset.domain: opset.version for opset in model.opset_import},
        )

    def reachable(self, outputs: Sequence[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        """What ``outputs`` need: nodes, operands first, and names of initialisers in order of use.

        The order is that of a depth-first walk, so that it does not depend on the rest of the graph.
        """
        nodes: list[onnx.NodeProto] = []
        initializers: dict[str, None] = {}
        opened: set[str] = set()
        stack = [(value, False) for value in reversed(outputs)]
        while stack:
            value, operands_done = stack.pop()
            node = self.producers.get(value)
            if node is None:
                if value in self.initializers:
                    initializers[value] = None
            elif operands_done:
                nodes.append(node)
            elif (key := next(filter(None, node.output))) not in opened:
                opened.add(key)
                stack.append((value, True))
                stack.extend((operand, False) for operand in reversed(list(_reads(node))))
        return nodes, list(initializers)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads; those that its subgraphs define or capture are among them."""
    yield from (name for name in node.input if name)
    for graph in _subgraphs(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (output.name for output in graph.output)


def renamed_node(old: onnx.NodeProto, rename: Callable[[str, str], str]) -> onnx.NodeProto:
    """A copy under other names, its subgraphs included, without notes on where it came from.

    Args:
        old: Left as it is.
        rename: From a value's name, and what makes the value ("conv", "constant", "input"), to its new
            name. Called for every definition before any use.
    """
    new = onnx.NodeProto()
    new.CopyFrom(old)
    _strip(new, "doc_string", "metadata_props", "input", "output")
    kind = old.op_type.lower()
    new.input.extend(rename(name, kind) if name else "" for name in old.input)
    new.output.extend(rename(name, kind) if name else "" for name in old.output)
    new.name = next(filter(None, new.output), kind)
    for attribute in new.attribute:
        _strip(attribute, "doc_string")
    for graph in _subgraphs(new):
        _rename_graph(graph, rename)
        graph.name = new.name
    return new


def _rename_graph(graph: onnx.GraphProto, rename: Callable[[str, str], str]) -> None:
    _strip(graph, "doc_string", "metadata_props", "value_info")
    for tensor in graph.initializer:
        tensor.name = rename(tensor.name, "constant")
    for value in graph.input:
        value.name = rename(value.name, "input")
    nodes = [renamed_node(node, rename) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.output:
        value.name = rename(value.name, "output")


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _strip(message: onnx.NodeProto | onnx.AttributeProto | onnx.GraphProto, *fields: str) -> None:
    for field in fields:
        message.ClearField(field)


def round_weights(model: onnx.ModelProto) -> None:
    """Round weights to bfloat16 where that is what they are multiplied with.

    Folding a batch normalisation into the weights before it, the exporter makes them float32, which is a
    type that no operator takes next to bfloat16.

    Args:
        model: Changed in place.
    """
    bfloat16, float32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    if all(tensor.data_type != bfloat16 for tensor in weights.values()):
        return
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    for node in model.graph.node:
        if node.op_type in PRODUCTS and types.get(node.input[0]) == bfloat16:
            for name in node.input[1:]:
                if name in weights and weights[name].data_type == float32:
                    _round(weights[name])


def _round(tensor: onnx.TensorProto) -> None:
    """To the nearest bfloat16, of two to the even one."""
    bits = np.ascontiguousarray(numpy_helper.to_array(tensor)).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    name, dims = tensor.name, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, onnx.TensorProto.BFLOAT16
    tensor.dims.extend(dims)
    tensor.raw_data = rounded.astype("<u2").tobytes()
