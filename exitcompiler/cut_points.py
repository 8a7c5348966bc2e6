"""Finds where few values are live in a body: the places where it can be cut.

Dominators are taken over tensor data flow from one main input. Symbolic sizes, parameters and whatever
else does not depend on rows are no edges: a class token that is expanded to the batch, or a position
table, is computed again where it is needed. Other inputs (an attention mask) are side values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from exitcompiler.flops import node_flops
from exitcompiler.fx_utils import is_symbolic_size, node_spec, result_nodes
from exitcompiler.program import ValueSpec, torch_dtype

__all__ = ["Candidate", "CutPoint", "find_candidates", "row_bytes"]

_CHEAP_SHARE = 0.01
"""Side values are computed again, rather than handed over, up to this share of the body's FLOPs."""


@dataclass(frozen=True, slots=True)
class CutPoint:
    """A place where a program of one block can be split in two.

    Args:
        name: The module that ends here, such as ``layer2.3``; the value's name where there is none.
        value: The value cut through; a head is attached to it.
        live: All values that have to cross, ``value`` first; every one has rows.
        spec: The type of ``value``, a floating-point tensor.
        flops_share: Share of the program's FLOPs that are spent up to here, 0 to 1.
    """

    name: str
    value: str
    live: tuple[str, ...]
    spec: ValueSpec
    flops_share: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A legal cut, before it is named.

    Args:
        node: The node cut through.
        spec: Its type.
        live: Names of all values that have to cross, its own first.
        live_bytes: Their size per row.
        flops: Floating-point operations per row up to here.
    """

    node: fx.Node
    spec: ValueSpec
    live: tuple[str, ...]
    live_bytes: int
    flops: int


def find_candidates(body: fx.GraphModule, *, beside: int | None = None) -> tuple[Candidate, ...]:
    """All legal cuts of a body with one result, in the order of its data flow.

    Every param is tried as the main input; the one with most cuts wins, then the one whose cuts come
    earliest.

    Args:
        body: What to cut.
        beside: How many values may be live beside the one cut through, for networks of several streams that
            meet again and again; None: only where all that goes on from the main input is one value.
    """
    best: tuple[Candidate, ...] = ()
    flow = _TensorFlow(body)
    for source in flow.params:
        found = tuple(flow.candidates(source, beside))
        if not best or (found and (-len(found), found[0].flops) < (-len(best), best[0].flops)):
            best = found
    return best


def row_bytes(spec: ValueSpec) -> int:
    """The size of one row of a value."""
    return math.prod(int(size) for size in spec.shape[1:]) * torch_dtype(spec).itemsize


class _TensorFlow:
    """The edges between values that depend on rows, in one body."""

    def __init__(self, body: fx.GraphModule) -> None:
        (self._result,) = result_nodes(body)
        self._order = {node: i for i, node in enumerate(body.graph.nodes)}
        self.params = [node for node in self._order if node.op == "placeholder"]
        rows: set[fx.Node] = set()
        for node in self._order:
            if node.op == "placeholder" or (
                node.op != "output"
                and not is_symbolic_size(node)
                and any(argument in rows for argument in node.all_input_nodes)
            ):
                rows.add(node)
        self._rows = rows
        self._flops = {node: node_flops(node) for node in self._order}
        self._total = sum(self._flops[node] for node in self._needed([self._result]))

    def candidates(self, source: fx.Node, beside: int | None) -> Iterable[Candidate]:
        """Legal cuts on the way from ``source`` to the result."""
        if beside is None:
            cuts = ((node, self._sides(node)) for node in self._bottlenecks(source))
        else:
            cuts = ((node, self._live_beside(node, beside)) for node in self._path(source))
        for node, sides in cuts:
            spec = node_spec(node)
            if node is self._result or node.op == "placeholder" or spec is None or spec.batch_axis != 0:
                continue
            if not torch_dtype(spec).is_floating_point or len(spec.shape) < 2 or sides is None:
                continue
            before = self._needed([node, *sides])
            flops = sum(self._flops[n] for n in before)
            if not self._worthwhile(before, flops):
                continue
            live_bytes = row_bytes(spec) + self._bytes(sides)
            yield Candidate(node, spec, (node.name, *(n.name for n in sides)), live_bytes, flops)

    def _worthwhile(self, before: set[fx.Node], flops: int) -> bool:
        # Nothing is saved by leaving after the last product, and nothing is known before the first one;
        # pooled embeddings, though, are a bag of words.
        if not self._total:
            return True
        embeds = any(node.target is torch.ops.aten.embedding.default for node in before)
        return flops < self._total and (flops > 0 or embeds)

    def _bottlenecks(self, source: fx.Node) -> list[fx.Node]:
        """Nodes on every path from ``source`` to the result, in order.

        In a topological order of the nodes that lie on some path, these are the ones that no edge
        passes over.
        """
        path = self._path(source)
        position = {node: i for i, node in enumerate(path)}
        found, furthest = [], 0
        for i, node in enumerate(path):
            if i >= furthest:
                found.append(node)
            furthest = max([furthest, *(position[user] for user in node.users if user in position)])
        return found

    def _path(self, source: fx.Node) -> list[fx.Node]:
        """Nodes on some path from ``source`` to the result, in order."""
        return sorted(self._upstream([self._result]) & self._reached(source), key=self._order.__getitem__)

    def _sides(self, cut: fx.Node) -> list[fx.Node] | None:
        """What else has to cross at a cut; None where that is impossible.

        Either the params that side values come from, if computing these again is cheap, or the side
        values themselves: whichever is smaller.
        """
        after = self._upstream([self._result], stop=cut)
        below = self._reached(cut)
        sides = {node for node in after if node not in below}
        if not sides:
            return []
        params = sorted((n for n in sides if n.op == "placeholder"), key=self._order.__getitem__)
        frontier = sorted((n for n in sides if any(u in below for u in n.users)), key=self._order.__getitem__)
        cheap = sum(self._flops[node] for node in sides) <= _CHEAP_SHARE * self._total
        specs = [node_spec(node) for node in frontier]
        legal = all(spec is not None and spec.batch_axis == 0 for spec in specs)
        if cheap and (not legal or self._bytes(params) <= self._bytes(frontier)):
            return params
        return frontier if legal else None

    def _live_beside(self, cut: fx.Node, most: int) -> list[fx.Node] | None:
        """What is needed later of all that is computed until ``cut``; None where that is too much or illegal.

        The order is that in which the network computes, so cuts that follow one another lie inside one
        another, whichever stream they are in.
        """
        here = self._order[cut]
        live = [
            node
            for node in sorted(self._upstream([self._result]), key=self._order.__getitem__)
            if self._order[node] <= here
            and any(self._order[user] > here and user in self._rows for user in node.users)
        ]
        sides = [node for node in live if node is not cut]
        specs = [node_spec(node) for node in sides]
        if len(sides) == len(live) or len(sides) > most:
            return None
        return sides if all(spec is not None and spec.batch_axis == 0 for spec in specs) else None

    @staticmethod
    def _bytes(nodes: Iterable[fx.Node]) -> int:
        return sum(row_bytes(spec) for node in nodes if (spec := node_spec(node)) is not None)

    def _reached(self, start: fx.Node) -> set[fx.Node]:
        """Row-dependent nodes that depend on ``start``, itself among them."""
        reached, pending = {start}, [start]
        while pending:
            for user in pending.pop().users:
                if user in self._rows and user not in reached:
                    reached.add(user)
                    pending.append(user)
        return reached

    def _upstream(self, ends: Iterable[fx.Node], stop: fx.Node | None = None) -> set[fx.Node]:
        """Row-dependent nodes that ``ends`` depend on, without going through ``stop``."""
        found: set[fx.Node] = set()
        pending = list(ends)
        while pending:
            node = pending.pop()
            if node in found or node is stop:
                continue
            found.add(node)
            pending.extend(argument for argument in node.all_input_nodes if argument in self._rows)
        return found

    def _needed(self, ends: Iterable[fx.Node]) -> set[fx.Node]:
        """All nodes that ``ends`` depend on, sizes apart."""
        found: set[fx.Node] = set()
        pending = list(ends)
        while pending:
            node = pending.pop()
            if node not in found and not is_symbolic_size(node):
                found.add(node)
                pending.extend(node.all_input_nodes)
        return found
