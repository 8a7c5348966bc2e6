"""Every exit is timed, and counts by its share of all rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitcompiler.budgets.sampling import (
    ROWS_PER_EXIT,
    draw_batch,
    draw_rows,
    row_weights,
    stratified_subset,
    weighted_quantile,
)

EXITS = st.lists(st.integers(0, 4), min_size=1, max_size=200).map(np.array)


@given(EXITS, st.integers(1, 200), st.integers(0, 99))
def test_some_rows_of_every_exit_come_first_and_none_comes_twice(
    exits: np.ndarray, most: int, seed: int
) -> None:
    weights = np.full(len(exits), 1 / len(exits))
    drawn = draw_rows(exits, weights, most, np.random.default_rng(seed))
    assert len(set(drawn.tolist())) == len(drawn)
    found, counts = np.unique(exits, return_counts=True)
    least = np.minimum(counts, ROWS_PER_EXIT)
    first = exits[drawn[: least.sum()]]
    np.testing.assert_array_equal([np.sum(first == index) for index in found], least)
    assert len(drawn) == max(least.sum(), min(most, len(exits)))
    assert set(exits[drawn[: len(found)]]) == set(found)  # one of each before the second of any


@given(EXITS, st.integers(1, 300))
def test_a_subset_keeps_the_shares_of_exits(exits: np.ndarray, most: int) -> None:
    kept = stratified_subset(exits, most, np.random.default_rng(0))
    assert np.all(np.diff(kept) > 0)
    for index, count in zip(*np.unique(exits, return_counts=True), strict=True):
        wanted = max(ROWS_PER_EXIT, round(most * count / len(exits)))
        assert np.sum(exits[kept] == index) == min(count, wanted)


def test_weights_give_exits_their_shares() -> None:
    exits = np.array([0, 2, 2, 2])
    shares = np.array([0.7, 0.0, 0.3])
    np.testing.assert_allclose(row_weights(exits, shares), [0.7, 0.1, 0.1, 0.1])


def test_batches_repeat_rows_only_where_there_are_too_few() -> None:
    rng = np.random.default_rng(0)
    weights = np.full(10, 0.1)
    assert sorted(draw_batch(weights, 10, rng)) == list(range(10))
    assert len(draw_batch(weights, 25, rng)) == 25
    assert set(draw_batch(np.array([0.0, 1.0]), 3, rng)) == {1}


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), min_size=1, max_size=30).filter(
        lambda pairs: any(weight for _, weight in pairs)
    ),
    st.sampled_from([0.05, 0.25, 0.5, 0.95, 0.99, 1.0]),
)
def test_a_weight_counts_as_so_many_equal_values(pairs: list[tuple[int, int]], share: float) -> None:
    values, weights = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    repeated = np.repeat(values, weights.astype(int))
    expected = np.sort(repeated)[int(np.ceil(share * len(repeated) - 1e-9)) - 1]
    for scale in (1.0, 1 / 3):
        assert weighted_quantile(values, scale * weights, share) == pytest.approx(expected)
