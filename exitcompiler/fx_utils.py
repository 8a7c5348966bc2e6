"""Cutting and joining the FX graphs of blocks.

A body names its values by its node names: one placeholder per param, an output node that is a tuple
with one node per result. Everything here keeps that, keeps ``meta`` (``val``, ``nn_module_stack``) and
shares the storage of parameters instead of copying it.

Only the batch is symbolic in a body, so a symbolic size is always an expression in one symbol. Sizes
never cross from one body into another: each body asks one of its own params how many rows there are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from exitcompiler.errors import PassError
from exitcompiler.program import BATCH, ValueSpec

__all__ = [
    "BodyBuilder",
    "compose_bodies",
    "extract_body",
    "find_attribute",
    "is_batch_size",
    "is_symbolic_size",
    "node_spec",
    "nodes_by_name",
    "required_inputs",
    "result_nodes",
]

_SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)


def is_batch_size(size: object) -> bool:
    """Whether a dimension is the batch itself (not, say, four windows per row)."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_Symbol)


def is_symbolic_size(node: fx.Node) -> bool:
    """Whether a node is a number that depends on the batch size, such as ``sym_size.int(x, 0)``."""
    return isinstance(node.meta.get("val"), _SYMBOLIC)


def node_spec(node: fx.Node) -> ValueSpec | None:
    """The type of a node's value; None unless it is one tensor that is static but for a batch as dim 0."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    shape: list[int | str] = []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(size)
        elif axis == 0 and is_batch_size(size):
            shape.append(BATCH)
        else:
            return None
    return ValueSpec(tuple(shape), str(value.dtype).removeprefix("torch."))


def result_nodes(body: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The nodes that a body hands out, in order."""
    outputs = body.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    return tuple(node for node in outputs if isinstance(node, fx.Node))


def nodes_by_name(body: fx.GraphModule) -> dict[str, fx.Node]:
    """Name -> node, in graph order, without the output node."""
    return {node.name: node for node in body.graph.nodes if node.op != "output"}


def find_attribute(body: nn.Module, target: str) -> Any:
    """The parameter, buffer, constant or submodule that ``get_attr`` with this target reads."""
    return operator.attrgetter(target)(body)


class BodyBuilder:
    """Builds one body node by node out of the nodes of others.

    Names are kept where they are free, and made unique where they are not. Parameters keep their
    dotted path; two different tensors that come with the same path get different ones.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        """Start an empty body.

        Args:
            reserved: Names that only :meth:`copy` with an explicit ``name`` may give.
        """
        self._graph = fx.Graph()
        self._names: set[str] = set()
        self._reserved = frozenset(reserved)
        self._attributes: dict[str, Any] = {}

    def placeholder(self, name: str, like: fx.Node | None = None) -> fx.Node:
        """Add a param, with the ``val`` of the node that it stands for."""
        node = self._graph.placeholder(name)
        self._rename(node, name)
        if like is not None:
            node.meta = {key: like.meta[key] for key in ("val", "tensor_meta") if key in like.meta}
        return node

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        name: str,
        val: object,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """Add a call whose result is ``val`` on fake tensors."""
        node = self._graph.call_function(target, args, kwargs)
        self._rename(node, self._free_name(name))
        node.meta["val"] = val
        return node

    def constant(self, target: str, value: torch.Tensor, name: str, val: object) -> fx.Node:
        """Add a tensor, under this path where it is free."""
        node = self._graph.create_node("get_attr", self._attribute(target, value))
        self._rename(node, self._free_name(name))
        node.meta["val"] = val
        return node

    def copy(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, fx.Node],
        source: nn.Module,
        *,
        name: str | None = None,
    ) -> fx.Node:
        """Add a copy of ``node``, its arguments replaced by ``values``.

        Args:
            node: Of ``source``; neither placeholder nor output.
            values: Node of ``source`` -> node of this body.
            source: Where ``get_attr`` and ``call_module`` targets are looked up.
            name: What to call it; by default its own name where that is free.
        """
        copied = self._graph.node_copy(node, lambda argument: values[argument])
        if node.op in ("get_attr", "call_module"):
            assert isinstance(node.target, str)
            copied.target = self._attribute(node.target, find_attribute(source, node.target))
        self._rename(copied, name if name is not None else self._free_name(node.name))
        return copied

    def hand_over_name(self, node: fx.Node, name: str, other: str) -> None:
        """Call a node ``name``; whichever has that name is called ``other`` from now on, or nearly so."""
        for holder in self._graph.nodes:
            if holder.name == name and holder is not node:
                self._rename(holder, self._free_name(other))
                self._names.discard(name)
        if node.name != name:
            self._rename(node, name)

    def finish(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """The body, with these results."""
        self._graph.output(tuple(results))
        body = fx.GraphModule(self._attributes, self._graph, class_name="Body")
        body.graph.lint()
        # The constructor sets training; a body answers as the network does when it is used.
        body.training = False
        return body

    def _attribute(self, target: str, value: object) -> str:
        unique, count = target, 0
        while unique in self._attributes and self._attributes[unique] is not value:
            count += 1
            unique = f"{target}_{count}"
        self._attributes[unique] = value
        return unique

    def _free_name(self, name: str) -> str:
        unique, count = name, 0
        while unique in self._names or unique in self._reserved:
            count += 1
            unique = f"{name}_{count}"
        return unique

    def _rename(self, node: fx.Node, name: str) -> None:
        # FX renames what shadows a builtin (`input`, the parameter of every nn.Sequential); a value of a
        # program keeps its name, and shadowing one in generated code does no harm.
        if name in self._names:
            raise PassError(f"two values of one body would both be called {name!r}")
        self._names.add(name)
        node.name = name


def required_inputs(
    body: fx.GraphModule, outputs: Sequence[str], available: Sequence[str] = ()
) -> tuple[str, ...]:
    """Which params are needed to compute ``outputs`` when the values ``available`` are given.

    Symbolic sizes do not count: they can be had from any value with rows.

    Args:
        body: A body with a batch as the only symbol.
        outputs: Names of nodes.
        available: Names of nodes that need not be computed.

    Returns:
        Names of placeholders, in their order, those in ``available`` left out.

    Raises:
        PassError: A name is none of a node.
    """
    needed = _backward_slice(body, outputs, available)
    given = set(available)
    return tuple(
        n.name for n in body.graph.nodes if n.op == "placeholder" and n in needed and n.name not in given
    )


def extract_body(
    source: fx.GraphModule,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    rename: Mapping[str, str] | None = None,
) -> fx.GraphModule:
    """Make a body that computes ``outputs`` from ``inputs``: a slice out of ``source``.

    What neither is given nor depends on rows (parameters, position tables, sizes) is copied in; what
    the outputs do not need is left out.

        source(x): a = f(x); b = g(a); c = h(b, w); d = k(a)
        extract_body(source, ["a"], ["c"])  ->  (a): b = g(a); c = h(b, w)

    Args:
        source: A body (or any FX graph of functional calls) with a batch as the only symbol.
        inputs: Names of nodes that become the placeholders, in this order. One that nothing needs
            stays a placeholder.
        outputs: Names of nodes that become the results, in this order.
        rename: Node name -> name in the new body; others keep theirs.

    Raises:
        PassError: A name is none of a node, or an output needs a param that is not among ``inputs``.
    """
    names = {} if rename is None else rename
    nodes = nodes_by_name(source)
    _require_names(nodes, inputs)
    missing = required_inputs(source, outputs, inputs)
    if missing:
        raise PassError(
            f"{list(outputs)} cannot be computed from {list(inputs)}: they also need {list(missing)}",
            remedy="pass these values along as well",
        )
    needed = _backward_slice(source, outputs, inputs)
    given = set(inputs)
    builder = BodyBuilder()
    values = {nodes[name]: builder.placeholder(names.get(name, name), nodes[name]) for name in inputs}
    sizes = _Sizes(builder, values.values())
    for node in source.graph.nodes:
        if node not in needed or node.name in given:
            continue
        size = sizes.recompute(node)
        values[node] = (
            size if size is not None else builder.copy(node, values, source, name=names.get(node.name))
        )
    return builder.finish([values[nodes[name]] for name in outputs])


def compose_bodies(
    first: fx.GraphModule,
    second: fx.GraphModule,
    bindings: Mapping[str, str],
    outputs: Sequence[str],
) -> fx.GraphModule:
    """Make one body that runs ``first``, then ``second`` on its values.

    Args:
        first: Its placeholders become those of the result, all of them, in order.
        second: The body that goes on.
        bindings: Param of ``second`` -> name of a node of ``first`` (a result, or a param passed through).
        outputs: Names of the results, in order: of results of ``second``, else of nodes of ``first``.
            They keep these names; other nodes are renamed where two would clash.

    Raises:
        PassError: A param of ``second`` is not bound, a name is none of a node, or a result would be
            called like a param.
    """
    first_nodes, second_nodes = nodes_by_name(first), nodes_by_name(second)
    params = [node for node in second_nodes.values() if node.op == "placeholder"]
    unbound = [node.name for node in params if node.name not in bindings]
    if unbound:
        raise PassError(f"params {unbound} of the second body are not bound")
    _require_names(first_nodes, [bindings[node.name] for node in params])
    # Only what the second body hands out is known by name outside: its other nodes may well be called
    # like a value of the first.
    returned = {node.name: node for node in result_nodes(second) if node.op != "placeholder"}
    unknown = [name for name in outputs if name not in returned and name not in first_nodes]
    if unknown:
        raise PassError(f"neither body computes {unknown}")
    builder = BodyBuilder(reserved=outputs)
    from_first: dict[fx.Node, fx.Node] = {}
    for name, node in first_nodes.items():
        if node.op == "placeholder":
            from_first[node] = builder.placeholder(name, node)
        else:
            kept = name if name in outputs and name not in returned else None
            from_first[node] = builder.copy(node, from_first, first, name=kept)
    from_second = {node: from_first[first_nodes[bindings[node.name]]] for node in params}
    for name, node in second_nodes.items():
        if node.op == "placeholder":
            continue
        kept = name if name in outputs and name in returned else None
        from_second[node] = builder.copy(node, from_second, second, name=kept)
    results = [
        from_second[returned[name]] if name in returned else from_first[first_nodes[name]] for name in outputs
    ]
    return builder.finish(results)


def _require_names(nodes: Mapping[str, fx.Node], names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in nodes]
    if unknown:
        raise PassError(f"the body has no values {unknown}")


def _backward_slice(body: fx.GraphModule, outputs: Sequence[str], stop: Sequence[str]) -> set[fx.Node]:
    """All nodes that ``outputs`` need, up to and including those in ``stop``."""
    nodes = nodes_by_name(body)
    _require_names(nodes, outputs)
    given = set(stop)
    needed: set[fx.Node] = set()
    pending = [nodes[name] for name in outputs]
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        if node.name not in given and _affine_in_batch(node) is None:
            pending.extend(node.all_input_nodes)
    return needed


def _affine_in_batch(node: fx.Node) -> tuple[int, int] | None:
    """``(a, c)`` where a node is the size ``a * batch + c``; None for every other node."""
    value = node.meta.get("val")
    if not isinstance(value, torch.SymInt):
        return None
    expression = value.node.expr
    if len(expression.free_symbols) != 1:
        return None
    (symbol,) = expression.free_symbols
    slope = expression.coeff(symbol, 1)
    offset = (expression - slope * symbol).expand()
    if not (slope.is_Integer and offset.is_Integer):
        return None
    return int(slope), int(offset)


class _Sizes:
    """Recomputes symbolic sizes from the rows of a body's own params."""

    def __init__(self, builder: BodyBuilder, params: Iterable[fx.Node]) -> None:
        self._builder = builder
        self._rows: fx.Node | None = None
        self._known: dict[tuple[int, int], fx.Node] = {}
        for node in params:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.ndim and is_batch_size(value.shape[0]):
                self._rows = node
                break

    def recompute(self, node: fx.Node) -> fx.Node | None:
        """The node to use for a size ``a * batch + c``; None where ``node`` has to be copied."""
        affine = _affine_in_batch(node)
        if affine is None:
            return None
        if affine not in self._known:
            self._known[affine] = self._emit(*affine, node.name)
        return self._known[affine]

    def _emit(self, slope: int, offset: int, name: str) -> fx.Node:
        if (slope, offset) == (1, 0):
            if self._rows is None:
                raise PassError("a size depends on the batch, but no param has rows", where=name)
            batch = self._rows.meta["val"].shape[0]
            return self._builder.call(torch.ops.aten.sym_size.int, (self._rows, 0), name, batch)
        if (1, 0) not in self._known:
            self._known[1, 0] = self._emit(1, 0, "batch_size")
        size = self._known[1, 0]
        if slope != 1:
            size = self._builder.call(operator.mul, (size, slope), name, size.meta["val"] * slope)
        if offset:
            size = self._builder.call(operator.add, (size, offset), name, size.meta["val"] + offset)
        return size
