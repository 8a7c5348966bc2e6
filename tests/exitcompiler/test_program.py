"""Programs: what is well-formed, how they read, what the oracle makes of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from programs import ROW, aten, diamond, exit_chain, programs, row_block, row_program, rows

from exitcompiler.controlflow import (
    Branch,
    ConstantGate,
    Edge,
    Jump,
    LinearGate,
    Return,
    ValueSpec,
    engine_signature,
)
from exitcompiler.errors import InputError, VerifyError
from exitcompiler.interpreter import interpret
from exitcompiler.printer import print_program
from exitcompiler.program import Block, Program
from exitcompiler.verify import verify
from exitcompiler.views import between, block_graph, dominators, incoming_edges, reachable

EXIT_CHAIN_TEXT = """\
program (x: float32[batch, 3]) -> (y: float32[batch, 3])
first(x: float32[batch, 3]) -> (h: float32[batch, 3], early: float32[batch, 3]):
    h = tanh(x)
    early = neg(h)
    branch [h] . [[1, 0, 0], [0, 0, 0]] + [0, 0]:
        return "first" (early)
        second(h)
second(h: float32[batch, 3]) -> (late: float32[batch, 3]):
    late = mul.Tensor(h, h)
    return "backbone" (late)"""


@given(programs())
def test_random_programs_are_well_formed(program: Program) -> None:
    verify(program)
    assert reachable(program) == {block.name for block in program.blocks}


@given(programs())
def test_a_row_gets_the_same_answer_beside_any_neighbours(program: Program) -> None:
    inputs = rows(5, program)
    together = interpret(program, inputs)
    shuffled = interpret(program, {name: tensor.flip(0) for name, tensor in inputs.items()})
    assert together.exit_index.tolist() == shuffled.exit_index[::-1].tolist()
    assert torch.equal(together.outputs["y"], shuffled.outputs["y"].flip(0))


def test_text_form_with_bodies() -> None:
    assert print_program(exit_chain(), bodies=True) == EXIT_CHAIN_TEXT


def test_text_form_counts_operators() -> None:
    assert "    1 tanh, 1 neg\n" in str(exit_chain())


def test_interpreter_routes_each_row_by_its_gate() -> None:
    x = torch.tensor([[2.0, 0, 0], [-2.0, 0, 0], [0.0, 1, 0]])
    result = interpret(exit_chain(), {"x": x})
    assert result.exit_index.tolist() == [0, 1, 0]  # the tie in the last row goes to the lowest action
    assert result.path == (("first",), ("first", "second"), ("first",))
    assert torch.equal(result.outputs["y"][0], -torch.tanh(x[0]))
    assert torch.equal(result.outputs["y"][1], torch.tanh(x[1]) ** 2)


def test_interpreter_joins_both_ways_of_a_diamond() -> None:
    x = torch.tensor([[2.0, -1, 0], [-2.0, -1, 0]])
    result = interpret(diamond(), {"x": x})
    assert result.path == (("head", "join"), ("head", "layer", "join"))
    assert torch.equal(result.outputs["y"][0], -torch.tanh(x[0]))
    assert torch.equal(result.outputs["y"][1], -torch.relu(torch.tanh(x[1])))


@pytest.mark.parametrize("inputs", [{}, {"x": torch.zeros(0, 3)}, {"z": torch.zeros(1, 3)}])
def test_interpreter_refuses_wrong_inputs(inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError):
        interpret(exit_chain(), inputs)


def _broken() -> dict[str, tuple[Program, str]]:
    chain = exit_chain()
    first, second = chain.blocks
    assert isinstance(first.terminator, Branch)
    leave, go_on = first.terminator.edges
    gate = first.terminator.gate

    def with_first(terminator: object) -> Program:
        return replace(chain, blocks=(replace(first, terminator=terminator), second))  # type: ignore[arg-type]

    inplace = row_block("only", ["x"], [("y", aten.relu_.default, ("x",))], ["y"], Return(("y",), "end"))
    wide = ValueSpec(("batch", 4), "float32")
    return {
        "no block": (replace(chain, blocks=()), "at least one block"),
        "unreachable": (with_first(leave), "no edge leads here"),
        "unknown target": (with_first(Jump(Edge("third", ("h",)))), "unknown block 'third'"),
        "too few values": (with_first(Branch(gate, (leave, Edge("second", ())))), "0 values bind 1 params"),
        "no such value": (with_first(Branch(gate, (leave, Edge("second", ("q",))))), "'q' does not exist"),
        "cycle": (
            replace(chain, blocks=(first, replace(second, terminator=Jump(Edge("first", ("late",)))))),
            "edge back",
        ),
        "gate of three": (with_first(Branch(ConstantGate(0, 3), (leave, go_on))), "3 actions for 2 edges"),
        "action out of range": (
            with_first(Branch(ConstantGate(2, 2), (leave, go_on))),
            "constant action 2 of 2",
        ),
        "gate reads elsewhere": (
            with_first(Branch(LinearGate(("late",), ((1.0,) * 3, (0.0,) * 3), (0.0, 0.0)), (leave, go_on))),
            "reads 'late', which does not reach it",
        ),
        "gate weights": (
            with_first(Branch(LinearGate(("h",), ((1.0,), (0.0,)), (0.0, 0.0)), (leave, go_on))),
            r"not \[2\]\[3\]",
        ),
        "gate not finite": (
            with_first(Branch(LinearGate(("h",), ((math.nan,) * 3, (0.0,) * 3), (0.0, 0.0)), (leave, go_on))),
            "finite",
        ),
        "exits twice": (with_first(Branch(gate, (replace(leave, exit="backbone"), go_on))), "not unique"),
        "inputs differ": (replace(chain, inputs={"z": ROW}), "differ from"),
        "shape": (
            replace(chain, blocks=(first, replace(second, params={"h": wide}))),
            r"float32\[batch, 3\] cannot bind 'h': float32\[batch, 4\]",
        ),
        "params differ from body": (
            replace(chain, blocks=(first, replace(second, params={"k": ROW}))),
            r"placeholders \['h'\] differ",
        ),
        "result missing": (
            replace(chain, blocks=(first, replace(second, results={"late": ROW, "more": ROW}))),
            "not a tuple of 2 results",
        ),
        "in place": (row_program(inplace), "in-place operator"),
    }  # fmt: skip


@pytest.mark.parametrize("case", _broken())
def test_verify_names_what_is_wrong(case: str) -> None:
    program, message = _broken()[case]
    with pytest.raises(VerifyError, match=message):
        verify(program)


def test_reserved_names_are_refused() -> None:
    block = row_block(
        "only", ["action"], [("y", aten.neg.default, ("action",))], ["y"], Return(("y",), "end")
    )
    with pytest.raises(VerifyError, match="reserved"):
        verify(row_program(block))


def test_views() -> None:
    program = diamond()
    assert dominators(program) == {"head": None, "layer": "head", "join": "head"}
    assert between(program, "head", "join") == {"layer", "join"}
    assert [source for source, _ in incoming_edges(program, "join")] == ["head", "layer"]
    assert block_graph(program).has_edge("join", "return:end")


def test_engine_signature_hands_on_only_what_is_used() -> None:
    first = exit_chain().entry
    assert isinstance(first, Block)
    signature = engine_signature(first)
    assert list(signature.inputs) == ["x", "gate_weight", "gate_bias"]
    assert signature.inputs["gate_weight"].shape == (2, 3)
    assert list(signature.outputs) == ["h", "early", "action"]
    constant = replace(first, terminator=Return(("early",), "e"))
    assert list(engine_signature(constant).outputs) == ["early"]


def test_interpretation_of_integers() -> None:
    result = interpret(exit_chain(leave=ConstantGate(0, 2)), {"x": torch.ones(2, 3)})
    assert result.exit_index.dtype == np.int32
    assert result.exit_index.tolist() == [0, 0]
