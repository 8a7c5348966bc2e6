"""networkx views of a program's control flow. Derived on demand: a program stores none of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx

from exitcompiler.controlflow import ControlFlow, Edge, Return, successors

__all__ = ["between", "block_graph", "dominators", "incoming_edges", "reachable"]


def block_graph(flow: ControlFlow) -> nx.MultiDiGraph[Any]:
    """Blocks as nodes, edges (with key = action index and data ``values``) as edges.

    Returns are nodes of their own, named ``return:<exit>``, so that paths end somewhere.
    """
    graph: nx.MultiDiGraph[Any] = nx.MultiDiGraph()
    graph.add_nodes_from(block.name for block in flow.blocks)
    for block in flow.blocks:
        for action, way in enumerate(successors(block.terminator)):
            target = f"return:{way.exit}" if isinstance(way, Return) else way.target
            graph.add_edge(block.name, target, key=action, values=way.values)
    return graph


def dominators(flow: ControlFlow) -> dict[str, str | None]:
    """Immediate dominator of every reachable block; None for the entry."""
    graph: nx.DiGraph[Any] = nx.DiGraph(block_graph(flow))
    immediate: dict[str, str | None] = dict(nx.immediate_dominators(graph, flow.entry.name))
    live = reachable(flow)
    immediate[flow.entry.name] = None  # networkx leaves the entry out, or makes it its own dominator
    return {block.name: immediate[block.name] for block in flow.blocks if block.name in live}


def reachable(flow: ControlFlow) -> frozenset[str]:
    """Names of the blocks that some path from the entry reaches."""
    graph = block_graph(flow)
    names = {flow.entry.name} | nx.descendants(graph, flow.entry.name)
    return frozenset(block.name for block in flow.blocks if block.name in names)


def between(flow: ControlFlow, source: str, target: str) -> frozenset[str]:
    """Blocks on some path from ``source`` to ``target``, without ``source``, with ``target``.

    Where ``source`` dominates ``target``, all predecessors of these blocks are again among them or are
    ``source`` itself, so a value of ``source`` can be handed along to ``target``.
    """
    graph = block_graph(flow)
    return (frozenset(nx.descendants(graph, source)) & nx.ancestors(graph, target)) | {target}


def incoming_edges(flow: ControlFlow, target: str) -> Iterator[tuple[str, Edge]]:
    """All edges into block ``target``, each with the name of the block it leaves."""
    for block in flow.blocks:
        for way in successors(block.terminator):
            if isinstance(way, Edge) and way.target == target:
                yield block.name, way
