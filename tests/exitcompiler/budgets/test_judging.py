"""Limits are judged by intervals where there is noise, and exactly where there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from budget_figures import EXITS, TIMES_US, elsewhere, measurement
from hypothesis import given
from hypothesis import strategies as st

from exitcompiler.budgets.figures import Answered, Measurement
from exitcompiler.budgets.judging import judge
from exitcompiler.budgets.limits import Budget, Family, Limit, LimitKind, Metric
from exitcompiler.budgets.outcomes import Outcome

MEAN_MS = sum(EXITS[name] * TIMES_US[name] for name in EXITS) / 100 / 1e3
RATIO = MEAN_MS  # the plain backbone takes 1 ms
LATER = {"early": 45, "middle": 30, "backbone": 25}


def outcome(
    key: tuple[Family, str, LimitKind],
    value: float,
    now: Measurement,
    before: Measurement | None = None,
    *,
    fresh_rows: bool = False,
) -> Outcome:
    family, name, kind = key
    limit = Limit(Metric(family, name), kind, value, str(value))
    (found,) = judge(Budget((limit,), fresh_rows=fresh_rows), now, before, 0.95)
    return found


@pytest.mark.parametrize(
    ("kind", "true"),
    [("max", MEAN_MS), ("max_ratio", RATIO), ("max_increase", 0.0), ("max_slowdown", 0.0)],
)
def test_latency_is_judged_by_its_interval(kind: LimitKind, true: float) -> None:
    now, before = measurement(noise=0.02, seed=1), measurement(noise=0.02, seed=2)
    near = outcome(("latency", "mean", kind), true, now, before)
    assert near.verdict == "INCONCLUSIVE"
    assert near.found is not None
    assert near.found.lower < true < near.found.upper
    assert outcome(("latency", "mean", kind), true + 0.15, now, before).verdict == "PASS"
    assert outcome(("latency", "mean", kind), true - 0.15, now, before).verdict == "FAIL"


def test_twenty_percent_slower_breaks_ten_and_not_thirty() -> None:
    now, before = measurement(slower=1.2, noise=0.02, seed=1), measurement(noise=0.02, seed=2)
    for kind in ("max_increase", "max_slowdown"):
        assert outcome(("latency", "mean", kind), 0.1, now, before).verdict == "FAIL"
        assert outcome(("latency", "mean", kind), 0.4, now, before).verdict == "PASS"
    found = outcome(("latency", "p99", "max_increase"), 0.1, now, before)
    assert found.found is not None
    assert found.found.value == pytest.approx(0.2, abs=0.06)
    assert found.now is not None
    assert found.before is not None
    assert found.now / found.before == pytest.approx(1.2, abs=0.06)


def test_throughput_has_a_lower_limit_and_may_fall() -> None:
    now, before = measurement(slower=1.25, noise=0.01, seed=1), measurement(noise=0.01, seed=2)
    rows_per_second = 1e3 / MEAN_MS / 1.25
    assert outcome(("throughput", "32", "min"), 0.8 * rows_per_second, now).verdict == "PASS"
    assert outcome(("throughput", "32", "min"), 1.2 * rows_per_second, now).verdict == "FAIL"
    assert outcome(("throughput", "32", "min_ratio"), 0.8 / RATIO / 1.25, now).verdict == "PASS"
    fallen = outcome(("throughput", "32", "max_decrease"), 0.1, now, before)
    assert fallen.verdict == "FAIL"
    assert fallen.found is not None
    assert fallen.found.value == pytest.approx(0.2, abs=0.03)
    assert fallen.found.lower < fallen.found.value < fallen.found.upper
    assert outcome(("throughput", "32", "max_decrease"), 0.3, now, before).verdict == "PASS"


def test_load_time_and_memory_come_from_the_processes_that_loaded_first() -> None:
    now = measurement(noise=0.02, processes=16, seed=1)
    load = outcome(("load", "time", "max"), 120.0, now)
    assert load.verdict == "PASS"
    assert load.now == pytest.approx(100.0, rel=0.05)
    assert outcome(("load", "time", "max_ratio"), 1.1, now).verdict == "FAIL"
    assert outcome(("load", "time", "max_increase"), 0.2, now, measurement(noise=0.02)).verdict == "PASS"
    assert outcome(("memory", "peak", "max"), 120e6, now).verdict == "PASS"
    assert outcome(("memory", "peak", "max"), 119e6, now).verdict == "FAIL"
    assert outcome(("memory", "peak", "max_ratio"), 1.25, now).verdict == "PASS"


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_processes_pass_nothing_and_fail_nothing(count: int) -> None:
    for family, name in (("latency", "mean"), ("load", "time")):
        found = outcome((family, name, "max_ratio"), 100.0, measurement(processes=count))
        assert found.verdict == ("SKIPPED" if count == 0 else "INCONCLUSIVE")


def test_times_of_another_machine_are_not_compared_but_ratios_are() -> None:
    now, before = measurement(noise=0.01, seed=1), elsewhere(measurement(noise=0.01, seed=2))
    skipped = outcome(("latency", "mean", "max_slowdown"), 0.1, now, before)
    assert skipped.verdict == "SKIPPED"
    assert "another place" in skipped.note
    assert outcome(("latency", "mean", "max_increase"), 0.1, now, before).verdict == "PASS"


def test_without_a_baseline_changes_are_skipped_and_the_rest_is_judged() -> None:
    assert outcome(("latency", "mean", "max_increase"), 0.1, measurement()).verdict == "SKIPPED"
    assert outcome(("exit_rates", "", "tolerance"), 0.1, measurement()).verdict == "SKIPPED"
    assert outcome(("latency", "mean", "max_ratio"), 0.9, measurement()).verdict == "PASS"


def test_a_batch_size_that_the_baseline_lacks_is_skipped() -> None:
    now = measurement()
    sides = [replace(p, program=replace(p.program, rows_per_second={})) for p in now.processes]
    before = replace(now, processes=tuple(sides))
    assert outcome(("throughput", "32", "max_decrease"), 0.1, now, before).verdict == "SKIPPED"


def test_size_is_exact() -> None:
    now = measurement()
    assert outcome(("artifact", "size", "max"), 2_000_000, now).verdict == "PASS"
    assert outcome(("artifact", "size", "max"), 1_999_999, now).verdict == "FAIL"
    before = replace(now, size_bytes=1_900_000)
    assert outcome(("artifact", "size", "max_increase"), 0.05, now, before).verdict == "FAIL"
    assert outcome(("artifact", "size", "max_increase"), 0.06, now, before).verdict == "PASS"


def _labelled(found: Measurement, lost: int, gained: int, rows: int = 1000) -> Measurement:
    answers = Answered(
        rows, "f" * 64, {"early": rows}, lost + gained, rows - lost, rows - gained, lost, gained
    )
    return replace(found, answered=answers)


def test_a_drop_is_exact_on_these_rows_and_an_interval_for_fresh_ones() -> None:
    now = _labelled(measurement(), lost=12, gained=2)
    assert outcome(("accuracy", "drop", "max"), 0.01, now).verdict == "PASS"
    assert outcome(("accuracy", "drop", "max"), 0.0099, now).verdict == "FAIL"
    fresh = outcome(("accuracy", "drop", "max"), 0.01, now, fresh_rows=True)
    assert fresh.verdict == "INCONCLUSIVE"
    assert fresh.found is not None
    assert fresh.found.lower < 0.01 < fresh.found.upper
    assert outcome(("accuracy", "drop", "max"), 0.03, now, fresh_rows=True).verdict == "PASS"


def test_a_drop_that_grew_is_compared_row_by_row() -> None:
    now, before = _labelled(measurement(), 12, 2), _labelled(measurement(), 6, 2)
    assert outcome(("accuracy", "drop", "max_increase"), 0.006, now, before).verdict == "PASS"
    assert outcome(("accuracy", "drop", "max_increase"), 0.005, now, before).verdict == "FAIL"


def test_disagreement_needs_no_labels() -> None:
    answers = replace(
        measurement().answered,
        rows=100,
        disagreements=3,
        right=None,
        plain_right=None,
        lost=None,
        gained=None,
    )
    now = replace(measurement(), answered=answers)
    assert outcome(("accuracy", "disagreement", "max"), 0.03, now).verdict == "PASS"
    assert outcome(("accuracy", "disagreement", "max"), 0.02, now).verdict == "FAIL"
    assert outcome(("accuracy", "drop", "max"), 0.02, now).verdict == "SKIPPED"


def test_exit_rates_are_exact() -> None:
    now, before = measurement(exits=LATER), measurement()
    found = outcome(("exit_rates", "", "tolerance"), 0.149, now, before)
    assert found.verdict == "FAIL"
    assert "early" in found.note
    assert (found.now, found.before) == (0.45, 0.6)
    assert outcome(("exit_rates", "", "tolerance"), 0.15, now, before).verdict == "PASS"
    assert outcome(("exit_rates", "middle", "tolerance"), 0.05, now, before).verdict == "PASS"
    assert outcome(("exit_rates", "middle", "tolerance"), 0.04, now, before).verdict == "FAIL"
    assert outcome(("exit_rates", "early", "min"), 0.5, now).verdict == "FAIL"
    assert outcome(("exit_rates", "early", "max"), 0.5, now).verdict == "PASS"


def test_an_exit_that_is_gone_has_moved_too() -> None:
    now = measurement(exits={"early": 60, "backbone": 40})
    assert outcome(("exit_rates", "", "tolerance"), 0.2, now, measurement()).verdict == "FAIL"


@given(st.floats(0.3, 3.0), st.floats(0.0, 2.0), st.integers(0, 1000))
def test_no_verdict_is_given_that_the_interval_does_not_bear_out(
    slower: float, limit: float, seed: int
) -> None:
    now, before = measurement(slower=slower, noise=0.1, seed=seed), measurement(noise=0.1, seed=seed + 1)
    found = outcome(("latency", "mean", "max_increase"), limit, now, before)
    assert found.found is not None
    expected = {True: "PASS"}.get(found.found.upper <= limit)
    expected = expected or ("FAIL" if found.found.lower > limit else "INCONCLUSIVE")
    assert found.verdict == expected
    assert not math.isnan(found.found.value)


def test_an_exit_with_a_tolerance_of_its_own_is_judged_by_that_alone() -> None:
    now, before = measurement(exits={"early": 45, "middle": 30, "backbone": 25}), measurement()
    every = Limit(Metric("exit_rates", ""), "tolerance", 0.11, "11 points")
    own = [
        Limit(Metric("exit_rates", name), "tolerance", 0.2, "20 points")
        for name in ("early", "middle", "backbone")
    ]
    verdicts = [o.verdict for o in judge(Budget((every,)), now, before, 0.95)]
    assert verdicts == ["FAIL"]
    outcomes = judge(Budget((every, own[0])), now, before, 0.95)
    assert [o.verdict for o in outcomes] == ["PASS", "PASS"]
    assert outcomes[0].note == "furthest: backbone"
    assert judge(Budget((every, *own)), now, before, 0.95)[0].verdict == "SKIPPED"
