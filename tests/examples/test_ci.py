"""The example for CI: the workflow is well-formed and calls what there is, its files fit one another."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml  # comes with pre-commit
from sample_check import passing_check

import exitcompiler
from exitcompiler.budgets.outcomes import CheckReport
from exitcompiler.budgets.reading import KNOWN_KEYS, read_budget
from exitcompiler.cli import app

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "ci"


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load((EXAMPLE / "exit-budget.yml").read_text(encoding="utf-8"))
    return found


def scripts(workflow: dict[Any, Any]) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def commands(text: str) -> list[list[str]]:
    """Every call of exitcompiler in a text, as words."""
    calls = re.findall(r"exitcompiler ((?:check|inspect)\b(?:[^\n\\`]|\\\n)*)", text)
    return [shlex.split(call.replace("\\\n", " ").partition("||")[0]) for call in calls]


def parse(words: list[str]) -> dict[str, Any]:
    """What the command line understands; a usage error fails."""
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    params: dict[str, Any] = command.make_context(words[0], list(words[1:])).params
    return params


def test_the_workflow_is_one(workflow: dict[Any, Any]) -> None:
    assert set(workflow[True]) == {"pull_request", "workflow_dispatch"}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
    install = next(script for script in scripts(workflow) if "pip install" in script)
    extras = re.findall(r"\[(.*)\]", install)[0].split(",")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = ", pyproject, re.MULTILINE) for extra in extras)


def test_the_workflow_calls_what_there_is(workflow: dict[Any, Any]) -> None:
    calls = [words for script in scripts(workflow) for words in commands(script)]
    check, update = map(parse, calls)
    assert check["junit"] == update["junit"] == Path("exit-budget.xml")
    assert (check["update_baseline"], update["update_baseline"]) == (False, True)
    assert check["budget"] == Path("$BUDGET")
    assert check["max_seconds"] < 60 * workflow["jobs"]["check"]["timeout-minutes"]
    upload = workflow["jobs"]["check"]["steps"][-1]
    assert upload["if"] == "always()"
    assert upload["with"]["path"].split() == ["exit-budget.xml", "ci/baseline.json"]


@pytest.mark.skipif(os.name != "posix", reason="the scripts are for bash")
@pytest.mark.parametrize(
    ("says", "check", "update"),
    [
        ("echo report > exit-budget.xml; exit 0", 0, 0),
        ("echo report > exit-budget.xml; exit 1", 1, 0),
        ("echo report > exit-budget.xml; exit 2", 0, 0),
        ("echo report > exit-budget.xml; exit 3", 3, 3),
        ("exit 2", 2, 2),  # no such command, or no such option
        ("exit 137", 137, 137),
    ],
)
def test_the_steps_fail_as_they_should(
    workflow: dict[Any, Any], tmp_path: Path, says: str, check: int, update: int
) -> None:
    command = tmp_path / "exitcompiler"
    command.write_text(f"#!/bin/sh\n{says}\n", encoding="utf-8")
    command.chmod(0o755)
    (tmp_path / "exit-budget.xml").write_text("of an earlier check", encoding="utf-8")
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"} | workflow["env"]
    for script, code in zip(
        [script for script in scripts(workflow) if "exitcompiler check" in script],
        (check, update),
        strict=True,
    ):
        found = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, timeout=60)
        assert found.returncode == code


@pytest.mark.parametrize(("page", "count"), [("examples/ci/README.md", 1), ("docs/budgets.md", 3)])
def test_pages_call_what_there_is(page: str, count: int) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    calls = commands(lines)
    assert len(calls) == count
    for words in calls:
        assert parse(words)["data"].endswith(".npz")


def test_the_budgets_read(workflow: dict[Any, Any]) -> None:
    budget = read_budget(EXAMPLE / "budget.toml")
    keys = {limit.key for limit in budget.limits}
    assert {"latency.mean.max_increase", "accuracy.max_drop", "exit_rates.tolerance"} <= keys
    assert budget.baseline is not None
    baseline = Path(workflow["env"]["BUDGET"]).parent / budget.baseline.name
    assert str(baseline) in workflow["jobs"]["check"]["steps"][-1]["with"]["path"]
    assert not any(limit.needs_baseline for limit in read_budget(EXAMPLE / "dark.toml").limits)


def test_lines_that_are_commented_out_read_too(tmp_path: Path) -> None:
    text = (EXAMPLE / "budget.toml").read_text(encoding="utf-8")
    uncommented = re.sub(r"^# (?=\[|[a-z_]+ = )", "", text, flags=re.MULTILINE)
    path = tmp_path / "budget.toml"
    path.write_text(uncommented, encoding="utf-8")
    keys = {limit.key for limit in read_budget(path).limits}
    assert keys - {limit.key for limit in read_budget(EXAMPLE / "budget.toml").limits} == {
        "latency.p99.max", 'exit_rates."layer1.0".min', 'exit_rates."layer1.0".tolerance',
    }  # fmt: skip


def test_every_key_of_the_reader_is_in_the_page() -> None:
    page = (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8")
    assert len(KNOWN_KEYS) > 25
    assert [key for key in KNOWN_KEYS if f"`{key}`" not in page] == []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What ``exitcompiler.check`` is asked, which passes everything here; it waits for no other check."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found: list[tuple[Any, ...]] = []

    def check(*args: Any, **kwargs: Any) -> CheckReport:
        found.append((*args, kwargs["max_seconds"]))
        return passing_check()

    monkeypatch.setattr(exitcompiler, "check", check)
    return found


def test_the_tests_run(
    pytester: pytest.Pytester, asked: list[tuple[Any, ...]], workflow: dict[Any, Any]
) -> None:
    (pytester.path / "ci").mkdir()
    np.savez(pytester.path / "ci" / "rows.npz", x=np.ones((2, 3)), y=np.zeros(2))
    pytester.makeini("[pytest]\nfilterwarnings = error\naddopts = --strict-markers")
    shutil.copy(EXAMPLE / "test_exit_budget.py", pytester.path)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)
    (artifact, budget, data, seconds), dark = asked
    names = [pytester.path / workflow["env"][name] for name in ("MODEL", "BUDGET", "ROWS")]
    assert [artifact, budget, Path(data)] == names
    assert seconds == 120
    assert dark[1] == pytester.path / "ci" / "dark.toml"
    np.testing.assert_array_equal(dark[2][0], np.full((2, 3), 0.5))
