"""What makes a program's control flow well-formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from exitcompiler.controlflow import (
    BATCH,
    DTYPES,
    RESERVED,
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Return,
    ValueSpec,
    successors,
)
from exitcompiler.errors import VerifyError

__all__ = ["verify_control_flow"]


def verify_control_flow(flow: ControlFlow) -> None:
    """Check that a program's control flow is well-formed.

    Acyclic and in topological order, everything reachable, names unique, every edge binds every
    param with the right shape, dtype and batch axis, every return binds every output, a gate has as
    many actions as edges and reads only what its own block has on every way in. What is carried belongs
    to rows; a return carries all of it or nothing.

    Raises:
        VerifyError: Naming the block and the value at fault.
    """
    if not flow.blocks:
        raise VerifyError("a program needs at least one block")
    position = {block.name: i for i, block in enumerate(flow.blocks)}
    if len(position) != len(flow.blocks):
        raise VerifyError(f"block names are not unique: {[b.name for b in flow.blocks]}")
    _require_equal(flow.inputs, flow.entry.params, "entry", "the program's inputs", "its params")
    _verify_exits(flow)
    reached = {flow.entry.name}
    for index, block in enumerate(flow.blocks):
        where = f"block {block.name!r}"
        if block.name not in reached:
            raise VerifyError("no edge leads here", where=where)
        _verify_values(block, where)
        for way in successors(block.terminator):
            if isinstance(way, Return):
                _verify_return(block, way, flow)
                continue
            target = position.get(way.target)
            if target is None:
                raise VerifyError(f"edge to unknown block {way.target!r}", where=where)
            if target <= index:
                raise VerifyError(f"edge back to {way.target!r}: blocks must be in order", where=where)
            reached.add(way.target)
            _verify_binding(block, way.values, flow.blocks[target].params, f"{where} -> {way.target!r}")
        if isinstance(block.terminator, Branch):
            _verify_gate(block, block.terminator, where)


def _verify_exits(flow: ControlFlow) -> None:
    names = flow.exits
    if not names:
        raise VerifyError("no block returns")
    if len(set(names)) != len(names):
        raise VerifyError(f"exit names are not unique: {list(names)}")
    if flow.carried and not any(way.carries for way in flow.returns.values()):
        raise VerifyError(f"no exit carries {list(flow.carried)}")
    for name, spec in flow.carried.items():
        if spec.batch_axis != 0:
            raise VerifyError(f"{name!r}: {spec} is carried, but does not belong to rows")


def _verify_return(block: BlockInterface, way: Return, flow: ControlFlow) -> None:
    where = f"block {block.name!r}, exit {way.exit!r}"
    _verify_binding(block, way.values, flow.outputs, where)
    if way.carries:
        _verify_binding(block, way.carries, flow.carried, f"{where}, carried")


def _verify_values(block: BlockInterface, where: str) -> None:
    both = block.params.keys() & block.results.keys()
    if both:
        raise VerifyError(f"{sorted(both)} are both params and results", where=where)
    for name, spec in block.values.items():
        if name in RESERVED:
            raise VerifyError(f"value name {name!r} is reserved for lowering", where=where)
        if spec.dtype not in DTYPES:
            raise VerifyError(f"value {name!r} has unknown dtype {spec.dtype!r}", where=where)
        for axis, size in enumerate(spec.shape):
            if not (isinstance(size, int) and size >= 0) and not (axis == 0 and size == BATCH):
                raise VerifyError(f"value {name!r} has a bad shape {spec.shape}", where=where)


def _verify_binding(
    block: BlockInterface, values: Sequence[str], params: Mapping[str, ValueSpec], where: str
) -> None:
    if len(values) != len(params):
        raise VerifyError(f"{len(values)} values bind {len(params)} params {list(params)}", where=where)
    available = block.values
    for value, (param, spec) in zip(values, params.items(), strict=True):
        if value not in available:
            raise VerifyError(f"value {value!r} does not exist in the block", where=where)
        if available[value] != spec:
            raise VerifyError(f"{value!r}: {available[value]} cannot bind {param!r}: {spec}", where=where)


def _verify_gate(block: BlockInterface, branch: Branch, where: str) -> None:
    gate = branch.gate
    if gate.actions != len(branch.edges):
        raise VerifyError(f"the gate has {gate.actions} actions for {len(branch.edges)} edges", where=where)
    if gate.actions < 1:
        raise VerifyError("a branch needs at least one edge", where=where)
    if isinstance(gate, ConstantGate):
        if not 0 <= gate.action < gate.actions:
            raise VerifyError(f"constant action {gate.action} of {gate.actions}", where=where)
        return
    width = 0
    for name in gate.reads:
        spec = block.values.get(name)
        if spec is None:
            raise VerifyError(f"the gate reads {name!r}, which does not reach it", where=where)
        if spec.dtype != "float32" or len(spec.shape) != 2 or spec.batch_axis != 0:
            raise VerifyError(f"the gate reads {name!r}: {spec}, not float32[batch, n]", where=where)
        width += int(spec.shape[1])
    if len(gate.weight) != gate.actions or any(len(row) != width for row in gate.weight):
        raise VerifyError(f"gate weights are not [{gate.actions}][{width}]", where=where)
    if not all(math.isfinite(v) for row in (*gate.weight, gate.bias) for v in row):
        raise VerifyError("gate parameters must be finite", where=where)


def _require_equal(
    a: Mapping[str, ValueSpec], b: Mapping[str, ValueSpec], where: str, a_name: str, b_name: str
) -> None:
    if list(a.items()) != list(b.items()):
        raise VerifyError(f"{a_name} {_show(a)} differ from {b_name} {_show(b)}", where=where)


def _show(specs: Mapping[str, ValueSpec]) -> str:
    return "(" + ", ".join(f"{name}: {spec}" for name, spec in specs.items()) + ")"
