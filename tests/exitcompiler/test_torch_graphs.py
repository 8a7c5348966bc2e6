"""Bodies written as JSON and safetensors come back bit-equal, and forged files are refused."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from models import ZOO
from programs import aten, build_body, programs, rows
from torch import fx, nn

from exitcompiler.capture import capture
from exitcompiler.controlflow import ValueSpec
from exitcompiler.errors import ArtifactError, LoweringError
from exitcompiler.program import Program
from exitcompiler.runtime.torch_graphs import load_body, resolve_operator
from exitcompiler.torch_graphs import serialize_body

ROW = torch.tensor([[1.0, -2.0, 3.0]])
ROW_SPEC = ValueSpec(("batch", 3), "float32")


def body_of(*nodes: tuple[str, Callable[..., Any], tuple[Any, ...]], result: str = "y") -> fx.GraphModule:
    """A body of one param ``x`` from (name, operator, arguments), without running anything."""
    graph = fx.Graph()
    values = {"x": graph.placeholder("x")}
    for name, target, arguments in nodes:
        args = tuple(values.get(a, a) if isinstance(a, str) else a for a in arguments)
        values[name] = graph.create_node("call_function", target, args, name=name)
    graph.output((values[result],))
    return fx.GraphModule(nn.Module(), graph)


def document(body: fx.GraphModule) -> tuple[dict[str, Any], bytes]:
    graph, weights = serialize_body(body)
    return json.loads(graph), weights


def load_document(content: dict[str, Any], weights: bytes) -> Any:
    return load_body(json.dumps(content).encode(), weights)


def linear_body() -> fx.GraphModule:
    return build_body(
        {"x": ROW_SPEC},
        [("y", aten.linear.default, ("x", "weight", "bias"))],
        ["y"],
        {"weight": torch.arange(9.0).reshape(3, 3) / 7, "bias": torch.tensor([0.1, -0.2, 0.3])},
    )


@pytest.mark.parametrize("name", ["windows", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_model_comes_back_bit_equal(name: str) -> None:
    entry = ZOO[name]
    body = capture(entry.build(0), entry.inputs(3, 0), logits=entry.logits).program.entry.body
    restored = load_body(*serialize_body(body))
    for count in (1, 3):
        inputs = list(entry.inputs(count, 1).values())
        with torch.no_grad():
            expected, found = body(*inputs), restored(inputs)
        assert len(expected) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@given(programs())
def test_bodies_of_any_program_come_back_bit_equal(program: Program) -> None:
    entry = program.entry
    inputs = list(rows(3, program).values())
    expected, found = entry.body(*inputs), load_body(*serialize_body(entry.body))(inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_same_body_gives_the_same_bytes() -> None:
    assert serialize_body(linear_body()) == serialize_body(linear_body())


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.clamp.default, ("x", -math.inf, 2.5)),
        (aten.to.dtype, ("x", torch.float64)),
        (aten.full_like.default, ("x", math.nan)),
        (aten.sum.dim_IntList, ("x", [1], True)),
        (aten.cat.default, (["x", "x"], 1)),
        (aten.clone.default, ("x",)),
    ],
)
def test_arguments_of_every_kind_come_back(target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(
        (graph.call_function(target, fx.node.map_aggregate(arguments, lambda a: x if a == "x" else a)),)
    )
    body = fx.GraphModule(nn.Module(), graph)
    (expected,) = body(ROW)
    (found,) = load_body(*serialize_body(body))([ROW])
    assert found.dtype == expected.dtype
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_keyword_arguments_move_to_the_device_of_execution() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    options: dict[str, Any] = {"dtype": torch.float32, "layout": torch.strided, "device": torch.device("cpu")}
    made = graph.call_function(aten.full.default, ([1, 3], 2.0), options)
    kept = graph.call_function(aten.clone.default, (made,), {"memory_format": torch.contiguous_format})
    graph.output((graph.call_function(aten.add.Tensor, (x, kept)),))
    content, weights = document(fx.GraphModule(nn.Module(), graph))
    assert content["nodes"][0]["kwargs"]["device"] == {"device": "execution"}
    (found,) = load_document(content, weights)([ROW])
    assert torch.equal(found, ROW + 2)


def test_sizes_are_computed_from_the_batch() -> None:
    body = body_of(
        ("n", aten.sym_size.int, ("x", 0)),
        ("twice", operator.mul, ("n", 2)),
        ("again", torch.sym_max, ("twice", 1)),
        ("y", aten.sum.default, ("x",)),
        ("z", aten.mul.Tensor, ("y", "again")),
        result="z",
    )
    (found,) = load_body(*serialize_body(body))([torch.ones(3, 2)])
    assert float(found) == 36.0


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (("y", aten.relu_.default, ("x",)), "'y'.*aten.relu_.default is in-place"),
        (("y", print, ("x",)), "'y'.*print.* is not on the list"),
        (("y", torch.relu, ("x",)), "'y'.*is not on the list"),
        (("y", torch.ops.higher_order.cond, ("x",)), "'y'.*higher-order"),
        (("y", aten.clamp.default, ("x", 1j)), "'y'.*type complex"),
    ],
)
def test_what_has_no_word_is_refused_by_name(node: tuple[str, Any, tuple[Any, ...]], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        serialize_body(body_of(node))


def test_an_inner_graph_is_refused_by_name() -> None:
    graph = fx.Graph()
    inner = graph.get_attr("inner")
    graph.output((inner,))
    with pytest.raises(LoweringError, match=r"'inner'.*higher-order"):
        serialize_body(fx.GraphModule({"inner": nn.Identity()}, graph))


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "aten.relu_.default", "aten.add_.Tensor", "aten.from_file.default", "aten.relu.nope"),
        *("aten.__class__.default", "aten.nope.default", "builtins.eval", "operator.attrgetter", "aten.relu"),
        *("torch.load", "prim.Print.default", "aten.relu.__call__", "aten.add.out"),
    ],
)
def test_targets_off_the_list_are_refused(name: str) -> None:
    assert resolve_operator(name) is None
    content, weights = document(linear_body())
    content["nodes"][-1]["target"] = name
    with pytest.raises(ArtifactError, match="is not an operator that a graph may call"):
        load_document(content, weights)


def _edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        *steps, last = (int(step) if step.isdigit() else step for step in path.split("/"))
        place: Any = content
        for step in steps:
            place = place[step]
        place[last] = value

    return edit


def _nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit("version", 2), "not a exitcompiler-torch-graph of version 1"),
        (_edit("extra", 1), "unknown keys"),
        (_edit("params", "x"), "expected an array"),
        (_edit("params/0", "x; import os"), "cannot name a value"),
        (_edit("params/0", "lambda"), "cannot name a value"),
        (_edit("nodes", {}), "expected an array of at most"),
        (_edit("nodes/2/name", "x"), "is taken"),
        (_edit("nodes/2/name", "a.b"), "cannot name a value"),
        (_edit("nodes/0/tensor", "other"), "expected one of"),
        (_edit("nodes/2/args/0", {"node": "later"}), "no value is called 'later'"),
        (_edit("nodes/2/args/0", {"pickle": "gASV"}), "'pickle' is no kind of argument"),
        (_edit("nodes/2/args/0", {"node": "x", "tuple": []}), "not an argument"),
        (_edit("nodes/2/args/0", 1.5), "not an argument"),
        (_edit("nodes/2/args/0", 2**63), "is not in"),
        (_edit("nodes/2/args/0", _nest(20)), "nested deeper than"),
        (_edit("nodes/2/args/0", {"float": "1.0.0"}), "is not a number"),
        (_edit("nodes/2/args/0", {"dtype": "load"}), "expected one of"),
        (_edit("nodes/2/args/0", {"layout": "load"}), "expected one of"),
        (_edit("nodes/2/args/0", {"device": "cuda"}), "expected one of"),
        (_edit("nodes/2/kwargs", {"a b": 1}), "keywords have to be identifiers"),
        (_edit("results/0", "nope"), "no value is called 'nope'"),
        (_edit("tensors/tensor_0/shape", [9]), "the weights hold torch.float32"),
        (_edit("tensors/tensor_0/dtype", "int8"), "the weights hold torch.float32"),
        (_edit("tensors/tensor_9", {"shape": [], "dtype": "int8"}), "the weights hold other tensors"),
    ],
)
def test_a_forged_document_is_refused(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    content, weights = document(linear_body())
    load_document(content, weights)
    edit(content)
    with pytest.raises(ArtifactError, match=message):
        load_document(content, weights)


@pytest.mark.parametrize(
    "graph", [b"", b"[", b'{"a": NaN}', b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"[]"]
)
def test_text_that_is_no_document_is_refused(graph: bytes) -> None:
    with pytest.raises(ArtifactError):
        load_body(graph, b"")


def test_weights_that_are_no_safetensors_are_refused() -> None:
    graph, weights = serialize_body(linear_body())
    for damaged in (b"", weights[:-1], b"x" * 100):
        with pytest.raises(ArtifactError, match="not a safetensors file"):
            load_body(graph, damaged)


def test_weights_may_not_shadow_attributes_of_modules() -> None:
    content, weights = document(linear_body())
    content["tensors"]["forward"] = content["tensors"].pop("tensor_0")
    content["nodes"][0]["tensor"] = "forward"
    tensors = safetensors.torch.load(weights)
    tensors["forward"] = tensors.pop("tensor_0")
    with pytest.raises(ArtifactError, match="'forward' cannot name a tensor"):
        load_document(content, safetensors.torch.save(tensors))
