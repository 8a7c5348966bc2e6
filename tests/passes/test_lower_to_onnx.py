"""Blocks become ONNX models: same values, the agreed signature, bytes that depend on nothing else."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ZOO
from programs import ROW, WIDTH, aten, build_body, programs, row_block, rows
from torch import Tensor, nn
from torch.nn import functional

from exitcompiler import onnx_utils
from exitcompiler.capture import capture
from exitcompiler.controlflow import (
    ACTION,
    GATE_BIAS,
    GATE_WEIGHT,
    Branch,
    ConstantGate,
    Edge,
    Jump,
    LinearGate,
    Return,
    ValueSpec,
    engine_signature,
)
from exitcompiler.errors import LoweringError
from exitcompiler.export import trace_body
from exitcompiler.interpreter import interpret
from exitcompiler.onnx_utils import IR_VERSION
from exitcompiler.passes import lower_to_onnx as lowering
from exitcompiler.passes.assemble_onnx import EXIT_INDEX, assemble_onnx
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.lower_to_onnx import OPSET, lower_blocks
from exitcompiler.passes.split_block import split_block
from exitcompiler.program import Block, Program

IMAGE = ValueSpec(("batch", 3, 8, 8), "float32")
DEEP = ValueSpec(("batch", 4, 8, 8), "float32")
LOGITS = ValueSpec(("batch", 5), "float32")
CONFIDENCE = ValueSpec(("batch", 3), "float32")


class Segment(nn.Module):
    """A piece of backbone with an exit: convolution, batch norm, head, confidence features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.classify = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = functional.relu(self.norm(self.conv(x)))
        logits = self.classify(h.mean((2, 3)))
        log_p = functional.log_softmax(logits, 1)
        p = log_p.exp()
        top = p.topk(2, dim=1).values
        entropy = -(p * log_p).sum(1, keepdim=True)
        return h, logits, torch.cat([top[:, :1], top[:, :1] - top[:, 1:], entropy], 1)


@pytest.fixture(scope="module")
def exit_block() -> Block:
    torch.manual_seed(0)
    module = Segment().requires_grad_(requires_grad=False)
    assert module.norm.running_mean is not None
    module.norm.running_mean.normal_()
    results = {"h": DEEP, "logits": LOGITS, "confidence": CONFIDENCE}
    gate = LinearGate(("confidence",), ((3.0, 1.0, -1.0), (0.0, 0.0, 0.0)), (-0.5, 0.0))
    branch = Branch(gate, (Return(("logits",), "early"), Edge("next", ("h",))))
    return Block("exit", {"x": IMAGE}, results, branch, trace_body(module, {"x": IMAGE}, list(results)))


@pytest.fixture(scope="module")
def exit_model(exit_block: Block) -> bytes:
    return lower_blocks([exit_block])["exit"]


def run(model: bytes, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {value.name: np.asarray(inputs[value.name]) for value in session.get_inputs()}
    return {
        name: torch.from_numpy(array) for name, array in zip(names, session.run(names, given), strict=True)
    }


def gate_inputs(block: Block) -> dict[str, Any]:
    if ACTION not in engine_signature(block).outputs:
        return {}
    assert isinstance(block.terminator, Branch)
    assert isinstance(block.terminator.gate, LinearGate)
    gate = block.terminator.gate
    return {GATE_WEIGHT: np.array(gate.weight, np.float32), GATE_BIAS: np.array(gate.bias, np.float32)}


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_agrees(block: Block, model: bytes, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compare all handed-on results with torch; returns what torch computes."""
    with torch.no_grad():
        expected = block.run(params)
    found = run(model, {**params, **gate_inputs(block)})
    for name in found.keys() - {ACTION}:
        assert_close(found[name], expected[name])
    return expected


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_exit_block_computes_what_torch_computes(exit_block: Block, exit_model: bytes, count: int) -> None:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
    expected = assert_agrees(exit_block, exit_model, {"x": x})
    scores = expected["confidence"] @ torch.tensor([[3.0, 1.0, -1.0], [0.0, 0.0, 0.0]]).T
    action = (scores + torch.tensor([-0.5, 0.0])).argmax(1).to(torch.int32)
    found = run(exit_model, {"x": x, **gate_inputs(exit_block)})
    assert torch.equal(found[ACTION], action)


def test_the_signature_is_the_agreed_one(exit_block: Block, exit_model: bytes) -> None:
    model = onnx.load_from_string(exit_model)
    signature = engine_signature(exit_block)
    assert [value.name for value in model.graph.input] == list(signature.inputs)
    assert [value.name for value in model.graph.output] == list(signature.outputs) == ["h", "logits", ACTION]
    for value, spec in zip(
        (*model.graph.input, *model.graph.output),
        (*signature.inputs.values(), *signature.outputs.values()),
        strict=True,
    ):
        dims = value.type.tensor_type.shape.dim
        assert tuple(dim.dim_param or dim.dim_value for dim in dims) == spec.shape
        assert str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)) == spec.dtype
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert model.ir_version == IR_VERSION


def test_batch_norms_are_folded_into_convolutions(exit_model: bytes) -> None:
    kinds = [node.op_type for node in onnx.load_from_string(exit_model).graph.node]
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds


def test_the_model_carries_no_notes_of_the_exporter(exit_model: bytes) -> None:
    model = onnx.load_from_string(exit_model)
    assert not model.metadata_props
    assert not model.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b"torch" not in exit_model
    assert b"/" not in b"".join(node.name.encode() for node in model.graph.node)


def test_bytes_depend_on_the_contents_of_the_block_alone(exit_block: Block, exit_model: bytes) -> None:
    neighbour = row_block("n", ["x"], [("y", aten.tanh.default, ("x",))], ["y"], Return(("y",), "end"))
    renamed = dataclasses.replace(exit_block, name="other")
    models = lower_blocks([neighbour, renamed])
    assert models["other"] == exit_model
    assert list(models) == ["n", "other"]


def test_other_gate_parameters_need_no_other_model(exit_block: Block, exit_model: bytes) -> None:
    x = torch.randn(4, 3, 8, 8)
    never = {GATE_WEIGHT: np.zeros((2, 3), np.float32), GATE_BIAS: np.array([0, 1], np.float32)}
    tie = {GATE_WEIGHT: np.zeros((2, 3), np.float32), GATE_BIAS: np.array([1, 1], np.float32)}
    assert run(exit_model, {"x": x, **never})[ACTION].tolist() == [1] * 4
    assert run(exit_model, {"x": x, **tie})[ACTION].tolist() == [0] * 4  # a tie goes to the lowest


def test_a_gate_reads_params_and_results_in_order() -> None:
    ones, zeros = (1.0,) * WIDTH, (0.0,) * WIDTH
    gate = LinearGate(("h", "x"), (ones + zeros, zeros + ones), (0.0, 0.0))
    ways = (Return(("x",), "a"), Return(("x",), "b"))
    block = row_block("b", ["x"], [("h", aten.neg.default, ("x",))], ["h"], Branch(gate, ways))
    model = lower_blocks([block])["b"]
    found = run(model, {"x": np.array([[1, 2, 3], [-1, -2, -3]], np.float32), **gate_inputs(block)})
    assert list(found) == [ACTION]
    assert found[ACTION].tolist() == [1, 0]


def test_a_gate_alone_needs_no_export() -> None:
    gate = LinearGate(("x",), ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (0.0, 0.0))
    ways = (Return(("x",), "a"), Edge("next", ("x",)))
    block = Block("b", {"x": ROW}, {}, Branch(gate, ways), build_body({"x": ROW}, [], []))
    x = np.array([[1, 0, 0], [-1, 0, 0]], np.float32)
    found = run(lower_blocks([block])["b"], {"x": x, **gate_inputs(block)})
    assert found[ACTION].tolist() == [0, 1]


def test_results_that_are_params_constants_or_twins_are_handed_on() -> None:
    body = build_body(
        {"conv_0": ROW, "unused": ROW},
        [("double", aten.add.Tensor, ("conv_0", "conv_0"))],
        ["conv_0", "double", "double", "table"],
        {"table": torch.arange(4.0)},
    )
    results = {"same": ROW, "d1": ROW, "d2": ROW, "t": ValueSpec((4,), "float32")}
    block = Block("b", {"conv_0": ROW, "unused": ROW}, results, Jump(Edge("n", tuple(results))), body)
    x = torch.randn(3, WIDTH)
    model = lower_blocks([block])["b"]
    assert list(run(model, {"conv_0": x, "unused": x})) == list(results)
    assert_agrees(block, model, {"conv_0": x, "unused": x})


def test_blocks_with_nothing_to_compute_are_left_out() -> None:
    dead = row_block("dead", ["x"], [("h", aten.neg.default, ("x",))], ["h"], Jump(Edge("n", ("x",))))
    constant = Branch(ConstantGate(0, 2), (Edge("n", ("x",)), Edge("m", ("x",))))
    assert lower_blocks([dead, dataclasses.replace(dead, name="c", terminator=constant)]) == {}
    assert lower_blocks([]) == {}


def test_values_without_rows_keep_their_size() -> None:
    table = ValueSpec((WIDTH,), "float32")
    body = build_body({"x": ROW, "t": table}, [("y", aten.mul.Tensor, ("x", "t"))], ["y"])
    block = Block("b", {"x": ROW, "t": table}, {"y": ROW}, Return(("y",), "end"), body)
    model = lower_blocks([block])["b"]
    for count in (1, 4):
        assert_agrees(block, model, {"x": torch.randn(count, WIDTH), "t": torch.arange(float(WIDTH))})


def test_every_block_asks_its_own_params_for_the_batch_size() -> None:
    def block(name: str) -> Block:
        size = [("n", aten.sym_size.int, ("x", 0))]
        body = build_body({"x": ROW}, size, ["x"], {"token": torch.ones(1, WIDTH)})
        graph = body.graph
        nodes = {node.name: node for node in graph.nodes}
        output = graph.output_node()
        with graph.inserting_before(output):
            wide = graph.call_function(aten.expand.default, (nodes["token"], [nodes["n"], WIDTH]))
            y = graph.call_function(aten.cat.default, ([nodes["x"], wide], 1))
        output.args = ((y,),)
        body.recompile()
        results = {"y": ValueSpec(("batch", 2 * WIDTH), "float32")}
        return Block(name, {"x": ROW}, results, Return(("y",), name), body)

    for name, model in lower_blocks([block("a"), block("b")]).items():
        for count in (1, 3):
            assert_agrees(block(name), model, {"x": torch.randn(count, WIDTH)})


def zoo_program(name: str) -> Program:
    sample = ZOO[name]
    program = capture(sample.build(0), sample.inputs(3, 0), logits=sample.logits).program
    cuts = find_cut_points(program)
    return split_block(program, cuts[:: max(1, len(cuts) // 3)])


@pytest.mark.parametrize(
    "name",
    [name if name == "depthwise" else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ZOO)],
)
def test_split_models_compute_what_torch_computes(name: str) -> None:
    program = zoo_program(name)
    assert len(program.blocks) > 2
    models = lower_blocks(program.blocks)
    whole = assemble_onnx(program, models)
    for count in (1, 2, 5):
        inputs = values = ZOO[name].inputs(count, 1)
        for block in program.blocks:
            values = {**values, **assert_agrees(block, models[block.name], values)}
        last = program.blocks[-1].terminator
        assert isinstance(last, Return)
        assert_close(run(whole, inputs)[next(iter(program.outputs))], values[last.values[0]])


@settings(max_examples=2)
@given(st.lists(programs(), min_size=10, max_size=10))
def test_any_program_in_one_file_answers_as_the_interpreter_does(several: list[Program]) -> None:
    """Many programs per example, for one export."""
    together = [
        dataclasses.replace(block, name=f"{i}.{block.name}")
        for i, program in enumerate(several)
        for block in program.blocks
    ]
    models = lower_blocks(together)
    for i, program in enumerate(several):
        own = {block.name: models.get(f"{i}.{block.name}", b"") for block in program.blocks}
        inputs = rows(7, program, seed=i)
        expected = interpret(program, inputs)
        found = run(assemble_onnx(program, own), inputs)
        assert found[EXIT_INDEX].tolist() == expected.exit_index.tolist()
        for name in program.outputs:
            assert_close(found[name], expected.outputs[name])


def culprit() -> Block:
    """A block with an operator that ONNX does not have."""
    operations: Sequence[Any] = [
        ("fine", aten.tanh.default, ("x",)),
        ("odd", aten.special_bessel_j0.default, ("fine",)),
    ]
    return row_block("culprit", ["x"], operations, ["odd"], Return(("odd",), "end"))


@pytest.mark.parametrize("alone", [True, False])
def test_the_block_and_the_node_at_fault_are_named(alone: bool) -> None:
    good = row_block("good", ["x"], [("y", aten.tanh.default, ("x",))], ["y"], Return(("y",), "end"))
    with pytest.raises(LoweringError, match="block 'culprit', node 'odd'") as caught:
        lower_blocks([culprit()] if alone else [good, culprit()])
    assert "torch" in str(caught.value.remedy)


def test_a_gate_that_reads_nothing_is_refused() -> None:
    gate = LinearGate((), ((), ()), (0.0, 1.0))
    ways = (Return(("x",), "a"), Edge("next", ("x",)))
    block = Block("b", {"x": ROW}, {}, Branch(gate, ways), build_body({"x": ROW}, [], []))
    with pytest.raises(LoweringError, match="'b': the gate reads nothing"):
        lower_blocks([block])


def test_the_exporter_is_not_heard_and_leaves_nothing_behind(
    exit_block: Block, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("torch.onnx")
    before = (logger.level, list(warnings.filters), torch.is_grad_enabled())
    lower_blocks([exit_block])
    assert (logger.level, list(warnings.filters), torch.is_grad_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_weights_beyond_one_file_are_refused_before_anything_is_exported(
    exit_block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_utils, "MODEL_BYTES", 100)
    with pytest.raises(LoweringError, match=r"largest weight '.*': weights of .* GB") as caught:
        lower_blocks([exit_block])
    assert caught.value.remedy


def test_blocks_that_fit_alone_but_not_together_are_lowered_one_by_one(
    exit_block: Block, exit_model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "MODEL_BYTES", 100)
    other = dataclasses.replace(exit_block, name="other")
    assert lower_blocks([exit_block, other]) == {exit_block.name: exit_model, "other": exit_model}


def test_pairs_of_clips_on_one_value_keep_their_bounds() -> None:
    operations = [
        ("low", aten.clamp.default, ("x", -0.5, 0.5)),
        ("low_again", aten.clamp.default, ("low", -0.1, 1.0)),
        ("high", aten.clamp.default, ("x", -1.0, 1.0)),
        ("high_again", aten.clamp.default, ("high", 0.2, 2.0)),
        ("y", aten.sub.Tensor, ("low_again", "high_again")),
    ]
    block = row_block("clips", ["x"], operations, ["y"], Return(("y",), "end"))
    assert_agrees(block, lower_blocks([block])["clips"], {"x": torch.randn(7, WIDTH)})
