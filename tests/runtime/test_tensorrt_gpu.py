"""TensorRT on a GPU: engines built, kept, captured; whole programs in one launch. For `make gpu-check`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")

from onnx_programs import TestProgram, artifact_of, cascade, chain, diamond, random_rows

from exitcompiler.errors import BackendUnavailableError, LoweringError
from exitcompiler.runtime.cuda_executor import DeviceExecutor
from exitcompiler.runtime.device import DeviceArray
from exitcompiler.runtime.tensorrt_api import installed_flavours
from exitcompiler.runtime.tensorrt_backend import TensorRtBackend

pytestmark = pytest.mark.gpu

Make = Callable[[int], TestProgram]
_CAPTURABLE = {"kernel", "memcpy", "memset", "empty", "graph"}


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> TensorRtBackend:
    if request.param not in installed_flavours():
        pytest.skip(f"{request.param} is not installed")
    try:
        made = TensorRtBackend(buckets=(1, 2, 4), cache=tmp_path, flavour=request.param)
        load(made, chain(3))
    except BackendUnavailableError as error:
        pytest.skip(error.what)
    return made


def load(backend: TensorRtBackend, program: TestProgram) -> Any:
    artifact = artifact_of(program)
    return backend.load_device_block(
        artifact.files, artifact.manifest.operating_points[0], program.flow.entry
    )


def make_executor(program: TestProgram, backend: TensorRtBackend) -> DeviceExecutor:
    artifact = artifact_of(program)
    point = artifact.manifest.operating_points[0]
    return DeviceExecutor(
        program.flow,
        lambda block: backend.load_device_block(artifact.files, point, block),
        backend.driver,
        buckets=backend.buckets,
    )


@pytest.mark.parametrize("make", [chain, cascade, diamond])
def test_programs_answer_as_each_row_alone(make: Make, backend: TensorRtBackend) -> None:
    """All numbers are small integers, so that answers are equal to the bit."""
    program = make(3)
    executor = make_executor(program, backend)
    for seed, count in enumerate((1, 2, 4, 7, 1)):
        rows = random_rows(count, seed)
        outputs, exits = executor.run([rows], count)
        answers = [program.answer_row(row) for row in rows]
        np.testing.assert_array_equal(outputs[0], np.stack([logits for logits, _ in answers]))
        assert [program.flow.exits[i] for i in exits] == [name for _, name in answers]
    executor.close()


def test_a_captured_block_has_only_nodes_that_a_conditional_body_may_have(backend: TensorRtBackend) -> None:
    program, driver = chain(3), backend.driver
    engine = load(backend, program)
    memory: list[int] = []

    def array(spec: Any) -> DeviceArray:
        shape = tuple(4 if axis == spec.batch_axis else int(n) for axis, n in enumerate(spec.shape))
        memory.append(driver.malloc(4096))
        driver.fill(memory[-1], 0, 4096, driver.stream)
        return DeviceArray(memory[-1], shape, spec.dtype)

    captured = engine.capture(
        4,
        [array(spec) for spec in engine.signature.inputs.values()],
        [array(spec) for spec in engine.signature.outputs.values()],
    )
    assert set(driver.node_types(captured.graph)) <= _CAPTURABLE
    assert captured.destroy is not None
    captured.destroy()
    for address in memory:
        driver.free(address)


def test_engines_are_kept(backend: TensorRtBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("exitcompiler.runtime.tensorrt_backend.build_plan", refuse)
    flavour = backend._trt.flavour
    again = TensorRtBackend(buckets=(1, 2, 4), cache=tmp_path, flavour=flavour, driver=backend.driver)
    program = chain(3)
    assert load(again, program).signature == load(backend, program).signature


@pytest.mark.parametrize("static_batch", [None, 1, 40])
def test_blocks_run_alone_on_arrays_of_the_host(backend: TensorRtBackend, static_batch: int | None) -> None:
    program = chain(3)
    artifact, block = artifact_of(program), program.flow.entry
    gate: Any = block.terminator
    weight, bias = (np.array(part, np.float32) for part in (gate.gate.weight, gate.gate.bias))
    point = artifact.manifest.operating_points[0]
    engine = backend.load_block(artifact.files, point, block, static_batch=static_batch)
    for count in (1, 3, 32, 40) if static_batch is None else (static_batch,):
        rows = random_rows(count, count)
        expected = program.engine(block).run([rows, weight, bias])
        for found, wanted in zip(engine.run([rows, weight, bias]), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_rows_without_a_profile_are_refused(backend: TensorRtBackend) -> None:
    with pytest.raises(LoweringError, match="built for 1, 2, 4 rows, not for 3"):
        load(backend, chain(3)).capture(3, [], [])
