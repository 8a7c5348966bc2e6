"""Tests of learning gates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_tables import make_costs, make_table

from exitcompiler.errors import CalibrationError, InputError
from exitcompiler.gate_features import losses, max_probability, smoothed_losses
from exitcompiler.gate_search import Choice, Direction, Problem, best_cut, search, to_policy
from exitcompiler.gates import RECIPES, Recipe, learn_policy, prepare
from exitcompiler.policies import CostModel, GoOn, Leave, LinearRule, Policy, evaluate
from exitcompiler.scores import HeadScores, ScoreTable

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
    policy = to_policy(table.exits, prepare(table, costs, REALISED).learn(trade_off_us))
    learned = _objective(policy, table, costs, trade_off_us)
    rivals: list[Policy] = [Policy.plain(table.exits)]
    for name, kind in table.heads:
        place = table.exits.index(name)
        thresholds = np.quantile(table.heads[name, kind].confidence[:, 0], np.linspace(0, 1, 12))
        rules: list[GoOn | Leave | LinearRule] = [Leave(kind)]
        rules += [LinearRule(kind, ((name, kind),), (1.0, 0.0, 0.0), -float(t)) for t in thresholds]
        for rule in rules:
            decisions: list[GoOn | Leave | LinearRule] = [GoOn()] * len(table.exits)
            decisions[place] = rule
            rivals.append(Policy(table.exits, tuple(decisions)))
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
    later = Choice(("exit1", "deep"), max_probability(table, ("exit1", "deep")), generator.uniform(0.2, 1.0))
    gate = Choice(key, max_probability(table, key), generator.uniform(0.2, 1.0))
    gain_us = problem.suffixes_us((gate, later))[0] - penalty_us[key]
    wrong = gate.leaves(table.rows) != (gain_us >= 0)
    ideal = np.minimum(problem.suffixes_us((gate, later))[0], penalty_us[key]).mean()
    overhead = costs.segment_us[0] + problem.overhead_us(gate)
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
    result = evaluate(to_policy(table.exits, choices), table, costs)
    harm = result.accuracy_drop if loss == "net" else result.excess_error
    assert value_us == pytest.approx(result.mean_us + 3000.0 * harm)
    assert value_us == pytest.approx(problem.objective_us(choices))


@given(
    values=st.lists(st.tuples(st.integers(0, 6), st.integers(-5, 5), st.booleans()), min_size=1, max_size=25)
)
@settings(max_examples=100, deadline=None)
def test_best_cut_agrees_with_trying_every_threshold(values: list[tuple[int, int, bool]]) -> None:
    score = np.array([float(v[0]) for v in values])
    gain = np.array([float(v[1]) for v in values])
    arrives = np.array([v[2] for v in values])
    key = ("a", "deep")
    direction = Direction(key, (key,), np.eye(3)[0], score, np.argsort(-score, kind="stable"), 1e-6)
    total, threshold = best_cut(direction, gain, arrives)
    tried = [gain[arrives & (score >= cut)].sum() for cut in (*score, np.inf)]
    assert total == pytest.approx(max(tried))
    assert gain[arrives & (score >= threshold)].sum() == pytest.approx(total)


def test_no_threshold_parts_scores_that_engines_cannot_tell_apart() -> None:
    score = np.array([0.9, 0.9 - 2e-7, 0.5])
    key = ("a", "deep")
    direction = Direction(key, (key,), np.eye(3)[0], score, np.arange(3), 1e-6)
    total, threshold = best_cut(direction, np.array([5.0, -4.0, -9.0]), np.ones(3, np.bool_))
    assert total == 1.0
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
    for key in table.heads:
        direction = max_probability(table, key)
        cuts = np.quantile(direction.score, np.linspace(0.02, 0.98, 14))
        grid.append([None, Choice(key), *(Choice(key, direction, float(cut)) for cut in cuts)])
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
    policies = [to_policy(table.exits, learner.learn(t)) for t in (200.0, 2_000.0, 20_000.0, 200_000.0)]
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
    table = ScoreTable(base.exits, {("exit0", "deep"): head}, base.backbone_logits, base.labels)
    policy = learn_policy(table, table, make_costs(table), 10_000.0)
    assert policy.kept == {"exit0": Leave("deep")}


def test_bad_input_is_refused() -> None:
    table = make_table(rows=200)
    costs = make_costs(table)
    with pytest.raises(CalibrationError, match="at least 100 are needed"):
        learn_policy(table.take(np.arange(60)), table, costs, 100.0)
    assert table.labels is not None
    same = ScoreTable(table.exits, table.heads, table.backbone_logits, np.zeros(200, np.int64))
    with pytest.raises(CalibrationError, match="all 200 labels are 0"):
        learn_policy(same, table, costs, 100.0)
    with pytest.raises(InputError, match="trade-off"):
        learn_policy(table, table, costs, float("nan"))
    with pytest.raises(InputError, match="recipe"):
        learn_policy(table, table, costs, 1.0, recipes=())
    with pytest.raises(InputError, match="no times"):
        learn_policy(table, table, CostModel((1.0,) * 4, {}), 1.0)
