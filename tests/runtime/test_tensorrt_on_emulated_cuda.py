"""Whole programs with the TensorRT backend, on an emulated driver, with a stand-in for TensorRT itself.

What is real: the backend, its contexts and captures, shared memory, the graph, the kernels. What stands in
computes each block with ONNX Runtime, on the memory that it was given, after spoiling all of its scratch.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from emulated_cuda import Emulator, emulated_device, kernel_image, primary_context
from fake_tensorrt import FakeTensorRt
from onnx_programs import TestProgram, artifact_of, cascade, chain, diamond, plain, random_rows

from exitcompiler.errors import ArtifactError, LoweringError
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_executor import DeviceExecutor
from exitcompiler.runtime.loading import open_artifact
from exitcompiler.runtime.tensorrt_backend import TensorRtBackend
from exitcompiler.trtexec_export import export_trtexec

Make = Callable[[int], TestProgram]


@functools.lru_cache(maxsize=32)
def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def launcher(emulator: Emulator) -> Callable[[Any, int], None]:
    """What `FakeTensorRt.launch` does: one kernel that runs the block."""

    def launch(context: Any, stream: int) -> None:
        facts, memory = context.engine.facts, context.memory
        addresses, rows = dict(context.addresses), next(iter(context.rows.values()))
        model = bytes.fromhex(facts["model"])

        def body() -> None:
            def view(name: str) -> Any:
                tensor = facts["tensors"][name]
                shape = [rows if n == -1 else n for n in tensor["shape"]]
                dtype = {"FLOAT": "float32", "INT32": "int32"}[tensor["dtype"]]
                return emulator.view(addresses[name], shape, dtype)

            emulator.view(memory[0], [memory[1]], "uint8")[...] = 0xA5
            found = session(model)
            given = {value.name: np.array(view(value.name)) for value in found.get_inputs()}
            names = [value.name for value in found.get_outputs()]
            for name, result in zip(names, found.run(names, given), strict=True):
                view(name)[...] = result

        function = emulator.host_function(body, "tensorrt")
        with primary_context() as (cuda, _):
            cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, 0, 0)

    return launch


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Emulator, Driver, FakeTensorRt]]:
    versions = {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}
    module = FakeTensorRt(request.param, versions[request.param])
    monkeypatch.setitem(sys.modules, request.param, module)
    with emulated_device() as emulator:
        module.launch = launcher(emulator)
        driver = Driver.open()
        yield emulator, driver, module
        gc.collect()
        driver.close()
        assert emulator.alive() == {}
        assert emulator.take_violations() == []


def make_backend(driver: Driver, module: FakeTensorRt, *buckets: int) -> TensorRtBackend:
    return TensorRtBackend(driver=driver, buckets=buckets, cache=None, flavour=module.__name__)


def make_executor(program: TestProgram, backend: TensorRtBackend) -> DeviceExecutor:
    artifact = artifact_of(program)
    point = artifact.manifest.operating_points[0]
    return DeviceExecutor(
        program.flow,
        lambda block: backend.load_device_block(artifact.files, point, block),
        backend.driver,
        buckets=backend.buckets,
        compile_image=lambda _: kernel_image(),
    )


def check(program: TestProgram, executor: DeviceExecutor, rows: np.ndarray[Any, Any]) -> None:
    outputs, exits = executor.run([rows], len(rows))
    answers = [program.answer_row(row) for row in rows]
    np.testing.assert_array_equal(outputs[0], np.stack([logits for logits, _ in answers]))
    assert [program.flow.exits[i] for i in exits] == [name for _, name in answers]


@pytest.mark.parametrize("make", [chain, cascade, diamond])
def test_programs_answer_as_each_row_alone(make: Make, device: tuple[Emulator, Driver, FakeTensorRt]) -> None:
    _, driver, module = device
    backend = make_backend(driver, module, 1, 2, 4, 8)
    program = make(3)
    executor = make_executor(program, backend)
    for seed, count in enumerate((1, 2, 7, 8, 19, 1)):
        check(program, executor, random_rows(count, seed))
    assert module.builds == len(program.flow.blocks)  # one engine a block, for one row and for many
    executor.close()


@pytest.mark.parametrize("buckets", [(1,), (4,), (3, 8)])
def test_programs_run_in_the_buckets_that_engines_were_built_for(
    buckets: tuple[int, ...], device: tuple[Emulator, Driver, FakeTensorRt]
) -> None:
    _, driver, module = device
    program = diamond(3)
    executor = make_executor(program, make_backend(driver, module, *buckets))
    for seed, count in enumerate((1, 2, 5, 9)):
        check(program, executor, random_rows(count, seed))
    executor.close()


def test_a_folder_of_engines_is_loaded_and_runs_in_its_buckets(
    device: tuple[Emulator, Driver, FakeTensorRt], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From export to answers; in the place of build.sh stands a backend that keeps what it builds."""
    _, driver, module = device
    artifact = artifact_of(chain(3), plain(3))
    point = artifact.manifest.operating_points[0]
    export_trtexec(artifact, tmp_path, (2, 4))
    for entry in json.loads((tmp_path / "engines.json").read_text())["engines"]:
        cache = tmp_path / entry["block"]
        some = TensorRtBackend(driver=driver, buckets=(2, 4), cache=cache, flavour=module.__name__)
        some.load_device_block(artifact.files, point, point.control_flow.block(entry["block"]))
        (kept,) = cache.glob("*.engine")
        (tmp_path / entry["plan"]).write_bytes(kept.read_bytes().partition(b"\n")[2])
    device_facts = (driver.name, "{}.{}".format(*driver.compute_capability))
    (tmp_path / "device.txt").write_text("\n".join(device_facts))
    module.builds = 0

    monkeypatch.setattr("exitcompiler.runtime.cuda_driver.Driver.open", lambda ordinal: driver)
    executor = functools.partial(DeviceExecutor, compile_image=lambda _: kernel_image())
    monkeypatch.setattr("exitcompiler.runtime.cuda_executor.DeviceExecutor", executor)
    monkeypatch.setattr("exitcompiler.runtime.tensorrt_api.TENSORRT_FLAVOURS", (module.__name__,))
    compiled = open_artifact(artifact, "tensorrt", engines=tmp_path)
    for count in (1, 2, 3, 4, 9):
        rows = random_rows(count, count)
        expected = np.stack([chain(3).answer_row(row)[0] for row in rows])
        np.testing.assert_array_equal(compiled(rows), expected)
    with pytest.raises(ArtifactError, match=r"block 'whole': no engine was built.*\n.*without engines="):
        compiled.plain(random_rows(1))
    assert module.builds == 0


def test_a_call_is_one_launch_whatever_rows_do(device: tuple[Emulator, Driver, FakeTensorRt]) -> None:
    emulator, driver, module = device
    program = chain(3)
    executor = make_executor(program, make_backend(driver, module, 1, 2, 4))
    check(program, executor, random_rows(4, 0))
    launches = emulator.count("cuGraphLaunch")
    for seed in range(1, 4):
        check(program, executor, random_rows(4, seed))
    assert emulator.count("cuGraphLaunch") == launches + 3
    assert "kernel tensorrt" in emulator.executed()
    executor.close()


def test_programs_of_one_backend_share_the_memory_they_work_in(
    device: tuple[Emulator, Driver, FakeTensorRt],
) -> None:
    emulator, driver, module = device
    backend = make_backend(driver, module, 1, 2)
    programs = [chain(3), cascade(4)]
    executors = [make_executor(program, backend) for program in programs]
    before = emulator.count("device allocations")
    for seed in range(3):
        for program, executor in zip(programs, executors, strict=True):
            check(program, executor, random_rows(1, seed))
            check(program, executor, random_rows(2, seed))
    # Each program's values, for one row and for two; and one piece to work in.
    assert emulator.count("device allocations") - before <= 2 * 2 * 2 + 1
    for executor in executors:
        executor.close()


def test_blocks_run_alone_on_arrays_of_the_host(device: tuple[Emulator, Driver, FakeTensorRt]) -> None:
    _, driver, module = device
    program = chain(3)
    artifact = artifact_of(program)
    block = program.flow.entry
    backend = make_backend(driver, module, 1)
    point = artifact.manifest.operating_points[0]
    engine = backend.load_block(artifact.files, point, block)
    gate: Any = block.terminator
    weight, bias = (np.array(part, np.float32) for part in (gate.gate.weight, gate.gate.bias))
    for count in (1, 3, 32, 40):
        rows = random_rows(count, count)
        expected = program.engine(block).run([rows, weight, bias])
        for found, wanted in zip(engine.run([rows, weight, bias]), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_a_block_whose_capture_breaks_is_named_and_leaves_nothing(
    device: tuple[Emulator, Driver, FakeTensorRt],
) -> None:
    emulator, driver, module = device
    program = chain(3)
    executor = make_executor(program, make_backend(driver, module, 1))
    working = module.launch

    def breaking(context: Any, stream: int) -> None:
        assert working is not None
        working(context, stream)
        if stream != driver.stream:
            emulator.break_capture(stream)

    module.launch = breaking
    with pytest.raises(LoweringError, match=r"block 'first': the engine cannot be captured.*INVALIDATED"):
        executor.run([random_rows(1)], 1)
    module.launch = working
    check(program, executor, random_rows(1))
    executor.close()
