"""Paired measurement; nothing here depends on how fast the machine is."""

from __future__ import annotations

import time

import numpy as np
import pytest

from exitcompiler.errors import InputError
from exitcompiler.runtime.timing import measure_interleaved


def test_candidates_take_turns_on_the_same_inputs() -> None:
    calls: list[tuple[str, int]] = []
    samples = measure_interleaved(
        {name: lambda i, name=name: calls.append((name, i)) for name in "ab"},
        [(0,), (1,), (2,)],
        repeats=6,
        warmup=3,
    )
    assert {name: s.shape for name, s in samples.items()} == {"a": (6,), "b": (6,)}
    turns = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert all({name for name, _ in turn} == {"a", "b"} for turn in turns)
    assert [turn[0][1] for turn in turns] == [0, 1, 2] * 3
    assert all(turn[0][1] == turn[1][1] for turn in turns)
    assert len({turn[0][0] for turn in turns}) == 2, "the order should vary"


def test_microseconds() -> None:
    samples = measure_interleaved({"sleep": lambda: time.sleep(0.002)}, [()], repeats=2, warmup=0)
    assert (samples["sleep"] >= 2000).all()


def test_nothing_to_time() -> None:
    for candidates, inputs, repeats in (({}, [()], 1), ({"a": print}, [], 1), ({"a": print}, [()], 0)):
        with pytest.raises(InputError):
            measure_interleaved(candidates, inputs, repeats=repeats)


class _Clock:
    """Each look at it takes a millisecond, so that a turn of two calls takes five looks."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += 1_000_000
        return self.now_ns


@pytest.mark.parametrize(
    ("limit_s", "minimum", "turns"),
    [(None, 1, 100), (1e9, 1, 100), (0.2, 1, 40), (0.2, 60, 60), (0.0, 200, 100), (0.0, 1, 1)],
)
def test_a_time_limit_ends_the_turns_but_not_too_soon(
    limit_s: float | None, minimum: int, turns: int
) -> None:
    samples = measure_interleaved(
        {"a": lambda: None, "b": lambda: None}, [()], repeats=100, warmup=0, limit_s=limit_s, minimum=minimum,
        clock=_Clock(),
    )  # fmt: skip
    assert {name: s.shape for name, s in samples.items()} == {"a": (turns,), "b": (turns,)}
    np.testing.assert_array_equal(np.concatenate(list(samples.values())), 1000.0)


def test_the_warm_up_counts_towards_the_limit() -> None:
    calls: list[int] = []
    samples = measure_interleaved(
        {"a": lambda: calls.append(0)}, [()], repeats=100, warmup=50, limit_s=0.05, minimum=7, clock=_Clock()
    )
    assert len(calls) == 57
    assert samples["a"].shape == (7,)
