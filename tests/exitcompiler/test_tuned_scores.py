"""Scores of a network that was fine-tuned: accuracy is counted from the network as it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_tables import every_edge, make_cascade, make_costs, make_table, random_policy

from exitcompiler.baselines import patience, random_routing, shared_threshold, soft_oracle
from exitcompiler.cascade_baselines import network_alone, oracle, parts
from exitcompiler.costs import CostModel
from exitcompiler.errors import CalibrationError
from exitcompiler.evaluation import Evaluation, evaluate
from exitcompiler.frontier import Frontier, sweep
from exitcompiler.gate_search import to_policy
from exitcompiler.gates import Recipe
from exitcompiler.naming import OWN
from exitcompiler.scores import HeadScores, ScoreTable

BETTER, WORSE = 4.0, 0.8
"""How much the original network knows; the tuned one of ``make_table`` lies between."""


def tuned(table: ScoreTable, skill: float = BETTER, seed: int = 100) -> ScoreTable:
    """The same scores, as those of a network that was tuned from another one."""
    generator = np.random.default_rng(seed)
    rows, classes = table.backbone_logits.shape
    right = generator.integers(classes, size=rows) if table.labels is None else table.labels
    logits = skill * np.eye(classes)[right] + generator.normal(size=(rows, classes))
    return replace(table, original_logits=logits.astype(np.float32))


def original_right(table: ScoreTable) -> np.ndarray:
    """By hand."""
    assert table.original_logits is not None
    answers = table.original_logits.argmax(axis=1)
    return np.asarray(answers == (answers if table.labels is None else table.labels))


def cost_of_tuning(table: ScoreTable) -> float:
    """By hand: how much accuracy the network itself lost."""
    assert table.labels is not None
    return float(original_right(table).mean() - (table.backbone_logits.argmax(axis=1) == table.labels).mean())


def test_what_is_right_of_the_original_and_of_the_tuned_network() -> None:
    plain = make_table(rows=200)
    table = tuned(plain)
    np.testing.assert_array_equal(table.reference_correct, original_right(table))
    np.testing.assert_array_equal(table.backbone_correct, plain.backbone_correct)
    assert (table.reference_correct != table.backbone_correct).any()
    assert table.targets is table.labels
    np.testing.assert_array_equal(plain.reference_correct, plain.backbone_correct)


def test_without_labels_the_target_is_the_original() -> None:
    table = tuned(make_table(rows=200, labelled=False))
    assert table.original_logits is not None
    answers = table.original_logits.argmax(axis=1)
    np.testing.assert_array_equal(table.targets, answers)
    assert table.targets.dtype == np.int64
    assert table.reference_correct.all()
    np.testing.assert_array_equal(table.backbone_correct, table.backbone_logits.argmax(axis=1) == answers)
    assert not table.backbone_correct.all()
    key = ("exit1", "deep")
    np.testing.assert_array_equal(table.correct(key), table.heads[key].logits.argmax(axis=1) == answers)


def test_original_logits_that_do_not_fit_are_refused() -> None:
    table = tuned(make_table(rows=20, exits=1))
    assert table.original_logits is not None
    for wrong in (table.original_logits[:19], table.original_logits[:, :4]):
        with pytest.raises(CalibrationError, match=r"original backbone.*\n?.*the backbone's have"):
            replace(table, original_logits=wrong)
    spoiled = table.original_logits.copy()
    spoiled[[3, 7], 1] = np.inf
    with pytest.raises(CalibrationError, match=r"original backbone.*2 of 20 rows have NaN or infinite"):
        replace(table, original_logits=spoiled)


@pytest.mark.parametrize("labelled", [True, False])
def test_parts_of_a_table_count_from_the_same_original(labelled: bool) -> None:
    table = tuned(make_table(rows=50, labelled=labelled))
    assert table.original_logits is not None
    rows = np.array([40, 3, 3, 17])
    right, targets = table.reference_correct, table.targets
    part = table.take(rows)
    np.testing.assert_array_equal(part.original_logits, table.original_logits[rows])
    np.testing.assert_array_equal(part.reference_correct, right[rows])
    np.testing.assert_array_equal(part.targets, targets[rows])
    np.testing.assert_array_equal(part.take(np.array([1])).reference_correct, right[[3]])
    few = table.restrict(("exit1",))
    assert few.exits == ("exit1",)
    np.testing.assert_array_equal(few.reference_correct, right)
    np.testing.assert_array_equal(few.targets, targets)
    assert make_table(rows=50).take(rows).original_logits is None


def require_shifted(found: Evaluation, before: Evaluation, table: ScoreTable) -> None:
    """Where nothing differs but what accuracy is counted from."""
    assert found.accuracy_drop == pytest.approx(before.accuracy_drop + cost_of_tuning(table), abs=1e-12)
    assert found.backbone_accuracy == original_right(table).mean()
    assert found.excess_error == (original_right(table) & ~before.correct).mean()
    np.testing.assert_array_equal(found.backbone_correct, original_right(table))
    np.testing.assert_array_equal(found.correct, before.correct)
    np.testing.assert_array_equal(found.exit_index, before.exit_index)
    np.testing.assert_array_equal(found.time_us, before.time_us)
    assert found.exit_accuracy == before.exit_accuracy


@given(seed=st.integers(0, 10_000), exits=st.integers(1, 3), skill=st.sampled_from([BETTER, WORSE]))
@settings(max_examples=30, deadline=None)
def test_a_drop_is_shifted_by_what_tuning_cost(seed: int, exits: int, skill: float) -> None:
    plain = make_table(rows=60, exits=exits, seed=seed)
    table, costs, policy = tuned(plain, skill, seed + 1), make_costs(plain), random_policy(plain, seed)
    require_shifted(evaluate(policy, table, costs), evaluate(policy, plain, costs), table)


def test_baselines_are_shifted_by_what_tuning_cost() -> None:
    plain = make_table(rows=120, exits=3)
    table, costs = tuned(plain), make_costs(plain)
    exits = tuple((name, "deep") for name in table.exits)
    baselines = [
        *list(shared_threshold(plain, [exits], "entropy", steps=4)),
        *patience([exits]),
        *random_routing([exits], [0.0, 0.4]),
    ]
    for baseline in baselines:
        require_shifted(baseline.evaluate(table, costs), baseline.evaluate(plain, costs), table)
    require_shifted(soft_oracle(table, costs, exits), soft_oracle(plain, costs, exits), table)
    assert cost_of_tuning(table) > 0.05


QUICK = {"recipes": (Recipe("net", linear=False),), "steps": 4, "folds": 2}


def require_a_frontier_from_the_original(frontier: Frontier, table: ScoreTable, whole_us: float) -> None:
    right = original_right(table)
    for point in frontier.points:
        np.testing.assert_array_equal(point.estimate.backbone_correct, right)
        if point.policy.is_plain:
            assert point is frontier.plain
    plain = frontier.plain
    assert (plain.accuracy_drop, plain.mean_us) == (0.0, whole_us)
    assert frontier.select(max_accuracy_drop=0.0).accuracy_drop <= 0.0
    drops = [point.accuracy_drop for point in frontier.points]
    assert drops == sorted(drops)


@given(seed=st.integers(0, 10_000), skill=st.sampled_from([BETTER, WORSE]), head_us=st.sampled_from([9, 400]))
@settings(max_examples=8, deadline=None)
def test_the_only_plain_point_is_the_original(seed: int, skill: float, head_us: float) -> None:
    table = tuned(make_table(rows=220, exits=2, kinds=("deep",), seed=seed), skill, seed + 1)
    costs = make_costs(table, head_us=head_us)
    frontier = sweep(table, costs, **QUICK)  # type: ignore[arg-type]
    require_a_frontier_from_the_original(frontier, table, costs.whole_us)


def without_exits(table: ScoreTable) -> CostModel:
    """Heads that cost so much that nobody leaves."""
    return make_costs(table, head_us=1e6)


@pytest.mark.parametrize("skill", [BETTER, WORSE])
def test_a_tuned_network_without_exits_is_no_point(skill: float) -> None:
    """It is as slow as the original, and not as given; be it better or worse."""
    table = tuned(make_table(rows=220, exits=1), skill)
    assert abs(cost_of_tuning(table)) > 0.05
    frontier = sweep(table, without_exits(table), **QUICK)  # type: ignore[arg-type]
    assert frontier.points == (frontier.plain,)
    assert frontier.drops == pytest.approx([cost_of_tuning(table)] * 4)
    assert frontier.fit(max_accuracy_drop=0.0) is frontier.plain


def test_the_plain_point_is_estimated_as_the_original() -> None:
    """It is right where the original is, so that it makes no errors that the original does not make."""
    table = tuned(make_table(rows=220, exits=1))
    estimate = sweep(table, without_exits(table), **QUICK).plain.estimate  # type: ignore[arg-type]
    assert estimate.accuracy == estimate.backbone_accuracy == original_right(table).mean()
    assert (estimate.accuracy_drop, estimate.excess_error) == (0.0, 0.0)


def test_where_tuning_cost_more_than_is_allowed_the_original_is_what_is_left() -> None:
    plain = make_table(rows=400, exits=2, kinds=("deep",), seed=4)
    table, costs = tuned(plain), make_costs(plain, gate_us=1.0, head_us=5.0)
    lost, options = cost_of_tuning(table), {**QUICK, "steps": 7}
    assert lost > 0.05
    from_tuned = sweep(plain, costs, **options)  # type: ignore[arg-type]
    frontier = sweep(table, costs, **options)  # type: ignore[arg-type]
    assert any(not point.policy.is_plain for point in frontier.points)
    np.testing.assert_allclose(frontier.drops, from_tuned.drops + lost, atol=1e-12)
    np.testing.assert_allclose(frontier.times_us, from_tuned.times_us)
    limit = from_tuned.points[1].accuracy_drop
    assert limit < frontier.drops.min()
    assert not from_tuned.fit(max_accuracy_drop=limit).policy.is_plain
    assert frontier.fit(max_accuracy_drop=limit) is frontier.plain


TOPOLOGY = every_edge(("a/0", "a"), ("b",), ("c",))


def cascade_costs(table: ScoreTable) -> CostModel:
    heads = dict.fromkeys([*table.heads, *table.agreements], 4.0)
    return CostModel(tuple(100.0 * 2**place for place in range(len(table.exits))), heads, 1.0)


def tuned_cascade(labelled: bool = True) -> ScoreTable:
    table = make_cascade(TOPOLOGY, rows=220)
    return tuned(table if labelled else replace(table, labels=None))


@pytest.mark.parametrize("labelled", [True, False])
def test_parts_of_a_cascade_count_from_the_original_reference(labelled: bool) -> None:
    table = tuned_cascade(labelled)
    for ways, own in (({"chains": True, "inner": False}, True), ({"chains": False, "inner": True}, False)):
        found = parts(TOPOLOGY, **ways)
        assert len(found) == 4
        for part in found:
            few = part.table(table, own=own)
            np.testing.assert_array_equal(few.reference_correct, original_right(table))
            np.testing.assert_array_equal(few.targets, table.targets)


def test_networks_alone_and_the_oracle_of_a_cascade_count_from_the_original_reference() -> None:
    table = tuned_cascade()
    costs = cascade_costs(table)
    for name in ("a", "b", "c"):
        alone = network_alone(table, costs, name)
        right = table.heads[name, OWN].logits.argmax(axis=1) == table.labels
        assert alone.accuracy == right.mean()
        assert alone.accuracy_drop == pytest.approx(original_right(table).mean() - right.mean(), abs=1e-12)
    assert network_alone(table, costs, "c").accuracy_drop == pytest.approx(cost_of_tuning(table), abs=1e-12)
    for result in oracle(table, costs):
        np.testing.assert_array_equal(result.backbone_correct, original_right(table))


@pytest.mark.parametrize("change", [None, lambda table: replace(table, labels=None)], ids=["", "no labels"])
def test_the_frontier_of_a_cascade_has_no_tuned_reference_as_plain(
    change: Callable[[ScoreTable], ScoreTable] | None,
) -> None:
    table = make_cascade(every_edge(("a",), ("b",)), rows=200)
    useless = table.heads["a", OWN].logits[::-1].copy()
    heads = {("a", OWN): HeadScores("a", OWN, useless), ("b", OWN): table.heads["b", OWN]}
    table = tuned(replace(table, heads=heads, agreements={}), WORSE)
    table = table if change is None else change(table)
    costs = cascade_costs(table)
    frontier = sweep(table, costs, **QUICK)  # type: ignore[arg-type]
    require_a_frontier_from_the_original(frontier, table, costs.whole_us)
    # Which is what is learned where accuracy is worth a lot.
    assert to_policy(table.topology, frontier.learner.learn(1e4 * costs.whole_us)).is_plain
