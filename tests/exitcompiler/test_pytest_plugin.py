"""The pytest plugin, run in tests of its own: with a check that is made up, and once with the real one."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_programs import artifact_of, chain, random_rows
from sample_check import outcome_of, passing_check

import exitcompiler
from exitcompiler.budgets.outcomes import CheckReport, Verdict
from exitcompiler.errors import BudgetError
from exitcompiler.runtime.loading import open_artifact

pytest_plugins = ["pytester"]

INI = """
[pytest]
filterwarnings = error
addopts = --strict-markers --strict-config
"""
MARKED = """
import pytest

@pytest.mark.exit_budget("models/a.exit", budget="ci/budget.toml", data="data.npz", max_seconds=30, threads=1)
def test_budget():
    print("the body ran")
"""
LIMIT = "latency.mean.max_ratio = 0.6"


def report_of(artifact: Any, verdict: Verdict) -> CheckReport:
    outcome = outcome_of("latency", "mean", "max_ratio", "0.6", (0.58, 0.55, 0.61), verdict)
    told = replace(passing_check(), artifact=str(artifact), outcomes=(outcome,), notes=("a note",))
    return replace(told, seconds=12.0, looks=2)


class FakeCheck:
    """Stands for ``exitcompiler.check``: keeps what it is asked."""

    def __init__(self) -> None:
        self.verdict: Verdict = "PASS"
        self.broken: str | None = None
        self.error: BudgetError | None = None
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> CheckReport:
        self.asked.append((args, kwargs))
        if self.error is not None:
            raise self.error
        broken = self.broken is not None and self.broken in args[0].name
        return report_of(args[0], "FAIL" if broken else self.verdict)


@pytest.fixture(autouse=True)
def no_other_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others on this machine do not matter here."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> FakeCheck:
    fake = FakeCheck()
    monkeypatch.setattr(exitcompiler, "check", fake)
    return fake


@pytest.fixture
def run(pytester: pytest.Pytester, check: FakeCheck) -> Callable[..., pytest.RunResult]:
    """Runs tests in this process, after ``check`` was told what to find."""

    def run(test: str, *options: str, ini: str = "") -> pytest.RunResult:
        pytester.makeini(INI + ini)
        pytester.makepyfile(test)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rA", *options)

    return run


def test_a_budget_that_is_kept(
    run: Callable[..., pytest.RunResult], check: FakeCheck, pytester: pytest.Pytester
) -> None:
    result = run(MARKED)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([
        "the body ran", "*budgets of compiled programs*", "*::test_budget", "models?a.exit: PASS",
        f"PASS*{LIMIT}*0.58*", "note: a note", "PASS: 1 limit*",
    ])  # fmt: skip
    root = pytester.path
    assert check.asked == [
        (
            (root / "models/a.exit", root / "ci/budget.toml", str(root / "data.npz")),
            {
                "baseline": None, "update_baseline": False, "max_seconds": 30, "max_rows": None,
                "backend": None, "threads": 1, "preprocessing": None, "seed": 0,
            },
        )
    ]  # fmt: skip


def test_a_budget_that_is_broken(run: Callable[..., pytest.RunResult], check: FakeCheck) -> None:
    check.verdict = "FAIL"
    result = run(MARKED)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([
        "*FAILURES*", "models?a.exit: FAIL", f"FAIL*{LIMIT}*", "*budgets of compiled*", "*::test_budget",
        "models?a.exit: FAIL", f"FAIL*{LIMIT}*", "FAILED *::test_budget - *models?a.exit: *",
    ])  # fmt: skip
    result.stdout.no_fnmatch_line("*the body ran*")


@pytest.mark.parametrize(("options", "ini", "outcome"), [
    ((), "", "failed"),
    (("--exit-budget-inconclusive=fail",), "exit_budget_inconclusive = pass", "failed"),
    (("--exit-budget-inconclusive=pass",), "", "passed"),
    (("--exit-budget-inconclusive=skip",), "", "skipped"),
    ((), "exit_budget_inconclusive = pass", "passed"),
    ((), "exit_budget_inconclusive = skip", "skipped"),
])  # fmt: skip
def test_a_budget_that_is_inconclusive(
    run: Callable[..., pytest.RunResult], check: FakeCheck, options: tuple[str, ...], ini: str, outcome: str
) -> None:
    check.verdict = "INCONCLUSIVE"
    result = run(MARKED, *options, ini=ini)
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(["*budgets of compiled programs*", f"INCONCLUSIVE*{LIMIT}*"])
    if outcome == "skipped":
        result.stdout.fnmatch_lines("SKIPPED*models?a.exit: the budget is inconclusive after 12 s")


def test_an_ini_option_with_another_value_is_refused(run: Callable[..., pytest.RunResult]) -> None:
    result = run(MARKED, ini="exit_budget_inconclusive = warn")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*exit_budget_inconclusive = 'warn' is none of fail, skip, pass")


def test_the_fixture_gives_the_one_report(run: Callable[..., pytest.RunResult], check: FakeCheck) -> None:
    result = run(
        MARKED.replace("test_budget()", "test_budget(exit_budget_report)")
        + "    assert exit_budget_report.verdict == 'PASS'\n    assert exit_budget_report.looks == 2\n"
    )
    result.assert_outcomes(passed=1)
    assert len(check.asked) == 1


def test_a_check_within_a_test(
    run: Callable[..., pytest.RunResult], check: FakeCheck, pytester: pytest.Pytester
) -> None:
    test = """
    import numpy as np

    def test_both(check_exit_budget, tmp_path):
        rows = np.ones((2, 3)), np.zeros(2)
        for name in ("a", "b"):
            assert check_exit_budget(tmp_path / name, data=rows, baseline="base.json").looks == 2
    """
    run(test).assert_outcomes(passed=1)
    (first, options), _ = check.asked
    assert [len(part) for part in first[2]] == [2, 2]
    assert first[0].name == "a"
    assert first[1] == pytester.path / "budget.toml"
    assert options["baseline"] == pytester.path / "base.json"
    check.verdict = "FAIL"
    result = run(test)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*FAILURES*", "*a: FAIL", f"FAIL*{LIMIT}*"])
    assert len(check.asked) == 3


@pytest.mark.parametrize("data", ["module:factory", "package.module:make.rows"])
def test_a_factory_is_no_path(run: Callable[..., pytest.RunResult], check: FakeCheck, data: str) -> None:
    run(MARKED.replace("data.npz", data)).assert_outcomes(passed=1)
    assert check.asked[0][0][2] == data


def test_what_cannot_be_checked_is_an_error_and_no_failure(
    run: Callable[..., pytest.RunResult], check: FakeCheck
) -> None:
    check.error = BudgetError("there is no limit in it", where="budget.toml", remedy="give one")
    result = run(MARKED)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["the budget of models/a.exit could not be checked", "budget.toml: *", "  -> give one"]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*another exception occurred*")


@pytest.mark.parametrize(("arguments", "message"), [
    ("'a.exit'", "missing a required*argument: 'data'"),
    ("data='data.npz'", "missing a required argument: 'artifact'"),
    ("'a.exit', data='data.npz', max_second=3", "unexpected keyword argument 'max_second'"),
    ("'a.exit', 'budget.toml', data='data.npz'", "too many positional arguments"),
])  # fmt: skip
def test_wrong_arguments_of_the_marker(
    run: Callable[..., pytest.RunResult], check: FakeCheck, arguments: str, message: str
) -> None:
    result = run(f"import pytest\n@pytest.mark.exit_budget({arguments})\ndef test_budget(): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(f"@pytest.mark.exit_budget: *{message}*")
    assert check.asked == []


def test_the_fixture_without_the_marker(run: Callable[..., pytest.RunResult]) -> None:
    result = run("def test_budget(exit_budget_report): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*needs one @pytest.mark.exit_budget(...), and there are 0: *")


def test_new_baselines_where_there_is_a_place_for_them(
    run: Callable[..., pytest.RunResult], check: FakeCheck, pytester: pytest.Pytester
) -> None:
    budget = pytester.mkdir("ci") / "budget.toml"
    limit = "[latency.mean]\nmax_ratio = 0.6\n"
    for text, marked, updated in (
        (f"baseline = 'base.json'\n{limit}", MARKED, True),
        (limit, MARKED, False),
        (limit, MARKED.replace("threads=1", "baseline='base.json'"), True),
    ):
        budget.write_text(text)
        run(marked, "--exit-budget-update").assert_outcomes(passed=1)
        assert check.asked.pop()[1]["update_baseline"] is updated


def test_every_marker_is_checked(run: Callable[..., pytest.RunResult], check: FakeCheck) -> None:
    test = """
    import pytest

    @pytest.mark.exit_budget("upper.exit", data="data.npz")
    @pytest.mark.exit_budget("lower.exit", data="data.npz")
    def test_both(): pass
    """
    run(test).assert_outcomes(passed=1)
    assert sorted(args[0].name for args, _ in check.asked) == ["lower.exit", "upper.exit"]
    for broken in ("upper", "lower"):
        check.broken = broken
        result = run(test)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*FAILURES*", f"{broken}.exit: FAIL"])
    result = run(test.replace("test_both()", "test_both(exit_budget_report)"))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*needs one @pytest.mark.exit_budget(...), and there are 2: *")


def test_nothing_is_checked_for_tests_that_do_not_run(
    run: Callable[..., pytest.RunResult], check: FakeCheck
) -> None:
    run(MARKED.replace("@pytest", "@pytest.mark.skip\n@pytest", 1)).assert_outcomes(skipped=1)
    run(MARKED, "--setup-plan")
    run(MARKED, "--collect-only")
    run(MARKED, "-m", "not exit_budget").assert_outcomes(deselected=1)
    assert check.asked == []


def test_a_class_marked_as_a_whole_and_unittest(
    run: Callable[..., pytest.RunResult], check: FakeCheck
) -> None:
    result = run("""
    import pytest
    import unittest

    @pytest.mark.exit_budget("a.exit", data="data.npz")
    class TestBudget:
        def test_one(self): pass

        @pytest.mark.exit_budget("b.exit", data="data.npz")
        def test_other(self): pass

    @pytest.mark.exit_budget("c.exit", data="data.npz")
    class Case(unittest.TestCase):
        def test_third(self): pass
    """)
    result.assert_outcomes(passed=3)
    assert [args[0].name for args, _ in check.asked] == ["a.exit", "a.exit", "b.exit", "c.exit"]


def test_fixtures_of_the_test_come_first(run: Callable[..., pytest.RunResult], check: FakeCheck) -> None:
    check.verdict = "FAIL"
    result = run("""
    import pytest

    @pytest.fixture
    def artifact():
        pytest.fail("not compiled")

    @pytest.mark.exit_budget("a.exit", data="data.npz")
    def test_budget(artifact): pass
    """)
    result.assert_outcomes(errors=1)
    assert check.asked == []


def test_the_junit_file_has_the_lines(
    run: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    run(MARKED, "--junitxml=junit.xml").assert_outcomes(passed=1)
    text = (pytester.path / "junit.xml").read_text()
    assert 'name="exit_budget"' in text
    assert LIMIT in text


def test_runs_without_budgets_show_nothing(run: Callable[..., pytest.RunResult]) -> None:
    result = run("def test_other(): pass")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*budgets of compiled programs*")


def test_the_marker_is_listed_with_its_arguments(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--markers")
    result.stdout.fnmatch_lines("@pytest.mark.exit_budget(artifact, *")


def test_loading_the_plugin_imports_next_to_nothing() -> None:
    code = (
        "import sys, pytest\nbefore = set(sys.modules)\nimport exitcompiler.pytest_plugin\n"
        "ours = [n for n in set(sys.modules) - before if n.startswith('exitcompiler')]\n"
        "assert sorted(ours) == ['exitcompiler', 'exitcompiler.pytest_plugin'], ours\n"
        "assert not {'numpy', 'torch', 'onnxruntime', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


CONFTEST = """
from __future__ import annotations
import os, sys, time

sys.path.insert(0, {tests!r})
import exitcompiler
from dataclasses import replace
from sample_check import outcome_of, passing_check

{report_of}
def check(artifact, *args, **kwargs):
    os.mkdir("one-at-a-time")  # fails where another check is in here
    time.sleep(0.1)
    os.rmdir("one-at-a-time")
    return report_of(artifact, "FAIL" if "b.exit" in str(artifact) else "PASS")

exitcompiler.check = check
"""


def test_with_xdist_checks_wait_for_one_another_and_their_lines_arrive(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    tests = str(Path(__file__).resolve().parents[1])
    pytester.makeconftest(CONFTEST.format(tests=tests, report_of=inspect.getsource(report_of)))
    pytester.makeini(INI)
    pytester.makepyfile("""
    import pytest

    @pytest.mark.parametrize("number", range(4))
    def test_budget(number, check_exit_budget):
        check_exit_budget(f"{number}.exit", data="data.npz")

    @pytest.mark.exit_budget("b.exit", data="data.npz")
    def test_broken(): pass
    """)
    result = pytester.runpytest_subprocess("-n", "2", "-p", "no:cacheprovider", timeout=100)
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines_random([
        "*budgets of compiled programs*", "0.exit: PASS", "3.exit: PASS", "b.exit: FAIL",
        "note: tests ran beside this in 2 processes of pytest-xdist;*pytest -n 0 -m exit_budget",
    ])  # fmt: skip


def test_the_real_check(pytester: pytest.Pytester) -> None:
    pytest.importorskip("onnxruntime")
    open_artifact(artifact_of(chain(3)), "onnxruntime").save(pytester.path / "a.exit")
    np.savez(pytester.path / "rows.npz", x=random_rows(40))
    pytester.makeini(INI)
    pytester.makefile(
        ".toml", budget='[artifact]\nmax_size = "1 MB"\n[accuracy]\nmax_disagreement = "100 %"\n'
    )
    pytester.makefile(".toml", small='[artifact]\nmax_size = "10 B"\n')
    pytester.makepyfile("""
    import pytest

    @pytest.mark.exit_budget("a.exit", data="rows.npz")
    def test_kept(): pass

    @pytest.mark.exit_budget("a.exit", data="rows.npz", budget="small.toml")
    def test_broken(): pass

    @pytest.mark.exit_budget("a.exit", data="rows.npz", budget="missing.toml")
    def test_missing(): pass
    """)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rA")
    result.assert_outcomes(passed=1, failed=1, errors=1)
    result.stdout.fnmatch_lines([
        "*could not be checked*", "*missing.toml: cannot be read: No such file*",
        "FAIL*artifact.max_size = 10 B*", "*budgets of compiled programs*",
    ])  # fmt: skip
    result.stdout.fnmatch_lines("PASS*accuracy.max_disagreement = 100 %*")
