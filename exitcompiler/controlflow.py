"""Control flow as plain data: what a program and a saved artifact have in common.

A program is an acyclic control-flow graph of basic blocks with block arguments, as in any compiler.
This module holds everything about it but the bodies: value types, edges, gates, terminators, and what
makes them well-formed. It needs neither torch nor numpy, so that the runtime and the compiler share
one definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from exitcompiler.errors import VerifyError

__all__ = [
    "ACTION",
    "BATCH",
    "DTYPES",
    "GATE_BIAS",
    "GATE_WEIGHT",
    "RESERVED",
    "BlockInterface",
    "Branch",
    "ConstantGate",
    "ControlFlow",
    "Edge",
    "EngineSignature",
    "Gate",
    "Jump",
    "LinearGate",
    "OutputStructure",
    "Return",
    "Successor",
    "Terminator",
    "ValueSpec",
    "engine_signature",
    "map_successors",
    "successors",
    "verify_control_flow",
]

BATCH: Final = "batch"
"""The name of the one symbolic dimension: the number of rows."""

GATE_WEIGHT: Final = "gate_weight"
GATE_BIAS: Final = "gate_bias"
ACTION: Final = "action"
"""Names that lowering adds to a block: the gate's parameters as inputs, its decision as an output."""

RESERVED: Final = frozenset({GATE_WEIGHT, GATE_BIAS, ACTION})

DTYPES: Final = frozenset(
    {"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}
)


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """The type of a value: ``float32[batch, 16, 32, 32]``.

    Args:
        shape: Dimensions; the first may be ``BATCH`` ("batch"), all others are fixed numbers.
        dtype: One of ``DTYPES``, spelled as numpy and torch do.
    """

    shape: tuple[int | str, ...]
    dtype: str

    @property
    def batch_axis(self) -> int | None:
        """0 for a value with one entry per row; None for what does not belong to rows."""
        return 0 if self.shape and self.shape[0] == BATCH else None

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Return:
    """Leave the program: ``values`` bind its outputs; ``exit`` names the place."""

    values: tuple[str, ...]
    exit: str


@dataclass(frozen=True, slots=True)
class Edge:
    """Go on to block ``target``: ``values`` bind its params, in order."""

    target: str
    values: tuple[str, ...]


Successor: TypeAlias = Return | Edge


@dataclass(frozen=True, slots=True)
class ConstantGate:
    """Takes the same action for every row. The prune-constant-gates pass folds it away.

    Args:
        action: The index of the edge taken.
        actions: How many edges there are.
    """

    action: int
    actions: int

    @property
    def reads(self) -> tuple[str, ...]:
        """Nothing."""
        return ()


@dataclass(frozen=True, slots=True)
class LinearGate:
    """Takes, per row, the action with the highest linear score; a tie goes to the lowest index.

    ``action = argmax_a (weight[a] . features + bias[a])`` where ``features`` is the concatenation,
    along axis 1, of the values in ``reads``. With two actions, {leave, go on}, and a zero second
    row this is the linear gate of Bolukbasi et al. 2017, section 3.

    Args:
        reads: Values of the block (params or results), each ``float32[batch, n]``.
        weight: ``[actions][features]``.
        bias: ``[actions]``.
    """

    reads: tuple[str, ...]
    weight: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    @property
    def actions(self) -> int:
        """How many edges the gate chooses among."""
        return len(self.bias)


Gate: TypeAlias = ConstantGate | LinearGate


@dataclass(frozen=True, slots=True)
class Jump:
    """Always take ``edge``."""

    edge: Edge


@dataclass(frozen=True, slots=True)
class Branch:
    """Take the edge that ``gate`` picks, row by row."""

    gate: Gate
    edges: tuple[Successor, ...]


Terminator: TypeAlias = Return | Jump | Branch


def successors(terminator: Terminator) -> tuple[Successor, ...]:
    """All ways out of a block, in the order of the gate's actions."""
    match terminator:
        case Return():
            return (terminator,)
        case Jump(edge):
            return (edge,)
        case Branch(_, edges):
            return edges


def map_successors(terminator: Terminator, change: Callable[[Successor], Successor]) -> Terminator:
    """The terminator with every way out replaced by what ``change`` makes of it."""
    if isinstance(terminator, Branch):
        return replace(terminator, edges=tuple(change(way) for way in terminator.edges))
    way = change(terminator.edge if isinstance(terminator, Jump) else terminator)
    return way if isinstance(way, Return) else Jump(way)


@dataclass(frozen=True)
class BlockInterface:
    """A block as seen from outside: what it takes, what it makes, where rows go next.

    Args:
        name: Unique in the program.
        params: Name -> type of what comes in, in order.
        results: Name -> type of what the body makes, in order; disjoint from ``params``.
        terminator: May use params and results alike.
    """

    name: str
    params: Mapping[str, ValueSpec]
    results: Mapping[str, ValueSpec]
    terminator: Terminator

    @property
    def values(self) -> dict[str, ValueSpec]:
        """All values the terminator may use."""
        return {**self.params, **self.results}


@dataclass(frozen=True)
class ControlFlow:
    """A whole program without its bodies.

    Args:
        inputs: Name -> type; equal to the params of the first block.
        outputs: Name -> type; what every ``Return`` binds.
        blocks: In topological order; the first is the entry.
    """

    inputs: Mapping[str, ValueSpec]
    outputs: Mapping[str, ValueSpec]
    blocks: tuple[BlockInterface, ...]

    @property
    def entry(self) -> BlockInterface:
        """The block where every row starts."""
        return self.blocks[0]

    @property
    def returns(self) -> dict[str, Return]:
        """Exit name -> its ``Return``, in program order."""
        return {r.exit: r for r in _returns(self.blocks)}

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the places to leave, in program order; the last one is the deepest."""
        return tuple(r.exit for r in _returns(self.blocks))

    def block(self, name: str) -> BlockInterface:
        """The block called ``name``.

        Raises:
            KeyError: There is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)


def _returns(blocks: Iterable[BlockInterface]) -> Iterator[Return]:
    for block in blocks:
        for way in successors(block.terminator):
            if isinstance(way, Return):
                yield way


def verify_control_flow(flow: ControlFlow) -> None:
    """Check that a program's control flow is well-formed.

    Acyclic and in topological order, everything reachable, names unique, every edge binds every
    param with the right shape, dtype and batch axis, every return binds every output, a gate has as
    many actions as edges and reads only what its own block has on every way in.

    Raises:
        VerifyError: Naming the block and the value at fault.
    """
    if not flow.blocks:
        raise VerifyError("a program needs at least one block")
    position = {block.name: i for i, block in enumerate(flow.blocks)}
    if len(position) != len(flow.blocks):
        raise VerifyError(f"block names are not unique: {[b.name for b in flow.blocks]}")
    _require_equal(flow.inputs, flow.entry.params, "entry", "the program's inputs", "its params")
    _verify_exit_names(flow)
    reached = {flow.entry.name}
    for index, block in enumerate(flow.blocks):
        where = f"block {block.name!r}"
        if block.name not in reached:
            raise VerifyError("no edge leads here", where=where)
        _verify_values(block, where)
        for way in successors(block.terminator):
            if isinstance(way, Return):
                _verify_binding(block, way.values, flow.outputs, f"{where}, exit {way.exit!r}")
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


def _verify_exit_names(flow: ControlFlow) -> None:
    names = flow.exits
    if not names:
        raise VerifyError("no block returns")
    if len(set(names)) != len(names):
        raise VerifyError(f"exit names are not unique: {list(names)}")


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


@dataclass(frozen=True, slots=True)
class EngineSignature:
    """What a lowered block takes and gives, by name and in order.

    Args:
        inputs: The block's params, then ``GATE_WEIGHT`` and ``GATE_BIAS`` where it ends in a linear gate.
        outputs: The results that some edge or return hands on, then ``ACTION`` (``int32[batch]``)
            where it ends in a linear gate. Empty: the block needs no engine.
    """

    inputs: dict[str, ValueSpec]
    outputs: dict[str, ValueSpec]


def engine_signature(block: BlockInterface) -> EngineSignature:
    """The signature that lowering and executors agree on for ``block``."""
    handed_on = {value for way in successors(block.terminator) for value in way.values}
    inputs = dict(block.params)
    outputs = {name: spec for name, spec in block.results.items() if name in handed_on}
    if isinstance(block.terminator, Branch) and isinstance(block.terminator.gate, LinearGate):
        gate = block.terminator.gate
        width = len(gate.weight[0])
        inputs[GATE_WEIGHT] = ValueSpec((gate.actions, width), "float32")
        inputs[GATE_BIAS] = ValueSpec((gate.actions,), "float32")
        outputs[ACTION] = ValueSpec((BATCH,), "int32")
    return EngineSignature(inputs, outputs)


@dataclass(frozen=True, slots=True)
class OutputStructure:
    """How the model hands over its logits, so that the program hands them over the same way.

    Args:
        kind: "tensor", "dict" or "tuple"; a dict or tuple holds the logits alone.
        key: The model's key of the logits in a dict; None otherwise.
    """

    kind: str
    key: str | None = None
