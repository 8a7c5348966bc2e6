"""One file for a whole program: the same answers row by row, and work that is skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx_programs import TestProgram, cascade, chain, diamond, plain, random_program, random_rows, to_onnx

from exitcompiler.controlflow import (
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    LinearGate,
    Return,
    ValueSpec,
    engine_signature,
    successors,
)
from exitcompiler.errors import LoweringError
from exitcompiler.passes.assemble_onnx import EXIT_INDEX, assemble_onnx

Arrays = dict[str, np.ndarray[Any, Any]]
HEAVY = {"Conv", "MatMul", "Gemm"}


def models_of(program: TestProgram) -> dict[str, bytes]:
    return {
        block.name: to_onnx(block, program.bodies[block.name])
        for block in program.flow.blocks
        if engine_signature(block).outputs
    }


def assembled(program: TestProgram) -> bytes:
    return assemble_onnx(program.flow, models_of(program))


def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnxruntime(model: bytes, inputs: Arrays) -> Arrays:
    engine = session(model)
    outputs = [output.name for output in engine.get_outputs()]
    return dict(zip(outputs, engine.run(outputs, inputs), strict=True))


def assert_right(program: TestProgram, found: Mapping[str, Any], x: np.ndarray[Any, Any]) -> None:
    answers = [program.answer_row(row) for row in x]
    exits = [program.flow.exits.index(name) for _, name in answers]
    np.testing.assert_array_equal(found[EXIT_INDEX], np.array(exits, np.int32))
    np.testing.assert_array_equal(found["logits"], np.stack([answer for answer, _ in answers]))


def with_gates(program: TestProgram, gates: Mapping[str, LinearGate | ConstantGate]) -> TestProgram:
    """The same program with other gates in some blocks."""
    blocks = tuple(
        dataclasses.replace(block, terminator=Branch(gates[block.name], successors(block.terminator)))
        if block.name in gates
        else block
        for block in program.flow.blocks
    )
    return TestProgram(dataclasses.replace(program.flow, blocks=blocks), program.bodies)


@pytest.mark.parametrize("make", [plain, chain, cascade, diamond])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_gets_its_own_answer_on_onnxruntime(make: Any, seed: int) -> None:
    program = make(seed)
    model = assembled(program)
    for count in (1, 2, 7, 16):
        x = random_rows(count, seed)
        assert_right(program, run_onnxruntime(model, {"x": x}), x)


@pytest.mark.parametrize("seed", range(40))
def test_any_acyclic_program_is_right_on_onnxruntime(seed: int) -> None:
    program = random_program(seed)
    x = random_rows(16, seed)
    found = run_onnxruntime(assembled(program), {"x": x})
    assert_right(program, found, x)


@pytest.mark.parametrize("program", [chain(1), cascade(1), diamond(1), random_program(11)])
def test_every_row_gets_its_own_answer_on_openvino(program: TestProgram) -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(assembled(program)), "CPU", hints)
    for count in (1, 2, 7, 16):
        x = random_rows(count, count)
        result = compiled({"x": x})
        assert_right(program, {name: result[name] for name in ("logits", EXIT_INDEX)}, x)


def test_the_rows_of_one_batch_do_take_different_ways() -> None:
    """Else the tests above would not test merging."""
    program = chain()
    found = run_onnxruntime(assembled(program), {"x": random_rows(64)})
    assert set(found[EXIT_INDEX]) == {0, 1, 2}


def test_inputs_and_outputs_are_those_of_the_program_then_the_exit_index() -> None:
    graph = onnx.load_from_string(assembled(chain())).graph
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == ["logits", EXIT_INDEX]
    assert all(value.type.tensor_type.shape.dim[0].dim_param == "batch" for value in graph.output)


@pytest.mark.parametrize("program", [chain(), cascade(), diamond()])
def test_work_and_weights_of_later_blocks_are_inside_flat_branches(program: TestProgram) -> None:
    graph = onnx.load_from_string(assembled(program)).graph
    entry = f"0.{program.flow.entry.name}/"
    assert all(node.name.startswith(entry) for node in graph.node if node.op_type in HEAVY)
    assert all(tensor.name.startswith(entry) for tensor in graph.initializer if len(tensor.dims) == 2)
    guards = [node for node in graph.node if node.op_type == "If"]
    assert len(guards) == len(program.flow.blocks) - 1
    for guard in guards:
        then, otherwise = (branch_of(guard, name) for name in ("then_branch", "else_branch"))
        assert any(node.op_type in HEAVY for node in then.node)
        assert not any(node.op_type in HEAVY for node in otherwise.node)
        assert not any(node.op_type == "If" for node in (*then.node, *otherwise.node))
        # TensorRT wants both branches to agree in type and shape.
        assert [v.type for v in then.output] == [v.type for v in otherwise.output]


def branch_of(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    (graph,) = (attribute.g for attribute in node.attribute if attribute.name == name)
    return graph


def test_a_block_that_every_row_reaches_needs_no_branch() -> None:
    flow = chain().flow
    jumps = with_gates(chain(), {"first": ConstantGate(1, 2), "second": ConstantGate(1, 2)})
    graph = onnx.load_from_string(assembled(jumps)).graph
    assert not [node for node in graph.node if node.op_type == "If"]
    x = random_rows(5)
    found = run_onnxruntime(assembled(jumps), {"x": x})
    assert_right(jumps, found, x)
    assert set(found[EXIT_INDEX]) == {flow.exits.index("backbone")}


def test_a_block_that_no_row_can_reach_is_left_out() -> None:
    program = with_gates(cascade(), {"small": ConstantGate(2, 3)})
    x = random_rows(5)
    assert "medium" not in str(onnx.load_from_string(assembled(program)).graph.node)
    assert_right(program, run_onnxruntime(assembled(program), {"x": x}), x)


def test_a_tie_goes_to_the_lowest_action() -> None:
    tie = LinearGate(("conf",), ((0.0, 0.0), (0.0, 0.0)), (0.5, 0.5))
    found = run_onnxruntime(assembled(with_gates(chain(), {"first": tie})), {"x": random_rows(4)})
    assert set(found[EXIT_INDEX]) == {0}


def with_second_return(program: TestProgram, name: str) -> TestProgram:
    """Let a block of the chain choose between two answers and going on."""
    block = program.flow.block(name)
    leave, go_on = successors(block.terminator)
    assert isinstance(leave, Return)
    assert isinstance(block.terminator, Branch)
    reads = block.terminator.gate.reads
    width = 2 * len(reads)
    ramp = tuple(0.5 * (i + 1) for i in range(width))
    weight = (ramp, tuple(-w for w in ramp), (0.0,) * width)
    gate = LinearGate(reads, weight, (-2.0, -2.0, 0.0))
    ways = (leave, Return(("other",), f"{leave.exit}b"), go_on)
    results = {**block.results, "other": block.results[leave.values[0]]}
    changed = BlockInterface(name, block.params, results, Branch(gate, ways))
    answer = program.bodies[name][leave.values[0]]
    other = dataclasses.replace(answer, bias=answer.bias + 1)
    bodies = {**program.bodies, name: {**program.bodies[name], "other": other}}
    blocks = tuple(changed if b.name == name else b for b in program.flow.blocks)
    return TestProgram(dataclasses.replace(program.flow, blocks=blocks), bodies)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_block_may_return_in_several_ways(name: str) -> None:
    program = with_second_return(chain(1), name)
    x = random_rows(64)
    found = run_onnxruntime(assembled(program), {"x": x})
    assert_right(program, found, x)
    assert len(set(found[EXIT_INDEX])) == 4


def test_values_without_rows_follow_the_way_taken() -> None:
    row, one = ValueSpec(("batch", 2), "float32"), ValueSpec((1,), "float32")
    gate = LinearGate(("x",), ((1.0, 0.0), (0.0, 0.0)), (0.0, 0.0))
    ways = (Edge("join", ("x", "s")), Edge("join", ("x", "t")))
    head = BlockInterface("head", {"x": row, "s": one, "t": one}, {}, Branch(gate, ways))
    join = BlockInterface("join", {"y": row, "u": one}, {}, Return(("y", "u"), "end"))
    flow = ControlFlow(head.params, {"out": row, "scale": one}, (head, join))
    program = TestProgram(flow, {"head": {}, "join": {}})
    for x, expected in (((1.0, 0.0), 3.0), ((-1.0, 0.0), 4.0)):
        inputs: Arrays = {
            "x": np.array([x], np.float32),
            "s": np.array([3], np.float32),
            "t": np.array([4], np.float32),
        }
        found = run_onnxruntime(assemble_onnx(flow, models_of(program)), inputs)
        assert found["scale"] == [expected]
        np.testing.assert_array_equal(found["out"], inputs["x"])


def test_the_same_program_gives_the_same_bytes() -> None:
    assert assembled(cascade()) == assembled(cascade())


def test_names_of_blocks_may_be_anything() -> None:
    program = chain()
    renamed = {"first": "a", "second": "a/then", "third": "a/then/body"}
    blocks = []
    for block in program.flow.blocks:
        terminator: Any = block.terminator
        if isinstance(terminator, Branch):
            leave, go_on = terminator.edges
            assert isinstance(go_on, Edge)
            terminator = Branch(terminator.gate, (leave, Edge(renamed[go_on.target], go_on.values)))
        blocks.append(BlockInterface(renamed[block.name], block.params, block.results, terminator))
    flow = dataclasses.replace(program.flow, blocks=tuple(blocks))
    odd = TestProgram(flow, {renamed[name]: body for name, body in program.bodies.items()})
    x = random_rows(8)
    assert_right(odd, run_onnxruntime(assembled(odd), {"x": x}), x)


def test_a_missing_model_is_named() -> None:
    models = models_of(chain())
    del models["second"]
    with pytest.raises(LoweringError, match="'second': there is no model"):
        assemble_onnx(chain().flow, models)


def test_a_model_with_other_inputs_is_refused() -> None:
    models = models_of(chain())
    models["third"] = models["first"]
    with pytest.raises(LoweringError, match=r"'third': (?s:its model maps .* lower it again)"):
        assemble_onnx(chain().flow, models)


def test_models_of_different_opsets_are_refused() -> None:
    models = models_of(chain())
    other = onnx.load_from_string(models["third"])
    other.opset_import[0].version = 18
    models["third"] = other.SerializeToString()
    with pytest.raises(LoweringError, match="'third': its model is for opset 18, others for 20"):
        assemble_onnx(chain().flow, models)


@pytest.mark.parametrize("output", ["x", EXIT_INDEX])
def test_names_that_clash_are_refused(output: str) -> None:
    flow = dataclasses.replace(chain().flow, outputs={output: chain().flow.outputs["logits"]})
    with pytest.raises(LoweringError, match="would name two values"):
        assemble_onnx(flow, models_of(chain()))
