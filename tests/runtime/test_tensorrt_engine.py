"""Engines on a device of paper: the order in which a context is set up, and everything that is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_tensorrt import FakeDriver, FakeTensorRt, rewritten
from onnx_programs import chain, to_onnx

from exitcompiler.controlflow import engine_signature
from exitcompiler.errors import ArtifactError, BackendUnavailableError, DeviceError, LoweringError
from exitcompiler.runtime.device import DeviceArray
from exitcompiler.runtime.tensorrt_api import TensorRt, _prepared
from exitcompiler.runtime.tensorrt_build import BuildSettings, Profile, build_plan
from exitcompiler.runtime.tensorrt_engine import Scratch, TensorRtEngine, deserialize

PROGRAM = chain()
BLOCK = PROGRAM.flow.entry
MODEL = to_onnx(BLOCK, PROGRAM.bodies[BLOCK.name])
SIGNATURE = engine_signature(BLOCK)
PROFILES = (Profile.of(1), Profile.of(4))
WHERE = "block 'first'"


class Paper:
    """A TensorRT, a device, and a plan."""

    def __init__(self, flavour: str = "tensorrt", version: str = "10.16.1.11") -> None:
        self.module = FakeTensorRt(flavour, version)
        self.trt: TensorRt = _prepared(self.module, flavour)
        self.driver: Any = FakeDriver(self.module.calls)
        self.scratch = Scratch(self.driver)
        self.plan = build_plan(self.trt, MODEL, SIGNATURE, BuildSettings(PROFILES)).plan

    def load(self, plan: bytes | None = None, jit: Any = None) -> TensorRtEngine:
        plan = self.plan if plan is None else plan
        loaded = deserialize(self.trt, self.driver, plan, SIGNATURE, PROFILES, WHERE)
        return TensorRtEngine(self.trt, self.driver, loaded, SIGNATURE, PROFILES, self.scratch, WHERE, jit)

    def arrays(self, rows: int) -> tuple[list[DeviceArray], list[DeviceArray]]:
        inputs, outputs = (
            [
                DeviceArray(
                    4096 * (i + j + 1),
                    tuple(rows if axis == spec.batch_axis else int(n) for axis, n in enumerate(spec.shape)),
                    spec.dtype,
                )
                for j, spec in enumerate(specs.values())
            ]
            for i, specs in ((0, SIGNATURE.inputs), (100, SIGNATURE.outputs))
        )
        return inputs, outputs


TENSORRT_10 = ("tensorrt", "10.16.1.11")
TENSORRT_11 = ("tensorrt", "11.4.0.106")
TENSORRT_RTX = ("tensorrt_rtx", "1.7.1.116")


@pytest.fixture(params=[TENSORRT_10, TENSORRT_11, TENSORRT_RTX])
def paper(request: pytest.FixtureRequest) -> Paper:
    return Paper(*request.param)


def test_everything_is_final_before_the_first_run_and_one_run_comes_before_the_capture(paper: Paper) -> None:
    engine = paper.load()
    paper.module.calls.clear()
    captured = engine.capture(4, *paper.arrays(4))
    assert paper.module.calls == [
        "context",
        "memory",
        "profile 1",
        "synchronize",
        "shape x",  # the gate's parameters have no rows
        *(f"address {name}" for name in (*SIGNATURE.inputs, *SIGNATURE.outputs)),
        "execute",
        "synchronize",
        "begin_capture",
        "execute",
        "end_capture",
    ]
    assert captured.graph in paper.driver.graphs
    assert paper.driver.streams == set()
    assert captured.destroy is not None
    captured.destroy()
    assert paper.driver.graphs == set()


def test_the_engine_says_what_it_is(paper: Paper) -> None:
    engine = paper.load()
    assert engine.signature == SIGNATURE
    assert engine.profiles == PROFILES
    assert engine.scratch_bytes == 3001


def test_all_engines_work_in_one_piece_of_memory_and_it_goes_with_the_last_graph() -> None:
    paper = Paper()
    engine, larger = paper.load(), paper.load(rewritten(paper.plan, scratch=9000))
    captured = [e.capture(rows, *paper.arrays(rows)) for e, rows in ((engine, 1), (engine, 4), (larger, 4))]
    contexts = [c.keep[0] for c in captured]  # type: ignore[index]
    assert len({context.memory for context in contexts}) == 1
    assert len(set(map(id, contexts))) == 3
    assert list(paper.driver.memory.values()) == [9001]
    del contexts, captured[:2]

    assert list(paper.driver.memory.values()) == [9001]
    del captured

    assert paper.driver.memory == {}


def test_a_larger_engine_that_comes_late_gets_a_larger_piece() -> None:
    paper = Paper()
    engine = paper.load()
    early = engine.capture(1, *paper.arrays(1))
    late = paper.load(rewritten(paper.plan, scratch=9000)).capture(1, *paper.arrays(1))
    again = engine.capture(4, *paper.arrays(4))
    addresses = [c.keep[0].memory[0] for c in (early, late, again)]  # type: ignore[index]
    assert addresses[0] != addresses[1] == addresses[2]
    assert sorted(paper.driver.memory.values()) == [3001, 9001]


def test_of_a_range_and_a_profile_for_exactly_so_many_rows_the_latter_is_taken() -> None:
    paper = Paper()
    profiles = (Profile(1, 8, 8), Profile.of(4))
    plan = build_plan(paper.trt, MODEL, SIGNATURE, BuildSettings(profiles)).plan
    loaded = deserialize(paper.trt, paper.driver, plan, SIGNATURE, profiles, WHERE)
    engine = TensorRtEngine(paper.trt, paper.driver, loaded, SIGNATURE, profiles, paper.scratch, WHERE)
    for rows, profile in ((4, 1), (3, 0), (8, 0)):
        paper.module.calls.clear()
        engine.capture(rows, *paper.arrays(rows))
        assert f"profile {profile}" in paper.module.calls
    with pytest.raises(LoweringError, match=r"built for 1\.\.8, 4 rows, not for 9"):
        engine.capture(9, *paper.arrays(9))


def test_rows_without_a_profile_are_refused(paper: Paper) -> None:
    with pytest.raises(LoweringError, match="built for 1, 4 rows, not for 2"):
        paper.load().capture(2, *paper.arrays(2))


@pytest.mark.parametrize(
    ("trouble", "error", "says"),
    [
        ("context", LoweringError, "cannot make an execution context: cannot make a context"),
        ("profile", LoweringError, "cannot take the profile for 4 rows"),
        ("run", LoweringError, "cannot run: enqueue failed: illegal"),
        ("capture", LoweringError, "cannot be captured: enqueue failed: illegal"),
        ("shapes", ArtifactError, r"output 'h' would be \[4, 6\] instead of \[4, 5\]"),
    ],
)
def test_a_failed_capture_names_the_block_and_leaves_nothing(
    paper: Paper, trouble: str, error: type[Exception], says: str
) -> None:
    engine = paper.load()
    paper.module.trouble.add(trouble)
    with pytest.raises(error, match=says) as caught:
        engine.capture(4, *paper.arrays(4))
    assert "block 'first'" in str(caught.value)
    del caught

    assert not paper.driver.capturing
    assert (paper.driver.memory, paper.driver.graphs, paper.driver.streams) == ({}, set(), set())


def test_an_invalidated_capture_names_the_block_and_leaves_nothing() -> None:
    paper = Paper()
    engine = paper.load()
    paper.driver.invalid = True
    with pytest.raises(LoweringError, match=r"block 'first': .*CAPTURE_INVALIDATED") as caught:
        engine.capture(1, *paper.arrays(1))
    del caught

    assert (paper.driver.memory, paper.driver.graphs, paper.driver.streams) == ({}, set(), set())


def test_an_interrupted_capture_is_ended() -> None:
    paper = Paper()
    engine = paper.load()
    paper.module.trouble.add("raise")
    with pytest.raises(RuntimeError, match="interrupted"):
        engine.capture(1, *paper.arrays(1))
    assert not paper.driver.capturing
    assert (paper.driver.graphs, paper.driver.streams) == (set(), set())


def test_rtx_is_asked_whether_it_can_be_captured() -> None:
    paper = Paper("tensorrt_rtx", "1.7.1.116")
    paper.module.trouble.add("uncapturable")
    with pytest.raises(LoweringError, match="cannot be captured"):
        paper.load().capture(1, *paper.arrays(1))
    assert "begin_capture" not in paper.module.calls


def test_kernels_that_rtx_compiled_are_kept() -> None:
    class Kept:
        content: bytes | None = None
        reads = 0

        def read(self) -> bytes | None:
            self.reads += 1
            return self.content

        def write(self, content: bytes) -> None:
            self.content = content

    paper, kept = Paper("tensorrt_rtx", "1.7.1.116"), Kept()
    engine = paper.load(jit=kept)
    for rows in (1, 4):
        engine.capture(rows, *paper.arrays(rows))
    assert kept.content == b"kernel;"
    assert kept.reads == 1
    paper.load(jit=kept).capture(1, *paper.arrays(1))
    assert kept.content == b"kernel;"  # found there, so not compiled again


# ---------------------------------------------------------------- loading


def changed(plan: bytes, name: str, **facts: object) -> bytes:
    tensors = json.loads(plan[28:])["tensors"]
    tensors[name].update(facts)
    return rewritten(plan, tensors=tensors)


def without(plan: bytes, name: str) -> bytes:
    tensors = json.loads(plan[28:])["tensors"]
    del tensors[name]
    return rewritten(plan, tensors=tensors)


def extra(plan: bytes, name: str) -> bytes:
    tensors = json.loads(plan[28:])["tensors"]
    return rewritten(plan, tensors={**tensors, name: {**tensors["h"]}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: changed(p, "x", dtype="HALF"), ["input 'x' is float16 instead of float32"]),
        (lambda p: changed(p, "x", shape=[-1, 5]), ["input 'x' has shape [-1, 5] instead of [-1, 4]"]),
        (lambda p: changed(p, "x", shape=[2, 4]), ["input 'x' has shape [2, 4] instead of [-1, 4]"]),
        (lambda p: changed(p, "h", shape=[2, 5]), ["output 'h' has shape [2, 5] instead of [-1, 5]"]),
        (lambda p: changed(p, "x", shape=[-1, 4, 1]), ["input 'x' has shape [-1, 4, 1]"]),
        (lambda p: changed(p, "action", dtype="INT64"), ["output 'action' is int64 instead of int32"]),
        (lambda p: changed(p, "h", location="HOST"), ["output 'h' is read on the host"]),
        (lambda p: changed(p, "h", format="CHW32"), ["output 'h' has layout ['CHW32']"]),
        (lambda p: without(p, "gate_bias"), ["no input 'gate_bias': float32[2]"]),
        (lambda p: without(p, "early"), ["no output 'early'"]),
        (lambda p: extra(p, "odd"), ["output 'odd': float32[-1, 5] is not known"]),
        (lambda p: rewritten(p, aux_streams=2), ["2 auxiliary streams instead of none"]),
        (lambda p: rewritten(p, profiles=[{"x": [[1, 4]] * 3}]), ["1 profiles instead of 2"]),
        (
            lambda p: rewritten(p, profiles=[{"x": [[1, 4]] * 3}, {"x": []}]),
            ["profile 1 has no shapes for input 'x'"],
        ),
        (
            lambda p: rewritten(p, profiles=[{"x": [[1, 4]] * 3}, {"x": [[1, 4], [4, 4], [8, 4]]}]),
            ["profile 1 takes 1..8 rows of input 'x', best 4, instead of 4..4, best 4"],
        ),
        (
            lambda p: rewritten(changed(without(p, "h"), "x", dtype="HALF"), aux_streams=1),
            ["no output 'h'", "input 'x' is float16", "1 auxiliary streams"],
        ),
    ],
)
def test_another_engine_is_refused_with_every_difference(change: Any, says: list[str]) -> None:
    paper = Paper()
    with pytest.raises(ArtifactError, match="block 'first': the engine is not the one") as caught:
        paper.load(change(paper.plan))
    for text in says:
        assert text in str(caught.value)
    assert caught.value.remedy == "use backend='cuda' for this program"


def test_the_remedy_is_that_of_where_the_engine_comes_from() -> None:
    paper = Paper()
    for plan in (b"damaged", rewritten(paper.plan, aux_streams=2)):
        with pytest.raises(ArtifactError) as caught:
            deserialize(paper.trt, paper.driver, plan, SIGNATURE, PROFILES, WHERE, "ask the cook")
        assert caught.value.remedy == "ask the cook"


@pytest.mark.parametrize("rows", [1, 4])
def test_an_engine_for_one_number_of_rows_may_say_so_of_its_shapes(paper: Paper, rows: int) -> None:
    profiles = (Profile.of(rows),)
    plan = build_plan(paper.trt, MODEL, SIGNATURE, BuildSettings(profiles)).plan
    loaded = deserialize(paper.trt, paper.driver, plan, SIGNATURE, profiles, WHERE)
    assert loaded.engine.get_tensor_shape("x") == [rows, 4]
    assert loaded.engine.get_tensor_shape("h") == [rows, 5]
    engine = TensorRtEngine(paper.trt, paper.driver, loaded, SIGNATURE, profiles, paper.scratch, WHERE)
    engine.capture(rows, *paper.arrays(rows))
    with pytest.raises(ArtifactError, match=rf"takes {rows}\.\.{rows} rows of input 'x'"):
        deserialize(paper.trt, paper.driver, plan, SIGNATURE, (Profile.of(2),), WHERE)


@pytest.mark.parametrize("rows", [-1, 1, 4])
def test_shapes_may_have_the_rows_of_any_profile(rows: int) -> None:
    paper = Paper()
    plan = changed(changed(paper.plan, "x", shape=[rows, 4]), "h", shape=[rows, 5])
    paper.load(plan)


@pytest.mark.parametrize(
    ("built", "here"),
    [
        (("tensorrt", "10.1.0.27"), ("tensorrt", "10.16.1.11")),
        (("tensorrt", "10.16.1.10"), ("tensorrt", "10.16.1.11")),
        (("tensorrt_rtx", "1.7.1.116"), ("tensorrt", "11.4.0.106")),
    ],
)
def test_an_engine_of_another_version_is_never_given_to_tensorrt(
    built: tuple[str, str], here: tuple[str, str]
) -> None:
    plan, paper = Paper(*built).plan, Paper(*here)
    with pytest.raises(ArtifactError, match=f"built by {built[0]} {built[1]}, here is {here[0]} {here[1]}"):
        paper.load(plan)
    assert "deserialize" not in paper.module.calls


def test_what_is_no_engine_is_never_given_to_tensorrt() -> None:
    paper = Paper()
    with pytest.raises(ArtifactError, match="not a TensorRT engine"):
        paper.load(b"\x08\x0a onnx?")
    assert "deserialize" not in paper.module.calls


@pytest.mark.parametrize(
    ("flavour", "trouble", "error", "says"),
    [
        (TENSORRT_10, "load", ArtifactError, "cannot load the engine: magic tag"),
        (TENSORRT_10, "no room", DeviceError, "out of memory"),
        (
            TENSORRT_RTX,
            "UNSUPPORTED_CC",
            BackendUnavailableError,
            "UNSUPPORTED_CC\n.*backend='cuda'",
        ),
        (
            TENSORRT_RTX,
            "OLD_CUDA_DRIVER",
            BackendUnavailableError,
            "OLD_CUDA_DRIVER\n.*upgrade the NVIDIA driver",
        ),
        (TENSORRT_RTX, "VERSION_MISMATCH", ArtifactError, "VERSION_MISMATCH"),
        (TENSORRT_RTX, "MALFORMED_ENGINE", ArtifactError, "MALFORMED_ENGINE"),
        (TENSORRT_RTX, "INSUFFICIENT_GPU_MEMORY", DeviceError, "INSUFFICIENT_GPU_MEMORY"),
    ],
)
def test_a_device_that_does_not_take_the_engine_is_an_error(
    flavour: tuple[str, str], trouble: str, error: type[Exception], says: str
) -> None:
    paper = Paper(*flavour)
    paper.module.trouble.add(trouble)
    with pytest.raises(error, match=says):
        paper.load()
