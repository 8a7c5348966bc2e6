"""Compiling for a GPU, from a network to a saved program, on an emulated CUDA driver."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from emulated_backend import emulated_backend
from emulated_cuda import Emulator
from trained import stripes, trained_family, trained_network

import exitcompiler
from exitcompiler import delivery, profile
from exitcompiler.compiler import Details, compile_in_detail
from exitcompiler.errors import ArtifactError, BackendUnavailableError, InputError
from exitcompiler.interpreter import interpret
from exitcompiler.runtime import device_engines
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.loading import load, open_artifact
from exitcompiler.settings import Settings
from exitcompiler.training import HeadRecipe

pytest.importorskip("onnxruntime")

PRECISIONS = (
    "fp32",
    "fp16",
    pytest.param("bf16", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with ExitStack() as stack:
        emulator = stack.enter_context(emulated_backend())
        # Neither how fast this machine emulates is tested, nor whether exits pay on it.
        for module, name, value in (
            (delivery, "WORTHWHILE", 0.0),
            (delivery, "SPEEDUP_REPEATS", 30),
            (device_engines, "TIMED_RUNS", 1),
            (profile, "LIMIT_S", 0.0),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield emulator
        compiled_details.cache_clear()
        gc.collect()


@functools.cache
def compiled_details(precision: str) -> Details:
    settings = Settings(
        0.01, backend="cuda", precision=precision, threads=1, max_exits=1, recipe=HeadRecipe(epochs=3)
    )
    return compile_in_detail(trained_network(), stripes(800, seed=2), stripes(1500, seed=3), settings)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_answers_are_those_of_the_oracle(precision: str, emulator: Emulator) -> None:
    details = compiled_details(precision)
    compiled = details.compiled
    assert (compiled.backend.name, compiled.manifest.precision) == ("cuda", precision)
    assert compiled.execution == "blocks"
    assert f"on cuda, in {precision}, for batches of 1, in one launch" in " ".join(compiled.explain().split())
    assert details.selection is not None
    x, _ = stripes(70, seed=4)  # more than one launch takes
    result = compiled.run(x)
    assert len(set(result.exit_index.tolist())) > 1
    oracle = interpret(details.selection.chosen.program, {"image": torch.from_numpy(x)})
    agree = result.exit_index == oracle.exit_index
    assert agree.mean() >= 0.97
    np.testing.assert_allclose(result.outputs[agree], oracle.outputs["logits"].numpy()[agree], atol=1e-2)
    for row in range(3):
        alone = compiled.run(torch.from_numpy(x[row : row + 1]))
        assert alone.exit_index.tolist() == [result.exit_index[row]]
        np.testing.assert_allclose(alone.outputs[0], result.outputs[row], atol=1e-2)
        np.testing.assert_allclose(alone.confidence[0], result.confidence[row], atol=1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_and_blocks_are_of_the_precision(precision: str, emulator: Emulator) -> None:
    details = compiled_details(precision)
    assert details.candidates is not None
    low = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    first, second = details.candidates.program.blocks
    assert [spec.dtype for spec in second.params.values()] == [low]
    assert details.table is not None
    rows = stripes(800, seed=2)[0][details.split.learn][:8]
    key, scored = next(iter(details.table.heads.items()))
    head = details.candidates.heads[key]
    with torch.no_grad():
        values = first.run({"image": torch.from_numpy(rows)})
        expected, *_ = head.body(*(values[n.name] for n in head.body.graph.find_nodes(op="placeholder")))
    np.testing.assert_allclose(scored.logits[:8], expected, atol={"fp32": 1e-5}.get(precision, 0.1))
    assert details.costs is not None
    assert all(time >= 0.0 for time in details.costs.segment_us)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_save_and_load(precision: str, emulator: Emulator, tmp_path: Path) -> None:
    compiled = compiled_details(precision).compiled
    compiled.save(tmp_path / "m.exit")
    x, _ = stripes(9, seed=5)
    expected = compiled.run(x)
    loaded = load(tmp_path / "m.exit")
    assert (loaded.backend.name, loaded.backend.precision, loaded.notes) == ("cuda", precision, ())
    np.testing.assert_array_equal(loaded(x), expected.outputs)
    np.testing.assert_array_equal(loaded.plain(x), compiled.plain(x))
    compiled.save(tmp_path / "small.exit", torch=False)
    with pytest.raises(ArtifactError, match="no torch graph of block"):
        load(tmp_path / "small.exit", backend="cuda")(x)


def test_one_call_is_one_launch_and_one_wait(emulator: Emulator) -> None:
    compiled = compiled_details("fp32").compiled
    for rows in (1, 5):
        x, _ = stripes(rows, seed=6)
        compiled(x)
        counted = ("cuGraphLaunch", "host_syncs", "cuMemAlloc")
        before = {name: emulator.count(name) for name in counted}
        compiled(x)
        assert [emulator.count(name) - before[name] for name in counted] == [1, 1, 0]


def test_what_is_wrong_with_the_inputs_is_said_as_everywhere(emulator: Emulator) -> None:
    compiled = compiled_details("fp32").compiled
    x, _ = stripes(2, seed=6)
    bad = x.copy()
    bad[1] = np.nan
    for rows, message in ((bad, "row 1 holds NaN"), (x[:, :, :5], "expected float32"), (x[:0], "0 rows")):
        with pytest.raises(InputError, match=message):
            compiled(rows)
    assert "1 thread" not in repr(compiled)


def test_memory_goes_with_the_model(emulator: Emulator) -> None:
    compiled = compiled_details("fp32").compiled
    x, _ = stripes(2, seed=6)
    gc.collect()
    before = emulator.alive()
    other = open_artifact(compiled.artifact, "cuda")
    other(x)
    assert emulator.alive()["device allocations"] > before["device allocations"]
    driver = other.backend.driver  # type: ignore[attr-defined]
    del other
    assert emulator.alive()["device allocations"] == before["device allocations"]  # at once, in no circle
    driver.close()


def test_without_a_gpu(emulator: Emulator, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        compiled_details(precision).compiled.save(tmp_path / precision)
    with mock.patch("exitcompiler.runtime.backends._has_gpu", return_value=False):
        model = load(tmp_path / "fp32")
        assert model.backend.name == "onnxruntime"
        assert model.notes == (
            "compiled and measured for cuda, running on onnxruntime: cuda needs an NVIDIA GPU, "
            "and there is none here",
        )
        x, _ = stripes(5, seed=7)
        np.testing.assert_allclose(model(x), compiled_details("fp32").compiled(x), atol=1e-3)
        with pytest.raises(
            BackendUnavailableError,
            match=r"cuda needs an NVIDIA GPU.*no precision 'fp16'.*\n.*precision='fp32'",
        ):
            load(tmp_path / "fp16")
    assert read_artifact(tmp_path / "fp16").manifest.environment["device"] == "Emulated"


def test_a_cascade(emulator: Emulator) -> None:
    compiled = exitcompiler.cascade(
        trained_family()[:2], stripes(800, seed=2), backend="cuda", precision="fp16", threads=1,
        max_accuracy_drop=0.05,
    )  # fmt: skip
    x, y = stripes(200, seed=8)
    result = compiled.run(x)
    assert (result.outputs.argmax(axis=1) == y).mean() > 0.8
    assert compiled.backend.precision == "fp16"
