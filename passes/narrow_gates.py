"""narrow-gates: a gate reads only the features that it weighs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from exitcompiler.controlflow import BATCH, Branch, LinearGate, ValueSpec, successors, taken_along
from exitcompiler.fx_utils import extract_body, node_spec, nodes_by_name
from exitcompiler.naming import free_name
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, Program

__all__ = ["NarrowGates", "narrow_gates"]


def narrow_gates(program: Program) -> Program:
    """Leave out of each gate the features whose weight is zero for every action.

    A threshold on the max probability weighs one of a head's three confidences. Where a block joins them
    for its own gate alone, the gate reads the parts that it needs instead, and what the others were
    computed from is left for eliminate-dead-code. ::

        c = cat([p1, margin, entropy], 1)                       c_0 = p1
        branch [c] . [[9, 0, 0], [0, 0, 0]] + [-8, 0]:    =>    branch [c_0] . [[9], [0]] + [-8, 0]:

    Scores of finite features stay what they were, since a feature times zero adds nothing. A value of which
    nothing is weighed goes as a whole; one that comes from another block, or goes on to one, stays whole.
    """
    changed: dict[str, Block] = {}
    for block in program.blocks:
        if isinstance(block.terminator, Branch) and isinstance(block.terminator.gate, LinearGate):
            narrowed = _narrow(block, block.terminator, block.terminator.gate)
            if narrowed is not block:
                changed[block.name] = narrowed
    return program.with_blocks(changed) if changed else program


@dataclass(frozen=True, slots=True)
class _Read:
    """A value that a gate reads, or a part of one.

    Args:
        name: Of the value, or of the node that is the part.
        columns: Its features, among all of the gate.
        called: What a part is called as a result of its block, where that is free.
    """

    name: str
    columns: range
    called: str = ""


def _narrow(block: Block, branch: Branch, gate: LinearGate) -> Block:
    weighed = [any(column) for column in zip(*gate.weight, strict=True)]
    kept = [read for read in _reads(block, gate, weighed) if any(weighed[i] for i in read.columns)]
    columns = [i for read in kept for i in read.columns]
    if not kept or len(columns) == len(weighed) or len({read.name for read in kept}) < len(kept):
        return block  # one that weighs nothing is constant, which is for prune-constant-gates
    taken = {*nodes_by_name(block.body), *block.params}
    parts = {read.name: read for read in kept if read.name not in block.values}
    names = {name: free_name(read.called, taken) for name, read in parts.items()}
    narrow = LinearGate(
        tuple(names.get(read.name, read.name) for read in kept),
        tuple(tuple(row[i] for i in columns) for row in gate.weight),
        gate.bias,
    )
    terminator = replace(branch, gate=narrow)
    if not parts:
        return replace(block, terminator=terminator)
    body = extract_body(block.body, list(block.params), [*block.results, *parts], rename=names)
    made = {names[name]: _features(len(read.columns)) for name, read in parts.items()}
    return Block(block.name, block.params, {**block.results, **made}, terminator, body)


def _reads(block: Block, gate: LinearGate, weighed: Sequence[bool]) -> Iterator[_Read]:
    """What the gate reads; values that are joined for it alone, and not weighed whole, part by part."""
    goes_on = {value for way in successors(block.terminator) for value in taken_along(way)}
    start = 0
    for name in gate.reads:
        width = int(block.values[name].shape[1])
        columns = range(start, start + width)
        start += width
        own = name in block.results and name not in goes_on
        parts = _parts(nodes_by_name(block.body)[name], columns) if own else []
        if not parts or all(weighed[i] for i in columns):
            yield _Read(name, columns)
            continue
        yield from parts


def _parts(node: fx.Node, columns: range) -> list[_Read]:
    """What a value is joined of, if each is features of its own; nothing where it is not."""
    if node.target is not torch.ops.aten.cat.default or node.args[1:] not in ((1,), (-1,)):
        return []
    assert isinstance(node.args[0], list | tuple)
    parts: dict[str, _Read] = {}
    start = columns.start
    for number, joined in enumerate(node.args[0]):
        spec = node_spec(joined) if isinstance(joined, fx.Node) else None
        if spec is None or len(spec.shape) != 2 or spec != _features(int(spec.shape[1])):
            return []
        stop = start + int(spec.shape[1])
        parts[joined.name] = _Read(joined.name, range(start, stop), f"{node.name}_{number}")
        start = stop
    return list(parts.values()) if len(parts) == len(node.args[0]) else []


def _features(width: int) -> ValueSpec:
    return ValueSpec((BATCH, width), "float32")


@dataclass(frozen=True)
class NarrowGates:
    """The narrow-gates pass; see ``narrow_gates``."""

    name: ClassVar[str] = "narrow-gates"

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        narrowed = narrow_gates(program)
        return PassResult(narrowed, narrowed is not program)
