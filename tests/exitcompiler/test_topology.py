"""Topologies: ways, parts, and what every row has passed."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_tables import every_edge, random_topology

from exitcompiler.errors import InputError
from exitcompiler.topology import Topology, passed_before

SEEDS = st.integers(0, 10_000)


def graph_of(topology: Topology) -> nx.DiGraph[str]:
    """Its places, and every way between them."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(topology.places)
    for place, ways in zip(topology.places, topology.ways, strict=True):
        graph.add_edges_from((place, topology.places[way]) for way in ways)
    return graph


def test_a_chain_is_one_network_with_a_tail() -> None:
    chain = Topology.chain(["e0", "e1"])
    assert chain.places == ("e0", "e1", "backbone")
    assert chain.ways == ((1,), (2,), ())
    assert chain.follows == (None, 0, 1)
    assert chain.reference == (0, 1, 2)
    assert chain.restrict({"e1"}) == Topology.chain(["e1"])


def test_ways_of_a_cascade_with_exits_inside() -> None:
    topology = every_edge(("a/0", "a"), ("b",), ("c/0", "c"))
    ways = {site: [topology.sites[way] for way in topology.ways[i]] for i, site in enumerate(topology.sites)}
    assert ways == {
        "a/0": ["a", "b", "c/0"],
        "a": ["b", "c/0"],
        "b": ["c/0"],
        "c/0": ["c"],
        "c": [],
    }
    assert [topology.sites[place] for place in topology.reference] == ["a/0", "c/0", "c"]


@given(seed=SEEDS)
def test_ways_lead_onward_and_every_place_is_reached(seed: int) -> None:
    topology = random_topology(seed, inner=2)
    for place, ways in enumerate(topology.ways):
        assert all(way > place for way in ways)
        for way in ways:
            same = topology.network_of[way] == topology.network_of[place]
            assert topology.follows[way] == (place if same else None)
    graph = graph_of(topology)
    first = topology.places[0]
    assert nx.descendants(graph, first) | {first} == set(topology.places)
    assert nx.is_path(graph, [topology.places[place] for place in topology.reference])
    assert topology.reference[-1] == len(topology.places) - 1


@given(seed=SEEDS, data=st.data())
def test_what_is_left_can_be_reached_from_the_same_places_as_before(seed: int, data: st.DataObject) -> None:
    topology = random_topology(seed, inner=2)
    kept = data.draw(st.sets(st.sampled_from(topology.sites), min_size=1))
    numbers = {topology.network_of[topology.sites.index(site)] for site in kept}
    networks: nx.DiGraph[int] = nx.DiGraph(list(topology.edges))
    networks.add_nodes_from(range(len(topology.networks)))
    reached = nx.descendants(networks, min(numbers)) | {min(numbers)}
    if not numbers <= reached:
        with pytest.raises(InputError, match="no edge leads to"):
            topology.restrict(kept)
        return
    few = topology.restrict(kept)
    assert few.sites == tuple(site for site in topology.sites if site in kept)
    names = [topology.networks[number][-1] for number in sorted(numbers)]
    left: nx.DiGraph[int] = nx.DiGraph(list(few.edges))
    left.add_nodes_from(range(len(names)))
    for i, start in enumerate(sorted(numbers)):
        for j, end in enumerate(sorted(numbers)):
            assert nx.has_path(left, i, j) == nx.has_path(networks, start, end)
    direct = {(a, b) for a, b in topology.edges if {a, b} <= numbers}
    position = {number: index for index, number in enumerate(sorted(numbers))}
    assert {(position[a], position[b]) for a, b in direct} <= few.edges


@given(seed=SEEDS)
def test_what_is_passed_before_are_the_dominators(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 9))
    targets = [[later for later in range(p + 1, count) if generator.random() < 0.35] for p in range(count)]
    graph: nx.DiGraph[int] = nx.DiGraph([(p, t) for p, following in enumerate(targets) for t in following])
    graph.add_nodes_from(range(count))
    dominators = nx.immediate_dominators(graph, 0)
    for place, passed in enumerate(passed_before(targets)):
        if not nx.has_path(graph, 0, place):
            assert passed is None
            continue
        expected, at = set(), place
        while at != 0:
            at = dominators[at]
            expected.add(at)
        assert passed == expected


@pytest.mark.parametrize(
    ("networks", "edges", "tail", "message"),
    [
        ((("a",), ("a",)), {(0, 1)}, False, "names of their own"),
        ((("backbone",),), (), True, "names of their own"),
        ((("a",), ("b",)), {(0, 1)}, True, "only a single network"),
        ((("a",), ()), {(0, 1)}, False, "without a site"),
        ((("a",), ("b",)), {(0, 1), (1, 0)}, False, r"\[\(1, 0\)\] do not lead to a later"),
        ((("a",), ("b",)), {(0, 2)}, False, "do not lead to a later"),
        ((("a",), ("b",), ("c",)), {(0, 2)}, False, r"no edge leads to networks \[1\]"),
    ],
)
def test_what_makes_no_sense_is_refused(
    networks: tuple[tuple[str, ...], ...], edges: set[tuple[int, int]], tail: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Topology(networks, frozenset(edges), tail)


def test_a_path_that_is_not_there() -> None:
    topology = Topology((("a",), ("b",), ("c",)), frozenset({(0, 1), (1, 2)}))
    assert topology.path(0, 2, {1}) == [0, 1, 2]
    with pytest.raises(InputError, match="no way leads from network 0 to 2"):
        topology.path(0, 2, ())
