"""Builders of small programs: needs torch and nothing else, as on a GPU machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from exitcompiler.controlflow import (
    Branch,
    Edge,
    Gate,
    Jump,
    LinearGate,
    Return,
    Terminator,
    ValueSpec,
)
from exitcompiler.program import Block, Program

__all__ = [
    "ROW",
    "WIDTH",
    "aten",
    "build_body",
    "cascade",
    "diamond",
    "exit_chain",
    "row_block",
    "row_program",
    "rows",
    "sample",
]

WIDTH = 3
ROW = ValueSpec(("batch", WIDTH), "float32")
aten = torch.ops.aten


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


def cascade() -> Program:
    """``first`` leaves or goes to ``small`` or ``large``; ``small`` leaves or meets ``large`` in ``last``."""

    def gate(value: str, *bias: float) -> LinearGate:
        """By the first column: low ones go the first way, higher ones the second, the highest the third."""
        slopes = (-1.0, 1.0, 3.0)[: len(bias)]
        return LinearGate((value,), tuple((slope, 0.0, 0.0) for slope in slopes), bias)

    return row_program(
        row_block("first", ["x"], [("h", aten.tanh.default, ("x",)), ("early", aten.neg.default, ("h",))],
                  ["h", "early"],
                  Branch(gate("h", 0.0, 0.0, -1.0),
                         (Return(("early",), "first"), Edge("small", ("h",)), Edge("large", ("h",))))),
        row_block("small", ["s"], [("u", aten.add.Tensor, ("s", "s"))], ["u"],
                  Branch(gate("s", 0.0, -0.4), (Return(("u",), "small"), Edge("last", ("u",))))),
        row_block("large", ["l"], [("v", aten.sigmoid.default, ("l",))], ["v"], Jump(Edge("last", ("v",)))),
        row_block("last", ["z"], [("late", aten.mul.Tensor, ("z", "z"))], ["late"],
                  Return(("late",), "backbone")),
    )  # fmt: skip
