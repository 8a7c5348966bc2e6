"""Control flow as plain data: what a program and a saved artifact have in common.

A program is an acyclic control-flow graph of basic blocks with block arguments, as in any compiler.
This module holds everything about it but the bodies: value types, edges, gates and terminators; what
makes them well-formed is in `control_flow_checks`. It needs neither torch nor numpy, so that the runtime
and the compiler share one definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

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
    "taken_along",
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
    """Leave the program: ``values`` bind its outputs; ``exit`` names the place.

    Args:
        values: What binds the program's outputs, in order.
        exit: Unique in the program.
        carries: What binds `ControlFlow.carried`, in order, where rows that leave here go on in another
            program; empty where they do not.
    """

    values: tuple[str, ...]
    exit: str
    carries: tuple[str, ...] = ()


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


def taken_along(way: Successor) -> tuple[str, ...]:
    """All values that rows take along: what binds outputs or params, then what they carry."""
    return way.values + way.carries if isinstance(way, Return) else way.values


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
        carried: Name -> type; what rows hand over where they leave to go on in another program, which takes
            this as its inputs. Empty for a program that is whole.
    """

    inputs: Mapping[str, ValueSpec]
    outputs: Mapping[str, ValueSpec]
    blocks: tuple[BlockInterface, ...]
    carried: Mapping[str, ValueSpec] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True)
class EngineSignature:
    """What a lowered block takes and gives, by name and in order.

    Args:
        inputs: The block's params, then ``GATE_WEIGHT`` and ``GATE_BIAS`` where it ends in a linear gate.
        outputs: The results that some edge or return takes along, then ``ACTION`` (``int32[batch]``)
            where it ends in a linear gate. Empty: the block needs no engine.
    """

    inputs: dict[str, ValueSpec]
    outputs: dict[str, ValueSpec]


def engine_signature(block: BlockInterface) -> EngineSignature:
    """The signature that lowering and executors agree on for ``block``."""
    handed_on = {value for way in successors(block.terminator) for value in taken_along(way)}
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
