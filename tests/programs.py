"""Small programs for tests: hypothesis strategies for whole ones, besides the builders of row_programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from row_programs import (
    ROW,
    WIDTH,
    aten,
    build_body,
    diamond,
    exit_chain,
    row_block,
    row_program,
    rows,
    sample,
)

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
)
from exitcompiler.program import Program

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


numbers = st.floats(-2, 2, width=32).map(lambda value: round(value, 2))


@st.composite
def gates(draw: st.DrawFn, values: Sequence[str], actions: int, constant: bool | None = None) -> Gate:
    """A gate over some of the values, some of whose features may weigh nothing."""
    if draw(st.booleans()) if constant is None else constant:
        return ConstantGate(draw(st.integers(0, actions - 1)), actions)
    reads = tuple(draw(st.lists(st.sampled_from(list(values)), min_size=1, max_size=2, unique=True)))
    weighed = draw(st.lists(st.booleans(), min_size=WIDTH * len(reads), max_size=WIDTH * len(reads)))
    row = st.tuples(*(numbers if is_weighed else st.just(0.0) for is_weighed in weighed))
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
