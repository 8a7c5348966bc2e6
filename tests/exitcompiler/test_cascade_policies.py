"""Policies of cascades: judged as a row-by-row walk judges them, on all sites as on a part of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_tables import (
    cascade_costs,
    every_edge,
    make_cascade,
    make_costs,
    make_table,
    random_cascade_policy,
    random_policy,
    random_topology,
)
from trained import CLASSES, stripes, trained_family

from exitcompiler.candidates import Candidates, build_program
from exitcompiler.cascade_program import Member, cascade_program
from exitcompiler.costs import CostModel
from exitcompiler.errors import InputError
from exitcompiler.evaluation import evaluate
from exitcompiler.heads import LinearHead, lower_head
from exitcompiler.interpreter import interpret
from exitcompiler.naming import LINEAR, OWN, agreement_with, together_with, value_name
from exitcompiler.networks import read_networks
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.split_block import split_block
from exitcompiler.policies import GoOn, Leave, LinearRule, Policy, widen
from exitcompiler.scores import Agreement, HeadKey, HeadScores, ScoreTable
from exitcompiler.topology import Topology
from exitcompiler.verify import verify

SEEDS = st.integers(0, 10_000)


@dataclass
class Walk:
    """Where one row went, where it was answered, whether rightly, and what it cost."""

    passed: list[int]
    answered: int
    correct: bool
    time_us: float


def runs_on(policy: Policy, place: int) -> bool:
    """Whether the network of a place is run up to there: it is needed there, or further on in it."""
    if place == len(policy.topology.sites):
        return True  # the backbone's end
    decision = policy.decisions[place]
    if not isinstance(decision, GoOn):
        return True
    return decision.target is None and runs_on(policy, place + 1)


def walk_row(policy: Policy, table: ScoreTable, costs: CostModel, row: int) -> Walk:
    """The obvious way to follow a policy."""
    topology = policy.topology
    place, passed, time_us = 0, [0], 0.0
    while place < len(topology.sites):
        site, decision = topology.sites[place], policy.decisions[place]
        time_us += costs.segment_us[place] if runs_on(policy, place) else 0.0
        action: Leave | GoOn = decision  # type: ignore[assignment]
        if isinstance(decision, LinearRule):
            features = table.features(decision.reads)[row].astype(np.float64)
            scores = [
                float(np.dot(w, features)) + b for w, b in zip(decision.weight, decision.bias, strict=True)
            ]
            action = decision.actions[scores.index(max(scores))]
            heads = {(site, a.head) for a in decision.actions if isinstance(a, Leave)}
            heads |= {key for key in decision.reads if key[0] == site}
            time_us += costs.gate_us + sum(costs.head_us[key] for key in heads)
        elif isinstance(decision, Leave) and decision.head != OWN:
            time_us += costs.head_us[site, decision.head]
        if isinstance(action, Leave):
            right = table.heads[site, action.head].logits[row].argmax() == table.targets[row]
            return Walk(passed, place, bool(right), time_us)
        place = place + 1 if action.target is None else topology.places.index(action.target)
        passed.append(place)
    right = table.backbone_logits[row].argmax() == table.targets[row]
    if not policy.kept:
        return Walk(passed, place, bool(right), costs.whole_us)
    return Walk(passed, place, bool(right), time_us + costs.segment_us[place])


def require_same_as_walked(policy: Policy, table: ScoreTable, costs: CostModel) -> None:
    result = evaluate(policy, table, costs)
    for row in range(table.rows):
        walk = walk_row(policy, table, costs, row)
        assert np.flatnonzero(result.passed[row]).tolist() == walk.passed
        assert int(result.exit_index[row]) == walk.answered
        assert bool(result.correct[row]) == walk.correct
        assert float(result.time_us[row]) == pytest.approx(walk.time_us)
    assert result.mean_us == pytest.approx(result.time_us.mean())
    assert sum(result.exit_rates.values()) == pytest.approx(1.0)


@given(seed=SEEDS)
def test_a_cascade_is_judged_as_it_is_walked(seed: int) -> None:
    table = make_cascade(random_topology(seed, inner=2), rows=25, seed=seed)
    require_same_as_walked(random_cascade_policy(table, seed), table, cascade_costs(table, seed))


@given(seed=SEEDS)
def test_a_chain_is_judged_as_it_is_walked(seed: int) -> None:
    table = make_table(rows=25, seed=seed)
    require_same_as_walked(random_policy(table, seed), table, make_costs(table))


def test_a_network_that_every_row_jumps_over_costs_nothing() -> None:
    table = make_cascade(every_edge(("a/0", "a"), ("b/0", "b"), ("c",)))
    costs = cascade_costs(table)
    by_way_of_b = Policy(table.topology, (GoOn("b/0"), GoOn(), GoOn("c"), GoOn(), Leave(OWN)))
    assert evaluate(by_way_of_b, table, costs).mean_us == costs.segment_us[-1] == costs.whole_us
    assert by_way_of_b.is_plain
    assert Policy.plain(table.topology).is_plain
    through = replace(by_way_of_b, decisions=(GoOn(), GoOn("b/0"), GoOn(), GoOn("c"), Leave(OWN)))
    assert evaluate(through, table, costs).mean_us == costs.whole_us  # nobody reads what a or b say
    answering = Policy(table.topology, (GoOn(), GoOn("b/0"), Leave("deep"), GoOn(), GoOn()))
    b0 = table.exits.index("b/0")
    assert evaluate(answering, table, costs).mean_us == costs.segment_us[b0] + costs.head_us["b/0", "deep"]


A, B = ("a", OWN), ("b", OWN)


def rule(*actions: Leave | GoOn, reads: tuple[HeadKey, ...]) -> LinearRule:
    weight = tuple((1.0 / (n + 1),) + (0.0,) * (3 * len(reads) - 1) for n in range(len(actions)))
    return LinearRule(actions, reads, weight, (0.0,) * len(actions))


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ((GoOn("d"), Leave(OWN), Leave(OWN)), "no way leads from 'a' to 'd'"),
        ((GoOn(), Leave(OWN), Leave(OWN)), "to 'a next place'"),
        ((GoOn("b"), GoOn("a"), Leave(OWN)), "no way leads from 'b' to 'a'"),
        ((GoOn("b"), rule(Leave(OWN), GoOn("c"), reads=(A,)), Leave(OWN)), "its own first"),
        ((GoOn("b"), rule(Leave(OWN), GoOn("c"), reads=(B, A)), Leave(OWN)), "not computed on every way"),
        (
            (
                rule(Leave(OWN), GoOn("b"), GoOn("c"), reads=(A,)),
                rule(Leave(OWN), GoOn("c"), reads=(B, ("a", "with b"))),
                Leave(OWN),
            ),
            "not computed on every way",
        ),
        ((rule(Leave(OWN), Leave("x"), reads=(A,)), Leave(OWN), Leave(OWN)), "leaves in one way"),
    ],
)
def test_policies_that_cannot_be_are_refused(
    decisions: tuple[GoOn | Leave | LinearRule, ...], message: str
) -> None:
    topology = every_edge(("a",), ("b",), ("c",))
    with pytest.raises(InputError, match=message):
        Policy(topology, decisions)


def test_what_networks_say_together_needs_that_both_have_run() -> None:
    """Rows that jump from a to c have not met b."""
    table = make_cascade(every_edge(("a",), ("b",), ("c",)))
    costs = cascade_costs(table)
    start = rule(Leave(OWN), GoOn("b"), GoOn("c"), reads=(A,))
    onward = rule(Leave(OWN), GoOn("c"), reads=(B, A))
    fine = Policy(table.topology, (start, onward, Leave(together_with("a"))))
    evaluate(fine, table, costs)
    for wrong in (together_with("b"), together_with("ab")):
        with pytest.raises(InputError, match=r"uses scores of \['b'\]"):
            evaluate(Policy(table.topology, (start, onward, Leave(wrong))), table, costs)
    skipped = Policy(table.topology, (GoOn("b"), rule(Leave(OWN), GoOn("c"), reads=(B,)), Leave("with a")))
    with pytest.raises(InputError, match=r"uses scores of \['a'\]"):
        evaluate(skipped, table, costs)


@given(seed=SEEDS, data=st.data())
def test_a_policy_of_some_sites_does_the_same_among_all(seed: int, data: st.DataObject) -> None:
    """With every edge there; also where the first network is left out."""
    names = "abcd"[: data.draw(st.integers(2, 4))]
    topology = every_edge(*((f"{name}/0", name) for name in names))
    table = make_cascade(topology, rows=40, seed=seed)
    costs = cascade_costs(table, seed)
    kept = data.draw(st.sets(st.sampled_from(topology.sites), min_size=1))
    kept.add(topology.sites[-1])
    require_same_among_all(table, costs, kept, seed)


@given(seed=SEEDS, data=st.data())
def test_the_same_where_edges_are_contracted(seed: int, data: st.DataObject) -> None:
    """One network after the other, without jumps: a > b > c without b is a > c."""
    names = "abcd"[: data.draw(st.integers(2, 4))]
    topology = Topology(
        tuple((f"{name}/0", name) for name in names), frozenset((i, i + 1) for i in range(len(names) - 1))
    )
    table = make_cascade(topology, rows=40, seed=seed)
    kept = data.draw(st.sets(st.sampled_from(topology.sites), min_size=1))
    require_same_among_all(table, cascade_costs(table, seed), kept, seed)


@given(seed=SEEDS, data=st.data())
def test_the_same_with_any_edges_once_nothing_is_missing(seed: int, data: st.DataObject) -> None:
    topology = random_topology(seed)
    table = make_cascade(topology, rows=40, seed=seed)
    kept = data.draw(st.sets(st.sampled_from(topology.sites), min_size=1))
    closed = topology.closed(kept | {topology.sites[-1]})
    assert kept <= closed
    require_same_among_all(table, cascade_costs(table, seed), set(closed), seed)


def test_two_ways_through_a_network_that_is_left_out_cannot_be_told_apart() -> None:
    topology = Topology((("a",), ("b",), ("c",), ("d",)), frozenset({(0, 1), (1, 2), (1, 3), (2, 3)}))
    few = topology.restrict({"a", "c", "d"})
    start = rule(Leave(OWN), GoOn("c"), GoOn("d"), reads=(A,))
    with pytest.raises(InputError, match="two ways lead through 'b'"):
        widen(Policy(few, (start, Leave(OWN), Leave(OWN))), topology)
    assert topology.closed({"a", "c", "d"}) == {"a", "b", "c", "d"}
    fork = Topology((("a",), ("b",), ("c",)), frozenset({(0, 1), (0, 2)}))
    assert fork.closed({"b", "c"}) == {"a", "b", "c"}


def require_same_among_all(table: ScoreTable, costs: CostModel, kept: set[str], seed: int) -> None:
    few = table.restrict(kept)
    policy = random_cascade_policy(few, seed)
    result = evaluate(policy, few, costs.restrict(table.topology, few.topology))
    wide = widen(policy, table.topology)
    again = evaluate(wide, table, costs)
    assert [few.exits[i] for i in result.exit_index] == [table.exits[i] for i in again.exit_index]
    np.testing.assert_array_equal(result.correct, again.correct)
    assert list(wide.kept) == list(policy.kept)
    np.testing.assert_allclose(result.time_us, again.time_us)


NAMES = ("small", "middle", "large")


@cache
def candidates(edges: frozenset[tuple[int, int]]) -> Candidates:
    """Trained networks; the first two have an exit half-way, with an untrained head."""
    images, _ = stripes(3, seed=9)
    networks = read_networks(trained_family(), torch.from_numpy(images), names=NAMES)
    members = []
    for network in networks[:2]:
        cut = next(cut for cut in find_cut_points(network.program) if "blocks" in cut.name)
        chain = split_block(network.program, [cut])
        torch.manual_seed(0)
        head = lower_head(
            (cut.name, LINEAR), LinearHead(cut.spec, CLASSES).eval(), cut.value, cut.spec, CLASSES
        )
        members.append(Member(network, chain, {cut.name: chain.entry.name}, {(cut.name, LINEAR): head}))
    return cascade_program([*members, Member(networks[2])], edges)


@cache
def scored(edges: frozenset[tuple[int, int]]) -> tuple[torch.Tensor, ScoreTable]:
    """Rows, and what every head says of them, by torch, one row at a time as the interpreter does."""
    found = candidates(edges)
    images, labels = stripes(24, seed=10)
    x = torch.from_numpy(images)
    rows: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for row in x.split(1):
            values = {"image": row}
            for block in found.program.blocks:
                values |= block.run(values)
            for key in found.heads:
                values |= found.head_block(key).run(values)
            for name, value in values.items():
                rows.setdefault(name, []).append(value)

    def made(key: HeadKey, what: str) -> np.ndarray:
        return torch.cat(rows[value_name(*key, what)]).numpy()

    heads = {
        key: HeadScores(*key, made(key, "logits"), found.needs.get(key, ()))
        for key, head in found.heads.items()
        if head.answer
    }
    agreements = {
        key: Agreement(made(key, "confidence"), found.needs[key])
        for key, head in found.heads.items()
        if not head.answer
    }
    reference = made(("large", OWN), "logits")
    return x, ScoreTable(found.topology, heads, reference, labels, agreements)


EDGES = (
    frozenset({(0, 1), (0, 2), (1, 2)}),
    frozenset({(0, 1), (1, 2)}),
    frozenset({(0, 1), (0, 2)}),
)


@pytest.mark.parametrize("edges", EDGES)
@given(seed=SEEDS)
@settings(max_examples=12)
def test_the_program_does_what_the_policy_says(edges: frozenset[tuple[int, int]], seed: int) -> None:
    found = candidates(edges)
    x, table = scored(edges)
    policy = random_cascade_policy(table, seed)
    program = build_program(found, policy)
    verify(program)
    result = evaluate(policy, table, cascade_costs(table))
    near = on_an_edge(policy, table)
    ran = interpret(program, {"image": x})
    for row in np.flatnonzero(~near):
        site = table.exits[int(result.exit_index[row])]
        assert program.exits[int(ran.exit_index[row])] == site
        decision = policy.kept[site]
        expected = table.heads[site, decision.head].logits[row]
        np.testing.assert_allclose(ran.outputs["logits"][row].numpy(), expected, atol=1e-4)
    built = {block.name for block in program.blocks}
    assert built <= {found.block_of[site] for site in policy.live}


def on_an_edge(policy: Policy, table: ScoreTable) -> np.ndarray:
    """Rows whose two best actions are closer at some site than float32 can tell apart."""
    close = np.zeros(table.rows, np.bool_)
    for decision in policy.kept.values():
        if isinstance(decision, LinearRule):
            scores = table.features(decision.reads) @ np.array(decision.weight).T + np.array(decision.bias)
            best = np.sort(scores, axis=1)
            close |= best[:, -1] - best[:, -2] < 1e-4 if scores.shape[1] > 1 else False
    return close


def test_every_kind_of_head_is_there_to_be_tested() -> None:
    _, table = scored(EDGES[0])
    kinds = {kind for _, kind in table.heads} | {kind for _, kind in table.agreements}
    assert {OWN, LINEAR, together_with(["small"]), agreement_with("middle")} <= kinds
