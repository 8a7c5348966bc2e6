"""What a cascade has to beat: parts of its topology, thresholds, chance, each network alone."""

from __future__ import annotations

import numpy as np
import pytest
from score_tables import cascade_costs, every_edge, make_cascade

from exitcompiler.cascade_baselines import (
    learned_on,
    myopic,
    network_alone,
    oracle,
    parts,
    sub_topologies,
    uniform,
)
from exitcompiler.cascade_findings import overlap
from exitcompiler.evaluation import evaluate
from exitcompiler.gates import Recipe
from exitcompiler.naming import OWN
from exitcompiler.policies import GoOn, LinearRule
from exitcompiler.topology import Topology

TABLE = make_cascade(every_edge(("a/0", "a"), ("b",), ("c",)), rows=300, seed=3)
COSTS = cascade_costs(TABLE)
TRADE_OFFS_US = np.array([500.0, 2000.0, 8000.0])


def test_sub_topologies_are_those_that_can_stand_alone() -> None:
    assert list(sub_topologies(TABLE.topology)) == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    fork = Topology((("a",), ("b",), ("c",)), frozenset({(0, 1), (0, 2)}))
    assert list(sub_topologies(fork)) == [("a", "b"), ("a", "c"), ("a", "b", "c")]


def test_parts_are_chains_without_inner_exits_or_the_whole_of_the_ways() -> None:
    chains = parts(TABLE.topology, chains=True, inner=False)
    assert [part.topology.sites for part in chains] == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    assert chains[-1].topology.edges == {(0, 1), (1, 2)}
    whole = parts(TABLE.topology, chains=False, inner=True)[-1]
    assert whole.topology == TABLE.topology


def test_a_part_costs_what_passing_the_rest_costs() -> None:
    (part,) = [p for p in parts(TABLE.topology, chains=True, inner=False) if p.names == ("a", "c")]
    costs = COSTS.restrict(TABLE.topology, part.topology)
    assert costs.segment_us == pytest.approx((COSTS.segment_us[0] + COSTS.segment_us[1], COSTS.segment_us[3]))
    assert costs.whole_us == COSTS.whole_us
    own = part.table(TABLE, own=True)
    assert list(own.heads) == [("a", OWN), ("c", OWN)]
    assert not own.agreements
    assert ("c", "with a") in part.table(TABLE).heads
    assert ("c", "with a+b") not in part.table(TABLE).heads


def test_a_network_alone_costs_its_time_and_has_its_accuracy() -> None:
    for name in ("a", "b", "c"):
        result = network_alone(TABLE, COSTS, name)
        assert result.mean_us == pytest.approx(COSTS.reach_us(TABLE.topology, name))
        assert result.accuracy == TABLE.correct((name, OWN)).mean()
    assert network_alone(TABLE, COSTS, "c").accuracy_drop == 0.0
    assert network_alone(TABLE, COSTS, "c").mean_us == pytest.approx(COSTS.whole_us)


def test_myopic_looks_at_one_number_of_one_network_at_a_time() -> None:
    found = myopic(TABLE, COSTS, TRADE_OFFS_US)
    assert len(found) == 4 * len(TRADE_OFFS_US)
    for part, policy in found:
        assert policy.topology == part.topology
        for site, decision in policy.kept.items():
            if isinstance(decision, LinearRule):
                assert decision.reads == ((site, OWN),)
                ways = [action for action in decision.actions if isinstance(action, GoOn)]
                assert len(ways) == 1


def test_a_learned_policy_of_a_part_is_no_worse_than_its_thresholds() -> None:
    recipe = Recipe("net", smoothed=False, linear=False)
    thresholds = myopic(TABLE, COSTS, TRADE_OFFS_US)
    for part in parts(TABLE.topology, chains=True, inner=False):
        times = COSTS.restrict(TABLE.topology, part.topology)
        policies = learned_on(part, TABLE, COSTS, recipe, TRADE_OFFS_US)
        rivals = [policy for other, policy in thresholds if other == part]
        for trade_off_us, policy, rival in zip(TRADE_OFFS_US, policies, rivals, strict=True):
            mine, theirs = (
                evaluate(p, part.table(TABLE, own=own), times) for p, own in ((policy, False), (rival, True))
            )
            assert (
                mine.mean_us + trade_off_us * mine.accuracy_drop
                <= (theirs.mean_us + trade_off_us * theirs.accuracy_drop) * 1.01
            )


def test_the_oracle_loses_nothing_and_no_chain_without_loss_is_faster() -> None:
    found = oracle(TABLE, COSTS)
    assert all(result.excess_error == 0.0 for result in found)
    bound = min(result.mean_us for result in found)
    for part, policy in myopic(TABLE, COSTS, TRADE_OFFS_US * 50):
        if part.names[-1] == "c":
            costs = COSTS.restrict(TABLE.topology, part.topology)
            result = evaluate(policy, part.table(TABLE, own=True), costs)
            assert result.mean_us >= bound - 1e-9 or result.excess_error > 0


def test_chance_is_repeatable_and_between_the_networks() -> None:
    judge = make_cascade(TABLE.topology, rows=300, seed=4)
    first, second = (uniform(TABLE, COSTS, judge) for _ in range(2))
    assert [r.mean_us for r in first] == [r.mean_us for r in second]
    assert len(first) > 2
    cheapest = network_alone(judge, COSTS, "a").mean_us
    assert all(r.mean_us >= cheapest - 1e-9 for r in first)


def test_overlap_counts_every_row_once() -> None:
    found = overlap(TABLE, ["a", "b", "c"])
    right = np.stack([TABLE.correct((name, OWN)) for name in "abc"], axis=1)
    shares = {tuple(pattern["right"]): pattern["share"] for pattern in found["patterns"]}
    assert shares["a", "b", "c"] == right.all(axis=1).mean()
    assert shares[()] == (~right).all(axis=1).mean()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert found["only_right"][2][0] == pytest.approx((right[:, 2] & ~right[:, 0]).mean())
    assert all(found["only_right"][i][i] == 0.0 for i in range(3))
