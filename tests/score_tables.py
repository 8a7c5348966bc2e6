"""Synthetic score tables and random policies for the tests of gate learning, of chains and of cascades."""

from __future__ import annotations

from itertools import combinations

import networkx as nx
import numpy as np
from committee_scores import agreement_features, joint_logits

from exitcompiler.costs import CostModel
from exitcompiler.naming import OWN, agreement_with, together_with
from exitcompiler.policies import GoOn, Leave, LinearRule, Policy, leave_above
from exitcompiler.scores import Agreement, HeadKey, HeadScores, ScoreTable
from exitcompiler.topology import Topology


def make_table(
    rows: int = 400,
    exits: int = 3,
    kinds: tuple[str, ...] = ("linear", "deep"),
    classes: int = 5,
    seed: int = 0,
    labelled: bool = True,
) -> ScoreTable:
    """A table whose heads grow better with depth and know when a row is hard."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=rows)
    hardness = generator.gamma(2.0, 1.0, size=rows)

    def logits(skill: float) -> np.ndarray:
        noise = generator.normal(size=(rows, classes)) * (0.4 + hardness)[:, None]
        return (skill * np.eye(classes)[labels] * 3.0 + noise).astype(np.float32)

    names = tuple(f"exit{index}" for index in range(exits))
    heads = {
        (name, kind): HeadScores(name, kind, logits(0.5 + depth / (exits + 1) + 0.2 * place))
        for depth, name in enumerate(names)
        for place, kind in enumerate(kinds)
    }
    return ScoreTable(
        Topology.chain(names), heads, logits(2.0), labels.astype(np.int64) if labelled else None
    )


def make_costs(table: ScoreTable, gate_us: float = 5.0, head_us: float = 40.0) -> CostModel:
    """Equal segments of 200 us; the second kind of head costs twice the first."""
    heads = {key: head_us * (1 + table.kinds(key[0]).index(key[1])) for key in table.heads}
    return CostModel((200.0,) * (len(table.exits) + 1), heads, gate_us)


def random_policy(table: ScoreTable, seed: int) -> Policy:
    """Any valid policy."""
    generator = np.random.default_rng(seed)
    decisions: list[GoOn | Leave | LinearRule] = []
    kept: list[tuple[str, str]] = []
    for name in table.exits:
        kind = str(generator.choice(table.kinds(name)))
        what = generator.choice(["on", "leave", "rule", "rule", "rule"])
        if what == "on":
            decisions.append(GoOn())
            continue
        earlier = [key for key in kept if generator.random() < 0.5]
        reads = ((name, kind), *earlier)
        kept.append((name, kind))
        if what == "leave":
            decisions.append(Leave(kind))
        else:
            weight = tuple(float(w) for w in generator.normal(size=3 * len(reads)))
            decisions.append(leave_above(kind, reads, weight, float(generator.normal())))
    return Policy(table.topology, tuple(decisions))


def random_topology(seed: int, most: int = 4, inner: int = 1) -> Topology:
    """Networks ``a``, ``b``, ... with up to ``inner`` exits inside each, and any edges that reach all."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, most + 1))
    pairs = [pair for pair in combinations(range(count), 2) if generator.random() < 0.6]
    pairs += [(int(generator.integers(b)), b) for b in range(1, count) if not any(e == b for _, e in pairs)]
    names = [chr(ord("a") + number) for number in range(count)]
    exits = [int(generator.integers(inner + 1)) for _ in names]
    networks = [(*(f"{n}/{i}" for i in range(k)), n) for n, k in zip(names, exits, strict=True)]
    return Topology(tuple(networks), frozenset(pairs))


def every_edge(*networks: tuple[str, ...]) -> Topology:
    """Networks with every edge from an earlier to a later one."""
    return Topology(networks, frozenset(combinations(range(len(networks)), 2)))


def make_cascade(
    topology: Topology, rows: int = 200, classes: int = 4, seed: int = 0, joint: bool = True
) -> ScoreTable:
    """A table whose networks grow better one after the other and know when a row is hard.

    Args:
        topology: The networks, each named as its last site.
        rows: How many.
        classes: How many.
        seed: Of everything.
        joint: With answers of several networks, and agreements.
    """
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=rows)
    hardness = generator.gamma(2.0, 1.0, size=rows)
    common = generator.normal(size=(rows, classes))

    def logits(skill: float) -> np.ndarray:
        noise = (0.7 * generator.normal(size=(rows, classes)) + 0.7 * common) * (0.4 + hardness)[:, None]
        return (skill * np.eye(classes)[labels] * 3.0 + noise).astype(np.float32)

    heads: dict[HeadKey, HeadScores] = {}
    agreements: dict[HeadKey, Agreement] = {}
    graph: nx.DiGraph[int] = nx.DiGraph(list(topology.edges))
    graph.add_nodes_from(range(len(topology.networks)))
    for number, (*exits, name) in enumerate(topology.networks):
        skill = 0.6 + 1.4 * (number + 1) / len(topology.networks)
        for index, site in enumerate(exits):
            heads[site, "deep"] = HeadScores(site, "deep", logits(skill * (index + 1) / (len(exits) + 1.5)))
        heads[name, OWN] = HeadScores(name, OWN, logits(skill))
        earlier = [topology.networks[before][-1] for before in sorted(nx.ancestors(graph, number))]
        own = {other: heads[other, OWN].logits for other in (*earlier, name)}
        for size in range(1, len(earlier) + 1 if joint else 1):
            for others in combinations(earlier, size):
                both = joint_logits([own[name], *(own[other] for other in others)])
                kind = together_with(others)
                heads[name, kind] = HeadScores(name, kind, both, others)
        for other in earlier if joint else ():
            features = agreement_features(own[name], own[other])
            agreements[name, agreement_with(other)] = Agreement(features, (other,))
    reference = heads[topology.sites[-1], OWN].logits
    return ScoreTable(topology, heads, reference, labels.astype(np.int64), agreements)


def cascade_costs(table: ScoreTable, seed: int | None = None) -> CostModel:
    """Every network takes three times as long as the one before; with a seed by chance up to twice that."""
    topology = table.topology
    generator = np.random.default_rng(seed)
    segments = [100.0 * 3.0**number / len(topology.networks[number]) for number in topology.network_of]
    if seed is not None:
        segments = [time * float(generator.uniform(1, 2)) for time in segments]
    heads = {key: 4.0 + 2.0 * len(table.needs(key)) for key in (*table.heads, *table.agreements)}
    return CostModel(tuple(segments), heads, 3.0, sum(segments[site] for site in _reference_sites(topology)))


def _reference_sites(topology: Topology) -> list[int]:
    return [s for s, number in enumerate(topology.network_of) if number == len(topology.networks) - 1]


def random_cascade_policy(table: ScoreTable, seed: int) -> Policy:
    """Any valid policy of a cascade; its rules part the rows in shares that are not too small."""
    generator = np.random.default_rng(seed)
    topology = table.topology
    known: dict[int, frozenset[HeadKey]] = {0: frozenset()}
    ran: dict[int, frozenset[str]] = {0: frozenset()}
    decisions: list[GoOn | Leave | LinearRule] = []
    for place, site in enumerate(topology.sites):
        ways = [_onward(topology, place, way) for way in topology.ways[place]]
        if place not in known:
            decisions.append(GoOn())  # no row comes here
            continue

        def there(key: HeadKey, place: int = place) -> bool:
            return set(table.needs(key)) <= ran[place]

        kinds = [kind for kind in table.kinds(site) if there((site, kind))]
        kind = str(generator.choice(kinds))
        what = generator.choice(["on", "leave", "rule", "rule", "rule"]) if ways else "leave"
        taken, computed = list(topology.ways[place]), known[place]
        if what == "leave":
            decisions.append(Leave(kind))
            continue
        if what == "on":
            number = int(generator.integers(len(ways)))
            decisions.append(ways[number])
            taken, gated = [taken[number]], frozenset[str]()
        else:
            chosen = [n for n in range(len(ways)) if generator.random() < 0.7] or [0]
            taken = [taken[n] for n in chosen]
            actions: list[Leave | GoOn] = [*(ways[n] for n in chosen)]
            if len(actions) == 1 or generator.random() < 0.8:
                actions.insert(int(generator.integers(len(actions) + 1)), Leave(kind))
            others = [*known[place], *(key for key in table.agreements if key[0] == site and there(key))]
            more = [key for key in sorted(others) if generator.random() < 0.5]
            reads = ((site, kind), *more)
            decisions.append(_random_rule(table, tuple(actions), reads, generator))
            own = {(site, OWN)} & table.heads.keys()
            computed |= {key for key in reads if key[0] == site} | own
            gated = frozenset({site})
        for way in taken:
            known[way] = known.get(way, computed) & computed
            ran[way] = ran.get(way, ran[place] | gated) & (ran[place] | gated)
    return Policy(topology, tuple(decisions))


def _onward(topology: Topology, place: int, way: int) -> GoOn:
    return GoOn() if topology.follows[way] == place else GoOn(topology.places[way])


def _random_rule(
    table: ScoreTable,
    actions: tuple[Leave | GoOn, ...],
    reads: tuple[HeadKey, ...],
    generator: np.random.Generator,
) -> LinearRule:
    weight = generator.normal(size=(len(actions), 3 * len(reads)))
    bias = -(table.features(reads) @ weight.T).mean(axis=0)
    rows = tuple(tuple(float(w) for w in row) for row in weight)
    return LinearRule(actions, reads, rows, tuple(float(b) for b in bias))
