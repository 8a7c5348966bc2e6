"""What the policy of a cascade has to beat: parts of its topology, thresholds, chance, each network alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from exitcompiler.baselines import Baseline, best_on, per_exit_thresholds, random_routing
from exitcompiler.costs import CostModel
from exitcompiler.evaluation import Evaluation, evaluate, summarise, undominated
from exitcompiler.frontier import learn_all
from exitcompiler.gates import Recipe, prepare
from exitcompiler.naming import OWN
from exitcompiler.policies import Leave, Policy
from exitcompiler.scores import ScoreTable
from exitcompiler.topology import Topology

__all__ = [
    "Part",
    "learned_on",
    "myopic",
    "network_alone",
    "oracle",
    "parts",
    "sub_topologies",
    "uniform",
]

RATES: Final = tuple(0.05 * step for step in range(21))

MOST_NETWORKS: Final = 4


@dataclass(frozen=True)
class Part:
    """Some networks of a cascade, as a cascade of their own.

    Args:
        names: The networks.
        topology: Their sites, and the ways among them.
    """

    names: tuple[str, ...]
    topology: Topology

    def table(self, table: ScoreTable, *, own: bool = False) -> ScoreTable:
        """The scores of this part.

        Args:
            table: Of the whole cascade.
            own: The networks' own answers alone: no exits inside, no joint answers, no agreements.
        """
        few = table.restrict(self.topology.sites)
        heads = {key: scores for key, scores in few.heads.items() if not own or key[1] == OWN}
        agreements = {} if own else few.agreements
        return ScoreTable(
            self.topology, heads, table.backbone_logits, table.labels, agreements, table.original_logits
        )


def sub_topologies(topology: Topology, fewest: int = 2) -> Iterator[tuple[str, ...]]:
    """The names of every set of networks that can stand alone as a cascade, by rising number.

    Of more than ``MOST_NETWORKS`` only the pairs, and all together.
    """
    ends = [network[-1] for network in topology.networks]
    counts = range(fewest, len(ends) + 1) if len(ends) <= MOST_NETWORKS else (2, len(ends))
    for count in counts:
        for chosen in itertools.combinations(range(len(ends)), count):
            names = tuple(ends[number] for number in chosen)
            if topology.connects(names):
                yield names


def parts(topology: Topology, *, chains: bool, inner: bool) -> list[Part]:
    """Every sub-topology.

    Args:
        topology: The whole.
        chains: One network after the other, without jumps.
        inner: With the exits inside the networks.
    """
    found = []
    for names in sub_topologies(topology):
        sites = [
            site
            for network in topology.networks
            for site in network
            if network[-1] in names and (inner or site == network[-1])
        ]
        part = topology.restrict(sites)
        if chains:
            steps = frozenset(itertools.pairwise(range(len(names))))
            if not steps <= part.edges:
                continue
            part = Topology(part.networks, steps)
        found.append(Part(names, part))
    return found


def learned_on(
    part: Part,
    table: ScoreTable,
    costs: CostModel,
    recipe: Recipe,
    trade_offs_us: Iterable[float],
) -> list[Policy]:
    """Policies of a sub-topology, learned as those of the whole: one for each trade-off.

    Args:
        part: The sub-topology.
        table: Rows to learn on, of the whole cascade.
        costs: Measured times, likewise.
        recipe: How to learn.
        trade_offs_us: Microseconds that one unit of accuracy is worth.
    """
    few, times = part.table(table), costs.restrict(table.topology, part.topology)
    return list(learn_all(prepare(few, times, recipe), trade_offs_us))


def myopic(
    table: ScoreTable, costs: CostModel, trade_offs_us: NDArray[np.float64]
) -> list[tuple[Part, Policy]]:
    """A threshold on the max probability at every network of every chain (Bolukbasi et al. 2017).

    They learn a single threshold per network; here thresholds of a chain are chosen together, for the
    realised net accuracy drop and the measured time, which can only make this baseline stronger.

    Args:
        table: Rows to choose on, of the whole cascade.
        costs: Measured times, likewise.
        trade_offs_us: ``float64[steps]``: one policy per chain for each.
    """
    found = []
    for part in parts(table.topology, chains=True, inner=False):
        own, times = part.table(table, own=True), costs.restrict(table.topology, part.topology)
        found += [(part, rule.policy) for rule in per_exit_thresholds(own, times, trade_offs_us)]
    return found


def uniform(table: ScoreTable, costs: CostModel, judge: ScoreTable, seed: int = 0) -> list[Evaluation]:
    """Chance, whatever the input: the best rates on the learning rows, judged on others.

    Args:
        table: Rows to choose on.
        costs: Measured times.
        judge: Rows to judge on.
        seed: Of the draws.
    """
    found: list[tuple[Part, Baseline, Evaluation]] = []
    for part in parts(table.topology, chains=True, inner=False):
        own, times = part.table(table, own=True), costs.restrict(table.topology, part.topology)
        routing = random_routing([tuple((name, OWN) for name in part.names)], RATES, seed)
        found += [(part, rule, result) for rule, result in best_on(list(routing), own, times)]
    return [
        rule.evaluate(part.table(judge, own=True), costs.restrict(table.topology, part.topology))
        for part, rule, _ in undominated(found, lambda entry: entry[2])
    ]


def network_alone(table: ScoreTable, costs: CostModel, name: str) -> Evaluation:
    """One network for all rows."""
    only = Part((name,), Topology(((name,),)))
    few = only.table(table, own=True)
    return evaluate(Policy(few.topology, (Leave(OWN),)), few, costs.restrict(table.topology, only.topology))


def oracle(table: ScoreTable, costs: CostModel) -> list[Evaluation]:
    """Knows the labels, and still may not do everything (Bolukbasi et al. 2017, experiments).

    Every row starts with the same network and pays for it; then it goes the cheapest way to the first
    network that is right together with all later ones, and where there is none to the last. It cannot
    mend the last network's mistakes. It bounds what networks' own answers can do; answers of several
    networks together may be better.

    Returns:
        One evaluation for each network to start with.
    """
    topology = table.restrict([network[-1] for network in table.topology.networks]).topology
    times = costs.restrict(table.topology, topology).segment_us
    right = np.stack([table.correct((name, OWN)) for name in topology.sites])
    all_later = np.logical_and.accumulate(right[::-1], axis=0)[::-1]
    last = len(topology.sites) - 1
    graph = nx.DiGraph((a, b, {"time": times[b]}) for a, b in topology.edges)
    graph.add_nodes_from(range(last + 1))
    found = []
    for start in range(last + 1):
        lengths = nx.single_source_dijkstra_path_length(graph, start, weight="time")
        if last not in lengths:
            continue
        answered = np.full(table.rows, last)
        for place in sorted(lengths, reverse=True):
            answered[all_later[place]] = place
        time_us = times[start] + np.array([lengths.get(p, 0.0) for p in range(last + 1)])[answered]
        correct = right[answered, np.arange(table.rows)]
        passed = np.zeros((table.rows, last + 1), np.bool_)
        passed[np.arange(table.rows), answered] = passed[:, start] = True
        found.append(summarise(topology, answered, correct, table.reference_correct, time_us, passed))
    return found
