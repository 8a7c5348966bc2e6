"""Tests of the frontier."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_tables import make_costs, make_table

from exitcompiler.errors import CalibrationError, InputError
from exitcompiler.evaluation import evaluate, undominated
from exitcompiler.frontier import Frontier, FrontierPoint, sweep
from exitcompiler.gates import Recipe
from exitcompiler.policies import Policy

RECIPES = (Recipe("net", linear=False), Recipe("excess", linear=False))


@pytest.fixture(scope="module")
def frontier() -> Frontier:
    table = make_table(rows=900, seed=1)
    return sweep(table, make_costs(table), recipes=RECIPES, steps=10, folds=3)


def test_no_point_beats_another_and_the_plain_backbone_bounds_them(frontier: Frontier) -> None:
    drops = [point.accuracy_drop for point in frontier.points]
    times = [point.mean_us for point in frontier.points]
    assert drops == sorted(drops)
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == len(times) > 3
    assert frontier.points[-1].mean_us < frontier.learner.costs.whole_us


def test_estimates_come_from_rows_that_were_not_learned_on(frontier: Frontier) -> None:
    for index, table in enumerate(frontier.cross_fit.held_out):
        learned_on = frontier.cross_fit.learners[index].table
        assert learned_on.rows + table.rows == 900
        held = {row.tobytes() for row in table.backbone_logits}
        assert not held & {row.tobytes() for row in learned_on.backbone_logits}
    everywhere = np.sort(np.concatenate(frontier.cross_fit.rows))
    np.testing.assert_array_equal(everywhere, np.arange(900))


def test_estimates_hold_their_rows_in_order(frontier: Frontier) -> None:
    table = frontier.learner.table
    estimate = frontier.points[-1].estimate
    np.testing.assert_array_equal(estimate.backbone_correct, table.backbone_correct)
    heads = [table.kinds(name) for name in table.exits]
    for row, place in enumerate(estimate.exit_index[:50]):
        if place == len(table.exits):
            assert estimate.correct[row] == table.backbone_correct[row]
        else:
            answers = {bool(table.correct((table.exits[place], kind))[row]) for kind in heads[place]}
            assert bool(estimate.correct[row]) in answers


def test_select_keeps_its_limit_and_takes_the_best_within(frontier: Frontier) -> None:
    chosen = frontier.select(max_accuracy_drop=0.01)
    assert chosen.accuracy_drop <= 0.01
    assert all(p.mean_us >= chosen.mean_us for p in frontier.points if p.accuracy_drop <= 0.01)
    budget_us = frontier.points[2].mean_us
    within = frontier.select(latency_budget_us=budget_us)
    assert within.mean_us <= budget_us
    assert all(p.accuracy_drop >= within.accuracy_drop for p in frontier.points if p.mean_us <= budget_us)


def test_what_cannot_be_selected_is_refused_with_the_nearest(frontier: Frontier) -> None:
    with pytest.raises(InputError, match="the nearest drops"):
        frontier.select(max_accuracy_drop=-0.5)
    with pytest.raises(InputError, match=f"the fastest takes {frontier.points[-1].mean_us:.0f} us"):
        frontier.select(latency_budget_us=1.0)
    with pytest.raises(InputError, match="either"):
        frontier.select()
    with pytest.raises(InputError, match="either"):
        frontier.select(max_accuracy_drop=0.1, latency_budget_us=5.0)
    with pytest.raises(InputError, match="finite"):
        frontier.select(max_accuracy_drop=math.nan)


def test_a_fitted_point_sits_just_within_its_limit(frontier: Frontier) -> None:
    inner = [p for p in frontier.points if p.accuracy_drop > 0.0]
    limit = (inner[0].accuracy_drop + inner[1].accuracy_drop) / 2
    point = frontier.fit(max_accuracy_drop=limit)
    assert point.accuracy_drop == pytest.approx(limit)
    assert point.mean_us <= frontier.select(max_accuracy_drop=limit).mean_us
    budget_us = (inner[0].mean_us + inner[1].mean_us) / 2
    timed = frontier.fit(latency_budget_us=budget_us)
    assert timed.mean_us == pytest.approx(budget_us)
    assert timed.accuracy_drop <= frontier.select(latency_budget_us=budget_us).accuracy_drop + 1e-12


@given(share=st.floats(0.0, 1.0))
@settings(max_examples=15, deadline=None)
def test_what_is_fitted_to_a_limit_is_within_it_to_the_last_digit(frontier: Frontier, share: float) -> None:
    limit = float(frontier.drops[-1] + share * (frontier.drops[0] - frontier.drops[-1]))
    if limit >= 0.0:
        assert frontier.fit(max_accuracy_drop=limit).accuracy_drop <= limit
    budget_us = float(frontier.times_us[0] + share * (frontier.times_us[-1] - frontier.times_us[0]))
    assert frontier.fit(latency_budget_us=budget_us).mean_us <= budget_us


def test_a_limit_beyond_the_sweep_gives_its_fastest_point(frontier: Frontier) -> None:
    assert frontier.fit(max_accuracy_drop=0.99) is frontier.select(max_accuracy_drop=0.99)


def test_estimates_are_close_to_fresh_rows(frontier: Frontier) -> None:
    """Fresh rows of the same kind; three standard errors of the two estimates, 900 and 6000 rows."""
    # The table's generator draws all rows of a head at once: take other rows of a larger table.
    fresh = make_table(rows=6000, seed=77)
    costs = make_costs(fresh)
    for point in frontier.points[1:]:
        result = evaluate(point.policy, fresh, costs)
        spread = np.std(point.estimate.backbone_correct.astype(float) - point.estimate.correct)
        assert abs(result.accuracy_drop - point.accuracy_drop) < 3.5 * spread / np.sqrt(900) + 0.01


def test_progress_is_told_to_the_end() -> None:
    table = make_table(rows=200, exits=1)
    told: list[tuple[int, int]] = []
    sweep(
        table,
        make_costs(table),
        recipes=RECIPES[:1],
        steps=3,
        folds=2,
        on_step=lambda done, total: told.append((done, total)),
    )
    assert told == [(index + 1, 6) for index in range(6)]


def test_the_same_seed_gives_the_same_frontier() -> None:
    table = make_table(rows=250, exits=2)
    first, second = (sweep(table, make_costs(table), steps=3, folds=2) for _ in range(2))
    assert [p.policy for p in first.points] == [p.policy for p in second.points]
    assert first.recipe == second.recipe


def test_exits_that_never_pay_leave_the_plain_backbone() -> None:
    table = make_table(rows=200, exits=1)
    frontier = sweep(table, make_costs(table, head_us=1e6), recipes=RECIPES, steps=3, folds=2)
    assert [point.policy for point in frontier.points] == [Policy.plain(table.topology)]


def test_too_few_rows_are_refused() -> None:
    table = make_table(rows=120)
    with pytest.raises(CalibrationError, match="at least 125 are needed"):
        sweep(table, make_costs(table))
    with pytest.raises(InputError, match="1 folds"):
        sweep(table, make_costs(table), folds=1)


@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_pareto_keeps_exactly_the_unbeaten(pairs: list[tuple[int, int]]) -> None:
    table = make_table(rows=5, exits=1)
    plain = Policy.plain(table.topology)
    estimate = evaluate(plain, table, make_costs(table))
    points = [FrontierPoint(1.0, plain, float(d), float(t), estimate) for d, t in pairs]
    kept = {(p.accuracy_drop, p.mean_us) for p in undominated(points, lambda point: point)}
    unbeaten = {
        (d, t) for d, t in pairs if not any((a <= d and b <= t) and (a, b) != (d, t) for a, b in pairs)
    }
    assert kept == unbeaten
