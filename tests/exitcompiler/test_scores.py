"""Tests of cached scores and policies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_tables import make_costs, make_table, random_policy

from exitcompiler.controlflow import ConstantGate, LinearGate
from exitcompiler.costs import CostModel
from exitcompiler.errors import CalibrationError, InputError
from exitcompiler.evaluation import Evaluation, evaluate
from exitcompiler.policies import GoOn, Leave, LinearRule, Policy, gate_of, leave_above
from exitcompiler.scores import BACKBONE, HeadScores, ScoreTable, softmax_confidence
from exitcompiler.topology import Topology


def test_confidence_is_max_probability_margin_and_normalised_entropy() -> None:
    p = np.array([[0.7, 0.1, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    entropy = -(p[0] * np.log(p[0])).sum() / np.log(3)
    expected = [[0.7, 0.5, entropy], [1 / 3, 0.0, 1.0]]
    confidence = softmax_confidence(np.log(p).astype(np.float32))
    assert confidence.dtype == np.float32
    np.testing.assert_allclose(confidence, expected, atol=1e-6)


def test_confidence_of_extreme_logits_is_finite() -> None:
    confidence = softmax_confidence(np.array([[1e4, -1e4, 0.0]], np.float32))
    np.testing.assert_array_equal(confidence, [[1.0, 1.0, 0.0]])


def test_taken_rows_keep_derived_values() -> None:
    table = make_table(rows=50)
    rows = np.array([3, 3, 40])
    whole = table.features([("exit0", "deep")])
    part = table.take(rows)
    np.testing.assert_array_equal(part.features([("exit0", "deep")]), whole[rows])
    np.testing.assert_array_equal(part.targets, table.targets[rows])
    assert part.rows == 3


def test_without_labels_the_target_is_the_backbone() -> None:
    table = make_table(labelled=False)
    assert table.backbone_correct.all()
    key = ("exit1", "deep")
    agrees = table.heads[key].prediction == table.backbone_prediction
    np.testing.assert_array_equal(table.correct(key), agrees)


def _rebuild(table: ScoreTable, **changes: object) -> ScoreTable:
    values = {
        "topology": table.topology,
        "heads": table.heads,
        "backbone_logits": table.backbone_logits,
        "labels": table.labels,
    }
    return ScoreTable(**{**values, **changes})  # type: ignore[arg-type]


def test_bad_tables_are_refused() -> None:
    table = make_table(rows=20, exits=1, kinds=("deep",))
    key = ("exit0", "deep")
    spoiled = table.heads[key].logits.copy()
    spoiled[4, 1] = np.nan
    assert table.labels is not None
    with pytest.raises(CalibrationError, match="1 of 20 rows have NaN"):
        _rebuild(table, heads={key: HeadScores(*key, spoiled)})
    with pytest.raises(CalibrationError, match="the backbone's have"):
        _rebuild(table, heads={key: HeadScores(*key, spoiled[:5])})
    with pytest.raises(CalibrationError, match="labels run from 0 to 5, the model has 5 classes"):
        _rebuild(table, labels=np.arange(20) % 6)
    with pytest.raises(CalibrationError, match="19,"):
        _rebuild(table, labels=table.labels[:19])
    with pytest.raises(CalibrationError, match="not integers"):
        _rebuild(table, labels=table.labels.astype(np.float32))
    with pytest.raises(CalibrationError, match="no head"):
        _rebuild(table, topology=Topology.chain(("exit0", "other")))


def test_times_of_leaving_add_up() -> None:
    table = make_table(rows=10)
    costs = CostModel((10.0, 20.0, 30.0, 40.0), dict.fromkeys(table.heads, 3.0), 1.0, plain_us=90.0)
    rule = leave_above("deep", (("exit0", "deep"),), (1.0, 0.0, 0.0), -0.5)
    policy = Policy(table.topology, (rule, GoOn(), Leave("linear")))
    np.testing.assert_array_equal(costs.times_us(policy.topology, policy.steps), [14.0, 20.0, 33.0, 40.0])
    plain = Policy.plain(table.topology)
    assert costs.times_us(plain.topology, plain.steps).sum() == 90.0


def test_what_lies_behind_a_constant_exit_is_not_kept() -> None:
    table = make_table(rows=10)
    policy = Policy(table.topology, (GoOn(), Leave("deep"), Leave("linear")))
    assert list(policy.kept) == ["exit1"]
    assert set(policy.walk(table)[1]) == {1}


def test_rules_read_only_kept_exits_with_their_own_head_first() -> None:
    exits = Topology.chain(("a", "b"))
    own = ("b", "deep")
    first = leave_above("linear", (("a", "linear"),), (1.0, 0.0, 0.0), 0.0)
    with pytest.raises(InputError, match="not computed on every way"):
        Policy(exits, (GoOn(), leave_above("deep", (own, ("a", "deep")), (1.0,) * 6, 0.0)))
    with pytest.raises(InputError, match="not computed on every way"):
        Policy(exits, (first, leave_above("deep", (own, ("a", "deep")), (1.0,) * 6, 0.0)))
    with pytest.raises(InputError, match="of its own first"):
        Policy(exits, (first, leave_above("deep", (("a", "linear"), own), (1.0,) * 6, 0.0)))
    with pytest.raises(InputError, match="weights"):
        Policy(exits, (GoOn(), leave_above("deep", (own,), (1.0,), 0.0)))


def test_gates_of_a_program_leave_by_edge_0() -> None:
    table = make_table(rows=40)
    own, earlier = ("exit1", "deep"), ("exit0", "deep")
    rule = leave_above("deep", (own, earlier), (1.0, -2.0, 0.5, 1.0, 0.0, -1.0), -0.2)
    gate = gate_of(rule, {own: "own_confidence", earlier: "earlier_confidence"})
    assert isinstance(gate, LinearGate)
    assert gate.reads == ("own_confidence", "earlier_confidence")
    scores = table.features(rule.reads) @ np.asarray(gate.weight).T + np.asarray(gate.bias)
    first = leave_above("deep", (earlier,), (1.0, 0.0, 0.0), -2.0)
    left = Policy(table.topology, (first, rule, GoOn())).walk(table)[1] == 1
    assert 0 < left.sum() < 40
    np.testing.assert_array_equal(scores.argmax(axis=1) == 0, left)
    assert gate_of(Leave("deep"), {}) == ConstantGate(0, 1)
    assert gate_of(GoOn(), {}) == ConstantGate(0, 1)
    with pytest.raises(InputError, match="do not reach"):
        gate_of(rule, {own: "own_confidence"})


def _naive(policy: Policy, table: ScoreTable, costs: CostModel) -> tuple[list[int], list[float], list[bool]]:
    """Walk each row through the program, one at a time."""
    places, times, rights = [], [], []
    for row in range(table.rows):
        time_us = costs.whole_us if not policy.kept else costs.segment_us[0]
        place, answer = len(policy.exits), int(table.backbone_prediction[row])
        for index, (name, decision) in enumerate(zip(policy.exits, policy.decisions, strict=True)):
            leaves = False
            if isinstance(decision, Leave):
                time_us += costs.head_us[name, decision.head]
                leaves = True
            elif isinstance(decision, LinearRule):
                time_us += costs.head_us[name, decision.head] + costs.gate_us
                values = [float(v) for key in decision.reads for v in table.heads[key].confidence[row]]
                leave, onward = np.asarray(decision.weight) @ np.asarray(values) + np.asarray(decision.bias)
                leaves = bool(leave >= onward)
            if leaves:
                assert not isinstance(decision, GoOn)
                place, answer = index, int(table.heads[name, decision.head].prediction[row])
                break
            if policy.kept:
                time_us += costs.segment_us[index + 1]
        places.append(place)
        times.append(time_us)
        rights.append(answer == int(table.targets[row]))
    return places, times, rights


@given(seed=st.integers(0, 10_000), exits=st.integers(1, 4), labelled=st.booleans())
@settings(max_examples=40, deadline=None)
def test_evaluation_agrees_with_walking_row_by_row(seed: int, exits: int, labelled: bool) -> None:
    table = make_table(rows=30, exits=exits, seed=seed, labelled=labelled)
    costs = make_costs(table)
    policy = random_policy(table, seed)
    result = evaluate(policy, table, costs)
    places, times, rights = _naive(policy, table, costs)
    np.testing.assert_array_equal(result.exit_index, places)
    np.testing.assert_allclose(result.time_us, times)
    np.testing.assert_array_equal(result.correct, rights)
    assert result.mean_us == pytest.approx(np.mean(times))
    _check_shares(result)


def _check_shares(result: Evaluation) -> None:
    assert sum(result.exit_rates.values()) == pytest.approx(1.0)
    parts = [
        rate * accuracy
        for rate, accuracy in zip(result.exit_rates.values(), result.exit_accuracy.values(), strict=True)
        if accuracy is not None
    ]
    assert sum(parts) == pytest.approx(result.accuracy)
    assert result.accuracy_drop <= result.excess_error + 1e-12
    assert list(result.exit_rates)[-1] == BACKBONE
