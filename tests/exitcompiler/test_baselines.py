"""Tests of the baselines."""

from __future__ import annotations

import numpy as np
import pytest
from score_tables import make_costs, make_table

from exitcompiler.baselines import (
    PatiencePolicy,
    RandomPolicy,
    best_on,
    exit_sets,
    patience,
    per_exit_thresholds,
    random_routing,
    shared_threshold,
    soft_oracle,
)
from exitcompiler.errors import InputError
from exitcompiler.scores import HeadScores, ScoreTable
from exitcompiler.topology import Topology


def _table_of(predictions: list[list[int]], backbone: list[int], labels: list[int]) -> ScoreTable:
    """One exit per list of predicted classes, of three."""
    names = tuple(f"e{index}" for index in range(len(predictions)))
    one_hot = np.eye(3, dtype=np.float32) * 4
    heads = {
        (name, "deep"): HeadScores(name, "deep", one_hot[classes])
        for name, classes in zip(names, predictions, strict=True)
    }
    return ScoreTable(Topology.chain(names), heads, one_hot[backbone], np.asarray(labels, np.int64))


def test_patience_counts_agreeing_exits_in_a_row() -> None:
    table = _table_of([[0, 0, 1], [0, 1, 0], [0, 1, 1]], [0, 0, 0], [0, 0, 0])
    exits = exit_sets(table)[-1]
    one = PatiencePolicy(exits, 1).evaluate(table, make_costs(table))
    np.testing.assert_array_equal(one.exit_index, [1, 2, 3])
    two = PatiencePolicy(exits, 2).evaluate(table, make_costs(table))
    np.testing.assert_array_equal(two.exit_index, [2, 3, 3])


def test_the_oracle_leaves_only_where_all_that_follows_is_right() -> None:
    table = _table_of([[1, 1, 1, 1], [1, 1, 0, 0]], [1, 0, 1, 0], [1, 1, 1, 1])
    costs = make_costs(table)
    result = soft_oracle(table, costs, exit_sets(table)[-1])
    np.testing.assert_array_equal(result.exit_index, [0, 2, 2, 2])
    assert result.accuracy_drop == 0.0
    head_us = costs.head_us["e0", "deep"] + costs.gate_us
    assert result.time_us[0] == pytest.approx(200 + head_us)
    assert result.time_us[3] == pytest.approx(600 + 2 * head_us)


def test_no_threshold_without_loss_is_faster_than_the_oracle() -> None:
    table = make_table(rows=500, kinds=("deep",))
    costs = make_costs(table)
    for exits in exit_sets(table):
        bound = soft_oracle(table, costs, exits).mean_us
        for rival in shared_threshold(table, [exits], "max_probability", 15):
            result = rival.evaluate(table, costs)
            assert result.mean_us >= bound - 1e-9 or result.excess_error > 0


@pytest.mark.parametrize("measure", ["max_probability", "entropy"])
def test_a_shared_threshold_leaves_at_the_first_exit_that_passes_it(measure: str) -> None:
    table = make_table(rows=60, kinds=("deep",))
    exits = exit_sets(table)[-1]
    feature, sign = (0, 1.0) if measure == "max_probability" else (2, -1.0)
    confidence = sign * np.stack([table.heads[key].confidence[:, feature] for key in exits], axis=1)
    for rival in shared_threshold(table, [exits], measure, 7):  # type: ignore[arg-type]
        rule = next(iter(rival.policy.kept.values()))
        threshold = -rule.bias[0]  # type: ignore[union-attr]
        passes = confidence.astype(np.float64) >= threshold
        expected = np.where(passes.any(axis=1), passes.argmax(axis=1), len(exits))
        left = rival.evaluate(table, make_costs(table)).exit_index
        np.testing.assert_array_equal(left, expected)


def test_thresholds_per_exit_are_no_worse_than_shared_ones_on_their_rows() -> None:
    table = make_table(rows=400, kinds=("deep",), seed=4)
    costs = make_costs(table)
    trade_off_us = 3000.0
    (own,) = per_exit_thresholds(table, costs, np.array([trade_off_us]))
    value = own.evaluate(table, costs)
    shared = [
        r.evaluate(table, costs) for r in shared_threshold(table, exit_sets(table), "max_probability", 20)
    ]
    best = min(r.mean_us + trade_off_us * r.accuracy_drop for r in shared)
    assert value.mean_us + trade_off_us * value.accuracy_drop <= best * 1.001


def test_chance_leaves_at_its_rate_and_is_repeatable() -> None:
    table = make_table(rows=4000, exits=1, kinds=("deep",))
    costs = make_costs(table)
    exits = exit_sets(table)[0]
    result = RandomPolicy(exits, 0.3).evaluate(table, costs)
    assert result.exit_rates["exit0"] == pytest.approx(0.3, abs=0.03)
    again = RandomPolicy(exits, 0.3).evaluate(table, costs)
    np.testing.assert_array_equal(result.exit_index, again.exit_index)
    everyone = list(random_routing([exits], [0.0, 1.0]))
    assert [r.evaluate(table, costs).exit_rates["exit0"] for r in everyone] == [0.0, 1.0]


def test_exit_sets_are_all_subsets_with_the_heads_asked_for() -> None:
    table = make_table(rows=5)
    sets = exit_sets(table)
    assert len(sets) == len(set(sets)) == 7
    assert sets[-1] == (("exit0", "deep"), ("exit1", "deep"), ("exit2", "deep"))
    assert exit_sets(table, {"exit2": "linear"}) == ((("exit2", "linear"),),)
    with pytest.raises(InputError, match="no scores"):
        exit_sets(table, {"exit2": "wide"})
    assert sum(1 for _ in patience(sets)) == 3 * 1 + 2


def test_the_best_candidates_do_not_beat_one_another() -> None:
    table = make_table(rows=300, kinds=("deep",))
    kept = best_on(shared_threshold(table, exit_sets(table), "entropy", 10), table, make_costs(table))
    drops = [result.accuracy_drop for _, result in kept]
    times = [result.mean_us for _, result in kept]
    assert drops == sorted(drops)
    assert times == sorted(times, reverse=True)
    assert len(kept) > 2
