"""Paired measurement; nothing here depends on how fast the machine is."""

from __future__ import annotations

import time

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
