"""The command line, with a stand-in for the compiled model where none is needed."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_compiled import FakeCompiled
from sample_report import sample_control_flow, sample_report
from trained import stripes
from typer.testing import CliRunner

import exitcompiler
from exitcompiler.artifact import save_artifact
from exitcompiler.benchmarking import answer_rows, benchmark, logits_of
from exitcompiler.cli import app
from exitcompiler.controlflow import OutputStructure
from exitcompiler.data_sources import input_shape_of_networks
from exitcompiler.errors import CalibrationError
from exitcompiler.frontier import sweep
from exitcompiler.gates import RECIPES
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.manifest import (
    MODEL_FILE,
    Artifact,
    Estimate,
    Manifest,
    OperatingPoint,
    block_path,
)

ROWS = np.array([[3.0, 0.0], [0.0, 2.0], [0.4, 0.0], [1.0, 2.0]], np.float32)
LABELS = np.array([0, 1, 0, 0])


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=ROWS, y=LABELS)
    return path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A saved artifact whose blocks no engine has to read."""
    flow = sample_control_flow()
    contents = {block.name: f"model of {block.name}".encode() for block in flow.blocks}
    files = {name: f"{hashlib.sha256(content).hexdigest()}.onnx" for name, content in contents.items()}
    rates = {"layer1.8": 0.31, "layer2.6": 0.42, "backbone": 0.27}
    point = OperatingPoint("point-1", flow, files, Estimate(0.93, 0.008, 0.012, 0.75, rates))
    manifest = Manifest(
        flow.inputs,
        flow.outputs,
        OutputStructure("tensor"),
        "onnxruntime",
        "fp32",
        1,
        1,
        (point,),
        0,
        0,
        one_file=0,
    )
    pool = {block_path(files[name]): content for name, content in contents.items()}
    path = tmp_path / "model.exit"
    save_artifact(Artifact(manifest, {**pool, MODEL_FILE: b"one file"}, sample_report()), path)
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> FakeCompiled:
    """What loading gives to the commands."""
    from exitcompiler.runtime import artifact_files, loading

    fake = FakeCompiled()
    fake.artifact = artifact_files.read_artifact(artifact)
    monkeypatch.setattr(artifact_files, "read_artifact", lambda path: fake.artifact)
    monkeypatch.setattr(loading, "open_artifact", lambda read, backend, threads: fake)
    return fake


def test_help_lists_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in ("compile", "cascade", "inspect", "run", "bench", "check", "report", "export", "demo"):
        assert command in result.stdout


def test_run_answers_rows(loaded: FakeCompiled, data: Path, tmp_path: Path) -> None:
    result = call("run", "model.exit", "--data", data, "-o", tmp_path / "answers.npz")
    assert result.exit_code == 0, result.stderr
    assert "4 rows, 75.0% right; left at early 50.0%, backbone 50.0%" in result.stdout
    with np.load(tmp_path / "answers.npz") as answers:
        assert answers["prediction"].tolist() == [0, 1, 0, 1]
        assert answers["exit_index"].tolist() == [0, 1, 1, 0]
        assert answers["exits"].tolist() == ["early", "backbone"]


def test_json_is_all_that_is_on_stdout(loaded: FakeCompiled, data: Path) -> None:
    result = call("run", "model.exit", "--data", data, "--json", "--batch-size", 3)
    figures = json.loads(result.stdout)
    assert figures["accuracy"] == 0.75
    assert figures["exit_rates"] == {"early": 0.5, "backbone": 0.5}
    assert [answer["class"] for answer in figures["answers"]] == [0, 1, 0, 1]
    assert "4 rows" in result.stderr


def test_run_stops_after_max_rows(loaded: FakeCompiled, data: Path) -> None:
    figures = json.loads(call("run", "model.exit", "--data", data, "--json", "--max-rows", 3).stdout)
    assert figures["rows"] == 3


def test_max_rows_need_not_be_a_multiple_of_the_batch_size(loaded: FakeCompiled, data: Path) -> None:
    arguments = ("--json", "--max-rows", 3, "--batch-size", 2)
    assert json.loads(call("run", "model.exit", "--data", data, *arguments).stdout)["rows"] == 3


def test_bench_prints_both_programs_and_every_exit(loaded: FakeCompiled, data: Path) -> None:
    result = call("bench", "model.exit", "--data", data, "--json", "--passes", 2)
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["rows"] == 4
    for name in ("program", "plain"):
        assert figures[name]["p50_ms"] <= figures[name]["p95_ms"] <= figures[name]["p99_ms"]
        assert figures[name]["accuracy"] == 0.75
    speedup = figures["speedup"]
    assert speedup["lower"] <= speedup["value"] <= speedup["upper"]
    assert figures["agreement"] == 1.0
    assert [(exit["name"], exit["rate"], exit["accuracy"]) for exit in figures["exits"]] == [
        ("early", 0.5, 0.5),
        ("backbone", 0.5, 1.0),
    ]
    assert "whole network" in result.stderr


def test_inspect_needs_no_backend(artifact: Path) -> None:
    result = call("inspect", artifact, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["inputs"] == {"x": "float32[batch, 3, 32, 32]"}
    assert figures["operating_points"][0]["selected"] is True
    assert figures["report"] == sample_report()
    text = call("inspect", artifact).stdout
    assert "resnet56: 2 exits kept of 3 places" in text
    assert "point-1 *" in text


def test_report_writes_the_page_with_the_drawing(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert call("report", artifact, "-o", path).exit_code == 0
    assert "Program of 3 blocks with the exits layer1.8, layer2.6, backbone" in path.read_text()


def test_export_one_file_and_blocks(artifact: Path, tmp_path: Path) -> None:
    assert call("export", artifact, "-o", tmp_path / "model.onnx").exit_code == 0
    assert (tmp_path / "model.onnx").read_bytes() == b"one file"
    folder = tmp_path / "blocks"
    assert call("export", artifact, "-o", folder, "--format", "blocks").exit_code == 0
    program = json.loads((folder / "program.json").read_text())
    assert [block["name"] for block in program["blocks"]] == ["b0", "b1", "b2"]
    assert {name: (folder / file).read_bytes() for name, file in program["files"].items()} == {
        name: f"model of {name}".encode() for name in ("b0", "b1", "b2")
    }


def test_export_for_trtexec(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    arguments = ("export", artifact, "-o", folder, "--format", "trtexec", "--buckets", "1, 8")
    assert call(*arguments).exit_code == 0
    engines = json.loads((folder / "engines.json").read_text())["engines"]
    assert [(engine["block"], engine["buckets"]) for engine in engines] == [
        (name, [1, 8]) for name in ("b0", "b1", "b2")
    ]
    assert (folder / engines[0]["onnx"]).read_bytes() == b"model of b0"
    assert (folder / "build.sh").stat().st_mode & 0o111


def test_errors_are_one_message_with_the_remedy_and_exit_code_1(tmp_path: Path, data: Path) -> None:
    for arguments in (
        ("inspect", tmp_path / "missing.exit"),
        ("run", tmp_path / "missing.exit", "--data", data),
        ("compile", "model.onnx", "--calib", data, "-o", tmp_path / "out.exit"),
        ("compile", "no_such_module:f", "--calib", data, "-o", tmp_path / "out.exit"),
        ("compile", "torch:Tensor", "--calib", data, "-o", tmp_path / "no_such_folder" / "out.exit"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr


def test_a_place_where_nothing_can_be_saved_is_found_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("the work was done first")

    monkeypatch.setattr("exitcompiler.data_sources.load_model", never)
    monkeypatch.setattr("exitcompiler.runtime.artifact_files.read_artifact", never)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"meow")
    arguments = ("compile", "torch:Tensor", "--calib", data, "-o")
    assert "not an artifact, so it is not replaced" in call(*arguments, photos).stderr
    assert "folder does not exist" in call(*arguments, tmp_path / "none" / "out").stderr
    nowhere = call("run", "model.exit", "--data", data, "-o", tmp_path / "none" / "answers.npz")
    assert nowhere.exit_code == 1
    assert nowhere.stderr.startswith("error: output ")
    assert "folder does not exist" in nowhere.stderr
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "folder is not writable" in call(*arguments, tmp_path / "out").stderr


def test_answers_that_cannot_be_written_are_a_clean_error(
    loaded: FakeCompiled, data: Path, tmp_path: Path
) -> None:
    result = call("run", "model.exit", "--data", data, "-o", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "cannot be written" in result.stderr


def test_inspect_and_report_are_of_the_selected_point(artifact: Path, tmp_path: Path) -> None:
    read = read_artifact(artifact)
    (point,) = read.manifest.operating_points
    other = replace(read.manifest, operating_points=(replace(point, name="point-2"),))
    save_artifact(replace(read, manifest=other), artifact)
    assert "Certificate of point-1, not of point-2" in call("inspect", artifact).stdout
    assert call("report", artifact, "-o", tmp_path / "page.html").exit_code == 0
    assert "not of point-2" in (tmp_path / "page.html").read_text()


def test_debug_keeps_the_traceback(tmp_path: Path) -> None:
    result = call("--debug", "inspect", tmp_path / "missing.exit")
    assert isinstance(result.exception, exitcompiler.ArtifactError)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("run", "model.exit"),
        (
            "compile",
            "m:f",
            "--calib",
            "d.npz",
            "-o",
            "o.exit",
            "--max-drop",
            "0.1",
            "--latency-budget-ms",
            "2",
        ),
        ("compile", "m:f", "--calib", "d.npz", "-o", "o.exit", "--max-drop", "7"),
        ("compile", "m:f", "--calib", "d.npz", "-o", "o.exit", "--batch-size", "0"),
        ("compile", "m:f", "--calib", "d.npz", "-o", "o.exit", "--mean", "a,b"),
        ("compile", "m:f", "--calib", "d.npz", "-o", "o.exit", "--image-size", "12"),
        ("export", "model.exit", "-o", "x", "--format", "pickle"),
        ("export", "model.exit", "-o", "x", "--format", "onnx", "--split", "b1"),
        ("export", "model.exit", "-o", "x", "--buckets", "1,2"),
        ("export", "model.exit", "-o", "x", "--format", "trtexec", "--buckets", "1-8"),
        ("cascade", "--calib", "d.npz", "-o", "o.exit"),
        ("cascade", "a:f", "b:f", "--calib", "d.npz", "-o", "o.exit", "--name", "only"),
        ("cascade", "a:f", "b:f", "--calib", "d.npz", "-o", "o.exit", "--transform", "none"),
        ("cascade", "a:f", "b:f", "--calib", "d.npz", "-o", "o.exit", "--edge", "a-b"),
        ("cascade", "a:f", "b:f", "--calib", "d.npz", "-o", "o.exit", "--edge", "a:b:c"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2


def test_compile_passes_on_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, artifact: Path
) -> None:
    (tmp_path / "cli_factories.py").write_text(
        "import torch\ndef model():\n    return torch.nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}

    class Compiled:
        artifact = type("A", (), {"report": {"refused": None}})

        def save(self, path: Path) -> None:
            seen["saved"] = path

        def explain(self) -> str:
            return "because [of this]"

    def fake_compile(model: object, calib: object, **options: object) -> Compiled:
        seen.update(options, model=model, calib=calib)
        return Compiled()

    monkeypatch.setitem(vars(exitcompiler), "compile", fake_compile)
    result = call(
        "compile", "cli_factories:model", "--calib", data, "--train", data, "-o", "out.exit",
        "--latency-budget-ms", "2", "--backend", "openvino", "--precision", "bf16", "--batch-size", "8",
        "--threads", "2", "--seed", "3", "--logits", "1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"artifact": "out.exit", "report": {"refused": None}}
    assert "because [of this]" in result.stderr
    assert type(seen["model"]).__name__ == "Linear"
    np.testing.assert_array_equal(seen["calib"][0], ROWS)
    np.testing.assert_array_equal(seen["train_data"][1], LABELS)
    expected = {
        "max_accuracy_drop": None, "latency_budget_ms": 2.0, "backend": "openvino", "precision": "bf16",
        "batch_size": 8, "threads": 2, "seed": 3, "logits": 1, "saved": Path("out.exit"),
    }  # fmt: skip
    assert {key: seen[key] for key in expected} == expected


def test_cascade_passes_on_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    (tmp_path / "cascade_factories.py").write_text(
        "import torch\n"
        "def small():\n    return torch.nn.Linear(2, 2)\n"
        "def large():\n    return torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.zeros(1, 2)\n"
        "def halve():\n    return lambda x: x / 2\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}

    class Compiled:
        artifact = type("A", (), {"report": {"refused": None}})

        def save(self, path: Path) -> None:
            seen["saved"] = path

        def explain(self) -> str:
            return "because"

    def fake_cascade(networks: object, calib: object, **options: object) -> Compiled:
        seen.update(options, networks=networks, calib=calib)
        return Compiled()

    monkeypatch.setitem(vars(exitcompiler), "cascade", fake_cascade)
    arguments = (
        "cascade",
        "cascade_factories:small",
        "cascade_factories:large",
        "--calib",
        data,
        "-o",
        "out.exit",
    )
    result = call(
        *arguments, "--name", "s", "--name", "7", "--edge", "s:7", "--edge", "0:1", "--max-drop", "0.02",
        "--transform", "none", "--transform", "cascade_factories:halve", "--early-exits", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"artifact": "out.exit", "report": {"refused": None}}
    assert [type(network).__name__ for network in seen["networks"]] == ["Linear", "Sequential"]
    np.testing.assert_array_equal(seen["calib"][1], LABELS)
    nothing, halve = seen["transforms"]
    assert (nothing, halve(3)) == (None, 1.5)
    expected = {
        "edges": [("s", "7"), (0, 1)], "names": ["s", "7"], "train_data": None, "early_exits": True,
        "max_accuracy_drop": 0.02, "latency_budget_ms": None, "backend": "auto", "precision": "fp32",
        "batch_size": 1, "threads": None, "seed": 0, "logits": None, "dump": None, "saved": Path("out.exit"),
    }  # fmt: skip
    assert {key: seen[key] for key in expected} == expected
    assert call(*arguments).exit_code == 0
    assert (seen["edges"], seen["names"], seen["transforms"], seen["early_exits"]) == (
        None,
        None,
        None,
        False,
    )
    for wrong, message in (("number", "returned a int"), ("missing", "has no 'missing'")):
        transforms = ("--transform", "none", "--transform", f"cascade_factories:{wrong}")
        assert message in call(*arguments, *transforms).stderr
    assert "neither package.module:factory nor none" in call(*arguments, *["--transform", "x"] * 2).stderr


def test_a_cascade_from_files_to_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once for real: two factories, one of them with a transform; saved, inspected, run and cut."""
    (tmp_path / "real_factories.py").write_text(
        "from trained import trained_family\n"
        "def small():\n    return trained_family()[0]\n"
        "def large():\n    return trained_family()[2]\n"
        "def same():\n    return lambda image: image * 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("exitcompiler.delivery.WORTHWHILE", 0.0)
    coarse = functools.partial(sweep, steps=4, folds=2, recipes=RECIPES[2:])
    monkeypatch.setattr("exitcompiler.selection.sweep", coarse)
    x, y = stripes(600, seed=2)
    np.savez("calib.npz", x=x, y=y)
    result = call(
        "cascade", "real_factories:small", "real_factories:large", "--calib", "calib.npz", "-o", "out.exit",
        "--name", "small", "--name", "large", "--transform", "none", "--transform", "real_factories:same",
        "--edge", "small:large", "--max-drop", "0.03", "--backend", "onnxruntime", "--threads", "1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    assert [entry["name"] for entry in report["cascade"]["networks"]] == ["small", "large"]
    assert report["refused"] is None
    assert "cascade of 2 networks" in result.stderr
    assert "Ways between networks" in call("inspect", "out.exit").stdout
    answers = json.loads(call("run", "out.exit", "--data", "calib.npz", "--max-rows", 60, "--json").stdout)
    assert set(answers["exit_rates"]) == {"small", "large"}
    assert answers["accuracy"] > 0.8
    assert call("report", "out.exit", "-o", "page.html").exit_code == 0
    cut = call("export", "out.exit", "--split", "large", "-o", "parts", "--json")
    assert json.loads(cut.stdout)["edges"] == ["small:large"]


def test_the_input_of_a_cascade_is_told_by_networks_that_take_it_as_it_is() -> None:
    torch = pytest.importorskip("torch")
    network, small, large = torch.nn.Flatten(), torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 9)
    networks = [(network, None), (network, small), (network, large)]
    assert input_shape_of_networks(networks, None) == (1, 3, 8, 8)
    assert input_shape_of_networks(networks, [None, abs, None]) == (1, 3, 9, 9)
    assert input_shape_of_networks(networks, [None, abs, abs]) is None


def test_export_cuts_the_program_in_two(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "parts"
    result = call("export", artifact, "--split", "b0:b1", "-o", folder, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    bytes_per_row = 4 * (16 * 32 * 32 + 3)
    types = {"h": "float32[batch, 16, 32, 32]", "c0": "float32[batch, 3]"}
    assert figures["hand_over"] == {"values": types, "bytes_per_row": bytes_per_row}
    assert (figures["edges"], figures["shared"], round(figures["share"], 6)) == (["b0:b1"], [], 0.69)
    assert f"{bytes_per_row} bytes per row" in result.stderr
    near, far = (read_artifact(folder / f"{name}.exit") for name in ("near", "far"))
    assert [set(part.manifest.operating_points[0].files) for part in (near, far)] == [{"b0"}, {"b1", "b2"}]
    shown = call("inspect", folder / "far.exit", "--json")
    assert json.loads(shown.stdout)["part"]["kind"] == "far"
    assert "The far part of operating point point-1" in shown.stderr
    assert "no report" in call("report", folder / "far.exit").stderr
    listed = call("export", artifact, "--split", "", "-o", folder)
    assert listed.exit_code == 1
    assert f"b0:b1 ({bytes_per_row} bytes per row), b1:b2 (65536 bytes per row)" in listed.stderr


def test_module_and_script_are_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "exitcompiler", "--help"], check=True, capture_output=True, text=True
    )
    assert "compile" in result.stdout


def test_without_typer_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import exitcompiler.__main__ as m; m.main()"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'exitcompiler[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_logits_are_the_first_output_of_any_structure() -> None:
    logits = np.zeros((1, 2))
    for outputs in (logits, (logits, 1), {"logits": logits, "other": 2}, ((logits,),)):
        assert logits_of(outputs) is logits


def test_benchmark_of_no_rows_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no rows"):
        benchmark(FakeCompiled(), iter([]))  # type: ignore[arg-type]


def test_batches_of_any_size_give_the_same_answers() -> None:
    one, all_at_once = (answer_rows(FakeCompiled(), (ROWS, LABELS), size) for size in (1, 9))  # type: ignore[arg-type]
    np.testing.assert_array_equal(one.predictions, all_at_once.predictions)
    assert one.exit_rates == all_at_once.exit_rates
