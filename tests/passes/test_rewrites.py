"""The rewriting passes: what matches, what is left alone, and that no row's answer changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from programs import ROW, aten, build_body, diamond, exit_chain, programs, row_block, row_program, rows

from exitcompiler.availability import pass_along
from exitcompiler.controlflow import Branch, ConstantGate, Edge, Jump, LinearGate, Return, ValueSpec
from exitcompiler.errors import PassError, VerifyError
from exitcompiler.interpreter import interpret
from exitcompiler.passes.base import Pass, PassResult
from exitcompiler.passes.eliminate_dead_code import EliminateDeadCode, eliminate_dead_code
from exitcompiler.passes.insert_exits import InsertExits, insert_exits
from exitcompiler.passes.merge_blocks import MergeBlocks, merge_blocks
from exitcompiler.passes.narrow_gates import NarrowGates
from exitcompiler.passes.pipeline import Pipeline, dump_to
from exitcompiler.passes.prune_constant_gates import PruneConstantGates, prune_constant_gates
from exitcompiler.passes.select_ways import SelectWays, select_ways
from exitcompiler.passes.set_gates import BranchSetting, SetGates, set_gates
from exitcompiler.printer import print_program
from exitcompiler.program import ExitHead, Program
from exitcompiler.verify import verify

CLEAN_UP = Pipeline((PruneConstantGates(), NarrowGates(), EliminateDeadCode(), MergeBlocks()), fixpoint=True)


def assert_same_answers(before: Program, after: Program, *, same_exits: bool = True) -> None:
    inputs = rows(6, before)
    old, new = interpret(before, inputs), interpret(after, inputs)
    assert torch.equal(old.outputs["y"], new.outputs["y"])
    if same_exits:
        names = [before.exits[i] for i in old.exit_index], [after.exits[i] for i in new.exit_index]
        assert names[0] == names[1]


@pytest.mark.parametrize(
    "step", [PruneConstantGates(), NarrowGates(), EliminateDeadCode(), MergeBlocks(), CLEAN_UP]
)
@given(program=programs())
def test_every_pass_keeps_answers_and_exits_and_is_idempotent(step: Pass, program: Program) -> None:
    result = step(program)
    verify(result.program)
    assert result.modified == (result.program is not program)
    assert_same_answers(program, result.program)
    assert not step(result.program).modified


@given(programs())
def test_after_clean_up_no_branch_is_constant_and_no_jump_has_a_private_target(program: Program) -> None:
    clean = CLEAN_UP(program).program
    for block in clean.blocks:
        assert not (isinstance(block.terminator, Branch) and isinstance(block.terminator.gate, ConstantGate))
        if isinstance(block.terminator, Jump):
            target = block.terminator.edge.target
            assert sum(w.target == target for b in clean.blocks for w in _edges(b.terminator)) > 1


def _edges(terminator: object) -> list[Edge]:
    match terminator:
        case Jump(edge):
            return [edge]
        case Branch(_, ways):
            return [way for way in ways if isinstance(way, Edge)]
    return []


@pytest.mark.parametrize(("action", "text"), [
    (0, 'first(x: float32[batch, 3]) -> (early: float32[batch, 3]):\n'
        '    1 tanh, 1 neg\n    return "first" (early)'),
    (1, 'second(x: float32[batch, 3]) -> (late: float32[batch, 3]):\n'
        '    1 tanh, 1 mul.Tensor\n    return "backbone" (late)'),
])  # fmt: skip
def test_a_constant_gate_takes_its_exit_or_the_rest_with_it(action: int, text: str) -> None:
    program = exit_chain(leave=ConstantGate(action, 2))
    header = "program (x: float32[batch, 3]) -> (y: float32[batch, 3])\n"
    assert str(CLEAN_UP(program).program) == header + text


def test_a_linear_gate_with_equal_rows_is_constant() -> None:
    gate = LinearGate(("h",), ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)), (0.0, 0.5))
    assert prune_constant_gates(exit_chain(leave=gate)).exits == ("backbone",)


def test_prune_leaves_a_real_gate_alone() -> None:
    program = exit_chain()
    assert prune_constant_gates(program) is program


def test_prune_folds_a_diamond_without_losing_the_join() -> None:
    program = diamond()
    head = program.entry
    assert isinstance(head.terminator, Branch)
    skip = replace(head, terminator=replace(head.terminator, gate=ConstantGate(0, 2)))
    pruned = CLEAN_UP(program.with_blocks({"head": skip})).program
    assert [block.name for block in pruned.blocks] == ["join"]


def test_dead_values_go_across_block_borders() -> None:
    operations = [("h", aten.tanh.default, ("x",)), ("u", aten.neg.default, ("x",))]
    unused = row_block("a", ["x"], operations, ["h", "u"], Jump(Edge("b", ("h", "u", "x"))))
    user = row_block("b", ["k", "d", "z"], [("y", aten.relu.default, ("k",))], ["y"], Return(("y",), "end"))
    smaller = eliminate_dead_code(row_program(unused, user))
    assert print_program(smaller, bodies=True).splitlines()[1:] == [
        "a(x: float32[batch, 3]) -> (h: float32[batch, 3]):",
        "    h = tanh(x)",
        "    jump b(h)",
        "b(k: float32[batch, 3]) -> (y: float32[batch, 3]):",
        "    y = relu(k)",
        '    return "end" (y)',
    ]


def test_a_score_that_a_later_gate_reads_stays_alive() -> None:
    program = exit_chain(leave=ConstantGate(1, 2))
    late = program.block("second")
    gate = LinearGate(("early",), ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (0.0, 0.0))
    program = pass_along(program, "early", "first", "second")
    late = program.block("second")
    branch = Branch(gate, (Return(("late",), "backbone"), Return(("h",), "other")))
    program = program.with_blocks({"second": replace(late, terminator=branch)})
    clean = CLEAN_UP(program).program
    assert "early" in clean.entry.results
    assert_same_answers(program, clean)


def test_merge_renames_what_would_clash() -> None:
    first = row_block("a", ["x"], [("y", aten.tanh.default, ("x",))], ["y"], Jump(Edge("b", ("x", "y"))))
    second = row_block("b", ["y", "x"], [("z", aten.sub.Tensor, ("y", "x"))], ["z"], Return(("z",), "end"))
    program = row_program(first, second)
    merged = merge_blocks(program)
    verify(merged)
    assert len(merged.blocks) == 1
    assert_same_answers(program, merged)


def test_merge_keeps_an_inner_value_apart_from_a_result_of_that_name() -> None:
    first = row_block("a", ["x"], [("h", aten.tanh.default, ("x",))], ["h"], Jump(Edge("b", ("h",))))
    operations = [("h", aten.neg.default, ("k",)), ("y", aten.mul.Tensor, ("h", "h"))]
    program = row_program(first, row_block("b", ["k"], operations, ["y"], Return(("y",), "end")))
    x = torch.tensor([[0.5, -1.0, 2.0]])
    assert torch.equal(merge_blocks(program).entry.run({"x": x})["h"], torch.tanh(x))


def test_merge_leaves_joins_alone() -> None:
    program = diamond()
    assert merge_blocks(program) is program


SCORE = ValueSpec(("batch", 3), "float32")


def _head(exit_name: str, name: str, reads: str = "h") -> ExitHead:
    body = build_body({reads: ROW}, [(name, aten.relu.default, (reads,))], [name])
    return ExitHead(exit_name, body, {name: SCORE}, (name,))


def _chain() -> Program:
    return row_program(
        row_block("first", ["x"], [("h", aten.tanh.default, ("x",))], ["h"], Jump(Edge("second", ("h",)))),
        row_block("second", ["h"], [("y", aten.neg.default, ("h",))], ["y"], Return(("y",), "backbone")),
    )


def test_inserted_exits_change_nothing_and_can_be_pruned_away_again() -> None:
    program = _chain()
    inserted = insert_exits(program, {"first": [_head("e/a", "a"), _head("e/b", "b")]})
    verify(inserted)
    assert inserted.exits == ("e/a", "e/b", "backbone")
    assert_same_answers(program, inserted)
    restored = Pipeline((PruneConstantGates(), EliminateDeadCode()))(inserted).program
    assert print_program(restored, bodies=True) == print_program(program, bodies=True)


def test_insert_exits_goes_before_what_a_block_chose() -> None:
    program = insert_exits(_chain(), {"second": [_head("e", "a")]})
    assert program.exits == ("e", "backbone")
    assert_same_answers(_chain(), program)
    twice = insert_exits(_dag(), {"first": [_head("e", "a")]})
    assert isinstance(twice.entry.terminator, Branch)
    assert twice.entry.terminator.gate == ConstantGate(2, 3)
    assert_same_answers(_dag(), twice)


def test_insert_exits_refuses_what_it_cannot_attach() -> None:
    with pytest.raises(PassError, match="gate has been set"):
        insert_exits(exit_chain(), {"first": [_head("e", "a")]})
    with pytest.raises(PassError, match=r"no block 'third'[\s\S]*first, second"):
        insert_exits(_chain(), {"third": [_head("e", "a")]})
    with pytest.raises(PassError, match="no head answers"):
        insert_exits(_chain(), {}, final=["first"])
    with pytest.raises(PassError, match="a head reads 'q', which no block makes"):
        insert_exits(_chain(), {"second": [_head("e", "a", reads="q")]})
    assert not InsertExits({"first": ()})(_chain()).modified


def test_a_head_reads_what_an_earlier_block_made() -> None:
    late = _head("e", "a", reads="u")
    with pytest.raises(PassError, match="does not reach block 'third' on every way in"):
        insert_exits(_dag(), {"third": [late]})
    straight = select_ways(_dag(), {"first": ["second"]})
    program = insert_exits(straight, {"third": [late]})
    verify(program)
    assert list(program.block("third").params) == ["h", "u"]
    assert_same_answers(straight, program)


def test_a_head_without_an_answer_adds_no_way() -> None:
    features = replace(_head("", "a"), answer=())
    program = insert_exits(_chain(), {"first": [features]})
    verify(program)
    assert program.entry.terminator == _chain().entry.terminator
    assert "a" in program.entry.results


def test_where_every_row_leaves_nothing_else_is_reached() -> None:
    """What a final block would have passed on does not count for the heads behind it."""
    early, late = _head("e", "a", reads="x"), _head("f", "b", reads="w")
    program = insert_exits(_dag(late=True), {"third": [late], "second": [early]}, final=["second"])
    verify(program)
    assert program.exits == ("e", "f", "backbone")
    assert [block.name for block in program.blocks] == ["first", "second", "other", "third"]
    only = insert_exits(_chain(), {"first": [_head("e", "a")]}, final=["first"])
    assert [block.name for block in only.blocks] == ["first"]
    assert only.entry.terminator == Return(("a",), "e")


def _dag(*, late: bool = False) -> Program:
    """``first`` chooses between ``second`` and ``third``; with ``late`` it is ``other``, not ``first``."""
    ways = Branch(
        ConstantGate(1, 2), (Edge("second", ("x", "h")), Edge("other" if late else "third", ("h",)))
    )
    first = row_block("first", ["x"], [("h", aten.tanh.default, ("x",))], ["h"], ways)
    on = Jump(Edge("third", ("u",)))
    second = row_block("second", ["x", "k"], [("u", aten.neg.default, ("k",))], ["u"], on)
    other = row_block("other", ["k"], [("w", aten.neg.default, ("k",))], ["w"], Jump(Edge("third", ("w",))))
    third = row_block("third", ["h"], [("y", aten.relu.default, ("h",))], ["y"], Return(("y",), "backbone"))
    return row_program(first, second, *([other] if late else []), third)


def test_select_ways_keeps_some_and_drops_what_nothing_reaches() -> None:
    selected = select_ways(_dag(), {"first": ["third"]})
    verify(selected)
    assert print_program(selected) == "\n".join([
        "program (x: float32[batch, 3]) -> (y: float32[batch, 3])",
        "first(x: float32[batch, 3]) -> (h: float32[batch, 3]):",
        "    1 tanh",
        "    jump third(h)",
        "third(h: float32[batch, 3]) -> (y: float32[batch, 3]):",
        "    1 relu",
        '    return "backbone" (y)',
    ])  # fmt: skip
    assert_same_answers(_dag(), selected)
    inserted = insert_exits(_dag(), {"first": [_head("e", "a")]})
    some = select_ways(inserted, {"first": ["e", "third"]}).entry.terminator
    assert isinstance(some, Branch)
    assert some.gate == ConstantGate(1, 2)
    assert isinstance(select_ways(inserted, {"first": ["e"]}).entry.terminator, Return)


def test_select_ways_leaves_the_rest_alone_and_refuses_what_is_not_there() -> None:
    program = _dag()
    assert not SelectWays({"first": ["second", "third"], "second": {"third"}})(program).modified
    with pytest.raises(PassError, match=r"no way leads to \['fourth'\][\s\S]*second, third"):
        select_ways(program, {"first": ["fourth"]})
    with pytest.raises(PassError, match="no way out would be left"):
        select_ways(program, {"first": []})
    with pytest.raises(PassError, match=r"no blocks \['fourth'\]"):
        select_ways(program, {"fourth": ["third"]})
    with pytest.raises(PassError, match="gate has been set"):
        select_ways(exit_chain(), {"first": ["second"]})


def test_set_gates_picks_the_head_and_hands_along_what_the_gate_reads() -> None:
    program = insert_exits(_chain(), {"first": [_head("e/a", "a"), _head("e/b", "b")]})
    gate = LinearGate(("b",), ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (-0.25, 0.0))
    changed = SetGates({"first": BranchSetting(gate, ("e/b", "second"), "e")})(program).program
    verify(changed)
    assert changed.exits == ("e", "backbone")
    x = torch.tensor([[2.0, 0, 0], [-2.0, 0, 0]])
    assert interpret(changed, {"x": x}).exit_index.tolist() == [0, 1]
    assert "a" not in eliminate_dead_code(changed).entry.results


def test_set_gates_orders_ways_and_drops_what_nothing_reaches() -> None:
    program = insert_exits(_dag(), {"second": [_head("e/a", "a", reads="u")]})
    gate = LinearGate(("h",), ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0)), (0.0, 0.0))
    settings = {
        "first": BranchSetting(gate, ("third", "second"), None),
        "second": BranchSetting(LinearGate(("h",), ((1.0, 0.0, 0.0),), (0.0,)), ("e/a",), "e"),
        "third": BranchSetting(ConstantGate(0, 1), ("backbone",), "backbone"),
    }
    changed = set_gates(program, settings)
    verify(changed)
    assert changed.entry.terminator == Branch(gate, (Edge("third", ("h",)), Edge("second", ("x", "h"))))
    assert changed.block("second").terminator == Return(("a",), "e")
    assert not SetGates(settings | {"second": BranchSetting(ConstantGate(0, 1), ("e",), "e")})(
        changed
    ).modified
    only = set_gates(program, {"first": BranchSetting(ConstantGate(0, 1), ("third",), None)})
    assert [block.name for block in only.blocks] == ["first", "third"]


def test_a_gate_reads_what_exists_on_every_way_in() -> None:
    program = insert_exits(_dag(late=True), {"second": [_head("e", "a", reads="k")]})

    def reading(value: str) -> dict[str, BranchSetting]:
        gate = LinearGate((value,), ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (0.0, 0.0))
        return {"second": BranchSetting(gate, ("e", "third"), "e")}

    along = set_gates(program, reading("h"))
    verify(along)
    assert list(along.block("second").params) == ["x", "k", "h"]
    with pytest.raises(PassError, match="'w' does not reach block 'second'"):
        set_gates(program, reading("w"))


def test_set_gates_refuses_what_does_not_exist() -> None:
    program = insert_exits(_chain(), {"first": [_head("e", "a"), _head("f", "b")]})
    two = ConstantGate(0, 2)
    with pytest.raises(PassError, match=r"no way leads to 'g'[\s\S]*e, f, second"):
        set_gates(program, {"first": BranchSetting(two, ("g", "second"), "g")})
    with pytest.raises(PassError, match="2 ways leave"):
        set_gates(program, {"first": BranchSetting(two, ("e", "f"), "e")})
    with pytest.raises(PassError, match="2 actions for 1 ways"):
        set_gates(program, {"first": BranchSetting(two, ("e",), "e")})
    with pytest.raises(PassError, match="1 ways leave, none is named"):
        set_gates(program, {"first": BranchSetting(two, ("e", "second"), None)})
    with pytest.raises(PassError, match="no block 'g'"):
        set_gates(program, {"g": BranchSetting(two, ("e", "second"), "e")})
    gate = LinearGate(("q",), ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (0.0, 0.0))
    with pytest.raises(PassError, match="reads 'q', which no block makes"):
        set_gates(program, {"first": BranchSetting(gate, ("e", "second"), "e")})


def test_pass_along_needs_dominance() -> None:
    with pytest.raises(PassError, match="does not reach block 'join' on every way in"):
        pass_along(diamond(), "b", "layer", "join")
    along = pass_along(diamond(), "x", "head", "join")
    verify(along)
    assert "x" in along.block("layer").params
    assert_same_answers(diamond(), along)


class _Liar:
    name = "liar"

    def __call__(self, program: Program) -> PassResult:
        return PassResult(program, modified=True)


class _Breaker:
    name = "breaker"

    def __call__(self, program: Program) -> PassResult:
        return PassResult(replace(program, blocks=program.blocks[:1]), modified=True)


def test_pipeline_verifies_after_each_pass_and_names_the_culprit() -> None:
    with pytest.raises(VerifyError, match="liar"):
        Pipeline((_Liar(),))(exit_chain())
    with pytest.raises(VerifyError, match="after pass 'breaker', block 'first'"):
        Pipeline((_Breaker(),))(exit_chain())


def test_pipeline_dumps_before_and_after(tmp_path: Path) -> None:
    program = exit_chain(leave=ConstantGate(1, 2))
    Pipeline((PruneConstantGates(), EliminateDeadCode()), observers=(dump_to(tmp_path),))(program)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "000-prune-constant-gates.after.txt",
        "000-prune-constant-gates.before.txt",
        "001-eliminate-dead-code.after.txt",
        "001-eliminate-dead-code.before.txt",
    ]
    assert "always 1" in (tmp_path / names[1]).read_text()
