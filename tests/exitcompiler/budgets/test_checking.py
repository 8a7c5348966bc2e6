"""A check measures until the answer is clear, and says what it compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from budget_figures import ENVIRONMENT, answered, elsewhere, measurement, process

import exitcompiler
from exitcompiler.budgets import checking
from exitcompiler.budgets.baseline import read_baseline, write_baseline
from exitcompiler.budgets.checking import check
from exitcompiler.budgets.limits import Budget, Limit, Metric, RunSettings
from exitcompiler.errors import BudgetError, InputError

ROWS = np.zeros((100, 1), np.float32), np.zeros(100, np.int64)


class FakeProcesses:
    """Draws processes instead of running them; ``seconds`` each, on a clock of its own."""

    now = 0.0
    notes = ("times are of some rows",)

    def __init__(self, *, noise: float, slower: float, seconds: float) -> None:
        self.noise, self.slower, self.seconds = noise, slower, seconds
        self.generator = np.random.default_rng(3)
        self.count = 0

    def __call__(self, *_: object) -> FakeProcesses:
        return self

    def __enter__(self) -> FakeProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, number: int) -> Any:
        assert number == self.count
        self.count += 1
        FakeProcesses.now += self.seconds
        times = {
            name: self.slower * us
            for name, us in {"early": 200.0, "middle": 500.0, "backbone": 1100.0}.items()
        }
        figures = process(number, answered(), times_us=times, noise=self.noise, generator=self.generator)
        return replace(figures, seconds=self.seconds)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeProcesses]:
    """Everything but judging is made up: no artifact, no processes, a clock that tests turn."""
    program = SimpleNamespace(
        exits=("early", "middle", "backbone"),
        notes=(),
        operating_point=SimpleNamespace(name="drop+0.50"),
        artifact=SimpleNamespace(files={"a": b"12345"}),
        backend=SimpleNamespace(name="onnxruntime", threads=1),
    )
    FakeProcesses.now = 0.0
    monkeypatch.setattr(checking, "_open", lambda *_: (program, program))
    monkeypatch.setattr(checking, "answer", lambda *_: (answered(), np.zeros(100, np.int32)))
    monkeypatch.setattr(checking, "environment_of", lambda _: ENVIRONMENT)
    monkeypatch.setattr(checking.time, "perf_counter", lambda: FakeProcesses.now)

    def set_up(*, noise: float = 0.02, slower: float = 1.0, seconds: float = 1.0) -> FakeProcesses:
        fake = FakeProcesses(noise=noise, slower=slower, seconds=seconds)
        monkeypatch.setattr(checking, "Processes", fake)
        return fake

    return set_up


def budget(path: Path | None, increase: float = 0.1) -> Budget:
    limit = Limit(Metric("latency", "mean"), "max_increase", increase, "10 %")
    return Budget((limit,), RunSettings(), baseline=path)


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    write_baseline(path, measurement(noise=0.02, processes=20, seed=9))
    return path


def test_a_clear_case_takes_six_processes(measured: Callable[..., FakeProcesses], baseline: Path) -> None:
    measured()
    report = check("p.exit", budget(baseline), ROWS)
    assert (report.verdict, report.exit_code, report.looks) == ("PASS", 0, 1)
    assert len(report.measurement.processes) == 6
    assert report.causes is not None
    assert report.notes == FakeProcesses.notes


def test_what_is_slower_fails(measured: Callable[..., FakeProcesses], baseline: Path) -> None:
    measured(slower=1.2)
    report = check("p.exit", budget(baseline), ROWS)
    assert (report.verdict, report.exit_code) == ("FAIL", 1)
    assert report.causes is not None
    assert report.causes.named == ("kernels",)


def test_an_unclear_case_is_measured_longer_until_the_time_is_up(
    measured: Callable[..., FakeProcesses], baseline: Path
) -> None:
    fake = measured(slower=1.1, noise=0.05)
    report = check("p.exit", budget(baseline), ROWS, max_seconds=30.0)
    assert (report.verdict, report.exit_code) == ("INCONCLUSIVE", 2)
    assert fake.count == len(report.measurement.processes) == 30
    assert report.looks == 6  # at 6, 9, 13, 19, 28 and, as the time is up, at 30
    assert report.seconds == 30.0


def test_a_slow_program_is_measured_three_times_and_says_so(
    measured: Callable[..., FakeProcesses], baseline: Path
) -> None:
    measured(seconds=40.0)
    report = check("p.exit", budget(baseline), ROWS, max_seconds=60.0)
    assert len(report.measurement.processes) == 3
    assert any("only 3 processes" in note for note in report.notes)


def test_a_baseline_is_written_and_then_compared_with(
    measured: Callable[..., FakeProcesses], tmp_path: Path
) -> None:
    path = tmp_path / "new.json"
    measured()
    first = check("p.exit", budget(path), ROWS, update_baseline=True)
    assert first.baseline is None
    assert [outcome.verdict for outcome in first.outcomes] == ["SKIPPED"]
    assert first.baseline_written == str(path)
    assert len(read_baseline(path).processes) == 60  # until the time is up
    measured(slower=1.2)
    assert check("p.exit", budget(path), ROWS).verdict == "FAIL"
    measured(slower=1.2)
    again = check("p.exit", budget(path), ROWS, update_baseline=True)
    assert again.verdict == "FAIL"  # against the old one
    measured(slower=1.2)
    assert check("p.exit", budget(path), ROWS).verdict == "PASS"


def test_nothing_is_timed_where_no_limit_asks_for_it(measured: Callable[..., FakeProcesses]) -> None:
    fake = measured()
    size = Budget((Limit(Metric("artifact", "size"), "max", 10.0, "10 B"),))
    report = check("p.exit", size, ROWS)
    assert (report.verdict, fake.count) == ("PASS", 0)


def test_another_machine_is_named(measured: Callable[..., FakeProcesses], baseline: Path) -> None:
    write_baseline(baseline, elsewhere(measurement(noise=0.02, processes=20)))
    measured()
    report = check("p.exit", budget(baseline), ROWS)
    assert report.verdict == "PASS"
    assert any("only ratios" in note and "another processor" in note for note in report.notes)


@pytest.mark.parametrize("named", [True, False])
def test_a_missing_baseline_is_an_error_before_anything_is_measured(
    measured: Callable[..., FakeProcesses], tmp_path: Path, named: bool
) -> None:
    fake = measured()
    with pytest.raises(BudgetError, match=r"latency.mean.max_increase needs a baseline") as error:
        check("p.exit", budget(tmp_path / "none.json" if named else None), ROWS)
    assert "--update-baseline" in str(error.value.remedy)
    assert fake.count == 0


def test_a_baseline_needs_a_place(measured: Callable[..., FakeProcesses], tmp_path: Path) -> None:
    measured()
    with pytest.raises(BudgetError, match="no place for a baseline"):
        check("p.exit", budget(None), ROWS, update_baseline=True)
    with pytest.raises(InputError, match="folder"):
        check("p.exit", budget(tmp_path / "no" / "b.json"), ROWS, update_baseline=True)


@pytest.mark.parametrize(
    ("metric", "kind", "message"),
    [
        (Metric("accuracy", "drop"), "max", "no labels"),
        (Metric("exit_rates", "layer9"), "min", "no exit 'layer9'; it has early, middle, backbone"),
    ],
)
def test_limits_that_do_not_fit_are_refused(
    measured: Callable[..., FakeProcesses], metric: Metric, kind: Any, message: str
) -> None:
    measured()
    with pytest.raises(BudgetError, match=message):
        check("p.exit", Budget((Limit(metric, kind, 0.1, ""),)), ROWS[0])


def test_it_is_public() -> None:
    assert exitcompiler.check is check


def test_what_was_clear_stays_so_while_another_limit_is_measured_longer(
    measured: Callable[..., FakeProcesses], baseline: Path
) -> None:
    measured(slower=1.1, noise=0.05)
    near = budget(baseline).limits[0]
    clear = Limit(Metric("latency", "mean"), "max_ratio", 0.7, "0.7")
    both = replace(budget(baseline), limits=(near, clear))
    report = check("p.exit", both, ROWS, max_seconds=30.0)
    assert [outcome.verdict for outcome in report.outcomes] == ["INCONCLUSIVE", "PASS"]
    measured(slower=1.1, noise=0.05)
    first = check("p.exit", replace(both, limits=(clear,)), ROWS, max_seconds=30.0)
    assert first.looks == 1
    assert report.looks > 1
    assert report.outcomes[1] == first.outcomes[0]


def test_limits_that_only_rows_decide_do_not_keep_it_measuring(
    measured: Callable[..., FakeProcesses], baseline: Path
) -> None:
    fake = measured()
    drop = Limit(Metric("accuracy", "drop"), "max", 0.02, "2 points")
    both = replace(budget(baseline), limits=(drop, *budget(baseline).limits), fresh_rows=True)
    report = check("p.exit", both, ROWS)
    assert [outcome.verdict for outcome in report.outcomes] == ["INCONCLUSIVE", "PASS"]
    assert fake.count == 6


def test_a_single_slow_process_does_not_end_it(
    measured: Callable[..., FakeProcesses], baseline: Path
) -> None:
    fake = measured(slower=1.1, noise=0.05)
    usual = fake.run

    def run(number: int) -> Any:
        found = usual(number)
        return replace(found, seconds=25.0) if number == 0 else found

    fake.run = run  # type: ignore[method-assign]
    assert len(check("p.exit", budget(baseline), ROWS, max_seconds=30.0).measurement.processes) > 20


def other_rows(path: Path) -> None:
    write_baseline(path, measurement(noise=0.02, processes=8, fingerprint="0" * 64))


def test_a_baseline_of_other_rows_is_refused_where_it_matters(
    measured: Callable[..., FakeProcesses], baseline: Path
) -> None:
    other_rows(baseline)
    fake = measured()
    with pytest.raises(BudgetError, match="measured on other rows") as error:
        check("p.exit", budget(baseline), ROWS)
    assert "latency.mean.max_increase" in str(error.value.where)
    assert fake.count == 0
    size = replace(budget(baseline), limits=(Limit(Metric("artifact", "size"), "max", 10.0, "10 B"),))
    report = check("p.exit", size, ROWS)
    assert report.baseline is None
    assert any("nothing was compared" in note for note in report.notes)


def test_a_baseline_without_that_batch_size_is_refused(
    measured: Callable[..., FakeProcesses], baseline: Path
) -> None:
    measured()
    limit = Limit(Metric("throughput", "64"), "max_decrease", 0.1, "10 %")
    with pytest.raises(BudgetError, match="no throughput for batches of 64"):
        check("p.exit", replace(budget(baseline), limits=(limit,)), ROWS)


@pytest.mark.parametrize("damage", ["other rows", "cut off", "empty", "another schema"])
def test_an_old_baseline_that_is_of_no_use_is_replaced(
    measured: Callable[..., FakeProcesses], baseline: Path, damage: str
) -> None:
    if damage == "other rows":
        other_rows(baseline)
    else:
        text = baseline.read_text()
        changed = {
            "cut off": text[:-40],
            "empty": "",
            "another schema": text.replace('"schema": 1', '"schema": 9'),
        }
        baseline.write_text(changed[damage])
        measured()
        with pytest.raises(BudgetError):
            check("p.exit", budget(baseline), ROWS)
    measured()
    report = check("p.exit", budget(baseline), ROWS, update_baseline=True)
    assert any("old baseline" in note for note in report.notes)
    assert read_baseline(baseline).answered.fingerprint == "f" * 64


def test_what_is_no_baseline_is_not_overwritten(
    measured: Callable[..., FakeProcesses], tmp_path: Path
) -> None:
    path = tmp_path / "package.json"
    path.write_text('{"name": "mine"}')
    measured()
    with pytest.raises(BudgetError, match="will not be overwritten"):
        check("p.exit", budget(path), ROWS, update_baseline=True)
    assert path.read_text() == '{"name": "mine"}'


def test_exits_that_cannot_hold_all_rows_are_refused(measured: Callable[..., FakeProcesses]) -> None:
    measured()
    limits = tuple(
        Limit(Metric("exit_rates", name), "max", 0.3, "30 %") for name in ("early", "middle", "backbone")
    )
    with pytest.raises(BudgetError, match="add up to 90 %"):
        check("p.exit", Budget(limits), ROWS)


def test_a_program_in_memory_is_no_artifact(baseline: Path) -> None:
    with pytest.raises(InputError, match="is no path"):
        check(object(), budget(baseline), ROWS)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"max_seconds": 0.0}, {"max_seconds": float("nan")}])
def test_arguments_that_make_no_sense_are_refused(
    measured: Callable[..., FakeProcesses], baseline: Path, arguments: dict[str, Any]
) -> None:
    measured()
    with pytest.raises(InputError, match=r"negative|no time"):
        check("p.exit", budget(baseline), ROWS, **arguments)
