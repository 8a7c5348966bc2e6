"""Every block of every test model is built by TensorRT-RTX, without a GPU, and decides nothing on the host.

What TensorRT-RTX compiles is what its kernels will be on a device; what it says of TensorRT itself is that
the models parse, type and shape alike. Nothing here runs.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from fake_tensorrt import FakeDriver
from models import CLASSES, ZOO
from onnx_programs import TestProgram, cascade, chain, diamond, to_onnx

from exitcompiler.capture import capture
from exitcompiler.controlflow import EngineSignature, Jump, LinearGate, engine_signature
from exitcompiler.cut_points import CutPoint
from exitcompiler.errors import BackendUnavailableError, LoweringError
from exitcompiler.heads import LinearHead, lower_head
from exitcompiler.naming import LINEAR, head_exit, value_name
from exitcompiler.passes.assemble_onnx import assemble_onnx
from exitcompiler.passes.cast_precision import cast_precision
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.insert_exits import insert_exits
from exitcompiler.passes.lower_to_onnx import lower_blocks
from exitcompiler.passes.set_gates import BranchSetting, set_gates
from exitcompiler.passes.split_block import split_block
from exitcompiler.program import Block, Program
from exitcompiler.runtime.backends import _has_gpu
from exitcompiler.runtime.rows import single_file_signature
from exitcompiler.runtime.tensorrt_api import TensorRt, load_tensorrt, plan_origin, version_numbers
from exitcompiler.runtime.tensorrt_build import (
    Build,
    BuildSettings,
    Profile,
    build_plan,
    parse_network,
)
from exitcompiler.runtime.tensorrt_engine import deserialize
from exitcompiler.runtime.tensorrt_layers import compiled_layers, host_decisions, side_streams

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (it is, with [dev], on Linux)")

BUCKETS = tuple(map(Profile.of, (1, 2, 4, 8)))
DEVICE = (8, 9)
QUICK = {  # in `make test`; the rest is slow, as exporting takes seconds
    "mlp": ("fp32",),
    "resnet": ("fp32", "fp16", "bf16"),
    "depthwise": ("fp16",),
    "densenet": ("fp32",),
    "vit": ("fp16",),
    "bert": ("fp32",),
    "windows": ("fp16",),
}
PRECISIONS = ("fp32", "fp16", "bf16")
BETWEEN_BLOCKS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
UNKNOWN_IN_BF16 = {"depthwise": "Hard.wish"}  # model -> what this TensorRT has not got
TYPES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int32": "Int32", "int64": "Int64"}


@pytest.fixture(scope="module")
def trt() -> TensorRt:
    return load_tensorrt("tensorrt_rtx")


def build(trt: TensorRt, model: bytes, signature: EngineSignature, *profiles: Profile) -> Build:
    return build_plan(trt, model, signature, BuildSettings(profiles or BUCKETS, DEVICE, detailed=True))


def assert_stays_on_the_device(built: Build) -> None:
    layers = compiled_layers(built.log)
    assert host_decisions(layers) == []
    assert side_streams(layers) == []


def assert_takes_and_gives(built: Build, signature: EngineSignature) -> None:
    """What the log says of the engine's inputs and outputs: no GPU is needed to read that."""
    said = built.log.rpartition("I/O Tensors:")[2]
    ports = dict(re.findall(r"Name: (\S+), (IOMode: \w+, DataType: \w+), Dimensions", said))
    expected = {name: f"IOMode: Input, DataType: {TYPES[s.dtype]}" for name, s in signature.inputs.items()}
    expected |= {name: f"IOMode: Output, DataType: {TYPES[s.dtype]}" for name, s in signature.outputs.items()}
    assert ports == expected
    for name, spec in signature.inputs.items():
        (described,) = re.findall(rf"Name: {name}, IOMode.*", said)
        rest = "".join(f",{size}" for size in spec.shape[1:])
        if spec.batch_axis == 0:
            assert re.findall(r"MinShape: \[([^]]*)\]", described) == [f"{p.least}{rest}" for p in BUCKETS]
            assert re.findall(r"MaxShape: \[([^]]*)\]", described) == [f"{p.most}{rest}" for p in BUCKETS]


def test_an_engine_for_one_number_of_rows_says_it_of_its_shapes(trt: TensorRt) -> None:
    """And one for several does not: so does the stand-in for TensorRT that other tests load engines with."""
    program = chain()
    block = program.flow.entry
    model, signature = to_onnx(block, program.bodies[block.name]), engine_signature(block)
    for buckets, rows in (((4,), "4"), ((1, 4), "-1")):
        said = build(trt, model, signature, *map(Profile.of, buckets)).log.rpartition("I/O Tensors:")[2]
        shapes = dict(re.findall(r"Name: (\S+), IOMode: \w+, DataType: \w+, Dimensions: \[([^]]*)\]", said))
        assert (shapes["x"], shapes["gate_bias"]) == (f"{rows},4", "2")


@pytest.mark.parametrize("make", [chain, cascade, diamond])
def test_blocks_of_small_programs_are_built_for_every_bucket(trt: TensorRt, make: object) -> None:
    assert callable(make)
    program: TestProgram = make()
    for block in program.flow.blocks:
        signature = engine_signature(block)
        built = build(trt, to_onnx(block, program.bodies[block.name]), signature)
        assert plan_origin(built.plan) == ("tensorrt_rtx", version_numbers(trt.version))
        assert_stays_on_the_device(built)
        assert_takes_and_gives(built, signature)


@functools.cache
def with_exits(name: str) -> Program:
    """A model of the zoo, cut at a third and at two thirds, with an exit and a learned gate at each."""
    sample = ZOO[name]
    program = capture(sample.build(0), sample.inputs(2, 0), logits=sample.logits).program
    cuts: list[CutPoint] = list(find_cut_points(program))
    program = split_block(program, [cuts[len(cuts) // 3], cuts[2 * len(cuts) // 3]])
    heads, settings = {}, {}
    for block in program.blocks[:-1]:
        assert isinstance(block.terminator, Jump)
        edge, key = block.terminator.edge, (block.name.removeprefix("to_"), LINEAR)
        value = next(v for v in edge.values if v in block.results and block.results[v].dtype == "float32")
        spec = block.results[value]
        heads[block.name] = [lower_head(key, LinearHead(spec, CLASSES).eval(), value, spec, CLASSES)]
        reads = (value_name(*key, "confidence"),)
        gate = LinearGate(reads, ((3.0, 1.0, -1.0), (0.0, 0.0, 0.0)), (-0.5, 0.0))
        settings[block.name] = BranchSetting(gate, (head_exit(*key), edge.target), key[0])
    return set_gates(insert_exits(program, heads), settings)


def lowered(name: str, *precisions: str) -> dict[str, tuple[Program, dict[str, bytes]]]:
    """Precision -> program, and its blocks' models, all from one export: that costs seconds."""
    programs = {precision: cast_precision(with_exits(name), precision) for precision in precisions}
    models = lower_blocks(
        [
            Block(f"{precision} {block.name}", block.params, block.results, block.terminator, block.body)
            for precision, program in programs.items()
            for block in program.blocks
        ]
    )
    return {
        precision: (program, {block.name: models[f"{precision} {block.name}"] for block in program.blocks})
        for precision, program in programs.items()
    }


def assert_all_blocks_are_built(trt: TensorRt, program: Program, models: dict[str, bytes]) -> None:
    for block in program.blocks:
        signature = engine_signature(block)
        built = build(trt, models[block.name], signature)
        assert_stays_on_the_device(built)
        assert_takes_and_gives(built, signature)


def assert_a_model_is_built(trt: TensorRt, name: str, *precisions: str) -> None:
    """Every block at each precision; in float32 the program in one file as well."""
    for precision, (program, models) in lowered(name, *precisions).items():
        types = types_between_blocks(program)
        assert types & set(BETWEEN_BLOCKS.values()) == {BETWEEN_BLOCKS[precision]}
        if precision == "fp32":
            assert_the_one_file_model_decides_on_the_host(trt, program, models)
        if precision == "bf16" and name in UNKNOWN_IN_BF16:
            with pytest.raises(LoweringError, match=f"(?s)does not take the model.*{UNKNOWN_IN_BF16[name]}"):
                assert_all_blocks_are_built(trt, program, models)
        else:
            assert_all_blocks_are_built(trt, program, models)


def types_between_blocks(program: Program) -> set[str]:
    return {spec.dtype for block in program.blocks[1:] for spec in block.params.values()}


@pytest.mark.parametrize("name", list(ZOO))
def test_every_block_of_every_model_is_built(trt: TensorRt, name: str) -> None:
    assert_a_model_is_built(trt, name, *QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_every_block_of_every_model_is_built_in_every_precision(trt: TensorRt, name: str) -> None:
    if rest := [precision for precision in PRECISIONS if precision not in QUICK[name]]:
        assert_a_model_is_built(trt, name, *rest)


def assert_the_one_file_model_decides_on_the_host(
    trt: TensorRt, program: Program, models: dict[str, bytes]
) -> None:
    """The positive control: what the other checks look for is found where it has to be."""
    model = assemble_onnx(program, models)
    conditions = parse_network(trt, model, "model.onnx").layer_types().count("CONDITION")
    assert conditions == len(program.blocks) - 1
    built = build(trt, model, single_file_signature(program), Profile(1, 4, 8))
    decisions = host_decisions(compiled_layers(built.log))
    assert [layer for layer in decisions if layer.type == "cjmp"] != []
    assert [layer for layer in decisions if "d2h" in layer.name] != []


@pytest.mark.parametrize("make", [chain, cascade, diamond])
def test_small_programs_in_one_file_are_built_for_a_range_of_rows(trt: TensorRt, make: object) -> None:
    assert callable(make)
    program: TestProgram = make()
    models = {b.name: to_onnx(b, program.bodies[b.name]) for b in program.flow.blocks}
    model = assemble_onnx(program.flow, models)
    types = parse_network(trt, model, "model.onnx").layer_types()
    assert types.count("CONDITION") == len(program.flow.blocks) - 1
    assert types.count("CONDITIONAL_OUTPUT") >= types.count("CONDITION")
    built = build(trt, model, single_file_signature(program.flow), Profile(1, 8, 8))
    assert host_decisions(compiled_layers(built.log)) != []


def test_two_builds_give_the_same_engine(trt: TensorRt) -> None:
    program = chain()
    block = program.flow.entry
    first, second = (
        build(trt, to_onnx(block, program.bodies[block.name]), engine_signature(block)) for _ in range(2)
    )
    assert first.plan == second.plan


def test_without_details_there_is_nothing_to_read(trt: TensorRt) -> None:
    program = chain()
    block = program.flow.entry
    model = to_onnx(block, program.bodies[block.name])
    built = build_plan(trt, model, engine_signature(block), BuildSettings(BUCKETS, DEVICE))
    with pytest.raises(LoweringError, match="compiled layer"):
        compiled_layers(built.log)


def test_without_a_gpu_an_engine_is_not_loaded_and_that_is_said(trt: TensorRt) -> None:
    """The real library, as far as it goes here: what it says of a missing device becomes an error."""
    if _has_gpu():
        pytest.skip("there is a GPU")
    program = chain()
    block = program.flow.entry
    plan = build(trt, to_onnx(block, program.bodies[block.name]), engine_signature(block)).plan
    driver: Any = FakeDriver([])
    with pytest.raises(BackendUnavailableError, match=r"tensorrt_rtx 1\..* does not run the engine"):
        deserialize(trt, driver, plan, engine_signature(block), BUCKETS, "block 'first'")
