"""Ranking sets of exits: the fastest within the drop first, and no more exits than needed."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from score_tables import make_costs, make_table

from exitcompiler.baselines import shared_threshold
from exitcompiler.costs import CostModel
from exitcompiler.evaluation import Evaluation
from exitcompiler.finetuning.exit_ranking import FAST_ENOUGH, LOOSER, NEARLY, SAME, rank_sets
from exitcompiler.scores import HeadScores, ScoreTable


def _table(seed: int = 0, exits: int = 3, labelled: bool = True) -> ScoreTable:
    return make_table(rows=500, exits=exits, kinds=("deep",), seed=seed, labelled=labelled)


def _points(table: ScoreTable, costs: CostModel, exits: tuple[str, ...]) -> list[Evaluation]:
    keys = tuple((name, "deep") for name in exits)
    return [p.evaluate(table, costs) for p in shared_threshold(table, [keys], "max_probability")]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("limit", [0.0, 0.02, 0.2])
def test_every_set_is_judged_at_its_fastest_threshold_within_the_drop(limit: float, labelled: bool) -> None:
    table = _table(labelled=labelled)
    costs = make_costs(table)
    ranked, within = rank_sets(table, costs, limit, 2)
    subsets = [set_ for size in (1, 2) for set_ in combinations(table.exits, size)]
    assert {judged.exits for judged in ranked} <= set(subsets)
    found = {judged.exits: judged for judged in ranked}
    for exits in subsets:
        fitting = [p for p in _points(table, costs, exits) if p.accuracy_drop <= within]
        assert (exits in found) == bool(fitting)
        if fitting:
            assert found[exits].speedup == pytest.approx(costs.whole_us / min(p.mean_us for p in fitting))
            assert found[exits].accuracy_drop <= within


@pytest.mark.parametrize("seed", range(6))
def test_the_first_is_about_the_fastest_and_no_smaller_set_is(seed: int) -> None:
    table = _table(seed)
    ranked, _ = rank_sets(table, make_costs(table, gate_us=1.0, head_us=5.0 * seed), 0.03, 3)
    best, *others = ranked
    fastest = max(judged.speedup for judged in ranked)
    assert best.speedup >= SAME * fastest
    assert all(o.speedup < SAME * fastest for o in others if len(o.exits) < len(best.exits))
    assert [o.speedup for o in others] == sorted((o.speedup for o in others), reverse=True)


def test_an_exit_that_adds_next_to_nothing_is_left_out() -> None:
    table = _table(exits=2)
    first, second = table.exits
    # All leave at the first exit already; the second one is free, and still one exit more.
    sure = HeadScores(first, "deep", 20.0 * np.eye(5, dtype=np.float32)[table.targets])
    sure_table = replace(table, heads={**table.heads, (first, "deep"): sure})
    costs = make_costs(table, gate_us=0.0)
    costs = replace(costs, head_us={(first, "deep"): 10.0, (second, "deep"): 0.0})
    ranked, within = rank_sets(sure_table, costs, 0.01, 2)
    assert (ranked[0].exits, within) == ((first,), 0.01)


def test_exits_that_cost_more_are_ranked_behind() -> None:
    table = _table()
    cheap = make_costs(table, gate_us=0.0)
    best = rank_sets(table, cheap, 0.1, 1)[0][0].exits
    dear = replace(cheap, head_us={**cheap.head_us, (best[0], "deep"): 1e4})
    ranked, _ = rank_sets(table, dear, 0.1, 1)
    assert ranked[0].exits != best
    assert ranked[-1].exits == best


def _best(table: ScoreTable, costs: CostModel, drop: float) -> float:
    """The greatest speed-up of any set within a drop; 0 where none keeps it."""
    sets = [chosen for size in (1, 2, 3) for chosen in combinations(table.exits, size)]
    points = [point for chosen in sets for point in _points(table, costs, chosen)]
    return max((costs.whole_us / p.mean_us for p in points if p.accuracy_drop <= drop), default=0.0)


@pytest.mark.parametrize("last_us", [100.0, 1000.0])
@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3])
def test_sets_are_compared_at_the_tightest_drop_that_gains_enough(limit: float, last_us: float) -> None:
    table = _table()
    costs = CostModel((100.0, 100.0, 100.0, last_us), dict.fromkeys(table.heads, 0.0))
    ranked, within = rank_sets(table, costs, limit, 3)
    drops = [limit, *(drop for drop in LOOSER if drop > limit)]
    enough = min(FAST_ENOUGH, NEARLY * _best(table, costs, drops[-1]))
    assert within in drops
    assert ranked[0].speedup >= SAME * enough
    assert all(_best(table, costs, drop) < enough for drop in drops if drop < within)


def test_a_drop_between_is_found_where_one_gains_enough() -> None:
    table = _table()
    costs = CostModel((100.0, 100.0, 100.0, 4000.0), dict.fromkeys(table.heads, 0.0))
    assert _best(table, costs, LOOSER[-1]) > 2 * FAST_ENOUGH
    assert 0.0 < rank_sets(table, costs, 0.0, 3)[1] < LOOSER[-1]


def test_where_nothing_is_fast_and_little_is_gained_by_loss_the_limit_is_kept() -> None:
    """A heavy stem: the cheapest head at the first exit would win at 20 points, by next to nothing."""
    table = _table()
    costs = CostModel((10_000.0, 100.0, 100.0, 100.0), dict.fromkeys(table.heads, 0.0))
    ranked, within = rank_sets(table, costs, 0.01, 3)
    assert within == 0.01
    assert all(judged.accuracy_drop <= 0.01 for judged in ranked)
    assert ranked[0].speedup < _best(table, costs, LOOSER[-1])


def test_a_drop_that_gains_enough_is_kept() -> None:
    table = _table()
    costs = CostModel((10.0, 10.0, 10.0, 10_000.0), dict.fromkeys(table.heads, 0.0))
    assert _best(table, costs, 0.05) >= FAST_ENOUGH
    assert _best(table, costs, 0.2) > 1.1 * _best(table, costs, 0.05)  # a looser one would gain more
    assert rank_sets(table, costs, 0.05, 3)[1] == 0.05


def test_heads_that_know_nothing_are_ranked_all_the_same() -> None:
    table = _table(exits=2)
    blank = {key: HeadScores(*key, np.zeros_like(scores.logits)) for key, scores in table.heads.items()}
    ranked, within = rank_sets(replace(table, heads=blank), make_costs(table), 0.01, 2)
    assert len(ranked) == 3
    assert within == 1.0
    assert all(judged.accuracy_drop > LOOSER[-1] for judged in ranked)
