"""compile(), end to end: what comes out works, keeps its word, and says what it did."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from trained import SmallResNet, stripes, trained_network

import exitcompiler
from exitcompiler import delivery
from exitcompiler.candidates import build_program
from exitcompiler.compiler import Details, compile_in_detail
from exitcompiler.data import Rows
from exitcompiler.errors import (
    BackendUnavailableError,
    CalibrationError,
    InputError,
    UnsupportedModelError,
)
from exitcompiler.interpreter import interpret
from exitcompiler.policies import GoOn, Policy, leave_above
from exitcompiler.profile import programs_times_us
from exitcompiler.settings import Settings
from exitcompiler.training import HeadRecipe

RECIPE = HeadRecipe(epochs=3)
BACKENDS = ("onnxruntime", "openvino", "torch")


@functools.cache
def compiled_details(backend: str) -> Details:
    settings = Settings(0.02, backend=backend, threads=1, max_exits=2, recipe=RECIPE)
    # Whether exits pay on this machine today is not what is tested.
    with mock.patch.object(delivery, "WORTHWHILE", 0.0):
        return compile_in_detail(trained_network(), stripes(1500, seed=2), stripes(1500, seed=3), settings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_those_of_the_oracle(backend: str) -> None:
    details = compiled_details(backend)
    assert details.selection is not None
    compiled = details.compiled
    x, _ = stripes(60, seed=4)
    result = compiled.run(x)
    oracle = interpret(details.selection.chosen.program, {"image": torch.from_numpy(x)})
    agree = result.exit_index == oracle.exit_index
    assert agree.mean() >= 0.98  # a score on the very edge of a threshold may fall to either side
    np.testing.assert_allclose(result.outputs[agree], oracle.outputs["logits"].numpy()[agree], atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_takes_the_same_exit_alone_and_in_a_batch(backend: str) -> None:
    compiled = compiled_details(backend).compiled
    x, _ = stripes(64, seed=5)
    together = compiled.run(x)
    alone = [compiled.run(x[i : i + 1]) for i in range(len(x))]
    assert [int(r.exit_index[0]) for r in alone] == together.exit_index.tolist()
    np.testing.assert_allclose(np.concatenate([r.outputs for r in alone]), together.outputs, atol=1e-5)


def test_the_program_leaves_early_and_keeps_the_accuracy() -> None:
    compiled = compiled_details("onnxruntime").compiled
    x, y = stripes(2000, seed=6)
    result = compiled.run(x)
    assert (result.exit_index < len(compiled.exits)).all()
    assert compiled.exits[0] != "backbone"
    assert (result.exit_index == 0).mean() > 0.2
    plain = compiled.plain(x).argmax(axis=1)
    assert (plain == y).mean() - (result.outputs.argmax(axis=1) == y).mean() < 0.05
    assert result.confidence.min() > 1 / 4


def test_the_model_is_not_changed() -> None:
    model = SmallResNet(width=8, blocks=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exitcompiler.compile(
        model, stripes(400, seed=2), threads=1, backend="torch", max_exits=1, recipe=HeadRecipe(epochs=1)
    )
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_heads() -> None:
    model = SmallResNet(width=8, blocks=2)
    settings = Settings(backend="torch", threads=1, max_exits=1, recipe=HeadRecipe(epochs=1), seed=3)
    first, second = (compile_in_detail(model, stripes(400, seed=2), None, settings) for _ in range(2))
    assert first.table is not None
    assert second.table is not None
    for key, scores in first.table.heads.items():
        np.testing.assert_array_equal(scores.logits, second.table.heads[key].logits)


def test_save_and_load_give_the_same_answers(tmp_path: Path) -> None:
    compiled = compiled_details("onnxruntime").compiled
    compiled.save(tmp_path / "small.exit", torch=True)
    x, _ = stripes(40, seed=7)
    expected = compiled.run(x)
    for backend in BACKENDS:
        loaded = exitcompiler.load(tmp_path / "small.exit", backend=backend, threads=1)
        result = loaded.run(x)
        same = result.exit_index == expected.exit_index
        assert same.mean() >= 0.97
        np.testing.assert_allclose(result.outputs[same], expected.outputs[same], atol=1e-4)
        assert loaded.explain() == compiled.explain()


def test_model_onnx_alone_gives_the_same_answers(tmp_path: Path) -> None:
    import onnxruntime

    compiled = compiled_details("onnxruntime").compiled
    compiled.save(tmp_path / "small.exit")
    session = onnxruntime.InferenceSession((tmp_path / "small.exit" / "model.onnx").read_bytes())
    x, _ = stripes(33, seed=8)
    outputs, exit_index = session.run(None, {"image": x})
    expected = compiled.run(x)
    assert (exit_index == expected.exit_index).mean() >= 0.97
    same = exit_index == expected.exit_index
    np.testing.assert_allclose(outputs[same], expected.outputs[same], atol=1e-4)


def test_the_report_accounts_for_every_exit_and_row() -> None:
    details = compiled_details("onnxruntime")
    report = details.compiled.artifact.report
    assert report["rows"] == {"fit": 1500, "learn": 1200, "certify": 300}
    assert all(entry["reason"] for entry in report["exits"])
    for point in details.compiled.operating_points:
        assert sum(point.estimate.exit_rates.values()) == pytest.approx(1.0)
    certificate = report["certificate"]
    assert certificate["rows"] == 300
    assert certificate["bound"] >= certificate["errors"] / 300
    assert "Certificate" in details.compiled.explain()


def test_without_labels_the_target_is_agreement_with_the_model() -> None:
    x, _ = stripes(500, seed=2)
    settings = Settings(backend="torch", threads=1, max_exits=1, recipe=HeadRecipe(epochs=1))
    details = compile_in_detail(trained_network(), x, None, settings)
    assert details.table is not None
    assert details.table.backbone_correct.all()


def test_batches_from_a_loader_and_dicts_by_name() -> None:
    x, y = stripes(500, seed=2)

    def batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for start in range(0, 500, 64):
            rows = slice(start, start + 64)
            yield {"image": torch.from_numpy(x[rows])}, torch.from_numpy(y[rows])

    settings = Settings(backend="torch", threads=1, max_exits=1, recipe=HeadRecipe(epochs=1))
    loader: list[Any] = list(batches())
    details = compile_in_detail(trained_network(), batches(), loader, settings)
    assert len(details.split.learn) + len(details.split.certify) == 500


def test_a_latency_budget_is_kept_or_said_to_be_impossible() -> None:
    details = compiled_details("onnxruntime")
    assert details.costs is not None
    settings = Settings(
        latency_budget_ms=details.costs.whole_us / 1e6,
        backend="onnxruntime",
        threads=1,
        max_exits=1,
        recipe=HeadRecipe(epochs=1),
    )
    with pytest.raises(InputError, match="fastest"):
        compile_in_detail(trained_network(), stripes(500, seed=2), None, settings)


def test_a_network_too_small_for_exits_is_refused_and_still_answers() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4)).eval()
    x, y = stripes(400, seed=2)
    compiled = exitcompiler.compile(model, (x, y), threads=1, backend="onnxruntime", recipe=RECIPE)
    assert compiled.exits == ("backbone",)
    assert compiled.artifact.report["refused"]
    assert "no exits were added" in compiled.explain()
    np.testing.assert_allclose(compiled(x[:5]), model(torch.from_numpy(x[:5])).detach().numpy(), atol=1e-5)


def test_programs_of_several_rounds_are_timed_together() -> None:
    details = compiled_details("onnxruntime")
    assert details.table is not None
    assert details.candidates is not None
    exits = details.table.exits
    assert len(exits) == 2
    rules = [leave_above("deep", ((name, "deep"),), (1.0, 0.0, 0.0), -0.9) for name in exits]
    x, _ = stripes(4, seed=5)
    programs = [
        build_program(details.candidates, Policy(details.table.topology, decisions)).blocks
        for decisions in ((rules[0], rules[1]), (GoOn(), rules[1]), (rules[0], GoOn()))
    ]
    sample = Rows({"image": torch.from_numpy(x)}, None)
    times = programs_times_us(programs, details.engines, sample, 1, repeats=3)
    assert [len(part) for part in times] == [3, 2, 2]
    assert all(time > 0 for part in times for time in part)


def test_exits_that_do_not_pay_are_refused_with_the_measured_figure(tmp_path: Path) -> None:
    settings = Settings(
        0.02, backend="onnxruntime", threads=1, max_exits=2, recipe=RECIPE, dump=tmp_path / "dump"
    )
    with mock.patch.object(delivery, "WORTHWHILE", 1e6):
        details = compile_in_detail(trained_network(), stripes(600, seed=2), stripes(600, seed=3), settings)
    report = details.compiled.artifact.report
    assert "measured speed-up" in report["refused"] or "no exit pays" in report["refused"]
    assert details.compiled.exits == ("backbone",)
    assert [point.name for point in details.compiled.operating_points] == ["plain"]
    assert [entry["name"] for entry in report["frontier"] if entry["chosen"]] == ["plain"]
    assert 0.5 < details.compiled.operating_point.estimate.accuracy < 1.0
    assert "branch" in (tmp_path / "dump" / "000-insert-exits.after.txt").read_text()


class _BatchMean(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1)[:, :4] - image.mean()


X, Y = stripes(400, seed=2)
BAD_DATA: dict[str, tuple[Any, str]] = {
    "empty": ((X[:0], Y[:0]), "too few|rows along dim 0"),
    "tiny": ((X[:50], Y[:50]), "50 rows are too few"),
    "one class": ((X, np.zeros_like(Y)), "all rows have label 0"),
    "label too high": ((X, Y + 1), "label 4 is out of range"),
    "label below zero": ((X, Y - 1), "label -1 is below 0"),
    "labels too short": ((X, Y[:-1]), "one per row"),
    "labels not whole": ((X, Y.astype(np.float32)), "whole class numbers"),
    "NaN": ((np.where(np.arange(400)[:, None, None, None] == 300, np.float32("nan"), X), Y), "NaN or Inf"),
    "wrong shape": ([(X[:200], Y[:200]), (X[200:, :, :8], Y[200:])], "rows of different types"),
    "no iterable": (3, "there is no data"),
    "no batches": ([], "there is no data"),
    "labels here and there": ([(X[:200], Y[:200]), X[200:]], "some batches have labels"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_calibration_data_is_named(case: str) -> None:
    data, message = BAD_DATA[case]
    with pytest.raises((CalibrationError, InputError), match=message):
        exitcompiler.compile(trained_network(), data, backend="torch", threads=1)


def test_bad_options_are_named() -> None:
    model = trained_network()
    for options, message in (
        ({"max_accuracy_drop": 1.5}, "not a share"),
        ({"max_accuracy_drop": 0.01, "latency_budget_ms": 1.0}, "both given"),
        ({"latency_budget_ms": -1.0}, "not a positive time"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"threads": 0}, "threads=0"),
    ):
        with pytest.raises(InputError, match=message):
            exitcompiler.compile(model, (X, Y), **options)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailableError, match="bf16"):
        exitcompiler.compile(model, (X, Y), backend="onnxruntime", precision="bf16")


def test_a_model_that_mixes_rows_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="row"):
        exitcompiler.compile(_BatchMean(), (X, Y), backend="torch", threads=1)
