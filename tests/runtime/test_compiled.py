"""The compiled model, as a user calls it."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_programs import (
    CLASSES,
    artifact_of,
    cascade,
    chain,
    plain,
    random_rows,
    rows_of,
)

from exitcompiler.controlflow import BlockInterface, ControlFlow, OutputStructure, Return, ValueSpec
from exitcompiler.errors import ArtifactError, InputError
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.inputs import finite_check, require_finite
from exitcompiler.runtime.loading import open_artifact
from exitcompiler.runtime.manifest import Artifact, block_path

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return artifact_of(chain(3), cascade(3), plain(3))


@pytest.fixture
def model(artifact: Artifact) -> CompiledModel:
    return open_artifact(artifact, "onnxruntime")


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_outputs_exits_and_confidence(model: CompiledModel, rows: int) -> None:
    x = random_rows(rows)
    result = model.run(x)
    answers = [chain(3).answer_row(row) for row in x]
    logits = np.stack([a for a, _ in answers])
    np.testing.assert_array_equal(result.outputs, logits)
    np.testing.assert_array_equal(model(x), logits)
    assert [model.exits[i] for i in result.exit_index] == [name for _, name in answers]
    assert (result.exit_index.dtype, result.exit_index.shape) == (np.int32, (rows,))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result.confidence, softmax.max(axis=1), rtol=1e-6)
    assert result.confidence.dtype == np.float32


def test_confidence_does_not_overflow() -> None:
    spec = rows_of(CLASSES)
    flow = ControlFlow(
        {"x": spec}, {"x": spec}, (BlockInterface("pass", {"x": spec}, {}, Return(("x",), "e")),)
    )
    base = artifact_of(plain())
    point = replace(base.manifest.operating_points[0], control_flow=flow, files={})
    manifest = replace(base.manifest, inputs=flow.inputs, outputs=flow.outputs, operating_points=(point,))
    model = open_artifact(Artifact(manifest, {}))
    confidence = model.run(np.array([[1e4, 0, 0], [0, 0, 0]], np.float32)).confidence
    np.testing.assert_allclose(confidence, [1, 1 / 3], rtol=1e-6)


def test_torch_in_torch_out(model: CompiledModel) -> None:
    x = random_rows(5)
    for rows in (x, x[:1]):
        tensor = torch.from_numpy(rows).requires_grad_()
        result = model.run(tensor)
        assert all(isinstance(part, torch.Tensor) for part in (result.outputs, result.exit_index))
        assert result.exit_index.dtype == torch.int32
        np.testing.assert_array_equal(result.outputs.numpy(), model(rows))
        assert isinstance(model(tensor), torch.Tensor)


@pytest.mark.parametrize(
    ("structure", "unwrap"),
    [
        (OutputStructure("tensor"), lambda out: out),
        (OutputStructure("tuple"), lambda out: out[0]),
        (OutputStructure("dict", "logits"), lambda out: out["logits"]),
    ],
)
def test_outputs_come_in_the_models_structure(structure: OutputStructure, unwrap: object) -> None:
    model = open_artifact(artifact_of(plain(3), structure=structure))
    x = random_rows(2)
    found = unwrap(model(x))  # type: ignore[operator]
    np.testing.assert_array_equal(found, np.stack([plain(3).answer_row(row)[0] for row in x]))


@pytest.mark.parametrize("rows", [1, 4])
def test_what_was_returned_is_never_overwritten(model: CompiledModel, rows: int) -> None:
    x = random_rows(rows, 1)
    first = model.run(x)
    kept = [np.array(part) for part in (first.outputs, first.exit_index, first.confidence)]
    model.run(random_rows(rows, 2))
    for part, copy in zip((first.outputs, first.exit_index, first.confidence), kept, strict=True):
        np.testing.assert_array_equal(part, copy)
    np.testing.assert_array_equal(x, random_rows(rows, 1))


def test_any_memory_layout_is_taken(model: CompiledModel) -> None:
    x = random_rows(8)
    for view in (np.asfortranarray(x), x[::2], np.repeat(x, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(model(view), model(np.ascontiguousarray(view)))
        np.testing.assert_array_equal(model(view[:1]), model(np.ascontiguousarray(view[:1])))
    readonly = x.copy()
    readonly.setflags(write=False)
    np.testing.assert_array_equal(model(readonly), model(x))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (random_rows(0), "the batch has 0 rows"),
        (random_rows(2).astype(np.float64), r"found float64\n.*x.astype\(numpy.float32\)"),
        (random_rows(2)[:, :3], r"expected float32\[batch, 4\], found shape \[2, 3\]"),
        (random_rows(1)[0], r"found shape \[4\]\n.*one row needs shape \[1, 4\]"),
        (np.float32(3), "found shape"),
        ([[1.0, 2.0, 3.0, 4.0]], "expected a numpy array or a torch tensor, found list"),
        (None, "found NoneType"),
        (torch.zeros(2, 4, dtype=torch.float64), r"x.to\(torch.float32\)"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(2, 4, device="meta"), r"on device 'meta'\n.*x.cpu\(\)"),
        ({"y": random_rows(1)}, "inputs .'y'. are unknown"),
        ({}, "inputs .'x'. are missing"),
    ],
)
def test_input_that_does_not_fit(model: CompiledModel, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(value)


def test_calling_it_wrongly(model: CompiledModel) -> None:
    x = random_rows(1)
    with pytest.raises(InputError, match="2 inputs given, the model takes 1"):
        model(x, x)
    with pytest.raises(InputError, match="are given twice"):
        model(x, x=x)
    with pytest.raises(InputError, match="are missing"):
        model()
    np.testing.assert_array_equal(model(x=x), model(x))
    np.testing.assert_array_equal(model({"x": x}), model(x))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_input_that_is_not_finite(artifact: Artifact, rows: int, bad: float) -> None:
    x = random_rows(rows)
    x[-1, 2] = bad
    with pytest.raises(InputError, match=rf"row {rows - 1} holds NaN or infinity \(1 such"):
        open_artifact(artifact)(x)
    open_artifact(artifact, check_finite=False)(x)
    x[-1, 2] = 3e38  # overflows when squared, and is fine
    assert np.isfinite(open_artifact(artifact)(x)).all()


def test_only_floats_can_be_not_finite() -> None:
    require_finite("ids", np.array([2**62]))
    finite_check({"ids": np.array([2**62]), "half": np.ones(3, np.float16)})()
    with pytest.raises(InputError, match="input 'large'"):
        finite_check({"large": np.full((1, 9000), np.nan, np.float32)})()
    with pytest.raises(InputError, match="input 'half'"):
        finite_check({"half": np.full((1, 3), np.inf, np.float16)})()


def two_inputs() -> CompiledModel:
    ids, mask = ValueSpec(("batch", CLASSES), "float32"), ValueSpec(("batch", 2), "bool")
    inputs = {"ids": ids, "mask": mask}
    flow = ControlFlow(inputs, {"ids": ids}, (BlockInterface("pass", inputs, {}, Return(("ids",), "e")),))
    base = artifact_of(plain())
    point = replace(base.manifest.operating_points[0], control_flow=flow, files={})
    manifest = replace(base.manifest, inputs=inputs, outputs=flow.outputs, operating_points=(point,))
    return open_artifact(Artifact(manifest, {}))


def test_several_inputs() -> None:
    model = two_inputs()
    ids, mask = np.ones((3, CLASSES), np.float32), np.ones((3, 2), bool)
    for out in (
        model(ids, mask),
        model(ids, mask=mask),
        model(mask=mask, ids=ids),
        model({"mask": mask, "ids": ids}),
    ):
        np.testing.assert_array_equal(out, ids)
    with pytest.raises(InputError, match=r"input 'mask': 2 rows, others have 3"):
        model(ids, mask[:2])
    with pytest.raises(InputError, match=r"'mask'.*are missing"):
        model(ids)


def test_selecting_an_operating_point(model: CompiledModel) -> None:
    assert [p.name for p in model.operating_points] == ["point0", "point1", "point2"]
    assert model.select(max_accuracy_drop=0.02).operating_point.name == "point0"
    assert model.select(max_accuracy_drop=0.015).operating_point.name == "point1"
    assert model.select(latency_budget_ms=2.5).operating_point.name == "point1"
    assert model.select(name="point2").exits == ("backbone",)
    assert model.operating_points.select(latency_budget_ms=100).name == "point2"
    x = random_rows(9)
    np.testing.assert_array_equal(
        model.select(name="point1")(x), np.stack([cascade(3).answer_row(r)[0] for r in x])
    )
    for wrong in ({}, {"name": "x"}, {"latency_budget_ms": 0.1}, {"max_accuracy_drop": -1.0}):
        with pytest.raises(InputError):
            model.select(**wrong)  # type: ignore[arg-type]


def test_operating_points_share_engines(artifact: Artifact) -> None:
    twice = replace(
        artifact,
        manifest=replace(
            artifact.manifest,
            operating_points=(
                artifact.manifest.operating_points[0],
                replace(artifact.manifest.operating_points[0], name="again"),
            ),
            plain=1,
        ),
    )
    model = open_artifact(twice, "onnxruntime")
    other = model.select(name="again")
    model(random_rows(1))
    other(random_rows(4))
    block = model.operating_point.control_flow.entry
    assert model.engine(block, 1) is other.engine(block, None)


def test_another_artifact_of_the_same_files_keeps_the_engines(artifact: Artifact) -> None:
    model = open_artifact(artifact, "onnxruntime")
    block = model.operating_point.control_flow.entry
    engine = model.engine(block, None)
    manifest = replace(artifact.manifest, selected=2)
    changed = replace(artifact, manifest=manifest, files=dict(artifact.files), report={"refused": "so"})
    other = model.with_artifact(changed, notes=["note"])
    assert (other.operating_point.name, other.notes) == ("point2", ("note",))
    assert other.artifact is changed
    again = other.with_artifact(artifact)
    assert again.engine(block, None) is engine
    assert again.notes == ("note",)
    np.testing.assert_array_equal(again(random_rows(3)), model(random_rows(3)))
    more = replace(artifact, files={**artifact.files, "torch/x.json": b"{}"})
    assert model.with_artifact(more).engine(block, None) is not engine


def test_the_certificate_is_saved_with_its_own_point_only(artifact: Artifact, tmp_path: Path) -> None:
    for certificate in ({"bound": 0.02, "point": "point0"}, {"bound": 0.02}):
        model = open_artifact(replace(artifact, manifest=replace(artifact.manifest, certificate=certificate)))
        for name, expected in (("point0", certificate), ("point1", None)):
            model.select(name=name).save(tmp_path / name)
            assert read_artifact(tmp_path / name).manifest.certificate == expected


def test_explain_and_report_are_of_the_point_that_runs(artifact: Artifact, tmp_path: Path) -> None:
    report = {"certificate": {"bound": 0.02, "point": "point0"}}
    model = open_artifact(replace(artifact, report=report))
    assert "not of" not in model.explain()
    other = model.select(name="point1")
    assert "Certificate of point0, not of point1" in other.explain()
    other.report(tmp_path / "page.html")
    assert "Certificate of point0, not of point1" in (tmp_path / "page.html").read_text()


def test_the_plain_backbone(model: CompiledModel) -> None:
    x = random_rows(4)
    np.testing.assert_array_equal(model.plain(x), np.stack([plain(3).answer_row(row)[0] for row in x]))
    assert model.plain.backend is model.backend


@pytest.mark.parametrize("rows", [1, 5])
def test_forced_to_an_exit(model: CompiledModel, rows: int) -> None:
    for index, name in enumerate(model.exits):
        forced = model.forced(name)
        assert forced.run(random_rows(rows)).exit_index.tolist() == [index] * rows
    with pytest.raises(InputError, match="no exit"):
        model.forced("nowhere")
    with pytest.raises(ArtifactError, match="cannot be saved"):
        model.forced(name).save("unused")


def one_file_artifact() -> Artifact:
    from exitcompiler.passes.assemble_onnx import assemble_onnx

    base = artifact_of(chain(3), plain(3))
    point = base.manifest.operating_points[0]
    models = {name: base.files[block_path(file)] for name, file in point.files.items()}
    return artifact_of(chain(3), plain(3), one_file=assemble_onnx(point.control_flow, models))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_one_engine_of_the_one_file_model(backend: str) -> None:
    pytest.importorskip(backend)
    model = open_artifact(one_file_artifact(), backend)
    assert (model.execution, model.plain.execution) == ("single", "blocks")
    assert model.forced("exit1").execution == "blocks"
    blocks = open_artifact(artifact_of(chain(3), plain(3)), backend)
    seen = set()
    for row in random_rows(30):
        result, expected = model.run(row[None]), blocks.run(row[None])
        np.testing.assert_array_equal(result.outputs, expected.outputs)
        np.testing.assert_array_equal(result.exit_index, expected.exit_index)
        seen.add(int(result.exit_index[0]))
    assert seen == {0, 1, 2}


def test_threads_take_turns(model: CompiledModel) -> None:
    x = random_rows(200)
    expected = model(x)
    failures: list[str] = []

    def work(offset: int) -> None:
        for i in range(offset, 200, 4):
            if not np.array_equal(model(x[i : i + 1]), expected[i : i + 1]):
                failures.append(f"row {i}")
            if not np.array_equal(model(x[: i + 2]), expected[: i + 2]):
                failures.append(f"batch {i}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_its_text_says_what_runs(model: CompiledModel) -> None:
    assert repr(model) == (
        "CompiledModel('point0': exits ['exit1', 'exit2', 'backbone'], onnxruntime fp32, 1 thread)"
    )
    assert "test" in model.explain()
