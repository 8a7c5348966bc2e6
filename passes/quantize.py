"""quantize: lets a float32 program, or a head, compute in int8, and hand on integers from block to block."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from exitcompiler.controlflow import Branch, Edge, ValueSpec, successors
from exitcompiler.errors import PassError
from exitcompiler.passes.base import PassResult
from exitcompiler.program import Block, ExitHead, Program
from exitcompiler.quantized_body import BodyScales, fold_norms, has_constant_weight, quantize_body

__all__ = ["Quantize", "quantize", "quantize_head"]


def quantize(program: Program, scales: Mapping[str, BodyScales]) -> Program:
    """Quantise values and weights, as calibrated; the program's inputs and outputs stay float32.

    ::

        stem(x: float32) -> (h: float32, logits: float32)
        =>  stem(x: float32) -> (h: uint8, logits: float32)

    Batch norms are folded first, as engines do. A value that crosses blocks does so as an integer if it has a
    scale, and both sides have the same. What is computed from answers and by gates stays float32. Names stay.

    Source: Jacob et al. 2018, sections 2.1 and 2.4; per-channel weights as in Krishnamoorthi 2018, section 3.

    Args:
        program: Values of other types than float32 have no scales.
        scales: Block name -> what is quantised in it; others stay as they are.

    Raises:
        PassError: An edge would bind an integer to a float, or to an integer of another scale; or there is
            a scale for a value that is not there, or an integer weight for one that is not quantised.
    """
    kept = _kept_float(program)
    changed: dict[str, Block] = {}
    for block in program.blocks:
        _require_edges(block, program, scales, kept)
        given = scales.get(block.name, BodyScales())
        if given.values or given.products:
            folded = replace(block, body=fold_norms(block.body))
            _require_known(folded, given)
            changed[block.name] = _quantize_block(folded, given, kept[block.name])
    return program.with_blocks(changed) if changed else program


def quantize_head(head: ExitHead, values: Mapping[str, ValueSpec], scales: BodyScales) -> ExitHead:
    """The same for a head that is not attached yet; what it hands out stays float32.

    Args:
        head: It reads values of a program that has been quantised.
        values: Their types there.
        scales: What is quantised in the head, the values that it reads included.
    """
    if not scales.values and not scales.products:
        return head
    reads = [node.name for node in head.body.graph.nodes if node.op == "placeholder"]
    stored = [name for name in reads if values[name].dtype == "uint8"]
    return replace(head, body=quantize_body(fold_norms(head.body), scales, stored))


def _kept_float(program: Program) -> dict[str, set[str]]:
    """Block -> values that cross as float32: inputs, what gates read, what is returned or carried."""
    kept: dict[str, set[str]] = {block.name: set() for block in program.blocks}
    kept[program.entry.name].update(program.inputs)
    for block in program.blocks:
        if isinstance(block.terminator, Branch):
            kept[block.name].update(block.terminator.gate.reads)
        for way in successors(block.terminator):
            if not isinstance(way, Edge):
                kept[block.name].update((*way.values, *way.carries))
    for block in program.blocks:  # in topological order: inputs are handed along
        for way in successors(block.terminator):
            if isinstance(way, Edge):
                bound = zip(way.values, program.block(way.target).params, strict=True)
                kept[way.target].update(param for value, param in bound if value in kept[block.name])
    return kept


def _require_known(block: Block, scales: BodyScales) -> None:
    nodes = {node.name: node for node in block.body.graph.nodes}
    if unknown := sorted(scales.values.keys() - nodes.keys()):
        raise PassError(f"there are no values {unknown} to quantise", where=f"block {block.name!r}")
    wrong = [
        name
        for name in sorted(scales.products)
        if name not in nodes
        or not has_constant_weight(nodes[name])
        or nodes[name].all_input_nodes[0].name not in scales.values
    ]
    if wrong:
        raise PassError(
            f"{wrong} are no products with a constant weight of a quantised value",
            where=f"block {block.name!r}",
        )


def _require_edges(
    block: Block, program: Program, scales: Mapping[str, BodyScales], kept: Mapping[str, Collection[str]]
) -> None:
    for way in successors(block.terminator):
        if not isinstance(way, Edge):
            continue
        for value, param in zip(way.values, program.block(way.target).params, strict=True):
            ours = _crossing(block.name, value, scales, kept)
            theirs = _crossing(way.target, param, scales, kept)
            if ours != theirs:
                raise PassError(
                    f"{value!r} is {ours or 'float32'}, and binds {param!r}, which is {theirs or 'float32'}",
                    where=f"edge from block {block.name!r} to {way.target!r}",
                )


def _crossing(
    block: str, value: str, scales: Mapping[str, BodyScales], kept: Mapping[str, Collection[str]]
) -> object:
    """The scale that a param or result has where it crosses; None: it is float32 there."""
    if block not in scales or value in kept[block]:
        return None
    return scales[block].values.get(value)


def _quantize_block(block: Block, scales: BodyScales, kept: Collection[str]) -> Block:
    stored = [name for name in block.values if name in scales.values and name not in kept]

    def changed(specs: Mapping[str, ValueSpec]) -> dict[str, ValueSpec]:
        return {n: replace(spec, dtype="uint8") if n in stored else spec for n, spec in specs.items()}

    body = quantize_body(block.body, scales, stored)
    return replace(block, params=changed(block.params), results=changed(block.results), body=body)


@dataclass(frozen=True)
class Quantize:
    """The quantize pass; see ``quantize``."""

    name: ClassVar[str] = "quantize"

    scales: Mapping[str, BodyScales]

    def __call__(self, program: Program) -> PassResult:
        """Run the pass."""
        changed = quantize(program, self.scales)
        return PassResult(changed, changed is not program)
