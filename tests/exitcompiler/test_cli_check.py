"""The command ``check``: what it passes on, what it prints and writes, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_programs import CLASSES, artifact_of, chain, plain, random_rows
from rich.console import Console
from sample_check import failing_check, inconclusive_check, outcome_of, passing_check, sample_causes
from typer.testing import CliRunner

import exitcompiler
from exitcompiler.artifact import save_artifact
from exitcompiler.budgets.limits import LimitKind
from exitcompiler.budgets.outcomes import BlockChange, CheckReport
from exitcompiler.budgets.report import report_to_json
from exitcompiler.check_tables import check_parts
from exitcompiler.cli import app
from exitcompiler.errors import BackendUnavailableError
from exitcompiler.image_folder import ImagePreprocessing
from exitcompiler.statistics import Interval

ROWS = random_rows(40)
BUDGET = """
[latency.mean]
max_ratio = 0.7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an artifact, rows and a budget; other checks on this machine do not matter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    save_artifact(artifact_of(chain(), plain()), tmp_path / "model.exit")
    np.savez(tmp_path / "data.npz", x=ROWS, y=np.arange(len(ROWS)) % CLASSES)
    (tmp_path / "budget.toml").write_text(BUDGET)
    return tmp_path


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[Any], list[Any]]:
    """Makes the check come to something, and returns what it is then called with."""

    def come_to(result: Any) -> list[Any]:
        calls: list[Any] = []

        def fake(*arguments: Any, **options: Any) -> CheckReport:
            calls.append((arguments, options))
            if isinstance(result, BaseException):
                raise result
            report: CheckReport = result
            return report

        monkeypatch.setattr(exitcompiler, "check", fake)
        return calls

    return come_to


def call(*arguments: object, before: tuple[str, ...] = ()) -> Any:
    given = (*before, "check", "model.exit", "--budget", "budget.toml", "--data", "data.npz", *arguments)
    return CliRunner().invoke(app, [str(argument) for argument in given])


def shown(report: CheckReport, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in check_parts(report, width):
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize(
    ("report", "code"), [(passing_check(), 0), (failing_check(), 1), (inconclusive_check(), 2)]
)
def test_the_exit_code_is_the_verdict(checked: Any, folder: Path, report: CheckReport, code: int) -> None:
    checked(report)
    result = call("--junit", "junit.xml")
    assert result.exit_code == code, result.output
    assert f"{report.verdict}: " in result.stdout
    suite = ElementTree.parse(folder / "junit.xml").getroot()[0]
    assert suite.get("tests") == str(len(report.outcomes))


def test_options_reach_the_check(checked: Any) -> None:
    calls = checked(passing_check())
    options = ("--baseline", "b.json", "--update-baseline", "--max-seconds", 12.5, "--max-rows", 30)
    call(*options, "--backend", "torch", "--threads", 3, "--seed", 7)
    call()
    (arguments, given), (_, default) = calls
    artifact, budget, data = arguments
    assert (artifact, data) == (Path("model.exit"), "data.npz")
    assert [limit.key for limit in budget.limits] == ["latency.mean.max_ratio"]
    assert given.pop("preprocessing") == default.pop("preprocessing") == ImagePreprocessing((0.0,), (1.0,))
    assert given == {
        "baseline": Path("b.json"),
        "update_baseline": True,
        "max_seconds": 12.5,
        "max_rows": 30,
        "backend": "torch",
        "threads": 3,
        "seed": 7,
    }
    assert default == {
        "baseline": None,
        "update_baseline": False,
        "max_seconds": 60.0,
        "max_rows": None,
        "backend": None,
        "threads": None,
        "seed": 0,
    }


def test_json_is_all_that_is_on_stdout(checked: Any) -> None:
    checked(failing_check())
    result = call("--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(report_to_json(failing_check())))
    assert "FAIL: 4 limits" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("--no-such-option",), ("--max-seconds", "soon"), ("--max-rows", 0), ("--image-size", "large")],
)
def test_wrong_usage_does_not_read_as_inconclusive(checked: Any, arguments: tuple[object, ...]) -> None:
    calls = checked(passing_check())
    result = call(*arguments)
    assert result.exit_code == 3, result.output
    assert "Usage" in result.stderr
    assert not calls


def test_a_missing_option_does_not_read_as_inconclusive_and_other_commands_keep_their_codes(
    folder: Path,
) -> None:
    assert CliRunner().invoke(app, ["check", "model.exit"]).exit_code == 3
    assert CliRunner().invoke(app, ["check", "--help"]).exit_code == 0
    assert CliRunner().invoke(app, ["run", "model.exit"]).exit_code == 2
    assert CliRunner().invoke(app, ["run", "missing.exit", "--data", "data.npz"]).exit_code == 1


def test_an_error_is_shown_in_one_message_and_in_the_junit_file(checked: Any, folder: Path) -> None:
    checked(BackendUnavailableError("openvino is not installed", remedy="pip install openvino"))
    result = call("--junit", "junit.xml")
    assert result.exit_code == 3
    assert result.stderr == "error: openvino is not installed\n  -> pip install openvino\n"
    suite = ElementTree.parse(folder / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("errors")) == ("1", "1")
    error = suite.find("testcase/error")
    assert error is not None
    assert error.get("type") == "BackendUnavailableError"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(0), SystemExit(1)])
def test_what_nobody_foresaw_does_not_read_as_a_verdict(
    checked: Any, folder: Path, error: BaseException
) -> None:
    checked(error)
    result = call("--junit", "junit.xml")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert f"{type(error).__name__}: {error}" in result.stderr
    assert type(error).__name__ in (folder / "junit.xml").read_text()


def test_debug_shows_the_traceback_of_an_error(checked: Any) -> None:
    checked(BackendUnavailableError("openvino is not installed"))
    result = call(before=("--debug",))
    assert result.exit_code == 3
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("missing", "named"), [("model.exit", "model.exit"), ("budget.toml", "budget.toml"), ("data.npz", "DATA")]
)
def test_missing_files_are_errors(folder: Path, missing: str, named: str) -> None:
    (folder / missing).rename(folder / "elsewhere")
    result = call()
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
    assert named in result.stderr


def test_an_output_that_cannot_be_written_is_refused_before_the_measurement(checked: Any) -> None:
    calls = checked(passing_check())
    result = call("--junit", "no/such/folder/junit.xml")
    assert result.exit_code == 3
    assert "its folder does not exist" in result.stderr
    assert not calls


def test_an_output_that_cannot_be_written_after_all_is_an_error(checked: Any, folder: Path) -> None:
    checked(passing_check())
    (folder / "junit.xml").mkdir()
    result = call("--junit", "junit.xml")
    assert result.exit_code == 3
    assert "cannot be written" in result.stderr


def test_images_are_read_as_the_options_say(checked: Any) -> None:
    calls = checked(passing_check())
    assert call("--mean", "0.5", "--std", "0.2,0.3,0.4", "--image-size", "24x32").exit_code == 0
    ((_, given),) = calls
    assert given["preprocessing"] == ImagePreprocessing((0.5,), (0.2, 0.3, 0.4), (24, 32))


def test_rows_are_not_loaded_where_the_baseline_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exitcompiler.budgets import checking

    def load_data(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(checking, "load_data", load_data)
    monkeypatch.setattr("exitcompiler.data_sources.load_data", load_data)
    (folder / "budget.toml").write_text('baseline = "none.json"\n[latency.mean]\nmax_increase = "10 %"\n')
    result = call()
    assert result.exit_code == 3
    assert "needs a baseline" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes are those of POSIX")
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_the_verdict_stands_where_nobody_reads_it(folder: Path, option: tuple[str, ...]) -> None:
    (folder / "budget.toml").write_text('[artifact]\nmax_size = "1 MB"\n')
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "exitcompiler", "check", "model.exit", "--budget", "budget.toml"]
    found = subprocess.run(
        [*command, "--data", "data.npz", *option], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    assert "BrokenPipe" not in found.stderr


def test_a_real_check_of_what_needs_no_time(folder: Path) -> None:
    (folder / "budget.toml").write_text('[artifact]\nmax_size = "1 MB"\n[exit_rates.exit1]\nmax = "100 %"\n')
    passed = call("--json", "--junit", "junit.xml")
    assert passed.exit_code == 0, passed.output
    figures = json.loads(passed.stdout)
    assert [limit["verdict"] for limit in figures["limits"]] == ["PASS", "PASS"]
    assert figures["figures"]["rows"] == len(ROWS)
    (folder / "budget.toml").write_text('[artifact]\nmax_size = "1 B"\n')
    assert call().exit_code == 1


@pytest.mark.parametrize("report", [passing_check(), failing_check(), inconclusive_check()])
@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit_and_break_neither_keys_nor_figures(report: CheckReport, width: int) -> None:
    text = shown(report, width)
    assert max(map(len, text.splitlines())) <= width
    for outcome in report.outcomes:
        assert outcome.limit.key in text
        assert outcome.limit.text in text
    if report.causes is not None:
        for figure in (
            "+21.3 % (+18.2 to +24.5)",
            "0.583 -> 0.707",
            "62.1 -> 60.0 %",
            "1.36x (1.31 to 1.41)",
        ):
            assert figure in text


def test_what_was_before_has_a_column_where_there_is_room() -> None:
    assert "before -> now" in shown(failing_check(), 160).splitlines()[0]
    narrow = shown(failing_check(), 80)
    assert "before -> now" not in narrow.splitlines()[0]
    short, wide = (shown(passing_check(), width).partition("\n\n")[0] for width in (80, 160))
    assert len(short.splitlines()) == len(wide.splitlines())


def test_notes_that_limits_share_are_shown_once() -> None:
    kinds: tuple[LimitKind, ...] = ("max_increase", "max_slowdown")
    skipped = [
        replace(outcome_of("latency", name, kind, "5 %", None, "SKIPPED"), note="there is no baseline yet")
        for name in ("mean", "p99")
        for kind in kinds
    ]
    text = shown(replace(passing_check(), outcomes=tuple(skipped)), 80)
    assert text.count("there is no baseline yet") == 1
    assert "4 limits: there is no baseline yet" in text
    two = shown(replace(passing_check(), outcomes=tuple(skipped[:2])), 80)
    assert "latency.mean.max_increase, latency.mean.max_slowdown: there" in " ".join(two.split())


def test_the_slowest_grown_blocks_are_shown_and_the_rest_counted() -> None:
    blocks = tuple(BlockChange(f"b{i}", 10.0, Interval(1.0 + i / 100, 1.0, 2.0)) for i in range(15))
    text = shown(replace(failing_check(), causes=replace(sample_causes(), blocks=blocks)), 80)
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("b") and " us " in line]
    assert listed == [f"b{i}" for i in range(14, 2, -1)]
    assert "3 more" in text
    assert "block " not in shown(replace(failing_check(), causes=replace(sample_causes(), blocks=())), 80)


def test_names_are_no_markup() -> None:
    blocks = (BlockChange("[red]b0", 10.0, Interval(1.0, 1.0, 1.0)),)
    text = shown(replace(failing_check(), causes=replace(sample_causes(), blocks=blocks), notes=("[x]",)), 80)
    assert "[red]b0" in text
    assert "note: [x]" in text
