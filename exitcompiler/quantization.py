"""Networks in int8: calibrated once as a whole, heads included, then cut like any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from torch import fx

from exitcompiler.calibrated_scales import NEXT_BEST, calibrate
from exitcompiler.candidates import Candidates
from exitcompiler.controlflow import Branch, Return, ValueSpec
from exitcompiler.data import Rows
from exitcompiler.errors import CalibrationError, PassError
from exitcompiler.fx_utils import BodyBuilder, extract_body, nodes_by_name, result_nodes
from exitcompiler.passes.quantize import quantize, quantize_head
from exitcompiler.program import Block, Program
from exitcompiler.quantized_body import BodyScales, fold_norms
from exitcompiler.scores import HeadKey

__all__ = ["CALIBRATION_ROWS", "FEWEST_ROWS", "Quantizer", "evenly_spaced"]

CALIBRATION_ROWS: Final = 512
"""Rows that ranges are told from; more change little, since the largest of many values is what counts."""

FEWEST_ROWS: Final = 100


@dataclass(frozen=True)
class Quantizer:
    """Quantises programs with ranges from calibration rows, and remembers what it has quantised.

    Args:
        rows: Real rows; ``CALIBRATION_ROWS`` of them are used, evenly spaced: rows may come sorted.
        kept_float: Names of convolutions and linear layers, of whatever network, that stay float32.

    Raises:
        CalibrationError: There are too few rows.
    """

    rows: Rows
    kept_float: frozenset[str] = frozenset()
    _programs: dict[int, tuple[Program, Program]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.rows) < FEWEST_ROWS:
            raise CalibrationError(
                f"{len(self.rows)} rows are too few to tell ranges of values from, {FEWEST_ROWS} are needed",
                where="precision 'int8'",
                remedy=f"give more calibration rows; {NEXT_BEST}",
            )

    def keeping(self, kept_float: Iterable[str]) -> Quantizer:
        """One that leaves these products in float32."""
        names = frozenset(kept_float)
        return self if names == self.kept_float else Quantizer(self.rows, names)

    def program(self, program: Program) -> Program:
        """A chain of blocks in int8; the same object for the same program.

        Raises:
            LoweringError: The quantiser does not take it.
            PassError: It is no chain.
        """
        if id(program) not in self._programs:
            quantized, _ = self._quantize(program, {})
            self._programs[id(program)] = (program, quantized)
        return self._programs[id(program)][1]

    def candidates(self, candidates: Candidates) -> Candidates:
        """A network cut at its exits, and their heads, in int8.

        Raises:
            LoweringError: The quantiser does not take it.
            PassError: The candidates are those of several networks.
        """
        program, scales = self._quantize(
            candidates.program, {key: head.body for key, head in candidates.heads.items()}
        )
        values = {name: spec for block in program.blocks for name, spec in block.values.items()}
        heads = {key: quantize_head(head, values, scales[key]) for key, head in candidates.heads.items()}
        return replace(candidates, program=program, heads=heads)

    def _quantize(
        self, program: Program, heads: Mapping[HeadKey, fx.GraphModule]
    ) -> tuple[Program, dict[HeadKey, BodyScales]]:
        joint = _join(program, heads)
        some = evenly_spaced(self.rows, CALIBRATION_ROWS)
        found = calibrate(joint.block, some, kept_float=self.kept_float)
        scales = {block.name: joint.scales_of(block.name, found) for block in program.blocks}
        return quantize(program, scales), {key: joint.scales_of(key, found) for key in heads}


def evenly_spaced(rows: Rows, count: int) -> Rows:
    """At most so many rows, from all over."""
    if len(rows) <= count:
        return rows
    return rows.take(np.linspace(0, len(rows) - 1, count).astype(np.int64))


@dataclass(frozen=True)
class _Joint:
    """A chain and its heads as one block.

    Args:
        block: Its results are the logits of all heads, then the chain's own.
        names: Block name, or key of a head -> name of a value there -> name in the joint block.
        made: The same -> names of the values that are made there, and do not come in.
    """

    block: Block
    names: Mapping[str | HeadKey, Mapping[str, str]]
    made: Mapping[str | HeadKey, frozenset[str]]

    def scales_of(self, owner: str | HeadKey, found: BodyScales) -> BodyScales:
        """What was found, for one of the parts."""
        names, made = self.names[owner], self.made[owner]
        values = {name: found.values[joint] for name, joint in names.items() if joint in found.values}
        return BodyScales(values, frozenset(name for name in made if names[name] in found.products))


def _join(program: Program, heads: Mapping[HeadKey, fx.GraphModule]) -> _Joint:
    """Put a chain of blocks, and heads that read its values, into one body."""
    builder = BodyBuilder()
    known: dict[str, fx.Node] = {}
    names: dict[str | HeadKey, dict[str, str]] = {}
    made: dict[str | HeadKey, frozenset[str]] = {}
    entry = nodes_by_name(program.entry.body)
    for name in program.inputs:
        known[name] = builder.placeholder(name, entry[name])
    logits: dict[str, tuple[fx.Node, ValueSpec]] = {}
    for block in program.blocks:
        _require_chain(block)
        body = fold_norms(block.body)
        names[block.name], made[block.name] = _append(body, builder, known), _made(body)
        if isinstance(block.terminator, Return):
            logits |= {v: (known[v], block.values[v]) for v in block.terminator.values if v in block.results}
    for key, body in heads.items():
        answer, *_ = result_nodes(body)
        few = extract_body(body, [n.name for n in body.graph.find_nodes(op="placeholder")], [answer.name])
        seen = dict(known)
        few = fold_norms(few)
        names[key], made[key] = _append(few, builder, seen), _made(few)
        logits[answer.name] = (seen[answer.name], _logits_spec(program))
    for name, (node, _) in logits.items():
        builder.hand_over_name(node, name, f"{name}_other")
    whole = builder.finish([node for node, _ in logits.values()])
    results = {name: spec for name, (_, spec) in logits.items()}
    block = Block(program.entry.name, dict(program.inputs), results, Return(tuple(results), "joint"), whole)
    return _Joint(block, names, made)


def _made(body: fx.GraphModule) -> frozenset[str]:
    return frozenset(node.name for node in body.graph.nodes if node.op == "call_function")


def _logits_spec(program: Program) -> ValueSpec:
    (spec,) = program.outputs.values()
    return spec


def _append(body: fx.GraphModule, builder: BodyBuilder, known: dict[str, fx.Node]) -> dict[str, str]:
    """Copy a body; params are known values of the same name. Results become known."""
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes_by_name(body).values():
        if node.op != "placeholder":
            copies[node] = builder.copy(node, copies, body)
        elif node.name in known:
            copies[node] = known[node.name]
        else:
            raise PassError(f"no block before makes {node.name!r}", where="quantize")
    known.update({node.name: copies[node] for node in result_nodes(body)})
    return {node.name: copied.name for node, copied in copies.items()}


def _require_chain(block: Block) -> None:
    if isinstance(block.terminator, Branch):
        raise PassError(
            "only a network of its own is quantised, before anything is decided in it",
            where=f"block {block.name!r}",
        )
