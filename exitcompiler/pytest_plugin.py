"""The pytest plugin: tests that fail when a compiled program breaks its budget.

pytest loads it in every environment that has exitcompiler, so it imports nothing but pytest and the standard
library until a test asks for a check. What it offers is in ``docs/budgets.md``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pytest

if TYPE_CHECKING:
    from exitcompiler.budgets.limits import Budget
    from exitcompiler.budgets.outcomes import CheckReport
    from exitcompiler.image_folder import ImagePreprocessing

__all__ = [
    "BudgetCheck",
    "check_exit_budget",
    "exit_budget_report",
    "pytest_addoption",
    "pytest_configure",
    "pytest_runtest_call",
    "pytest_runtest_setup",
    "pytest_terminal_summary",
]

PathText: TypeAlias = "str | os.PathLike[str]"

_NAME: Final = "exit_budget"
_VERDICTS: Final = ("fail", "skip", "pass")
_PATIENCE_S: Final = 3600.0
_REPORT: Final = pytest.StashKey["CheckReport"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("exitcompiler", "budgets of compiled programs")
    group.addoption(
        "--exit-budget-inconclusive",
        choices=_VERDICTS,
        help="what a budget that is still INCONCLUSIVE after max_seconds does to its test "
        "(default: the ini option exit_budget_inconclusive, else fail)",
    )
    group.addoption(
        "--exit-budget-update", action="store_true", help="write what is measured as the new baselines"
    )
    parser.addini(
        "exit_budget_inconclusive", "as --exit-budget-inconclusive: fail, skip or pass", default="fail"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker.

    Raises:
        UsageError: The ini option has a value that there is none of.
    """
    config.addinivalue_line(
        "markers",
        f"{_NAME}(artifact, *, data, budget='budget.toml', max_seconds=60.0, ...): hold a compiled program "
        "to its budget; the arguments are those of exitcompiler.check, and paths are relative to the rootdir",
    )
    given = config.getini("exit_budget_inconclusive")
    if given not in _VERDICTS:
        raise pytest.UsageError(f"exit_budget_inconclusive = {given!r} is none of {', '.join(_VERDICTS)}")


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check the budget of a marked test, when its fixtures are there."""
    if item.get_closest_marker(_NAME) is not None and not item.config.getoption("setupplan", False):
        _report_of(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a marked test whose budget is broken, before its body runs."""
    report = item.stash.get(_REPORT, None)
    if report is not None:
        del item.stash[_REPORT]  # should the test be run again, so is the check
        _judge(item.config, report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show every check, those that passed too."""
    told = [
        (report.nodeid, text)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, text in report.user_properties
        if name == _NAME
    ]
    if told:
        terminalreporter.section("budgets of compiled programs")
    for test, text in told:
        terminalreporter.write_line(test, bold=True)
        terminalreporter.write_line(text)


@pytest.fixture
def exit_budget_report(request: pytest.FixtureRequest) -> CheckReport:
    """What the check of this test's ``exit_budget`` marker found."""
    if request.node.get_closest_marker(_NAME) is None:
        pytest.fail("the fixture exit_budget_report needs @pytest.mark.exit_budget(...)", pytrace=False)
    return _report_of(request.node)


@pytest.fixture
def check_exit_budget(request: pytest.FixtureRequest) -> BudgetCheck:
    """Holds a compiled program to a budget within a test: ``check_exit_budget("a.exit", data=(x, y))``."""
    return BudgetCheck(request.node)


@dataclass(frozen=True)
class BudgetCheck:
    """Holds compiled programs to budgets, in one test.

    Args:
        item: The test; what was found is kept with it for the summary and the JUnit file.
    """

    item: pytest.Item

    def __call__(self, artifact: PathText, **options: Any) -> CheckReport:
        """Check a budget and fail the test if it is broken.

        Args:
            artifact: What ``save`` wrote; paths are relative to pytest's rootdir.
            **options: As for `measure`.

        Returns:
            What was found, where the test goes on.
        """
        __tracebackhide__ = True
        report = self.measure(artifact, **options)
        _judge(self.item.config, report)
        return report

    def measure(
        self,
        artifact: PathText,
        *,
        data: Any,
        budget: PathText | Budget = "budget.toml",
        baseline: PathText | None = None,
        max_seconds: float = 60.0,
        max_rows: int | None = None,
        backend: str | None = None,
        threads: int | None = None,
        preprocessing: ImagePreprocessing | None = None,
        seed: int = 0,
    ) -> CheckReport:
        """Check a budget, without failing the test if it is broken; one check at a time on a machine.

        Args:
            artifact: As for ``exitcompiler.check``, like all of these; paths are relative to the rootdir.
            data: Rows, or where they are.
            budget: A file, or what was read from one.
            baseline: Compare with this file, and not the one that the budget names.
            max_seconds: When to stop measuring.
            max_rows: Use only the first rows.
            backend: As for ``load``.
            threads: Per call.
            preprocessing: Of images.
            seed: Of the order of rows and the bootstrap.
        """
        __tracebackhide__ = True
        import exitcompiler

        config = self.item.config
        root = config.rootpath
        try:
            with _alone():
                report = exitcompiler.check(
                    root / artifact,
                    root / budget if isinstance(budget, str | os.PathLike) else budget,
                    _data_of(root, data),
                    baseline=None if baseline is None else root / baseline,
                    update_baseline=bool(config.getoption("--exit-budget-update")),
                    max_seconds=max_seconds,
                    max_rows=max_rows,
                    backend=backend,
                    threads=threads,
                    preprocessing=preprocessing,
                    seed=seed,
                )
        except exitcompiler.ExitCompilerError as error:
            pytest.fail(f"the budget of {artifact} could not be checked\n{error}", pytrace=False)
        self.item.user_properties.append((_NAME, _text_of(root, report)))
        return report


def _report_of(item: pytest.Item) -> CheckReport:
    """The check of the test's marker, which is made once."""
    __tracebackhide__ = True
    found = item.stash.get(_REPORT, None)
    if found is not None:
        return found
    marker = item.get_closest_marker(_NAME)
    assert marker is not None
    check = BudgetCheck(item).measure
    try:
        given = inspect.signature(check).bind(*marker.args, **marker.kwargs)
    except TypeError as error:
        pytest.fail(f"@pytest.mark.{_NAME}: {error}", pytrace=False)
    report = item.stash[_REPORT] = check(*given.args, **given.kwargs)
    return report


def _judge(config: pytest.Config, report: CheckReport) -> None:
    __tracebackhide__ = True
    how = config.getoption("--exit-budget-inconclusive") or config.getini("exit_budget_inconclusive")
    outcome = {"FAIL": "fail", "INCONCLUSIVE": how}.get(report.verdict, "pass")
    if outcome == "fail":
        pytest.fail(_text_of(config.rootpath, report), pytrace=False)
    if outcome == "skip":
        artifact = _named(config.rootpath, report)
        pytest.skip(f"{artifact}: the budget is inconclusive after {report.seconds:.0f} s")


def _named(root: Path, report: CheckReport) -> str:
    artifact = Path(report.artifact)
    return str(artifact.relative_to(root) if artifact.is_relative_to(root) else artifact)


def _text_of(root: Path, report: CheckReport) -> str:
    """The report's lines, under a line that the short summary can show alone."""
    from exitcompiler.budgets.report import report_lines

    lines = [f"{_named(root, report)}: {report.verdict}", *report_lines(report)]
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    if workers != "1" and report.verdict != "PASS":
        lines.append(
            f"note: tests ran beside this in {workers} processes of pytest-xdist; "
            f"intervals are narrower without: pytest -n 0 -m {_NAME}"
        )
    return "\n".join(lines)


def _data_of(root: Path, data: Any) -> Any:
    """DATA with its path made absolute; a factory's name and rows are left as they are."""
    if not isinstance(data, str | os.PathLike):
        return data
    path = root / data
    return os.fspath(data) if ":" in os.fspath(data) and not path.exists() else str(path)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process of this user is in here: two measurements disturb one another.

    A transaction of SQLite is a lock that every system has, and that ends with its process.

    Raises:
        OperationalError: Another check has held it for an hour.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    path = Path(tempfile.gettempdir()) / f"exitcompiler-check-{user}.lock"
    with contextlib.closing(sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
