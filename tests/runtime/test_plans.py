"""Plans of device graphs: every one well-formed, and in numpy equal to a slow walk of each row alone."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_programs import (
    CLASSES,
    INPUTS,
    OUTPUTS,
    WIDTH,
    Builder,
    TestProgram,
    cascade,
    chain,
    diamond,
    plain,
    random_program,
    random_rows,
    with_shared_value,
)
from programs import programs
from programs import rows as torch_rows

from exitcompiler.controlflow import BlockInterface, Branch, ConstantGate, Edge, Jump, Return
from exitcompiler.errors import InputError, LoweringError, VerifyError
from exitcompiler.interpreter import interpret
from exitcompiler.program import Block, Program
from exitcompiler.runtime.backends import Engine
from exitcompiler.runtime.graph_plan import (
    LEFT,
    Buffer,
    Compact,
    Conditional,
    Gather,
    Guard,
    PickBucket,
    Plan,
    Route,
    RunBlock,
    Scope,
    Step,
    steps_of,
)
from exitcompiler.runtime.plan_checks import verify_plan, writers
from exitcompiler.runtime.plan_interpreter import PlanInterpreter
from exitcompiler.runtime.plan_printer import print_plan
from exitcompiler.runtime.planning import plan_program, powers_of_two
from exitcompiler.runtime.rows import BatchExecutor
from exitcompiler.runtime.torch_backend import torch_engine

buckets_of = st.sets(st.integers(1, 12), min_size=1, max_size=4).map(sorted).map(tuple)


def printed(program: TestProgram, *arguments: Any) -> str:
    return print_plan(plan_program(program.flow, *arguments))


def text(block: str) -> str:
    return textwrap.dedent(block).strip()


def test_a_chain_nests_one_condition_per_exit() -> None:
    assert printed(chain()) == text("""
        plan for 1 row
            run first
            route first: "exit1" | second; c0 = 0 | 1
            if c0:
                run second
                route second: "exit2" | third; c1 = 0 | 1
                if c1:
                    run third
                    route third: "backbone"
    """)


def test_a_join_reached_by_a_jump_has_a_condition_of_its_own() -> None:
    assert printed(cascade()) == text("""
        plan for 1 row
            run small
            route small: "small" | medium | big_stem; c0 = 0 | 1 | 0
            if c0:
                run medium
                route medium: "medium" | big_stem
            c1 = goes to big_stem
            if c1:
                run big_stem
                route big_stem: big
                run big
                route big: "large"
    """)


def test_a_layer_that_is_skipped_costs_one_condition_and_its_join_none() -> None:
    assert printed(diamond()) == text("""
        plan for 1 row
            run stem
            route stem: join | layer; c0 = 0 | 1
            if c0:
                run layer
                route layer: join
            gather join: join/q = stem/h | layer/h2
            run join
            route join: "backbone"
    """)


def test_several_rows_are_listed_gathered_and_run_in_a_bucket() -> None:
    assert printed(chain(), 4, (2, 4)) == text("""
        plan for up to 4 rows
            c0 = bucket of 2 | 4 for count
            switch c0:
              0:
                run first on 2
              1:
                run first on 4
            route first: "exit1" | second
            second:rows, second:count = rows that go to second; c1 = any
            if c1:
                c2 = bucket of 2 | 4 for second:count
                switch c2:
                  0:
                    gather second on 2: second/p = first/h, second/earlier = first/conf
                    run second on 2
                  1:
                    gather second on 4: second/p = first/h, second/earlier = first/conf
                    run second on 4
                route second: "exit2" | third
                third:rows, third:count = rows that go to third; c3 = any
                if c3:
                    c4 = bucket of 2 | 4 for third:count
                    switch c4:
                      0:
                        gather third on 2: third/p = second/h
                        run third on 2
                      1:
                        gather third on 4: third/p = second/h
                        run third on 4
                    route third: "backbone"
    """)


def test_three_ways_are_one_switch() -> None:
    make = Builder(0)
    ways = (Return(("a",), "one"), Edge("b", ("x",)), Edge("c", ("x",)))
    make.block("first", {"x": WIDTH}, {"a": CLASSES, "conf": 2}, Branch(make.gate(["conf"], 2, 3), ways))
    make.block("b", {"p": WIDTH}, {"out": CLASSES}, Return(("out",), "two"))
    make.block("c", {"q": WIDTH}, {"out2": CLASSES}, Return(("out2",), "three"))
    program = make.program()
    assert printed(program) == text("""
        plan for 1 row
            run first
            route first: "one" | b | c; c0 = 2 | 0 | 1
            switch c0:
              0:
                run b
                route b: "two"
              1:
                run c
                route c: "three"
    """)
    check(program, random_rows(30), plan_program(program.flow))


def check(program: TestProgram, rows: np.ndarray, plan: Plan) -> list[list[tuple[str, int]]]:
    """Run all rows through the plan, call by call; what each call ran."""
    verify_plan(plan)
    interpreter = PlanInterpreter(plan, program.flow, program.engine)
    ran = []
    for start in range(0, len(rows), plan.capacity):
        part = rows[start : start + plan.capacity]
        outputs, exits = interpreter.run([part], len(part))
        answers = [program.answer_row(row) for row in part]
        np.testing.assert_array_equal(outputs[0], np.stack([logits for logits, _ in answers]))
        assert [plan.exits[i] for i in exits] == [name for _, name in answers]
        ran.append(interpreter.ran)
    return ran


@given(seed=st.integers(0, 10_000), sizes=buckets_of, count=st.integers(1, 30))
def test_a_plan_answers_as_each_row_alone(seed: int, sizes: tuple[int, ...], count: int) -> None:
    program, rows = random_program(seed), random_rows(count, seed)
    check(program, rows, plan_program(program.flow))
    check(program, rows, plan_program(program.flow, sizes[-1], sizes))


@given(program=programs(), sizes=buckets_of, count=st.integers(1, 12))
def test_the_plan_of_any_program_against_the_oracle(
    program: Program, sizes: tuple[int, ...], count: int
) -> None:
    inputs = torch_rows(count, program)
    expected = interpret(program, inputs)

    def engine(block: BlockInterface) -> Engine:
        assert isinstance(block, Block)
        return torch_engine(block, lambda values: block.body(*values))

    for plan in (plan_program(program), plan_program(program, sizes[-1], sizes)):
        verify_plan(plan)
        interpreter = PlanInterpreter(plan, program, engine)
        for start in range(0, count, plan.capacity):
            stop = min(start + plan.capacity, count)
            arrays = [tensor[start:stop].numpy() for tensor in inputs.values()]
            outputs, exits = interpreter.run(arrays, stop - start)
            np.testing.assert_array_equal(exits, expected.exit_index[start:stop])
            for found, tensor in zip(outputs, expected.outputs.values(), strict=True):
                np.testing.assert_allclose(found, tensor[start:stop].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [chain, cascade, diamond, plain])
@pytest.mark.parametrize("capacity", [1, 2, 7, 32])
def test_known_programs(make: Callable[[int], TestProgram], capacity: int) -> None:
    check(make(3), random_rows(50), plan_program(make(3).flow, capacity))


def test_every_block_runs_once_in_the_smallest_bucket_that_holds_its_rows() -> None:
    program, rows = chain(3), random_rows(32)
    exits = [program.answer_row(row)[1] for row in rows]
    later = sum(name != "exit1" for name in exits)
    last = sum(name == "backbone" for name in exits)
    assert 0 < last < later < 32
    (ran,) = check(program, rows, plan_program(program.flow, 32))
    size = lambda n: next(b for b in powers_of_two(32) if b >= n)  # noqa: E731
    assert ran == [("first", 32), ("second", size(later)), ("third", size(last))]


def test_what_no_row_reaches_does_not_run() -> None:
    program = chain(3)
    leaving = np.stack([row for row in random_rows(200) if program.answer_row(row)[1] == "exit1"][:4])
    for capacity in (1, 4):
        for ran in check(program, leaving, plan_program(program.flow, capacity)):
            assert [name for name, _ in ran] == ["first"]


def test_a_constant_gate_takes_its_way_and_the_rest_is_not_planned() -> None:
    make = Builder(1)
    ways = (Return(("a",), "one"), Edge("b", ("x",)))
    make.block("first", {"x": WIDTH}, {"a": CLASSES}, Branch(ConstantGate(0, 2), ways))
    make.block("b", {"p": WIDTH}, {"out": CLASSES}, Return(("out",), "two"))
    program = make.program()
    assert printed(program) == text("""
        plan for 1 row
            run first
            route first: "one"
    """)
    check(program, random_rows(5), plan_program(program.flow))


def test_a_block_with_nothing_to_compute_only_routes() -> None:
    make = Builder(1)
    gate = make.gate(["conf"], 2, 2)
    ways = (Edge("b", ("h",)), Edge("c", ("h",)))
    make.block("first", {"x": WIDTH}, {"h": CLASSES, "conf": 2}, Branch(gate, ways))
    make.block("b", {"p": CLASSES}, {}, Jump(Edge("c", ("p",))))
    make.block("c", {"q": CLASSES}, {}, Return(("q",), "end"))
    program = make.program()
    for capacity in (1, 4):
        plan = plan_program(program.flow, capacity)
        assert {s.block for s in steps_of(plan.root) if isinstance(s, RunBlock)} == {"first"}
        verify_plan(plan)
        interpreter = PlanInterpreter(plan, program.flow, program.engine)
        rows = random_rows(capacity)
        outputs, _ = interpreter.run([rows], capacity)
        expected, _ = BatchExecutor(program.flow, lambda block, _: program.engine(block)).run(
            [rows], capacity
        )
        np.testing.assert_array_equal(outputs[0], expected[0])


def test_a_value_without_rows_is_read_in_place_where_all_ways_bring_the_same() -> None:
    for capacity in (1, 4):
        verify_plan(plan_program(with_shared_value(False).flow, capacity))
    verify_plan(plan_program(with_shared_value(True).flow, 1))
    with pytest.raises(LoweringError, match="'t3' does not belong to rows"):
        plan_program(with_shared_value(True).flow, 4)


@pytest.mark.parametrize(
    ("capacity", "buckets"), [(0, None), (4, (1, 2)), (4, ()), (4, (2, 1, 4)), (4, (0, 4)), (4, (4, 4))]
)
def test_buckets_have_to_make_sense(capacity: int, buckets: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError, match="buckets"):
        plan_program(chain().flow, capacity, buckets)


def test_powers_of_two_end_with_the_capacity() -> None:
    assert [powers_of_two(n) for n in (1, 2, 3, 8, 12)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2, 4, 8, 12),
    ]  # fmt: skip


def test_who_writes_what() -> None:
    found = writers(plan_program(chain().flow))
    assert found["first/x"] == ("the caller",)
    assert found["first/h"] == ("run 'first'",)
    assert found["first/gate_weight"] == ()
    assert found["output/logits"] == ("route 'first'", "route 'second'", "route 'third'")


# ---------------------------------------------------------------- plans that are wrong


def edit(scope: Scope, change: Callable[[Step], tuple[Step, ...]]) -> Scope:
    """Every step replaced by what ``change`` makes of it, scopes inside first."""
    found: list[Step] = []
    for step in scope:
        if isinstance(step, Conditional):
            bodies = tuple(edit(body, change) for body in step.bodies)
            found += change(dataclasses.replace(step, bodies=bodies))
        else:
            found += change(step)
    return tuple(found)


def broken(plan: Plan, change: Callable[[Step], tuple[Step, ...]]) -> Plan:
    return dataclasses.replace(plan, root=edit(plan.root, change))


def refused(plan: Plan, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify_plan(plan)


def test_a_forgotten_kernel_is_noticed() -> None:
    def without(kind: type) -> Callable[[Step], tuple[Step, ...]]:
        return lambda step: () if isinstance(step, kind) else (step,)

    refused(broken(plan_program(diamond().flow), without(Gather)), "reads .*which nothing has written")
    refused(broken(plan_program(cascade().flow), without(Guard)), "is not set before, in the same scope")
    refused(broken(plan_program(chain().flow, 4), without(Compact)), "is not set before, in the same scope")
    refused(broken(plan_program(chain().flow, 4), without(PickBucket)), "is not set before")
    refused(broken(plan_program(chain().flow, 4, (4,)), without(Gather)), "reads .*which nothing has written")
    for capacity in (1, 4):
        refused(broken(plan_program(plain().flow, capacity), without(RunBlock)), "returns .*nothing has writ")
        refused(broken(plan_program(plain().flow, capacity), without(Route)), "never gets there")


def test_a_condition_needs_one_writer_and_one_user_in_one_scope() -> None:
    plan = plan_program(chain().flow)

    def twice(step: Step) -> tuple[Step, ...]:
        return (step, step) if isinstance(step, Route) and step.condition == "c0" else (step,)

    refused(broken(plan, twice), "set twice")
    refused(
        broken(plan, lambda s: () if isinstance(s, Conditional) and s.condition == "c1" else (s,)), "not used"
    )
    outer = broken(
        plan,
        lambda s: (
            (dataclasses.replace(s, condition="c0"),)
            if isinstance(s, Conditional) and s.condition == "c1"
            else (s,)
        ),
    )
    refused(outer, "is not set before, in the same scope")


def test_a_row_that_is_sent_nowhere_is_noticed() -> None:
    plan = plan_program(chain().flow)

    def close(step: Step) -> tuple[Step, ...]:
        if isinstance(step, Route) and step.condition == "c1":
            ways = tuple(dataclasses.replace(way, arm=0) for way in step.ways)
            return (dataclasses.replace(step, ways=ways),)
        return (step,)

    refused(broken(plan, close), "a row that goes to block 'third' never gets there")


def test_an_answer_that_is_not_copied_is_noticed() -> None:
    def forget(step: Step) -> tuple[Step, ...]:
        if isinstance(step, Route) and step.block == "second":
            ways = tuple(dataclasses.replace(way, copies=()) for way in step.ways)
            return (dataclasses.replace(step, ways=ways),)
        return (step,)

    for capacity in (1, 4):
        plan = broken(plan_program(chain().flow, capacity), forget)
        refused(plan, r"a row leaves at 'exit2' without \['output/logits'\]")


def test_reading_what_a_skipped_body_should_have_written_is_noticed() -> None:
    """The join reads what the layer wrote, whichever way the row came."""

    def wrong_source(step: Step) -> tuple[Step, ...]:
        if isinstance(step, Gather):
            moves = tuple(dataclasses.replace(m, sources=("layer/h2",) * 2) for m in step.moves[:1])
            return (dataclasses.replace(step, moves=moves),)
        return (step,)

    refused(broken(plan_program(diamond().flow), wrong_source), "gather 'join': reads .*layer/h2")


def test_buffers_are_checked() -> None:
    plan = plan_program(chain().flow)
    refused(
        dataclasses.replace(plan, buffers={n: b for n, b in plan.buffers.items() if n != "first/h"}), "no b"
    )
    wrong = {**plan.buffers, "first/h": Buffer("float32", (3, 5), True)}
    refused(dataclasses.replace(plan, buffers=wrong), "does not hold 1 rows")
    parameter = {
        **plan.buffers,
        "first/h": dataclasses.replace(plan.buffers["first/h"], parameter=("a", "b")),
    }
    refused(dataclasses.replace(plan, buffers=parameter), "parameter 'first/h' is written")

    def too_many(step: Step) -> tuple[Step, ...]:
        return (dataclasses.replace(step, rows=2),) if isinstance(step, RunBlock) else (step,)

    refused(broken(plan, too_many), "2 rows in a plan for 1")
    both = broken(
        plan, lambda s: (s, dataclasses.replace(s, block="third")) if isinstance(s, RunBlock) else (s,)
    )
    refused(both, "several writers")


def test_the_interpreter_notices_what_was_not_written() -> None:
    plan = plan_program(diamond().flow)
    bad = broken(plan, lambda step: () if isinstance(step, Gather) else (step,))
    interpreter = PlanInterpreter(bad, diamond().flow, diamond().engine)
    with pytest.raises(VerifyError, match="read before anything has written it"):
        interpreter.run([random_rows(1)], 1)


def test_rows_beyond_the_batch_go_nowhere() -> None:
    program = chain(3)
    plan = plan_program(program.flow, 8)
    interpreter = PlanInterpreter(plan, program.flow, program.engine)
    rows = random_rows(3)
    outputs, exits = interpreter.run([rows], 3)
    assert len(outputs[0]) == len(exits) == 3
    assert (interpreter.buffers["next"] == LEFT).all()
    np.testing.assert_array_equal(outputs[0], np.stack([program.answer_row(row)[0] for row in rows]))


def test_inputs_and_outputs_are_those_of_the_program() -> None:
    plan = plan_program(chain().flow, 4)
    assert [plan.buffers[n].shape for n in plan.inputs] == [
        (4, *map(int, s.shape[1:])) for s in INPUTS.values()
    ]
    assert [plan.buffers[n].shape for n in plan.outputs] == [(4, CLASSES) for _ in OUTPUTS]
