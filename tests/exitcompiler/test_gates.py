"""Tests of learning gates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_tables import make_costs, make_table

from exitcompiler.costs import CostModel
from exitcompiler.errors import CalibrationError, InputError
from exitcompiler.evaluation import evaluate
from exitcompiler.gate_features import losses, max_probability, smoothed_losses
from exitcompiler.gate_search import Choice, Direction, Problem, best_cuts, best_shifts, cut, to_policy
from exitcompiler.gates import RECIPES, Recipe, learn_policy, prepare
from exitcompiler.policies import GoOn, Leave, LinearRule, Policy, leave_above
from exitcompiler.scores import HeadScores, ScoreTable
from exitcompiler.site_search import search

REALISED = Recipe("net", smoothed=False)


def _objective(policy: Policy, table: ScoreTable, costs: CostModel, trade_off_us: float) -> float:
    result = evaluate(policy, table, costs)
    return result.mean_us + trade_off_us * result.accuracy_drop


@given(seed=st.integers(0, 1000), trade_off_us=st.floats(100.0, 50_000.0))
@settings(max_examples=10, deadline=None)
def test_learned_objective_is_never_worse_than_constants_and_single_thresholds(
    seed: int, trade_off_us: float
) -> None:
    table = make_table(rows=150, exits=2, seed=seed)
    costs = make_costs(table)
    policy = to_policy(table.topology, prepare(table, costs, REALISED).learn(trade_off_us))
    learned = _objective(policy, table, costs, trade_off_us)
    rivals: list[Policy] = [Policy.plain(table.topology)]
    for name, kind in table.heads:
        place = table.exits.index(name)
        thresholds = np.quantile(table.heads[name, kind].confidence[:, 0], np.linspace(0, 1, 12))
        rules: list[GoOn | Leave | LinearRule] = [Leave(kind)]
        rules += [leave_above(kind, ((name, kind),), (1.0, 0.0, 0.0), -float(t)) for t in thresholds]
        for rule in rules:
            decisions: list[GoOn | Leave | LinearRule] = [GoOn()] * len(table.exits)
            decisions[place] = rule
            rivals.append(Policy(table.topology, tuple(decisions)))
    best = min(_objective(rival, table, costs, trade_off_us) for rival in rivals)
    assert learned <= best + 1e-6


@given(seed=st.integers(0, 10_000), trade_off_us=st.floats(1.0, 10_000.0))
@settings(max_examples=50, deadline=None)
def test_objective_less_its_optimum_is_the_weighted_error_of_the_gate(seed: int, trade_off_us: float) -> None:
    """The reduction to weighted classification, with a frozen future, is exact."""
    table = make_table(rows=40, exits=2, kinds=("deep",), seed=seed)
    costs = make_costs(table)
    loss = losses(table, "excess")
    key = ("exit0", "deep")
    penalty_us = {k: trade_off_us * v for k, v in loss.items()}
    problem = Problem(table, costs, penalty_us, {k: (max_probability(table, k),) for k in table.heads})
    generator = np.random.default_rng(seed)
    later = cut(max_probability(table, ("exit1", "deep")), ("deep", 2), [generator.uniform(0.2, 1.0)])
    gate = cut(max_probability(table, key), ("deep", 1), [generator.uniform(0.2, 1.0)])
    assert gate is not None
    assert later is not None
    onward_us = problem.values_us((gate, later))[1]
    gain_us = onward_us - penalty_us[key]
    wrong = gate.takes("deep") != (gain_us >= 0)
    ideal = np.minimum(onward_us, penalty_us[key]).mean()
    overhead = costs.step_us(0, gate.step("exit0"))
    excess = problem.objective_us((gate, later)) - (ideal + overhead)
    assert excess == pytest.approx(float((np.abs(gain_us) * wrong).mean()), abs=1e-6)


@given(seed=st.integers(0, 10_000), loss=st.sampled_from(["net", "excess"]))
@settings(max_examples=20, deadline=None)
def test_search_objective_is_that_of_the_policy(seed: int, loss: str) -> None:
    table = make_table(rows=120, seed=seed)
    costs = make_costs(table)
    learner = prepare(table, costs, Recipe(loss, smoothed=False))  # type: ignore[arg-type]
    problem = learner.problem(3000.0)
    value_us, choices = search(problem, (), learner.allowed)
    result = evaluate(to_policy(table.topology, choices), table, costs)
    harm = result.accuracy_drop if loss == "net" else result.excess_error
    assert value_us == pytest.approx(result.mean_us + 3000.0 * harm)
    assert value_us == pytest.approx(problem.objective_us(choices))


@given(
    values=st.lists(st.tuples(st.integers(0, 6), st.integers(-5, 5), st.booleans()), min_size=1, max_size=25)
)
@settings(max_examples=100, deadline=None)
def test_best_cuts_agree_with_trying_every_threshold(values: list[tuple[int, int, bool]]) -> None:
    score = np.array([float(v[0]) for v in values])
    gain = np.array([float(v[1]) for v in values])
    arrives = np.array([v[2] for v in values])
    key = ("a", "deep")
    direction = Direction(key, (key,), np.eye(3)[0], score, np.argsort(-score, kind="stable"), 1e-6)
    total, (threshold,) = best_cuts(direction, [-gain, np.zeros(len(gain))], arrives)
    tried = [gain[arrives & (score >= level)].sum() for level in (*score, np.inf)]
    assert -total == pytest.approx(max(tried))
    assert gain[arrives & (score >= threshold)].sum() == pytest.approx(-total)


@given(
    values=st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.integers(-5, 5), min_size=3, max_size=3), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_best_cuts_between_three_actions_agree_with_trying_all(
    values: list[tuple[int, list[int], bool]],
) -> None:
    score = np.array([float(v[0]) for v in values])
    costs = np.array([v[1] for v in values], np.float64)
    arrives = np.array([v[2] for v in values])
    key = ("a", "deep")
    direction = Direction(key, (key,), np.eye(3)[0], score, np.argsort(-score, kind="stable"), 1e-6)
    total, thresholds = best_cuts(direction, list(costs.T), arrives)

    def cost(first: float, second: float) -> float:
        action = (score < first).astype(int) + (score < second)
        return float(costs[np.arange(len(score)), action][arrives].sum())

    levels = [-np.inf, *score, np.inf]
    tried = [cost(first, second) for first in levels for second in levels if first >= second]
    assert total == pytest.approx(min(tried))
    assert cost(*thresholds) == pytest.approx(total)
    rule = cut(direction, ("deep", 1, 2), thresholds)
    if rule is not None:
        assert rule.weight is not None
        assert rule.bias is not None
        linear = (np.outer(score, rule.weight[:, 0]) + rule.bias).argmax(axis=1)
        taken = [("deep", 1, 2).index(rule.actions[number]) for number in linear]
        assert costs[np.arange(len(score)), taken][arrives].sum() == pytest.approx(total)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_shifts_are_never_worse_than_none_nor_than_any_single_action(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, costs = generator.normal(size=(2, 40, 3))
    arrives = generator.random(40) < 0.8
    arrives[0] = True
    total, bias = best_shifts(scores, costs, arrives)
    rows = np.flatnonzero(arrives)

    def cost(shift: np.ndarray) -> float:
        return float(costs[rows, (scores + shift)[rows].argmax(axis=1)].sum())

    assert cost(bias) == pytest.approx(total)
    assert total <= cost(np.zeros(3)) + 1e-9
    assert all(total <= cost(np.eye(3)[action] * 100.0) + 1e-9 for action in range(3))


def test_no_threshold_parts_scores_that_engines_cannot_tell_apart() -> None:
    score = np.array([0.9, 0.9 - 2e-7, 0.5])
    key = ("a", "deep")
    direction = Direction(key, (key,), np.eye(3)[0], score, np.arange(3), 1e-6)
    costs = [np.array([-5.0, 4.0, 9.0]), np.zeros(3)]
    total, (threshold,) = best_cuts(direction, costs, np.ones(3, np.bool_))
    assert total == -1.0
    assert 0.5 < threshold < 0.89


def test_search_finds_the_best_set_of_exits_and_thresholds() -> None:
    """Against trying all of them, on a coarse grid: the exact search may only be better."""
    table = make_table(rows=120, exits=3, kinds=("deep",), seed=3)
    costs = make_costs(table, head_us=60.0)
    loss = losses(table, "net")
    problem = Problem(
        table,
        costs,
        {key: 2500.0 * value for key, value in loss.items()},
        {key: (max_probability(table, key),) for key in table.heads},
    )
    value_us, _ = search(problem, (), (True,) * 3)
    grid = []
    for place, key in enumerate(table.heads):
        direction = max_probability(table, key)
        levels = np.quantile(direction.score, np.linspace(0.02, 0.98, 14))
        rules = [cut(direction, ("deep", place + 1), [float(level)]) for level in levels]
        grid.append([Choice((place + 1,)), Choice(("deep",)), *(rule for rule in rules if rule)])
    brute = min(problem.objective_us(choices) for choices in itertools.product(*grid))
    assert value_us <= brute * 1.005


def test_worthless_and_forbidden_exits_are_not_kept() -> None:
    table = make_table(rows=300, exits=3)
    dear = make_costs(table, head_us=5000.0)
    assert not learn_policy(table, table, dear, 2000.0, recipes=(REALISED,)).kept
    costs = make_costs(table)
    assert "exit0" in learn_policy(table, table, costs, 1000.0, recipes=(REALISED,)).kept
    kept = learn_policy(table, table, costs, 1000.0, recipes=(REALISED,), allowed=("exit2",)).kept
    assert list(kept) == ["exit2"]


def test_accuracy_for_nothing_ends_the_network_at_its_first_exit() -> None:
    table = make_table(rows=200)
    policy = learn_policy(table, table, make_costs(table), 0.0)
    assert policy.kept == {"exit0": Leave("linear")}


def test_more_weight_on_accuracy_never_pays_in_time_on_the_learning_rows() -> None:
    table = make_table(rows=400)
    costs = make_costs(table)
    learner = prepare(table, costs, Recipe("net", smoothed=False, linear=False))
    policies = [to_policy(table.topology, learner.learn(t)) for t in (200.0, 2_000.0, 20_000.0, 200_000.0)]
    drops = [evaluate(policy, table, costs).accuracy_drop for policy in policies]
    assert drops == sorted(drops, reverse=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_deterministic_and_reads_only_kept_exits(recipe: Recipe) -> None:
    table = make_table(rows=300, seed=5)
    costs = make_costs(table)
    first = learn_policy(table, table, costs, 4000.0, recipes=(recipe,))
    assert first == learn_policy(table, table, costs, 4000.0, recipes=(recipe,))
    for name, rule in first.kept.items():
        if isinstance(rule, LinearRule):
            assert rule.reads[0] == (name, rule.head)
            assert {key[0] for key in rule.reads} <= set(first.kept)


def test_smoothed_losses_keep_the_mean_and_vanish_on_agreement() -> None:
    table = make_table(rows=3000, seed=2)
    for kind in ("net", "excess"):
        realised = losses(table, kind)  # type: ignore[arg-type]
        smooth = smoothed_losses(table, kind)  # type: ignore[arg-type]
        agree = {k: table.heads[k].prediction == table.backbone_prediction for k in table.heads}
        assert all((smooth[k][agree[k]] == 0).all() for k in table.heads)
        total = sum(float(v.mean()) for v in realised.values())
        assert sum(float(v.mean()) for v in smooth.values()) == pytest.approx(total, abs=1e-3)
        assert sum(v.var() for v in smooth.values()) < sum(v.var() for v in realised.values())


def test_smoothing_without_labels_changes_nothing() -> None:
    table = make_table(rows=300, labelled=False)
    smooth, realised = smoothed_losses(table, "net"), losses(table, "net")
    assert all((smooth[key] == realised[key]).all() for key in table.heads)


def test_heads_that_always_agree_are_learned_from_without_a_regression() -> None:
    base = make_table(rows=200, exits=1, kinds=("deep",))
    head = HeadScores("exit0", "deep", base.backbone_logits)
    table = ScoreTable(base.topology, {("exit0", "deep"): head}, base.backbone_logits, base.labels)
    policy = learn_policy(table, table, make_costs(table), 10_000.0)
    assert policy.kept == {"exit0": Leave("deep")}


def test_bad_input_is_refused() -> None:
    table = make_table(rows=200)
    costs = make_costs(table)
    with pytest.raises(CalibrationError, match="at least 100 are needed"):
        learn_policy(table.take(np.arange(60)), table, costs, 100.0)
    assert table.labels is not None
    same = ScoreTable(table.topology, table.heads, table.backbone_logits, np.zeros(200, np.int64))
    with pytest.raises(CalibrationError, match="all 200 labels are 0"):
        learn_policy(same, table, costs, 100.0)
    with pytest.raises(InputError, match="trade-off"):
        learn_policy(table, table, costs, float("nan"))
    with pytest.raises(InputError, match="recipe"):
        learn_policy(table, table, costs, 1.0, recipes=())
    with pytest.raises(InputError, match="no times"):
        learn_policy(table, table, CostModel((1.0,) * 4, {}), 1.0)
