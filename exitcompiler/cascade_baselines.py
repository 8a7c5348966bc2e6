"""What the policy of a cascade has to beat: parts of its topology, thresholds, chance, each network alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exitcompiler.baselines import (
    Baseline,
    best_on,
    per_exit_thresholds,
    random_routing,
    soft_oracle,
)
from exitcompiler.costs import CostModel
from exitcompiler.errors import InputError
from exitcompiler.evaluation import Evaluation, evaluate
from exitcompiler.gate_search import Choices, to_policy
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

RATES = tuple(0.05 * step for step in range(21))


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
        return ScoreTable(self.topology, heads, table.backbone_logits, table.labels, agreements)

    def costs(self, costs: CostModel, topology: Topology) -> CostModel:
        """The times of this part: sites that are left out cost what passing them costs.

        Args:
            costs: Of the whole cascade.
            topology: The whole cascade's.
        """
        segments: list[float] = []
        for place, site in enumerate(self.topology.sites):
            follows = self.topology.follows[place]
            before = 0.0 if follows is None else costs.reach_us(topology, self.topology.sites[follows])
            segments.append(costs.reach_us(topology, site) - before)
        return replace(costs, segment_us=tuple(segments))


def sub_topologies(topology: Topology, fewest: int = 2) -> Iterator[tuple[str, ...]]:
    """The names of every set of networks that can stand alone as a cascade, by rising number."""
    ends = [network[-1] for network in topology.networks]
    for count in range(fewest, len(ends) + 1):
        for chosen in itertools.combinations(range(len(ends)), count):
            try:
                topology.restrict([site for number in chosen for site in topology.networks[number]])
            except InputError:  # no way leads to one of them
                continue
            yield tuple(ends[number] for number in chosen)


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
    few, times = part.table(table), part.costs(costs, table.topology)
    learner = prepare(few, times, recipe)
    starts: tuple[Choices, ...] = ()
    policies = []
    for trade_off_us in trade_offs_us:
        choices = learner.learn(trade_off_us, starts)
        starts = (choices,)
        policies.append(to_policy(few.topology, choices))
    return policies


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
        own, times = part.table(table, own=True), part.costs(costs, table.topology)
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
        own, times = part.table(table, own=True), part.costs(costs, table.topology)
        routing = random_routing([tuple((name, OWN) for name in part.names)], RATES, seed)
        found += [(part, rule, result) for rule, result in best_on(list(routing), own, times)]
    kept = _best([result for _, _, result in found])
    return [
        rule.evaluate(part.table(judge, own=True), part.costs(costs, table.topology))
        for part, rule, result in found
        if any(result is other for other in kept)
    ]


def network_alone(table: ScoreTable, costs: CostModel, name: str) -> Evaluation:
    """One network for all rows."""
    only = Part((name,), Topology(((name,),)))
    few = only.table(table, own=True)
    return evaluate(Policy(few.topology, (Leave(OWN),)), few, only.costs(costs, table.topology))


def oracle(table: ScoreTable, costs: CostModel) -> list[Evaluation]:
    """The soft oracle of every chain: see ``exitcompiler.baselines.soft_oracle``."""
    return [
        soft_oracle(
            part.table(table, own=True),
            part.costs(costs, table.topology),
            tuple((name, OWN) for name in part.names),
        )
        for part in parts(table.topology, chains=True, inner=False)
    ]


def _best(results: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that no other one beats."""
    kept: list[Evaluation] = []
    for result in sorted(results, key=lambda r: (r.accuracy_drop, r.mean_us)):
        if not kept or result.mean_us < kept[-1].mean_us:
            kept.append(result)
    return kept
