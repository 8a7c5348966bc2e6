"""Makes a lowered block really slower without changing what it answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from exitcompiler.errors import LoweringError

__all__ = ["with_extra_work"]

_PREFIX = "extra_work/"
_DEPTH = 64


def with_extra_work(model: bytes, columns: int, seed: int = 0) -> bytes:
    """A model that also multiplies its largest input or output with a matrix, and gives the same answers.

        x -> reshape [batch, n / d, d] -> matmul [d, columns] -> max per row -> floor(sigmoid / 2)
        x + that, which is 0 -> what read x before

    No optimiser sees that the sum is always x, so that none drops the product.

    Args:
        model: ONNX.
        columns: Of the matrix: time grows linearly with it.
        seed: Of the matrix.

    Raises:
        LoweringError: No floating-point rows go in or out.
    """
    proto = onnx.ModelProto()
    proto.ParseFromString(model)
    graph = proto.graph
    sizes = {value.name: _row_size(value) for value in (*graph.input, *graph.output)}
    name = max(sizes, key=lambda key: sizes[key])
    if not sizes[name]:
        raise LoweringError("no float32 rows go in or out", where=f"a block with {sorted(sizes)}")
    comes_in = name in {value.name for value in graph.input}
    before = name if comes_in else f"{_PREFIX}before"
    after = f"{_PREFIX}after" if comes_in else name
    place = 0
    for index, node in enumerate(graph.node):
        if comes_in:
            node.input[:] = [after if read == name else read for read in node.input]
        elif name in node.output:
            node.output[:] = [before if made == name else made for made in node.output]
            place = index + 1
    rank = next(len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.output) if v.name == name)
    nodes = list(graph.node)
    nodes[place:place] = _extra_nodes(graph, before, after, sizes[name], rank, columns, seed)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _row_size(value: onnx.ValueInfoProto) -> int:
    """How many numbers a row has; 0 for what is not rows of float32."""
    dims = value.type.tensor_type.shape.dim
    if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT or not dims or not dims[0].dim_param:
        return 0
    return math.prod(dim.dim_value for dim in dims[1:])


def _extra_nodes(
    graph: onnx.GraphProto, before: str, after: str, size: int, rank: int, columns: int, seed: int
) -> list[onnx.NodeProto]:
    """The nodes that lead from a value to the sum; adds their constants to the graph."""
    depth = max(divisor for divisor in range(1, _DEPTH + 1) if size % divisor == 0)
    constants: dict[str, npt.NDArray[Any]] = {
        "matrix": np.random.default_rng(seed).standard_normal((depth, columns)).astype(np.float32),
        "as_matrix": np.array([-1, size // depth, depth], np.int64),
        "as_rows": np.array([-1] + [1] * (rank - 1), np.int64),
        "axes": np.array([1, 2], np.int64),
        "half": np.array(0.5, np.float32),
    }
    names = {key: f"{_PREFIX}{key}" for key in constants}
    graph.initializer.extend(numpy_helper.from_array(value, names[key]) for key, value in constants.items())
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        label = f"{_PREFIX}{kind.lower()}.{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [output or label], label, **attributes))
        return output or label

    product = add("MatMul", add("Reshape", before, names["as_matrix"]), names["matrix"])
    highest = add("ReduceMax", product, names["axes"], keepdims=0)
    zero = add("Floor", add("Mul", add("Sigmoid", highest), names["half"]))
    add("Add", before, add("Reshape", zero, names["as_rows"]), output=after)
    return nodes
