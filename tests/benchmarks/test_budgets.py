"""The programs that the check of budgets is tried on are what they should be, and runs are counted right."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_programs
import pytest
from onnx.reference import ReferenceEvaluator

import exitcompiler
from exitcompiler.artifact import save_artifact
from exitcompiler.errors import ArtifactError
from exitcompiler.passes.assemble_onnx import assemble_onnx
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.loading import open_artifact
from exitcompiler.runtime.manifest import MODEL_FILE, Artifact, block_path

Bench = Callable[[str], ModuleType]
X = onnx_programs.random_rows(64)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """Three exits and the plain backbone, one row in one engine."""
    chain = onnx_programs.chain(2)
    blocks = onnx_programs.artifact_of(chain, onnx_programs.plain())
    point = blocks.manifest.operating_points[0]
    models = {name: blocks.files[block_path(file)] for name, file in point.files.items()}
    one_file = assemble_onnx(chain.flow, models)
    return onnx_programs.artifact_of(chain, onnx_programs.plain(), one_file=one_file)


def both_forms(bench: Bench, artifact: Artifact, tmp_path: Path) -> dict[str, CompiledModel]:
    """Saved and loaded again, run either way."""
    variants, models = bench("budgets_variants"), {}
    for form in ("single", "blocks"):
        save_artifact(variants.with_form(artifact, form), tmp_path / f"{form}.exit")
        models[form] = exitcompiler.load(tmp_path / f"{form}.exit")
        assert models[form].execution == form
    return models


def answers(model: CompiledModel) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, since it is there that the form makes a difference."""
    results = [model.run(row[None]) for row in X]
    return (
        np.concatenate([result.outputs for result in results]),
        np.concatenate([result.exit_index for result in results]),
    )


def operators(model: bytes) -> list[str]:
    """Those of a model, branches included."""
    proto = onnx.load_model_from_string(model)
    nodes = list(proto.graph.node)
    for node in nodes:
        nodes += [inner for attribute in node.attribute for inner in attribute.g.node]
    return [node.op_type for node in nodes]


def test_slower_blocks_answer_alike_in_either_form(bench: Bench, artifact: Artifact, tmp_path: Path) -> None:
    expected, exits = answers(open_artifact(artifact))
    assert len(set(exits)) == 3
    slower = bench("budgets_variants").with_slower_blocks(artifact, {"first": 3, "second": 5, "third": 2})
    for model in both_forms(bench, slower, tmp_path).values():
        found, found_exits = answers(model)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_exits, exits)
        np.testing.assert_array_equal(model(X), expected)


def test_extra_work_is_in_the_block_and_in_the_one_file_and_nowhere_else(
    bench: Bench, artifact: Artifact
) -> None:
    slower = bench("budgets_variants").with_slower_blocks(artifact, {"second": 5})
    before, after = (a.manifest.operating_points[0] for a in (artifact, slower))
    assert [name for name in after.files if after.files[name] != before.files[name]] == ["second"]
    for old, new in (
        (artifact.files[block_path(before.files["second"])], slower.files[block_path(after.files["second"])]),
        (artifact.files[MODEL_FILE], slower.files[MODEL_FILE]),
    ):
        assert operators(old).count("Floor") == 0
        assert operators(new).count("Floor") == 1
        assert operators(new).count("MatMul") == operators(old).count("MatMul") + 1
    assert slower.manifest.operating_points[1:] == artifact.manifest.operating_points[1:]


@pytest.mark.parametrize("largest", ["in", "out"])
def test_extra_work_is_done_on_the_largest_value(bench: Bench, largest: str) -> None:
    from onnx import TensorProto, helper, numpy_helper

    shapes = {"in": ("batch", 6, 4), "out": ("batch", 6, 2)} if largest == "in" else {
        "in": ("batch", 6, 2), "out": ("batch", 6, 4)
    }  # fmt: skip
    weight = np.arange(8, dtype=np.float32).reshape(shapes["in"][2], shapes["out"][2])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["in", "w"], ["h"]), helper.make_node("Relu", ["h"], ["out"])],
        "block",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, shapes["in"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shapes["out"])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    changed = bench("budgets_extra_work").with_extra_work(model.SerializeToString(), 7)
    proto = onnx.load_model_from_string(changed)
    reshape = next(node for node in proto.graph.node if node.op_type == "Reshape")
    assert reshape.input[0] == ("in" if largest == "in" else "extra_work/before")
    matrix = next(tensor for tensor in proto.graph.initializer if tensor.name == "extra_work/matrix")
    assert list(matrix.dims) == [24, 7]
    rows = np.random.default_rng(0).standard_normal((3, *shapes["in"][1:])).astype(np.float32)
    (found,) = ReferenceEvaluator(proto).run(None, {"in": rows})
    np.testing.assert_allclose(found, np.maximum(rows @ weight, 0.0), rtol=1e-6)


def test_careful_gates_let_fewer_rows_leave_with_the_same_kernels(
    bench: Bench, artifact: Artifact, tmp_path: Path
) -> None:
    _, before = answers(open_artifact(artifact))
    careful = bench("budgets_variants").with_careful_gates(artifact, 20.0)
    old, new = (a.manifest.operating_points[0] for a in (artifact, careful))
    assert new.files == old.files
    assert careful.manifest.certificate is None
    exits = {name: answers(model)[1] for name, model in both_forms(bench, careful, tmp_path).items()}
    np.testing.assert_array_equal(exits["single"], exits["blocks"])
    assert (exits["blocks"] >= before).all()
    assert (exits["blocks"] > before).any()


def test_a_program_that_has_no_exits_is_refused(bench: Bench, artifact: Artifact) -> None:
    plain = replace(artifact, manifest=replace(artifact.manifest, selected=1, one_file=1))
    with pytest.raises(ArtifactError, match="no exits"):
        bench("budgets_variants").with_form(plain, "blocks")


def test_programs_are_made_until_they_are_as_slow_as_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, artifact: Artifact, tmp_path: Path
) -> None:
    calibrate = bench("budgets_calibrate")
    asked: list[float] = []

    def made(growth: float) -> Artifact:
        asked.append(growth)
        return artifact

    def compared(*_: object, **__: object) -> list[Any]:
        return [calibrate.Comparison(1.0 + 0.5 * asked[-1], 100.0, {}, {}, {}, 1.0)]

    monkeypatch.setattr(calibrate, "compare_apart", compared)
    base = calibrate._Base(artifact, tmp_path, "x.npz", compared_once(calibrate), calibrate.Effort())
    calibrate._calibrate(base, made, tmp_path / "made.exit")
    assert asked == pytest.approx([0.2, 0.4])
    exitcompiler.load(tmp_path / "made.exit")


def compared_once(calibrate: ModuleType) -> Any:
    return calibrate.Comparison(1.0, 100.0, {}, {}, {}, 1.0)


def report(verdict: str = "PASS", named: tuple[str, ...] = (), grown: str = "a") -> dict[str, Any]:
    blocks = [{"name": name, "time": {"value": 1.5 if name == grown else 1.0}} for name in ("a", "b")]
    environment = {
        "cpu": "a processor", "cores": 2, "system": "Linux", "backend": "onnxruntime", "threads": 1,
        "versions": {"onnxruntime": "1"},
    }  # fmt: skip
    return {
        "verdict": verdict,
        "exit_code": {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}[verdict],
        "causes": {"named": list(named), "blocks": blocks},
        "limits": [{"found": {"value": 0.2}}],
        "figures": {"environment": environment, "rows": 397},
    }


def records(kind: str, *reports: dict[str, Any], seconds: float = 9.0) -> list[dict[str, Any]]:
    return [
        {"form": "single", "condition": "idle", "kind": kind, "number": n, "seconds": seconds, "report": r}
        for n, r in enumerate(reports)
    ]


def test_what_has_to_hold_is_counted(bench: Bench) -> None:
    text = bench("budgets_text")
    nineteen = [report("FAIL", ("kernels",))] * 19
    fail, named, in_time = text.targets_of("slower", records("slower", *nineteen, report("INCONCLUSIVE")))
    assert (fail.count, fail.holds, named.count, named.holds, in_time.holds) == (19, True, 19, True, True)
    fail, named, _ = text.targets_of("slower", records("slower", *nineteen[1:], report(), report("FAIL")))
    assert (fail.count, fail.holds, named.count, named.holds) == (19, True, 18, False)
    unchanged = [report()] * 45 + [report("INCONCLUSIVE")] * 4 + [report("FAIL")]
    assert [t.holds for t in text.targets_of("unchanged", records("unchanged", *unchanged))] == [True] * 3
    crying = [*unchanged[1:], report("FAIL")]
    assert [t.holds for t in text.targets_of("unchanged", records("unchanged", *crying))] == [
        False, False, True,
    ]  # fmt: skip
    late = text.targets_of("slower", records("slower", *nineteen, seconds=61.0))
    assert [target.holds for target in late] == [True, True, False]
    assert "**missed**" in str(late[-1])


@pytest.mark.parametrize(
    ("kind", "named", "grown", "right"),
    [
        ("exit mix", ("exit mix",), "a", True),
        ("exit mix", ("kernels", "exit mix"), "a", False),
        ("slower block", ("kernels",), "b", True),
        ("slower block", ("kernels",), "a", False),
        ("slower block", ("exit mix",), "b", False),
    ],
)
def test_a_cause_is_named_right_only_if_no_other_one_is(
    bench: Bench, kind: str, named: tuple[str, ...], grown: str, right: bool
) -> None:
    (record,) = records(kind, report("FAIL", named, grown))
    assert bench("budgets_text").named_right(kind, record, "b" if kind == "slower block" else None) is right


def test_the_table_has_a_line_for_each_program_under_each_condition(bench: Bench) -> None:
    one = {"exits": {"early": 60, "late": 40}, "same_classes": 1.0, "path": "", "block": None}
    made = {
        "slower": {**one, "ratios": [1.19, 1.21], "other_exits": {"early": 60, "late": 40}},
        "exit mix": {**one, "ratios": [1.2, 1.2], "other_exits": {"early": 30, "late": 70}},
    }
    figures = {"date": "2026-11-20", "baselines": 5, "forms": {"single": made}}
    runs = [
        *records("slower", report("FAIL", ("kernels",)), report("PASS")),
        *records("exit mix", report("FAIL", ("exit mix",))),
    ]
    page = bench("budgets_text").section(figures, runs)
    lines = [line for line in page.splitlines() if line.startswith("| idle")]
    assert [line.split(" | ")[1:6] for line in lines] == [
        ["slower kernels, all blocks", "+20.0 ± 0.0 %", "1", "1", "0"],
        ["worse exit mix, same kernels", "+20.0 ± 0.0 %", "0", "1", "0"],
    ]
    assert "FAIL: 1 of 2 (1 to 99 %; at least 95 %) **missed**" in lines[0]
    assert "mean latency 1.200 ± 0.010 x" in page
    assert "60 -> 30 % at `early`" in page


def test_kinds_come_in_random_order_and_the_same_each_time(bench: Bench) -> None:
    runs = bench("budgets_runs")
    planned = runs.plan("idle", {"unchanged": 5, "slower": 4})
    assert sorted((run.kind, run.number) for run in planned) == [
        *(("slower", n) for n in range(4)), *(("unchanged", n) for n in range(5)),
    ]  # fmt: skip
    assert planned == runs.plan("idle", {"unchanged": 5, "slower": 4})
    assert [run.kind for run in planned] != sorted(run.kind for run in planned)


def test_what_was_run_is_not_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = bench("budgets_runs")
    called: list[tuple[str, str]] = []

    def check(workplace: Any, kind: str, budget: Path, baseline: Path, seed: int, *more: str) -> Any:
        assert 'max_increase = "10 %"' in budget.read_text()
        called.append((kind, baseline.name))
        if more == ("--update-baseline",):
            baseline.write_text("{}")
        elif len(called) == 4:
            raise KeyboardInterrupt
        return 1.0, report()

    monkeypatch.setattr(runs, "_call", check)
    place = runs.Workplace(tmp_path, {}, "x.npz", baselines=2)
    planned = runs.plan("idle", {"unchanged": 2, "slower": 2})
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(place, planned)
    assert called[:2] == [("unchanged", "baseline-0.json"), ("unchanged", "baseline-1.json")]
    assert [place.record(run).exists() for run in planned] == [True, False, False, False]
    found = runs.run_all(place, planned)
    assert len(called) == 4 + 3
    assert [(one["kind"], one["number"]) for one in found] == [(run.kind, run.number) for run in planned]
    assert all(
        json.loads(place.record(run).read_text()) == one for run, one in zip(planned, found, strict=True)
    )


def test_a_check_without_a_verdict_stops_everything(bench: Bench, tmp_path: Path) -> None:
    runs = bench("budgets_runs")
    place = runs.Workplace(tmp_path, {"unchanged": tmp_path / "none.exit"}, "x.npz", baselines=1)
    with pytest.raises(RuntimeError, match="exit code 3"):
        runs.run_all(place, [runs.Run("idle", "unchanged", 0)])


def test_other_cores_are_busy_and_idle_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = bench("budgets_runs")
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: {0, 1, 2})
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: list[str]) -> Any:
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr(runs.subprocess, "Popen", start)
    with runs.spinning(False):
        assert started == []
    with runs.spinning(True):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


@pytest.mark.slow
def test_the_script_runs_from_programs_to_page(bench: Bench, artifact: Artifact, tmp_path: Path) -> None:
    """One check of the unchanged program; what it says about a program this small means nothing."""
    save_artifact(artifact, tmp_path / "program.exit")
    np.savez(tmp_path / "rows.npz", x=X)
    arguments = [
        "--artifact", tmp_path / "program.exit", "--data", tmp_path / "rows.npz", "--out", tmp_path / "out",
        "--quick", "--runs", 1, "--worse-runs", 1, "--baselines", 1, "--conditions", "busy",
        "--kinds", "unchanged", "slower", "--max-seconds", 5,
    ]  # fmt: skip
    assert bench("budgets").main([str(argument) for argument in arguments]) in (0, 1)
    page = (tmp_path / "out" / "benchmarks.md").read_text()
    assert page.count("| other cores busy |") == 2
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert {run["kind"] for run in figures["runs"]} == {"unchanged", "slower"}
