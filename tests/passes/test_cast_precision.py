"""cast-precision: what is rounded, what is not, and that answers stay close."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from device_programs import images, network_with_exits
from hypothesis import given
from hypothesis import strategies as st
from models import ZOO, captured
from programs import aten, build_body, diamond, exit_chain, programs, row_block, row_program, rows
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812
from trained import SmallResNet

from exitcompiler.body_precision import Kind, infer_kinds
from exitcompiler.capture import capture
from exitcompiler.committee import HeadMaker
from exitcompiler.controlflow import Return, ValueSpec, engine_signature
from exitcompiler.errors import PassError
from exitcompiler.heads import LinearHead, lower_head
from exitcompiler.interpreter import interpret
from exitcompiler.onnx_utils import round_weights
from exitcompiler.passes.cast_precision import PRECISIONS, CastPrecision, cast_head, cast_precision
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.lower_to_onnx import BFLOAT16_OPSET, lower_blocks
from exitcompiler.passes.pipeline import Pipeline
from exitcompiler.passes.split_block import split_block
from exitcompiler.program import Block, Program
from exitcompiler.verify import verify

LOW = tuple(PRECISIONS)
CLOSE = {"fp16": 4e-3, "bf16": 3e-2}
"""Of the largest value: some ten times what one value is rounded by."""


def dtypes(program: Program) -> dict[str, str]:
    return {name: spec.dtype for block in program.blocks for name, spec in block.values.items()}


def node_dtypes(program: Program) -> dict[str, torch.dtype]:
    return {
        node.name: node.meta["val"].dtype
        for block in program.blocks
        for node in block.body.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
    }


@pytest.mark.parametrize("precision", LOW)
@given(program=programs(), seed=st.integers(0, 100))
def test_any_program(precision: str, program: Program, seed: int) -> None:
    result = Pipeline((CastPrecision(precision),))(program)  # which verifies, and checks `modified`
    cast = result.program
    assert (cast.inputs, cast.outputs) == (program.inputs, program.outputs)
    assert [(b.name, list(b.params), list(b.results), b.terminator) for b in cast.blocks] == [
        (b.name, list(b.params), list(b.results), b.terminator) for b in program.blocks
    ]
    inputs = {name: tensor / 4 for name, tensor in rows(6, program, seed).items()}
    assert_typed(cast, inputs)
    expected, found = interpret(program, inputs), interpret(cast, inputs)
    same = [a == b for a, b in zip(expected.path, found.path, strict=True)]
    a, b = expected.outputs["y"][same], found.outputs["y"][same]
    assert b.dtype is torch.float32
    small = a.abs() < 4
    assert ((a - b).abs()[small] < 0.3).all()


def assert_typed(program: Program, inputs: Mapping[str, Tensor]) -> None:
    """Every block makes what it says, whatever it is given of the types that it asks for."""
    for block in program.blocks:
        params = {
            name: torch.zeros([3, *map(int, spec.shape[1:])], dtype=getattr(torch, spec.dtype))
            for name, spec in block.params.items()
        }
        made = block.run(params)
        assert {name: str(tensor.dtype) for name, tensor in made.items()} == {
            name: f"torch.{spec.dtype}" for name, spec in block.results.items()
        }
    assert {tensor.dtype for tensor in inputs.values()} == {torch.float32}


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("make", [exit_chain, diamond])
def test_known_programs(make: Callable[[], Program], precision: str) -> None:
    program = make()
    cast = cast_precision(program, precision)
    inputs = rows(50, program)
    expected, found = interpret(program, inputs), interpret(cast, inputs)
    same = expected.exit_index == found.exit_index
    assert same.mean() > 0.9
    torch.testing.assert_close(
        found.outputs["y"][same], expected.outputs["y"][same], atol=CLOSE[precision], rtol=0
    )


def test_where_types_change() -> None:
    cast = cast_precision(exit_chain(), "fp16")
    found = dtypes(cast)
    # The gate reads h, and so it is float32 between the blocks; what is computed with it is not.
    assert found == {"x": "float32", "h": "float32", "early": "float32", "late": "float32"}
    kinds = node_dtypes(cast)
    assert kinds["x_float16"] is kinds["h_float16"] is kinds["late_float16"] is torch.float16
    assert dtypes(cast_precision(diamond(), "bf16")) == {
        "x": "float32", "h": "bfloat16", "a": "bfloat16", "b": "bfloat16", "j": "bfloat16", "y": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("precision", LOW)
def test_a_network_with_exits(precision: str) -> None:
    program, cast = network_with_exits(), network_with_exits(precision)
    low = str(PRECISIONS[precision]).removeprefix("torch.")
    assert {name for name, dtype in dtypes(cast).items() if dtype == low} == {"relu_1", "relu_2"}
    inputs = {"image": images(60, 2)}
    expected, found = interpret(program, inputs), interpret(cast, inputs)
    same = expected.exit_index == found.exit_index
    assert same.mean() > 0.9
    assert len(set(expected.exit_index.tolist())) == 3
    close = CLOSE[precision] * float(expected.outputs["logits"].abs().max())
    torch.testing.assert_close(
        found.outputs["logits"][same], expected.outputs["logits"][same], atol=close, rtol=0
    )


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", sorted(ZOO))
def test_networks_of_all_kinds(name: str, precision: str) -> None:
    program = captured(name).program
    cuts = find_cut_points(program)
    cast = cast_precision(split_block(program, cuts[::3]) if cuts else program, precision)
    verify(cast)
    floats = [dtype for dtype in node_dtypes(cast).values() if dtype.is_floating_point]
    assert floats.count(torch.float32) <= 4  # the input, the logits, and what was made of integers
    inputs = ZOO[name].inputs(6, 1)
    (expected,) = interpret(program, inputs).outputs.values()
    (found,) = interpret(cast, inputs).outputs.values()
    close = CLOSE[precision] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=close, rtol=0)


def test_confidences_are_computed_in_float32() -> None:
    kinds = node_dtypes(network_with_exits("bf16"))
    assert kinds["linear"] is torch.float32
    assert {dtype for name, dtype in kinds.items() if name.startswith(("log_softmax", "exp", "topk"))} == {
        torch.float32
    }
    assert kinds["conv2d"] is kinds["relu"] is torch.bfloat16


class _Attention(nn.Module):
    """Tokens, a mask as Hugging Face models make it, and an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.position = nn.Parameter(torch.randn(1, 7, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.embedding(ids) + self.position
        added = (1.0 - mask[:, None].float()) * torch.finfo(torch.float32).min
        h = self.layer(F.softmax(h @ h.transpose(1, 2) + added, dim=-1) @ h)
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        logits = self.head(h.mean(dim=1))
        assert isinstance(logits, Tensor)
        return logits


def tokens(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(count, 7, dtype=torch.int64)
    mask[:, 5:] = 0
    return {"ids": torch.randint(0, 50, (count, 7), generator=generator), "mask": mask}


@pytest.mark.parametrize("precision", LOW)
def test_a_transformer(precision: str) -> None:
    program = capture(_Attention().eval(), tokens(2)).program
    chain = split_block(program, find_cut_points(program)[::4])
    cast = cast_precision(chain, precision)
    verify(cast)
    low = str(PRECISIONS[precision]).removeprefix("torch.")
    crossing = {block.name: [s.dtype for s in block.params.values()] for block in cast.blocks[1:]}
    assert all(low in types for types in crossing.values())
    expected = interpret(program, tokens(8)).outputs["logits"]
    found = interpret(cast, tokens(8)).outputs["logits"]
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=CLOSE[precision] * float(expected.abs().max()), rtol=0)


def test_what_loses_digits_or_overflows_is_in_float32_up_to_the_next_product() -> None:
    kinds = node_dtypes(cast_precision(capture(_Attention().eval(), tokens(2)).program, "fp16"))
    assert kinds["pow_1"] is kinds["rsqrt"] is torch.float32
    assert {
        dtype for name, dtype in kinds.items() if name.startswith(("layer_norm", "softmax", "matmul"))
    } == {torch.float16}


def test_a_finite_number_stays_finite() -> None:
    body = build_body(
        {"x": ValueSpec(("batch", 3), "float32")},
        [("y", aten.add.Tensor, ("x", -3.0e38)), ("z", aten.mul.Tensor, ("y", "big"))],
        ["z"],
        {"big": torch.tensor([1e30, -1e30, float("-inf")])},
    )
    spec = ValueSpec(("batch", 3), "float32")
    block = Block("b", {"x": spec}, {"z": spec}, Return(("z",), "end"), body)
    cast = cast_precision(Program({"x": spec}, {"y": spec}, (block,)), "fp16")
    (weight,) = (
        getattr(cast.entry.body, str(n.target)) for n in cast.entry.body.graph.find_nodes(op="get_attr")
    )
    assert weight.tolist() == [65504.0, -65504.0, float("-inf")]
    (added,) = (n for n in cast.entry.body.graph.nodes if n.target is aten.add.Tensor)
    assert added.args[1] == -65504.0


def test_weights_are_rounded_once_and_the_old_body_is_left_alone() -> None:
    program = capture(SmallResNet(8, 2).eval(), {"image": images(2)}).program
    before = {name: tensor.clone() for name, tensor in program.entry.body.state_dict().items()}
    cast = cast_precision(program, "fp16")
    assert all(torch.equal(before[n], tensor) for n, tensor in program.entry.body.state_dict().items())
    tensors = cast.entry.body.state_dict()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(tensors) == len(before)


def test_what_depends_on_no_row_is_computed_as_it_was_and_then_rounded() -> None:
    spec = ValueSpec(("batch", 3), "float32")
    body = build_body(
        {"x": spec},
        [
            ("table", aten.mul.Tensor, ("weight", 1.0001)),
            ("row", aten.select.int, ("table", 0, 1)),
            ("y", aten.add.Tensor, ("x", "row")),
        ],
        ["y"],
        {"weight": torch.arange(6, dtype=torch.float32).reshape(2, 3)},
    )
    program = Program(
        {"x": spec}, {"y": spec}, (Block("b", {"x": spec}, {"y": spec}, Return(("y",), "e"), body),)
    )
    kinds = node_dtypes(cast_precision(program, "bf16"))
    assert kinds["table"] is torch.float32
    assert kinds["row"] is kinds["table_bfloat16"] is torch.bfloat16


def test_nothing_to_do_is_the_same_object() -> None:
    program = exit_chain()
    assert cast_precision(program, "fp32") is program
    spec = ValueSpec(("batch", 3), "int64")
    body = build_body({"i": spec}, [("j", aten.add.Tensor, ("i", "i"))], ["j"])
    whole = Program(
        {"i": spec}, {"j": spec}, (Block("b", {"i": spec}, {"j": spec}, Return(("j",), "e"), body),)
    )
    assert cast_precision(whole, "fp16") is whole
    assert not CastPrecision("fp16")(whole).modified
    # All that is computed is computed from an answer.
    late = row_block("b", ["x"], [("y", aten.tanh.default, ("x",))], ["y"], Return(("y",), "e"))
    assert cast_precision(row_program(late), "fp16", answers=["x"]).entry.body is late.body


def test_heads() -> None:
    spec = ValueSpec(("batch", 8, 4, 4), "float32")
    head = lower_head(("site", "linear"), LinearHead(spec, 4).eval(), "h", spec, 4)
    cast = cast_head(head, {"h": ValueSpec(spec.shape, "float16")}, "fp16", ())
    x = torch.randn(5, 8, 4, 4)
    (logits, confidence), expected = cast.body(x.half()), head.body(x)
    assert logits.dtype is confidence.dtype is torch.float32
    torch.testing.assert_close(logits, expected[0], atol=0.01, rtol=0)
    assert (cast.exit, cast.answer, cast.results) == (head.exit, head.answer, head.results)
    assert cast_head(head, {"h": spec}, "fp32", ()) is head


def test_heads_over_answers_stay_as_they_are() -> None:
    make = HeadMaker(4)
    logits = {f"{name}_own_logits": ValueSpec(("batch", 4), "float32") for name in "ab"}
    for head in (make.own("a"), make.joint("b", ["a"]), make.agreement("b", "a")):
        assert cast_head(head, logits, "bf16", tuple(logits)) is head


def test_an_answer_of_another_block_is_exact() -> None:
    program = network_with_exits()
    cast = cast_precision(program, "fp16", answers=["relu_1"])
    assert dtypes(cast)["relu_1"] == "float32"
    kinds = infer_kinds(program.blocks[1].body, {"relu_1": Kind.EXACT}, ["relu_1"])
    assert set(kinds.values()) <= {Kind.EXACT, Kind.CONSTANT}


def test_typed_onnx_runs() -> None:
    cast = network_with_exits("fp16")
    block = cast.blocks[1]
    model = lower_blocks(cast.blocks)[block.name]
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert {port.name: port.type for port in session.get_inputs()}["relu_1"] == "tensor(float16)"
    x = torch.randn(5, 8, 16, 16).half()
    gate = {"gate_weight": np.zeros((2, 3), np.float32), "gate_bias": np.array([0, 1], np.float32)}
    found = dict(
        zip(
            engine_signature(block).outputs,
            session.run(list(engine_signature(block).outputs), {"relu_1": x.numpy(), **gate}),
            strict=True,
        )
    )
    expected = block.run({"relu_1": x})
    assert found["relu_2"].dtype == np.float16
    np.testing.assert_allclose(found["relu_2"], expected["relu_2"], atol=0.02)
    np.testing.assert_allclose(found["blocks_1_linear_logits"], expected["blocks_1_linear_logits"], atol=0.05)
    assert found["action"].tolist() == [1] * 5


def test_bfloat16_onnx_is_typed_all_through() -> None:
    cast = network_with_exits("bf16")
    for name, content in lower_blocks(cast.blocks, opset=BFLOAT16_OPSET).items():
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model, full_check=True)
        floats = {t.data_type for t in model.graph.initializer if t.dims} - {onnx.TensorProto.INT64}
        assert onnx.TensorProto.FLOAT not in floats, name


def test_weights_are_rounded_as_torch_rounds() -> None:
    weight = torch.randn(40, 30)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], "y"),
            onnx.helper.make_node("Cast", ["y"], ["z"], "z", to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("MatMul", ["z", "v"], ["u"], "u"),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, ["n", 40])],
        [onnx.helper.make_tensor_value_info("u", onnx.TensorProto.FLOAT, ["n", 2])],
        [
            onnx.numpy_helper.from_array(weight.numpy(), "w"),
            onnx.helper.make_tensor("b", onnx.TensorProto.BFLOAT16, [30], [0.0] * 30),
            onnx.numpy_helper.from_array(np.ones((30, 2), np.float32), "v"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", BFLOAT16_OPSET)])
    round_weights(model)
    w, _, v = model.graph.initializer
    assert (w.name, w.data_type, list(w.dims)) == ("w", onnx.TensorProto.BFLOAT16, [40, 30])
    bits = np.frombuffer(w.raw_data, "<i2").reshape(40, 30)
    assert torch.equal(torch.from_numpy(bits.copy()).view(torch.bfloat16), weight.bfloat16())
    assert v.data_type == onnx.TensorProto.FLOAT
    onnx.checker.check_model(model, full_check=True)


def test_what_cannot_be_cast_is_named() -> None:
    with pytest.raises(PassError, match=r"no precision 'fp8'.*\n.*fp16"):
        cast_precision(exit_chain(), "fp8")
    program = row_program(
        row_block("b", ["x"], [("y", aten.tanh.default, ("x",))], ["y"], Return(("y",), "e"))
    )
    (node,) = (n for n in program.entry.body.graph.nodes if n.name == "y")
    node.target = torch.ops.higher_order.cond
    with pytest.raises(PassError, match=r"node 'y': .*inner graph"):
        cast_precision(program, "fp16")


def test_an_operator_that_does_not_run_in_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(x: Any) -> Any:
        raise NotImplementedError('"odd" not implemented for Half')

    program = row_program(
        row_block("b", ["x"], [("y", aten.tanh.default, ("x",))], ["y"], Return(("y",), "e"))
    )
    graph: fx.Graph = program.entry.body.graph
    next(n for n in graph.nodes if n.name == "y").target = refuses
    with pytest.raises(PassError, match=r"node 'y': .*does not run in float16: .*not implemented for Half"):
        cast_precision(program, "fp16")
