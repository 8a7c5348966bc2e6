"""Where decisions are made, and where rows may go from there: the shape that policies are learned over.

A *site* is a place where a row may be answered: an exit inside a network, or the end of a network.
Early exit is one network whose sites stand in a row, with the backbone's own answer at the end; network
selection (Bolukbasi et al. 2017, section 4) is several networks, with edges from the end of each to
later ones. Both, and their combination, are one directed acyclic graph of sites.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx

from exitcompiler.errors import InputError
from exitcompiler.naming import BACKBONE

__all__ = ["Topology", "passed_before"]


@dataclass(frozen=True)
class Topology:
    """The sites of one or several networks, and which network may follow which.

    Args:
        networks: Per network its sites in order; networks in topological order, the first is the entry.
        edges: Pairs (network, later network), by position in ``networks``: from every site of the one a
            row may go to the start of the other.
        tail: Whether the (only) network goes on after its last site, to an answer that is no site: the
            backbone's.

    Raises:
        InputError: A network has no site, an edge leads backwards, a network cannot be reached, or
            there is a tail behind several networks.
    """

    networks: tuple[tuple[str, ...], ...]
    edges: frozenset[tuple[int, int]] = frozenset()
    tail: bool = False

    def __post_init__(self) -> None:
        sites = [site for network in self.networks for site in network]
        if len(set(sites)) != len(sites) or (self.tail and BACKBONE in sites):
            raise InputError(f"sites need names of their own: {sites}", where="topology")
        if self.tail and len(self.networks) > 1:
            raise InputError("only a single network has a tail", where="topology")
        if not self.tail and not all(self.networks):
            raise InputError("a network without a site answers nothing", where="topology")
        count = len(self.networks)
        wrong = sorted((a, b) for a, b in self.edges if not 0 <= a < b < count)
        if wrong:
            raise InputError(f"edges {wrong} do not lead to a later network", where="topology")
        lost = [i for i in range(1, count) if not any(b == i for _, b in self.edges)]
        if lost:
            raise InputError(f"no edge leads to networks {lost}", where="topology")

    @classmethod
    def chain(cls, exits: Iterable[str]) -> Topology:
        """One network with exits, and the backbone's own answer behind them."""
        return cls((tuple(exits),), tail=True)

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """All sites; every way leads from an earlier one to a later one."""
        return tuple(site for network in self.networks for site in network)

    @cached_property
    def places(self) -> tuple[str, ...]:
        """All sites, and the backbone where there is a tail: wherever a row can be answered."""
        return (*self.sites, BACKBONE) if self.tail else self.sites

    @cached_property
    def network_of(self) -> tuple[int, ...]:
        """Per place, the position of its network."""
        found = tuple(number for number, network in enumerate(self.networks) for _ in network)
        return (*found, 0) if self.tail else found

    @cached_property
    def ways(self) -> tuple[tuple[int, ...], ...]:
        """Per place, where a row may go on to: the next place of the same network, then other networks."""
        starts = [self.network_of.index(number) for number in range(len(self.networks))]
        found = []
        for place, number in enumerate(self.network_of):
            following = [place + 1] if self.network_of[place + 1 : place + 2] == (number,) else []
            found.append((*following, *(starts[b] for a, b in sorted(self.edges) if a == number)))
        return tuple(found)

    @cached_property
    def follows(self) -> tuple[int | None, ...]:
        """Per place, the place before it in the same network; None at its start."""
        numbers = self.network_of
        return tuple(
            place - 1 if place and numbers[place - 1] == numbers[place] else None
            for place in range(len(numbers))
        )

    @cached_property
    def reference(self) -> tuple[int, ...]:
        """The way through the network that all others are compared with, the last one: its places."""
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(len(self.places)))
        graph.add_edges_from((place, way) for place, ways in enumerate(self.ways) for way in ways)
        return tuple(nx.shortest_path(graph, 0, len(self.places) - 1))

    def path(self, start: int, end: int, through: Collection[int]) -> list[int]:
        """The shortest way from one network to a later one, over some of the others.

        Args:
            start: Position in ``networks``.
            end: Likewise.
            through: The networks that may lie between.

        Raises:
            InputError: There is none.
        """
        graph = self.network_graph().subgraph({start, end, *through})
        try:
            return list(nx.shortest_path(graph, start, end))
        except (nx.NetworkXNoPath, nx.NodeNotFound) as error:
            raise InputError(f"no way leads from network {start} to {end}", where="topology") from error

    def connects(self, names: Collection[str]) -> bool:
        """Whether networks, by the names of their ends, can stand alone: all are reached from the first."""
        gone = [number for number, network in enumerate(self.networks) if network[-1] not in names]
        graph = self.network_graph(gone)
        first = min(graph, default=0)
        return all(number == first or graph.in_degree(number) for number in graph)

    def closed(self, sites: Collection[str]) -> frozenset[str]:
        """These sites, with the ends of networks that cannot be left out.

        A network can, if the ways through it are still told apart afterwards: from one network that is left
        at most one way leads through it. The first one can, if another one is then where all rows start.
        """
        found = frozenset(sites)
        if self.tail:
            return found
        while True:
            gone = {n for n, network in enumerate(self.networks) if not found.intersection(network)}
            through = [n for n in gone if n and len([b for a, b in self.edges if a == n]) > 1]
            needed = {n for n in through if not self._bypassed(n)}
            left = [n for n in range(len(self.networks)) if n not in gone]
            entered = {b for a, b in self.network_graph(gone).edges}
            if 0 in gone and any(n not in entered for n in left[1:]):
                needed.add(0)
            if not needed:
                return found
            found |= {self.networks[n][-1] for n in needed}

    def _bypassed(self, network: int) -> bool:
        """Whether every way through a network may also be taken past it."""
        before = [a for a, b in self.edges if b == network]
        after = [b for a, b in self.edges if a == network]
        return all((a, b) in self.edges for a in before for b in after)

    def network_graph(self, gone: Collection[int] = ()) -> nx.DiGraph[int]:
        """The networks and their edges, without some of the networks, the ways through these kept."""
        graph: nx.DiGraph[int] = nx.DiGraph(sorted(self.edges))
        graph.add_nodes_from(range(len(self.networks)))
        for number in sorted(gone):
            before, after = list(graph.predecessors(number)), list(graph.successors(number))
            graph.remove_node(number)
            graph.add_edges_from((a, b) for a in before for b in after)
        return graph

    def restrict(self, sites: Collection[str]) -> Topology:
        """The topology without the other sites; where a network goes, ways through it are kept."""
        left = [tuple(site for site in network if site in sites) for network in self.networks]
        if self.tail:
            return Topology(tuple(left), tail=True)
        graph = self.network_graph([number for number, network in enumerate(left) if not network])
        position = {number: index for index, number in enumerate(sorted(graph))}
        edges = frozenset((position[a], position[b]) for a, b in graph.edges)
        return Topology(tuple(network for network in left if network), edges)


def passed_before(targets: Sequence[Collection[int]]) -> list[frozenset[int] | None]:
    """The places that every way to a place goes through: its dominators.

    Args:
        targets: Per place where rows go on to, later places; the first is the entry.

    Returns:
        Per place the places passed before it on every way; None where no way leads.
    """
    found: list[frozenset[int] | None] = [None] * len(targets)
    found[0] = frozenset()
    for place, following in enumerate(targets):
        here = found[place]
        if here is None:
            continue
        for target in following:
            known = found[target]
            found[target] = here | {place} if known is None else known & (here | {place})
    return found
