"""Slower kernels and a worse exit mix are told apart."""

from __future__ import annotations

import pytest
from budget_figures import EXITS, TIMES_US, elsewhere, measurement
from hypothesis import given
from hypothesis import strategies as st

from exitcompiler.budgets.causes import find_causes

LATER = {"early": 45, "middle": 30, "backbone": 25}


def test_the_same_program_has_no_cause() -> None:
    found = find_causes(measurement(noise=0.03, seed=1), measurement(noise=0.03, seed=2), 0.95)
    assert found is not None
    assert found.named == ()
    assert "Neither" in found.summary


def test_slower_kernels_are_named_and_the_block_is_found() -> None:
    now = measurement(slower=1.2, slow_block={"third": 900.0}, noise=0.02, seed=1)
    found = find_causes(now, measurement(noise=0.02, seed=2), 0.95)
    assert found is not None
    assert found.named == ("kernels",)
    assert found.exit_mix.value == pytest.approx(1.0)
    assert found.kernels.lower < 1.2 < found.kernels.upper
    assert "kernels got slower" in found.summary
    assert max(found.blocks, key=lambda block: block.time.value).name == "third"
    assert all(change.time.lower > 1.0 for change in found.exits)


def test_a_worse_mix_is_named_though_the_kernels_are_noisy() -> None:
    found = find_causes(measurement(exits=LATER, noise=0.03, seed=1), measurement(noise=0.03, seed=2), 0.95)
    assert found is not None
    assert found.named == ("exit mix",)
    old = sum(EXITS[name] * TIMES_US[name] for name in EXITS)
    assert found.exit_mix.value == pytest.approx(sum(LATER[n] * TIMES_US[n] for n in EXITS) / old, rel=0.02)
    assert "Fewer inputs leave early" in found.summary


def test_both_are_named_where_both_changed() -> None:
    found = find_causes(
        measurement(exits=LATER, slower=1.3, noise=0.02, seed=1), measurement(noise=0.02, seed=2), 0.95
    )
    assert found is not None
    assert found.named == ("kernels", "exit mix")


def test_warmer_caches_of_rows_that_go_further_are_not_named_beside_the_mix() -> None:
    now = measurement(exits=LATER, slower=0.94, noise=0.005, seed=1)
    found = find_causes(now, measurement(noise=0.005, seed=2), 0.95)
    assert found is not None
    assert found.kernels.upper < 1.0
    assert found.named == ("exit mix",)


def test_kernels_of_another_place_are_said_to_be() -> None:
    now, before = measurement(slower=1.3, noise=0.01, seed=1), elsewhere(measurement(noise=0.01, seed=2))
    found = find_causes(now, before, 0.95)
    assert found is not None
    assert "another place" in found.summary


def test_a_few_percent_are_never_named() -> None:
    found = find_causes(measurement(slower=1.04, noise=0.002, seed=1), measurement(noise=0.002, seed=2), 0.95)
    assert found is not None
    assert found.kernels.lower > 1.0
    assert found.named == ()


def test_what_got_better_is_said_so() -> None:
    found = find_causes(
        measurement(noise=0.01, seed=1), measurement(exits=LATER, slower=1.3, noise=0.01), 0.95
    )
    assert found is not None
    assert "kernels got faster" in found.summary
    assert "More inputs leave early" in found.summary


def test_other_exits_or_no_times_cannot_be_told_apart() -> None:
    other = measurement(exits={"early": 60, "middle": 40})
    assert find_causes(measurement(), other, 0.95) is None
    assert find_causes(measurement(processes=0), measurement(), 0.95) is None


@given(
    st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any),
    st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any),
    st.floats(0.5, 2.0),
)
def test_kernels_times_mix_is_the_change(now: list[int], before: list[int], slower: float) -> None:
    names = list(EXITS)
    found = find_causes(
        measurement(exits=dict(zip(names, now, strict=True)), slower=slower, noise=0.05, seed=1),
        measurement(exits=dict(zip(names, before, strict=True)), noise=0.05, seed=2),
        0.95,
    )
    assert found is not None
    assert found.kernels.value * found.exit_mix.value == pytest.approx(found.change.value)
