"""The pytest plugin: tests that fail when a compiled program breaks its budget.

pytest loads it in every environment that has exitcompiler, so it imports nothing but pytest and the standard
library until a test asks for a check. What it offers is in ``docs/budgets.md``.
"""

from __future__ import annotations

import inspect
import os
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
_REPORTS: Final = pytest.StashKey["list[CheckReport]"]()


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
    """Check the budgets of a marked test, when its fixtures are there."""
    if item.get_closest_marker(_NAME) is not None and not item.config.getoption("setupplan", False):
        _reports_of(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a marked test that breaks a budget, before its body runs."""
    reports = item.stash.get(_REPORTS, None)
    if reports is not None:
        del item.stash[_REPORTS]  # should the test be run again, so is the check
        for report in sorted(reports, key=lambda report: report.verdict != "FAIL"):
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
    markers = len(list(request.node.iter_markers(_NAME)))
    if markers != 1:
        pytest.fail(
            f"exit_budget_report needs one @pytest.mark.exit_budget(...), and there are {markers}: "
            "check_exit_budget returns the report of any check",
            pytrace=False,
        )
    return _reports_of(request.node)[0]


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
        from exitcompiler.budgets.alone import alone

        config = self.item.config
        root = config.rootpath
        named = None if baseline is None else root / baseline
        failure = ""
        try:
            limits = root / budget if isinstance(budget, str | os.PathLike) else budget
            with alone():
                report = exitcompiler.check(
                    root / artifact,
                    limits,
                    _data_of(root, data),
                    baseline=named,
                    update_baseline=_is_updated(config, limits, named),
                    max_seconds=max_seconds,
                    max_rows=max_rows,
                    backend=backend,
                    threads=threads,
                    preprocessing=preprocessing,
                    seed=seed,
                )
        except exitcompiler.ExitCompilerError as error:
            failure = f"the budget of {artifact} could not be checked\n{error}"
        if failure:  # outside, so that pytest does not show the error a second time
            pytest.fail(failure, pytrace=False)
        self.item.user_properties.append((_NAME, _text_of(root, report)))
        return report


def _reports_of(item: pytest.Item) -> list[CheckReport]:
    """The checks of all markers of a test, which are made once: of its module or class, then its own."""
    __tracebackhide__ = True
    found = item.stash.get(_REPORTS, None)
    if found is not None:
        return found
    check = BudgetCheck(item).measure
    arguments = []
    wrong = ""
    for marker in item.iter_markers(_NAME):
        try:
            arguments.append(inspect.signature(check).bind(*marker.args, **marker.kwargs))
        except TypeError as error:
            wrong = str(error)
    if wrong:
        pytest.fail(f"@pytest.mark.{_NAME}: {wrong}", pytrace=False)
    reports = [check(*given.args, **given.kwargs) for given in reversed(arguments)]
    item.stash[_REPORTS] = reports
    return reports


def _is_updated(config: pytest.Config, budget: Path | Budget, baseline: Path | None) -> bool:
    """Whether a new baseline is written: if that is asked for, and there is a place for it."""
    if not config.getoption("--exit-budget-update"):
        return False
    from exitcompiler.budgets.reading import read_budget

    limits = read_budget(budget) if isinstance(budget, Path) else budget
    return baseline is not None or limits.baseline is not None


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
