"""Calls that were interrupted are left out, unless too few are left."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from exitcompiler.budgets.undisturbed import Timed, measure_undisturbed
from exitcompiler.runtime.timing import OwnClock


class Machine:
    """Counts interruptions; calls know whether they are interrupted."""

    def __init__(self) -> None:
        self.count = 0
        self.calls = 0

    def candidate(self, us: float, interrupted: Callable[[int], bool]) -> OwnClock:
        def run_us(value: int) -> float:
            self.calls += 1
            hit = interrupted(value)
            self.count += hit
            return us + 1000.0 * hit

        return OwnClock(run_us)


def test_interrupted_calls_are_left_out_one_by_one() -> None:
    machine = Machine()
    timed = measure_undisturbed(
        {
            "calm": machine.candidate(5.0, lambda value: False),
            "hit": machine.candidate(7.0, lambda value: value % 2 == 1),
        },
        [(value,) for value in range(8)],
        strata=np.array([0, 0, 0, 0, 1, 1, 1, 1]),
        limit_s=0.0,
        minimum=20,
        warmup=3,
        seed=0,
        count=lambda: machine.count,
    )
    assert machine.calls == 2 * 23
    np.testing.assert_array_equal(timed["calm"].inputs, np.arange(20) % 8)
    assert timed["calm"].mean_us == 5.0
    np.testing.assert_array_equal(timed["hit"].inputs, (np.arange(20) % 8)[::2])
    assert timed["hit"].mean_us == 7.0


def test_all_calls_of_all_are_kept_where_one_kind_was_nearly_always_interrupted() -> None:
    machine = Machine()
    timed = measure_undisturbed(
        {
            "calm": machine.candidate(5.0, lambda value: value == 0),
            "hit": machine.candidate(7.0, lambda value: value == 3),
        },
        [(value,) for value in range(4)],
        strata=np.array([0, 0, 0, 1]),
        limit_s=0.0,
        minimum=8,
        warmup=0,
        seed=0,
        count=lambda: machine.count,
    )
    for calls in timed.values():
        np.testing.assert_array_equal(calls.inputs, np.arange(8) % 4)
    assert timed["calm"].mean_us == 5.0 + 250.0
    assert timed["hit"].mean_us == 7.0 + 250.0


def test_the_middle_half_knows_nothing_of_stalls() -> None:
    def midmean(*times_us: float) -> float:
        return Timed(np.array(times_us), np.arange(len(times_us))).midmean_us

    assert midmean(4.0) == 4.0
    assert midmean(1.0, 2.0, 6.0) == 3.0
    assert midmean(9e9, 3.0, 1.0, 5.0, 4.0) == 4.0
    assert midmean(*range(8)) == 3.5
    assert midmean(*range(7), 9e9) == 3.5


def test_by_itself_it_asks_the_system() -> None:
    timed = measure_undisturbed(
        {"a": lambda: None, "b": lambda: None}, [()], limit_s=0.0, minimum=10, warmup=0, seed=0
    )
    for calls in timed.values():
        assert 0 < len(calls.times_us) == len(calls.inputs) <= 10
        assert calls.mean_us > 0
