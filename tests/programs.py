"""Small programs for tests: a builder for bodies, and hypothesis strategies for whole programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx

from exitcompiler.controlflow import (
    Branch,
    ConstantGate,
    Edge,
    Gate,
    Jump,
    LinearGate,
    Return,
    Successor,
    Terminator,
    ValueSpec,
)
from exitcompiler.program import Block, Program

WIDTH = 3
ROW = ValueSpec(("batch", WIDTH), "float32")
aten = torch.ops.aten

BINARY: tuple[Callable[..., Any], ...] = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.maximum.default,
)
UNARY: tuple[Callable[..., Any], ...] = (
    aten.tanh.default,
    aten.relu.default,
    aten.neg.default,
    aten.sigmoid.default,
)


def sample(spec: ValueSpec) -> torch.Tensor:
    """A meta tensor of the type, with two rows."""
    shape = [2 if size == "batch" else int(size) for size in spec.shape]
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")


def build_body(
    params: Mapping[str, ValueSpec],
    operations: Sequence[tuple[str, Callable[..., Any], tuple[Any, ...]]],
    results: Sequence[str],
    constants: Mapping[str, torch.Tensor] | None = None,
) -> fx.GraphModule:
    """A body from (name, operator, arguments) triples; argument strings name earlier values."""
    root = torch.nn.Module()
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name, tensor in (constants or {}).items():
        root.register_buffer(name, tensor)
        nodes[name] = graph.get_attr(name)
        nodes[name].meta["val"] = tensor.to("meta")
    for name, spec in params.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = sample(spec)
    for name, target, arguments in operations:
        node = graph.create_node(
            "call_function",
            target,
            tuple(nodes.get(a, a) if isinstance(a, str) else a for a in arguments),
            name=name,
        )
        node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args))
        nodes[name] = node
    graph.output(tuple(nodes[name] for name in results))
    return fx.GraphModule(root, graph)


def row_block(
    name: str,
    params: Sequence[str],
    operations: Sequence[tuple[str, Callable[..., Any], tuple[Any, ...]]],
    results: Sequence[str],
    terminator: Terminator,
) -> Block:
    """A block whose values are all ``float32[batch, 3]``."""
    specs = dict.fromkeys(params, ROW)
    return Block(name, specs, dict.fromkeys(results, ROW), terminator, build_body(specs, operations, results))


def row_program(*blocks: Block) -> Program:
    """A program over ``float32[batch, 3]`` values with one output ``y``."""
    return Program(dict(blocks[0].params), {"y": ROW}, blocks)


numbers = st.floats(-2, 2, width=32).map(lambda value: round(value, 2))


@st.composite
def gates(draw: st.DrawFn, values: Sequence[str], actions: int, constant: bool | None = None) -> Gate:
    """A gate over some of the values."""
    if draw(st.booleans()) if constant is None else constant:
        return ConstantGate(draw(st.integers(0, actions - 1)), actions)
    reads = tuple(draw(st.lists(st.sampled_from(list(values)), min_size=1, max_size=2, unique=True)))
    row = st.tuples(*[numbers] * (WIDTH * len(reads)))
    weight = tuple(draw(row) for _ in range(actions))
    return LinearGate(reads, weight, tuple(draw(numbers) for _ in range(actions)))


@st.composite
def programs(draw: st.DrawFn, *, max_blocks: int = 6) -> Program:
    """Any acyclic program: chains, DAGs with joins, diamonds, exits anywhere, dead values, constants."""
    count = draw(st.integers(1, max_blocks))
    arity = [draw(st.integers(1, 2)) for _ in range(count)]
    # Every block but the first has one edge that is sure to lead to it.
    parent = {i: draw(st.integers(0, i - 1)) for i in range(1, count)}
    exits = iter(f"e{i}" for i in range(100))
    shared_names = draw(st.booleans())  # the same names in every block: merging has to keep them apart
    blocks = []
    for index in range(count):
        prefix = "b" if shared_names else f"b{index}"
        params = [f"{prefix}_p{i}" for i in range(arity[index])]
        operations, results = draw(_operations(prefix, params))
        values = [*params, *results]
        targets = [child for child, owner in parent.items() if owner == index]
        targets += draw(st.lists(st.integers(index + 1, count - 1), max_size=2)) if index + 1 < count else []
        ways: list[Successor] = [
            Edge(f"b{target}", tuple(draw(st.sampled_from(values)) for _ in range(arity[target])))
            for target in targets
        ]
        for _ in range(draw(st.integers(0 if ways else 1, 1))):
            ways.insert(0, Return((draw(st.sampled_from(values)),), next(exits)))
        blocks.append(row_block(f"b{index}", params, operations, results, draw(_terminators(ways, values))))
    return row_program(*blocks)


@st.composite
def _operations(
    draw: st.DrawFn, prefix: str, params: Sequence[str]
) -> tuple[list[tuple[str, Callable[..., Any], tuple[Any, ...]]], list[str]]:
    available = list(params)
    operations: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
    for number in range(draw(st.integers(1, 4))):
        name = f"{prefix}_v{number}"
        if draw(st.booleans()):
            arguments = (draw(st.sampled_from(available)), draw(st.sampled_from(available)))
            operations.append((name, draw(st.sampled_from(BINARY)), arguments))
        else:
            operations.append((name, draw(st.sampled_from(UNARY)), (draw(st.sampled_from(available)),)))
        available.append(name)
    made = [name for name, _, _ in operations]
    return operations, sorted(draw(st.sets(st.sampled_from(made), min_size=1)), key=made.index)


@st.composite
def _terminators(draw: st.DrawFn, ways: list[Successor], values: Sequence[str]) -> Terminator:
    if len(ways) == 1 and draw(st.booleans()):
        way = ways[0]
        return way if isinstance(way, Return) else Jump(way)
    return Branch(draw(gates(values, len(ways))), tuple(ways))


def rows(count: int, program: Program, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, *(int(size) for size in spec.shape[1:]), generator=generator)
        for name, spec in program.inputs.items()
    }


def exit_chain(*, leave: Gate | None = None) -> Program:
    """Two blocks with one exit between them: the smallest program with a decision."""
    first = row_block(
        "first",
        ["x"],
        [("h", aten.tanh.default, ("x",)), ("early", aten.neg.default, ("h",))],
        ["h", "early"],
        Branch(
            leave
            if leave is not None
            else LinearGate(("h",), ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (0.0, 0.0)),
            (Return(("early",), "first"), Edge("second", ("h",))),
        ),
    )
    second = row_block(
        "second", ["h"], [("late", aten.mul.Tensor, ("h", "h"))], ["late"], Return(("late",), "backbone")
    )
    return row_program(first, second)


def diamond() -> Program:
    """Layer skipping: run the layer, or go round it; both edges bind the join's param."""
    gate = LinearGate(("x",), ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (0.0, 0.0))
    return row_program(
        row_block("head", ["x"], [("h", aten.tanh.default, ("x",))], ["h"],
                  Branch(gate, (Edge("join", ("h",)), Edge("layer", ("h",))))),
        row_block("layer", ["a"], [("b", aten.relu.default, ("a",))], ["b"], Jump(Edge("join", ("b",)))),
        row_block("join", ["j"], [("y", aten.neg.default, ("j",))], ["y"], Return(("y",), "end")),
    )  # fmt: skip


__all__ = [
    "ROW",
    "WIDTH",
    "aten",
    "build_body",
    "diamond",
    "exit_chain",
    "gates",
    "programs",
    "row_block",
    "row_program",
    "rows",
    "sample",
]
