"""narrow-gates: what a gate does not weigh is not computed, and every row goes where it went."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import ROW, aten, numbers, row_block, row_program, rows
from torch import nn

from exitcompiler.controlflow import (
    Branch,
    ConstantGate,
    Edge,
    Jump,
    LinearGate,
    Return,
    ValueSpec,
)
from exitcompiler.export import trace_body
from exitcompiler.fx_utils import extract_body
from exitcompiler.heads import Confidence
from exitcompiler.interpreter import interpret
from exitcompiler.passes.eliminate_dead_code import eliminate_dead_code
from exitcompiler.passes.insert_exits import insert_exits
from exitcompiler.passes.narrow_gates import NarrowGates, narrow_gates
from exitcompiler.passes.set_gates import BranchSetting, set_gates
from exitcompiler.program import ExitHead, Program
from exitcompiler.verify import verify

BODY = trace_body(Confidence(nn.Tanh()), {"h": ROW}, ["logits", "confidence"])
HEAD = ExitHead("early", BODY, {"logits": ROW, "confidence": ROW}, ("logits",))


def program_of(*row: float, bias: float = -0.5, reads: tuple[str, ...] = ("confidence",)) -> Program:
    """Two blocks, the first with an exit whose gate weighs features so."""
    operations = [("h", aten.tanh.default, ("x",)), ("u", aten.neg.default, ("x",))]
    chain = row_program(
        row_block("first", ["x"], operations, ["h", "u"], Jump(Edge("second", ("h",)))),
        row_block("second", ["k"], [("late", aten.neg.default, ("k",))], ["late"], Return(("late",), "end")),
    )
    gate = LinearGate(reads, (row, (0.0,) * len(row)), (bias, 0.0))
    setting = BranchSetting(gate, ("early", "second"), "early")
    return set_gates(insert_exits(chain, {"first": [HEAD]}), {"first": setting})


def operators(program: Program) -> set[str]:
    """Names of what the first block computes, dead code left out."""
    nodes = eliminate_dead_code(program).entry.body.graph.nodes
    names = {node.target.__name__.split(".")[0] for node in nodes if node.op == "call_function"}
    return names - {"getitem", "slice"}


def gate_of(program: Program) -> LinearGate:
    assert isinstance(program.entry.terminator, Branch)
    assert isinstance(program.entry.terminator.gate, LinearGate)
    return program.entry.terminator.gate


@pytest.mark.parametrize(
    ("row", "reads", "gone"),
    [
        ((9.0, 0.0, 0.0), ("confidence_0",), {"topk", "sum", "sub", "cat", "mul"}),
        ((0.0, 9.0, -0.0), ("confidence_1",), {"sum", "cat", "mul"}),
        ((0.0, 0.0, -9.0), ("confidence_2",), {"topk", "amax", "sub", "cat"}),
        ((9.0, 0.0, 1.0), ("confidence_0", "confidence_2"), {"topk", "sub", "cat"}),
    ],
)
def test_what_is_not_weighed_is_not_computed(
    row: tuple[float, ...], reads: tuple[str, ...], gone: set[str]
) -> None:
    program = program_of(*row)
    narrowed = narrow_gates(program)
    verify(narrowed)
    assert gate_of(narrowed).reads == reads
    assert gate_of(narrowed).weight == (tuple(value for value in row if value), (0.0,) * len(reads))
    assert operators(program) - operators(narrowed) == gone


@given(row=st.tuples(*[st.just(0.0) | numbers] * 6), bias=numbers)
def test_every_row_goes_where_it_went_with_the_same_answer(row: tuple[float, ...], bias: float) -> None:
    program = program_of(*row, bias=bias, reads=("u", "confidence"))
    narrowed = eliminate_dead_code(narrow_gates(program))
    verify(narrowed)
    inputs = rows(16, program)
    old, new = interpret(program, inputs), interpret(narrowed, inputs)
    assert torch.equal(old.outputs["y"], new.outputs["y"])
    assert torch.equal(torch.as_tensor(old.exit_index), torch.as_tensor(new.exit_index))
    assert not NarrowGates()(narrowed).modified


def test_a_value_of_which_nothing_is_weighed_goes_as_a_whole() -> None:
    narrowed = narrow_gates(program_of(0.0, 0.0, 0.0, 1.0, 2.0, 3.0, reads=("u", "confidence")))
    assert gate_of(narrowed) == LinearGate(("confidence",), ((1.0, 2.0, 3.0), (0.0,) * 3), (-0.5, 0.0))


@pytest.mark.parametrize("row", [(1.0, 2.0, 3.0), (0.0, 0.0, 0.0)])
def test_what_is_weighed_whole_or_not_at_all_stays(row: tuple[float, ...]) -> None:
    program = program_of(*row)  # the latter is constant: prune-constant-gates folds it
    assert narrow_gates(program) is program


def test_what_is_joined_of_nothing_or_goes_on_stays_whole() -> None:
    made_at_once = program_of(1.0, 0.0, 0.0, reads=("u",))
    assert narrow_gates(made_at_once) is made_at_once
    program = program_of(9.0, 0.0, 0.0)
    first = program.entry
    ways = (Return(("confidence",), "early"), Edge("second", ("h",)))
    for gate in (gate_of(program), ConstantGate(1, 2)):
        other = program.with_blocks({"first": replace(first, terminator=Branch(gate, ways))})
        assert narrow_gates(other) is other


def test_a_part_that_has_a_name_already_keeps_it() -> None:
    program = program_of(9.0, 0.0, 0.0)
    first = program.entry
    (part,) = (node.name for node in first.body.graph.nodes if "amax" in str(node.target))
    body = extract_body(first.body, list(first.params), [*first.results, part])
    results = {**first.results, part: ValueSpec(("batch", 1), "float32")}
    named = program.with_blocks({"first": replace(first, body=body, results=results)})
    assert gate_of(narrow_gates(named)).reads == (part,)
    assert narrow_gates(named).entry.body is body
