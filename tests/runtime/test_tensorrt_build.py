"""What a build asks of TensorRT, and what it says when it goes wrong; on a TensorRT of paper."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_tensorrt import FakeTensorRt
from onnx_programs import chain, to_onnx

from exitcompiler.controlflow import EngineSignature, ValueSpec, engine_signature
from exitcompiler.errors import DeviceError, LoweringError
from exitcompiler.runtime.tensorrt_api import TensorRt, _prepared
from exitcompiler.runtime.tensorrt_build import BuildSettings, Profile, build_plan

PROGRAM = chain()
BLOCK = PROGRAM.flow.entry
MODEL = to_onnx(BLOCK, PROGRAM.bodies[BLOCK.name])
SIGNATURE = engine_signature(BLOCK)
SETTINGS = BuildSettings((Profile.of(1), Profile.of(4)))


def prepared(flavour: str = "tensorrt", version: str = "10.16.1.11") -> TensorRt:
    return _prepared(FakeTensorRt(flavour, version), flavour)


@pytest.mark.parametrize("version", ["10.1.0.27", "11.4.0.106"])
def test_networks_are_strongly_typed_whether_that_has_to_be_asked_for_or_not(version: str) -> None:
    trt = prepared(version=version)
    built = build_plan(trt, MODEL, SIGNATURE, SETTINGS)  # the fake refuses a weakly typed one
    assert trt.module.builds == 1
    assert built.plan.startswith(b"ftrt")


def test_every_bucket_is_a_profile_for_exactly_its_rows() -> None:
    built = build_plan(prepared(), MODEL, SIGNATURE, SETTINGS)
    facts = json.loads(built.plan[28:])
    assert facts["profiles"] == [{"x": [[1, 4]] * 3}, {"x": [[4, 4]] * 3}]
    assert facts["aux_streams"] == 0


def test_a_range_of_rows_is_a_profile_too() -> None:
    built = build_plan(prepared(), MODEL, SIGNATURE, BuildSettings((Profile(1, 4, 8),)))
    assert json.loads(built.plan[28:])["profiles"] == [{"x": [[1, 4], [4, 4], [8, 4]]}]


def test_float32_is_not_tf32_and_details_are_kept_only_where_asked_for() -> None:
    trt = prepared()
    build_plan(trt, MODEL, SIGNATURE, SETTINGS)
    build_plan(trt, MODEL, SIGNATURE, BuildSettings((Profile.of(1),), detailed=True))
    plain, detailed = trt.module.configs
    assert plain.flags == detailed.flags == set()
    assert plain.profiling_verbosity.name == "LAYER_NAMES_ONLY"
    assert detailed.profiling_verbosity.name == "DETAILED"


def test_timings_of_an_earlier_build_are_used_and_those_after_it_are_handed_back() -> None:
    trt = prepared()
    first = build_plan(trt, MODEL, SIGNATURE, SETTINGS)
    assert first.timings == b"timed;"
    assert build_plan(trt, MODEL, SIGNATURE, SETTINGS, timings=first.timings).timings == b"timed;timed;"


def test_timings_that_do_not_fit_are_dropped_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    built = build_plan(prepared(), MODEL, SIGNATURE, SETTINGS, timings=b"of another device")
    assert built.timings == b"timed;"
    assert "does not take the timing cache" in caplog.text


def test_a_tensorrt_that_compiles_when_loading_is_given_no_timing_cache() -> None:
    built = build_plan(prepared("tensorrt_rtx", "1.7.1.116"), MODEL, SIGNATURE, SETTINGS)
    assert built.timings is None


def test_a_device_can_be_named_where_tensorrt_builds_without_one() -> None:
    trt = prepared("tensorrt_rtx", "1.7.1.116")
    build_plan(trt, MODEL, SIGNATURE, BuildSettings((Profile.of(1),), compute_capability=(8, 9)))
    (config,) = trt.module.configs
    assert config.num_compute_capabilities == 1
    assert config.compute_capability.name == "SM89"
    with pytest.raises(LoweringError, match=r"does not build for compute capability 9.0"):
        build_plan(trt, MODEL, SIGNATURE, BuildSettings((Profile.of(1),), compute_capability=(9, 0)))
    with pytest.raises(LoweringError, match="builds only for the device that is here"):
        build_plan(prepared(), MODEL, SIGNATURE, BuildSettings((Profile.of(1),), compute_capability=(8, 9)))


@pytest.mark.parametrize(
    ("trouble", "error", "says"),
    [
        ("parse", LoweringError, "does not take the model: In node 3 with name: odd"),
        ("build", LoweringError, "cannot build an engine: no kernels for node conv.0"),
        ("memory", DeviceError, "Out of memory"),
        ("profile", LoweringError, "refuses the profile"),
    ],
)
def test_what_goes_wrong_is_said_in_the_words_of_tensorrt(
    trouble: str, error: type[Exception], says: str
) -> None:
    trt = prepared()
    trt.module.trouble.add(trouble)
    with pytest.raises(error, match=says) as caught:
        build_plan(trt, MODEL, SIGNATURE, SETTINGS, where="block 'first'")
    assert str(caught.value).startswith("block 'first': ")


@pytest.mark.parametrize("change", ["name", "dtype"])
def test_a_model_of_another_block_is_refused(change: str) -> None:
    inputs: dict[str, Any] = dict(SIGNATURE.inputs)
    spec = inputs.pop("x")
    inputs["y" if change == "name" else "x"] = ValueSpec(
        spec.shape, "float16" if change == "dtype" else spec.dtype
    )
    with pytest.raises(LoweringError, match=r"the model's inputs are .*, the program needs"):
        build_plan(prepared(), MODEL, EngineSignature(inputs, SIGNATURE.outputs), SETTINGS)


def test_settings_that_differ_are_different_keys() -> None:
    profiles = (Profile.of(1),)
    several = [
        BuildSettings(profiles),
        BuildSettings((Profile.of(2),)),
        BuildSettings(profiles, compute_capability=(8, 9)),
        BuildSettings(profiles, detailed=True),
    ]
    assert len({json.dumps(settings.to_json()) for settings in several}) == 4
