"""cast-precision: lets a float32 program, or a head, compute in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Final, TypeAlias

import torch
from torch import fx

from exitcompiler.body_precision import Kind, cast_body, infer_kinds
from exitcompiler.controlflow import Branch, Edge, ValueSpec, successors
from exitcompiler.errors import PassError
from exitcompiler.fx_utils import result_nodes
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, ExitHead, Program, torch_dtype

__all__ = ["PRECISIONS", "CastPrecision", "cast_head", "cast_precision"]

PRECISIONS: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"fp16": torch.float16, "bf16": torch.bfloat16}
)
"""Precision -> the dtype that values have in it."""

_Value: TypeAlias = "tuple[str, str]"
"""A block's name, and a value of it."""


def cast_precision(program: Program, precision: str, answers: Collection[str] = ()) -> Program:
    """Compute in float16 or bfloat16 what may be rounded; the program's inputs and outputs stay float32.

    ::

        stem(x: float32) -> (h: float32, logits: float32, confidence: float32)
        =>  stem(x: float32) -> (h: float16, logits: float32, confidence: float32)

    Weights, values and dtype arguments change, inputs are cast where they are used. An answer is cast back,
    and everything that is computed from it is in float32: a threshold like 0.998 cannot be told in bfloat16.
    A value that crosses blocks is in the low precision if it is wherever it comes from. Names stay.

    Source: Micikevicius et al. 2018, section 3; operators as `exitcompiler.body_precision` has them.

    Args:
        program: Values of other types than float32 are left alone.
        precision: One of ``PRECISIONS``, or ``"fp32"``, which changes nothing.
        answers: Values that are answers besides those that the program returns, in whatever block they are.

    Raises:
        PassError: There is no such precision, or an operator does not run in it; names the node.
    """
    if precision == "fp32":
        return program
    dtype = _dtype(precision)
    kinds = _Kinds.of(program, answers)
    inferred = {block.name: kinds.infer(block) for block in program.blocks}
    while kinds.raise_to(inferred, program):
        inferred = {block.name: kinds.infer(block) for block in program.blocks}
    blocks = tuple(_cast_block(block, dtype, kinds, inferred[block.name]) for block in program.blocks)
    if all(new is old for new, old in zip(blocks, program.blocks, strict=True)):
        return program
    return replace(program, blocks=blocks)


def cast_head(
    head: ExitHead, values: Mapping[str, ValueSpec], precision: str, answers: Collection[str]
) -> ExitHead:
    """The same for a head that is not attached yet; what it hands out stays float32.

    Args:
        head: It reads values of a program that has been cast.
        values: Their types there.
        precision: As for `cast_precision`.
        answers: As for `cast_precision`; the head's own answer is one anyway.

    Raises:
        PassError: As for `cast_precision`.
    """
    if precision == "fp32":
        return head
    dtype = _dtype(precision)
    answers = {*answers, *head.answer}
    reads = [node.name for node in head.body.graph.nodes if node.op == "placeholder"]
    kinds = {
        name: Kind.EXACT if name in answers else Kind.LOW if torch_dtype(values[name]) is dtype else Kind.WIDE
        for name in reads
    }
    stored = {name: torch_dtype(values[name]) for name in reads}
    stored |= {name: torch_dtype(spec) for name, spec in head.results.items()}
    inferred = infer_kinds(head.body, kinds, answers)
    if not _rounds(inferred):
        return head
    return replace(head, body=cast_body(head.body, dtype, inferred, stored))


def _dtype(precision: str) -> torch.dtype:
    if precision not in PRECISIONS:
        raise PassError(
            f"there is no precision {precision!r} to cast to", remedy=f"choose one of {list(PRECISIONS)}"
        )
    return PRECISIONS[precision]


@dataclass
class _Kinds:
    """How values that cross blocks are treated: those that bind the same param are treated alike.

    A kind only ever rises, so that going over the blocks again and again comes to an end.
    """

    answers: frozenset[str]
    _bound_to: dict[_Value, _Value] = field(default_factory=dict)
    _kind: dict[_Value, Kind] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, answers: Collection[str]) -> _Kinds:
        """What the control flow says."""
        kinds = _Kinds(frozenset(answers))
        for block in program.blocks:
            for way in successors(block.terminator):
                if isinstance(way, Edge):
                    for name, param in zip(way.values, program.block(way.target).params, strict=True):
                        kinds._bind((block.name, name), (way.target, param))
        for value, kind in _known(program, answers):
            kinds._raise(value, kind)
        return kinds

    def __getitem__(self, value: _Value) -> Kind:
        return self._kind.get(self._class_of(value), Kind.LOW)

    def infer(self, block: Block) -> dict[fx.Node, Kind]:
        """The kinds of everything in a block's body, as far as is known by now."""
        params = {name: self[block.name, name] for name in block.params}
        return infer_kinds(block.body, params, self._answers_in(block))

    def raise_to(self, inferred: Mapping[str, Mapping[fx.Node, Kind]], program: Program) -> bool:
        """Take over what was found out about results; says whether that changed anything."""
        before = dict(self._kind)
        for block in program.blocks:
            for node in result_nodes(block.body):
                self._raise((block.name, node.name), inferred[block.name][node])
        return self._kind != before

    def _answers_in(self, block: Block) -> set[str]:
        return {value for value in block.values if self[block.name, value] is Kind.EXACT}

    def _class_of(self, value: _Value) -> _Value:
        while value in self._bound_to:
            value = self._bound_to[value]
        return value

    def _bind(self, a: _Value, b: _Value) -> None:
        first, second = self._class_of(a), self._class_of(b)
        if first != second:
            self._bound_to[first] = second

    def _raise(self, value: _Value, kind: Kind) -> None:
        if kind > self[value]:
            self._kind[self._class_of(value)] = kind


def _known(program: Program, answers: Collection[str]) -> Iterator[tuple[_Value, Kind]]:
    """What is stored in float32 whatever computes it: inputs, answers, what is carried, what gates read."""
    entry = program.entry.name
    yield from (((entry, name), Kind.INPUT) for name in program.inputs)
    for block in program.blocks:
        yield from (((block.name, value), Kind.EXACT) for value in block.values if value in answers)
        if isinstance(block.terminator, Branch):
            yield from (((block.name, value), Kind.INPUT) for value in block.terminator.gate.reads)
    for block in program.blocks:
        for way in successors(block.terminator):
            if not isinstance(way, Edge):
                yield from (((block.name, value), Kind.EXACT) for value in (*way.values, *way.carries))


def _cast_block(block: Block, dtype: torch.dtype, kinds: _Kinds, inferred: Mapping[fx.Node, Kind]) -> Block:
    low = str(dtype).removeprefix("torch.")

    def changed(specs: Mapping[str, ValueSpec]) -> dict[str, ValueSpec]:
        rounded = {n for n, s in specs.items() if s.dtype == "float32" and kinds[block.name, n] is Kind.LOW}
        return {n: replace(spec, dtype=low) if n in rounded else spec for n, spec in specs.items()}

    params, results = changed(block.params), changed(block.results)
    if params == block.params and results == block.results and not _rounds(inferred):
        return block
    stored = {name: torch_dtype(spec) for name, spec in (params | results).items()}
    body = cast_body(block.body, dtype, inferred, stored)
    return replace(block, params=params, results=results, body=body)


def _rounds(inferred: Mapping[fx.Node, Kind]) -> bool:
    """Whether something is computed in low precision that was in float32."""
    return any(
        kind is Kind.LOW
        and node.op == "call_function"
        and any(map(_is_float32, (node, *node.all_input_nodes)))
        for node, kind in inferred.items()
    )


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(part, torch.Tensor) and part.dtype is torch.float32 for part in values)


@dataclass(frozen=True)
class CastPrecision:
    """The cast-precision pass; see ``cast_precision``."""

    name: ClassVar[str] = "cast-precision"

    precision: str
    answers: Collection[str] = ()

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        changed = cast_precision(program, self.precision, self.answers)
        return PassResult(changed, changed is not program)
