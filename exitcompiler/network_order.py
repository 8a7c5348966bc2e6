"""Which network of a cascade may follow which: edges as they are given, in topological order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import networkx as nx

from exitcompiler.errors import InputError

__all__ = ["Order", "order_networks", "topology_edges"]


@dataclass(frozen=True)
class Order:
    """Networks in topological order.

    Args:
        order: Positions in the list as given.
        edges: Pairs (network, later network), by position in ``order``.
    """

    order: tuple[int, ...]
    edges: frozenset[tuple[int, int]]


def topology_edges(
    edges: nx.DiGraph[Any] | Iterable[tuple[int | str, int | str]] | None, names: Sequence[str]
) -> frozenset[tuple[int, int]]:
    """The edges of a cascade, by the networks' positions.

    Args:
        edges: A networkx DiGraph, or pairs; nodes are names or positions. None: from every network to
            every later one.
        names: Of the networks.

    Raises:
        InputError: An edge is no pair of networks, or leads back to where it starts.
    """
    if edges is None:
        return frozenset(combinations(range(len(names)), 2))
    if isinstance(edges, nx.Graph):
        if not edges.is_directed():
            raise InputError("edges need a direction", where="edges", remedy="give a networkx.DiGraph")
        for node in edges.nodes:
            _position(node, names)
        edges = edges.edges()
    found = set()
    for edge in edges:
        if isinstance(edge, str) or not isinstance(edge, Sequence) or len(edge) != 2:
            raise InputError(f"{edge!r} is no pair of networks", where="edges", remedy="(from, to)")
        pair = _position(edge[0], names), _position(edge[1], names)
        if pair[0] == pair[1]:
            raise InputError(f"{names[pair[0]]!r} would follow itself", where="edges")
        found.add(pair)
    return frozenset(found)


def order_networks(edges: frozenset[tuple[int, int]], names: Sequence[str]) -> Order:
    """Put networks into topological order; where there is a choice, the order given decides.

    Args:
        edges: By position.
        names: Of the networks.

    Raises:
        InputError: There is a cycle, or a network besides the first that no edge leads to.
    """
    graph: nx.DiGraph[int] = nx.DiGraph(list(edges))
    graph.add_nodes_from(range(len(names)))
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [start for start, _ in nx.find_cycle(graph)]
        shown = " -> ".join(repr(names[i]) for i in [*cycle, cycle[0]])
        raise InputError(
            f"the networks follow one another in a circle: {shown}",
            where="edges",
            remedy="leave one of these edges out: a row meets every network once at most",
        )
    order = tuple(nx.lexicographical_topological_sort(graph))
    entries = [i for i in order if not graph.in_degree(i)]
    if len(entries) > 1:
        first, *lost = (repr(names[i]) for i in entries)
        raise InputError(
            f"every row starts at {first}, and no edge leads to {', '.join(lost)}",
            where="edges",
            remedy="add an edge to each, or leave the network out",
        )
    position = {network: index for index, network in enumerate(order)}
    return Order(order, frozenset((position[a], position[b]) for a, b in edges))


def _position(node: object, names: Sequence[str]) -> int:
    if isinstance(node, str) and node in names:
        return list(names).index(node)
    if isinstance(node, int) and not isinstance(node, bool) and 0 <= node < len(names):
        return node
    raise InputError(
        f"there is no network {node!r}",
        where="edges",
        remedy=f"networks are named {', '.join(map(repr, names))}, or numbered from 0",
    )
