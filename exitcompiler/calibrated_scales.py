"""Calibrates quantisation: which values of a network are quantised, and how, by ONNX Runtime's quantiser.

The network and its heads are lowered once, as one graph in which every value keeps its name, and given to
``onnxruntime.quantization`` with calibration rows. What it decides is read back by name. So both sides of
any cut agree, and what is quantised where is left to a quantiser that is kept up for the engines.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx

from exitcompiler.data import Rows
from exitcompiler.errors import BackendUnavailableError, LoweringError
from exitcompiler.fx_utils import node_spec, result_nodes
from exitcompiler.onnx_utils import PRODUCTS, GraphIndex
from exitcompiler.passes.lower_to_onnx import lower_blocks
from exitcompiler.program import Block, Return
from exitcompiler.quantized_body import BodyScales, Scale, has_constant_weight

__all__ = ["NEXT_BEST", "calibrate"]

logger = logging.getLogger(__name__)

BATCH_SIZE: Final = 64

_QUANTIZED: Final = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "LeakyRelu",
    "MatMul", "MaxPool", "Mul", "Relu", "Reshape", "Resize", "Sigmoid", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
"""Operators of the quantiser's that run on integers, or only move them. Softmax and normalisation are not
among them: what they make is too fine for 255 steps."""

NEXT_BEST: Final = (
    "the next best is precision='bf16' with backend='openvino' where the CPU has it, then 'fp32'"
)


def calibrate(block: Block, rows: Rows, *, kept_float: Collection[str] = ()) -> BodyScales:
    """How the values of a network are quantised: min and max on calibration rows, weights per channel.

    Of what the quantiser finds, only what serves a product with an integer weight is taken over: other pairs
    would cost accuracy, and bring nothing.

    Args:
        block: The whole network and its heads, with batch norms folded; its results are their logits, and
            these, with the products that make them, stay float32: a confidence of 0.998 cannot be told in
            255 steps. So do products of two activations.
        rows: Calibration rows.
        kept_float: Names of further products that stay float32.

    Raises:
        LoweringError: The network cannot be lowered, the quantiser does not take it, or it has no product
            that could be quantised.
        BackendUnavailableError: The quantiser is not installed.
    """
    model = _with_all_names(block)
    index = GraphIndex.of(model)
    excluded = _last_products(index, [*(value.name for value in model.graph.output), *kept_float])
    excluded |= {
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS and node.input[1] not in index.initializers
    }
    readers = _Readers(rows, [value.name for value in model.graph.input])
    quantized = _quantize(model, readers, sorted(excluded))
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    nodes = {node.name: node for node in block.body.graph.nodes}
    values = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in nodes:
            values[node.input[0]] = Scale(float(weights[node.input[1]]), int(weights[node.input[2]]))
    products = frozenset(
        name
        for name, node in nodes.items()
        if has_constant_weight(node)
        and node.args[0].name in values
        and _has_integer_weight(name, index, weights)
    )
    if not products:
        raise LoweringError(
            "the network has no convolution or linear layer, besides the last, that could be quantised",
            where="precision 'int8'",
            remedy=NEXT_BEST,
        )
    useful = _useful(block.body, values, products, index)
    logger.info("int8: %d values, %d products", len(useful), len(products))
    return BodyScales({name: values[name] for name in useful}, products)


def _useful(
    body: fx.GraphModule, values: Collection[str], products: Collection[str], index: GraphIndex
) -> set[str]:
    """The values whose quantisation lets a product, or what lies between products, run on integers.

    A value counts if it goes into an integer product, or into an operator that runs on integers and whose own
    result counts. It counts as well if it comes out of a convolution, which is one kernel with the step to
    integers behind it; or of an operator that runs on integers, all of whose inputs count.
    """

    def between(node: fx.Node) -> bool:
        made_by = index.producers.get(node.name)
        return made_by is not None and made_by.op_type in _QUANTIZED and made_by.op_type not in PRODUCTS

    def is_convolution(node: fx.Node) -> bool:
        return node.name in products and node.target is not torch.ops.aten.linear.default

    useful: set[str] = set()
    for node in reversed(body.graph.nodes):
        for user in node.users:
            into_product = user.name in products and user.args[0] is node
            if node.name in values and (into_product or (user.name in useful and between(user))):
                useful.add(node.name)
    for node in body.graph.nodes:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        # An activation behind a convolution has no pair of its own in between.
        inside = (
            between(node) and bool(sources) and all(s.name in useful or is_convolution(s) for s in sources)
        )
        if node.name in values and (is_convolution(node) or inside):
            useful.add(node.name)
    return useful


def _with_all_names(block: Block) -> onnx.ModelProto:
    """The ONNX model of a block in which all values that have rows are called as in the body."""
    body = block.body
    nodes = [n for n in body.graph.nodes if n.op == "call_function" and node_spec(n) is not None]
    nodes = list(dict.fromkeys([*result_nodes(body), *nodes]))
    specs = {node.name: spec for node in nodes if (spec := node_spec(node)) is not None}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(body.graph, copies)
    graph.output(tuple(copies[node] for node in nodes))
    for old, new in copies.items():
        new.name = old.name
    everything = Block(
        block.name, block.params, specs, Return(tuple(specs), "all"), fx.GraphModule(body, graph)
    )
    model = onnx.load_from_string(lower_blocks([everything])[block.name])
    outputs = [value for value in model.graph.output if value.name in block.results]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def _last_products(index: GraphIndex, outputs: Collection[str]) -> set[str]:
    """Names of the nodes from the last products on: what the logits are made of."""
    found: set[str] = set()
    todo = list(outputs)
    while todo:
        node = index.producers.get(todo.pop())
        if node is None or node.name in found:
            continue
        found.add(node.name)
        if node.op_type not in PRODUCTS:
            todo.extend(node.input)
    return found


def _has_integer_weight(name: str, index: GraphIndex, weights: Mapping[str, Any]) -> bool:
    """Whether the product that makes a value was given an integer weight."""
    node = index.producers.get(name)
    while node is not None and node.op_type not in PRODUCTS:  # the addition of a bias
        node = next((index.producers[value] for value in node.input if value in index.producers), None)
    return node is not None and f"{node.input[1]}_quantized" in weights


class _Readers:
    """Calibration rows as the quantiser asks for them."""

    def __init__(self, rows: Rows, names: Collection[str]) -> None:
        self._batches: Iterator[dict[str, Any]] = (
            {name: np.ascontiguousarray(inputs[name].numpy()) for name in names}
            for inputs, _ in rows.batches(BATCH_SIZE)
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None: there are no more."""
        return next(self._batches, None)


def _quantize(model: onnx.ModelProto, readers: _Readers, excluded: list[str]) -> onnx.ModelProto:
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata
    except ImportError as error:
        raise BackendUnavailableError(
            f"int8 needs ONNX Runtime's quantiser, whatever backend runs: {error}",
            where="precision 'int8'",
            remedy="pip install onnxruntime",
        ) from error
    add_pre_process_metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        try:
            quantize_static(
                str(source),
                str(target),
                readers,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTIZED),
                nodes_to_exclude=excluded,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # the quantiser raises anything
            raise LoweringError(
                f"ONNX Runtime's quantiser does not take the network: {error}",
                where="precision 'int8'",
                remedy=NEXT_BEST,
            ) from error
        return onnx.load(target)
