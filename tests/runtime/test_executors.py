"""Executors: every one against a slow walk of each row alone."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_programs import (
    CLASSES,
    INPUTS,
    OUTPUTS,
    WIDTH,
    TestProgram,
    cascade,
    chain,
    diamond,
    plain,
    random_program,
    random_rows,
    rows_of,
    to_onnx,
)

from exitcompiler.controlflow import (
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    Return,
    ValueSpec,
    successors,
)
from exitcompiler.errors import InputError, VerifyError
from exitcompiler.runtime.backends import Engine, create_backend
from exitcompiler.runtime.forcing import force_exit
from exitcompiler.runtime.rows import BatchExecutor, EngineSource
from exitcompiler.runtime.single_row import SingleRowExecutor
from exitcompiler.views import block_graph


def expect(program: TestProgram, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    answers = [program.answer_row(row) for row in rows]
    return np.stack([logits for logits, _ in answers]), [exit_name for _, exit_name in answers]


def run_batch(flow: ControlFlow, engines: EngineSource, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    outputs, exit_index = BatchExecutor(flow, engines).run([rows], len(rows))
    return outputs[0], [flow.exits[i] for i in exit_index]


def run_singly(flow: ControlFlow, engines: EngineSource, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    executor = SingleRowExecutor(flow, engines)
    logits, exits = [], []
    for row in rows:
        executor.inputs[0][...] = row
        outputs, exit_index = executor.run()
        logits.append(outputs[0][0].copy())
        exits.append(flow.exits[exit_index])
    return np.stack(logits), exits


@given(seed=st.integers(0, 10_000), count=st.integers(1, 40))
def test_every_row_gets_what_it_would_get_alone(seed: int, count: int) -> None:
    program, rows = random_program(seed), random_rows(count, seed)
    expected, exits = expect(program, rows)
    for run in (run_batch, run_singly):
        logits, taken = run(program.flow, program.engine, rows)
        np.testing.assert_array_equal(logits, expected)
        assert taken == exits


@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(1, 30), min_size=2, max_size=5))
def test_an_executor_forgets_the_batch_before(seed: int, sizes: list[int]) -> None:
    program = random_program(seed)
    executor = BatchExecutor(program.flow, program.engine)
    kept = []
    for number, count in enumerate(sizes):
        rows = random_rows(count, number)
        before = rows.copy()
        outputs, _ = executor.run([rows], count)
        np.testing.assert_array_equal(rows, before)
        kept.append((outputs[0], expect(program, rows)[0]))
    for logits, expected in kept:  # later batches have not written into what was returned
        np.testing.assert_array_equal(logits, expected)


@given(seed=st.integers(0, 10_000))
def test_order_does_not_matter(seed: int) -> None:
    program, rows = random_program(seed), random_rows(20, seed)
    order = np.random.default_rng(seed).permutation(20)
    logits, exits = run_batch(program.flow, program.engine, rows)
    shuffled, shuffled_exits = run_batch(program.flow, program.engine, rows[order])
    np.testing.assert_array_equal(shuffled, logits[order])
    assert shuffled_exits == [exits[i] for i in order]


@pytest.mark.parametrize("make", [chain, cascade, diamond, plain])
@pytest.mark.parametrize("backend_name", ["onnxruntime", "openvino"])
def test_real_engines(make: type, backend_name: str) -> None:
    pytest.importorskip(backend_name)
    backend = create_backend(backend_name, threads=1)
    program: TestProgram = make(3)

    def engines(block: BlockInterface, static_batch: int | None) -> Engine:
        from exitcompiler.controlflow import engine_signature

        model = to_onnx(block, program.bodies[block.name])
        return backend.load(model, engine_signature(block), static_batch=static_batch)

    rows = random_rows(50)
    expected, exits = expect(program, rows)
    assert len(set(exits)) == len(program.flow.exits), "the rows should take every exit"
    for run in (run_batch, run_singly):
        logits, taken = run(program.flow, engines, rows)
        np.testing.assert_array_equal(logits, expected)
        assert taken == exits


@given(seed=st.integers(0, 10_000), data=st.data())
def test_forced_to_an_exit_all_rows_take_it(seed: int, data: st.DataObject) -> None:
    program = random_program(seed)
    wanted = data.draw(st.sampled_from(program.flow.exits))
    flow = force_exit(program.flow, wanted)
    for run in (run_batch, run_singly):
        _, exits = run(flow, program.engine, random_rows(5))
        assert exits == [wanted] * 5


@given(seed=st.integers(0, 10_000), data=st.data())
def test_forced_along_a_route_rows_pass_its_blocks_and_no_others(seed: int, data: st.DataObject) -> None:
    program = random_program(seed)
    graph: nx.DiGraph[str] = nx.DiGraph(block_graph(program.flow))
    wanted = data.draw(st.sampled_from(program.flow.exits))
    ways = list(nx.all_simple_paths(graph, program.flow.entry.name, f"return:{wanted}"))
    route = data.draw(st.sampled_from(ways))[:-1]
    flow = force_exit(program.flow, wanted, route)
    block, passed = flow.entry, []
    while True:
        passed.append(block.name)
        terminator = block.terminator
        way = successors(terminator)[0]
        if isinstance(terminator, Branch):
            gate = terminator.gate
            constant = isinstance(gate, ConstantGate)
            action = gate.action if constant else gate.bias.index(max(gate.bias))  # type: ignore[union-attr]
            way = terminator.edges[action]
        if isinstance(way, Return):
            break
        block = flow.block(way.target)
    assert passed == route
    for run in (run_batch, run_singly):
        assert run(flow, program.engine, random_rows(5))[1] == [wanted] * 5


def test_forcing_an_unknown_exit() -> None:
    with pytest.raises(InputError, match="no exit 'nowhere'"):
        force_exit(chain().flow, "nowhere")


def test_forcing_a_route_that_is_none() -> None:
    flow = chain().flow
    with pytest.raises(InputError, match="no way leads from block"):
        force_exit(flow, flow.exits[0], [flow.entry.name, "nowhere"])
    with pytest.raises(InputError, match="a route starts at block"):
        force_exit(flow, flow.exits[-1], [flow.blocks[-1].name])


def test_constant_gates_need_no_engine_output() -> None:
    block = BlockInterface(
        "only",
        INPUTS,
        {"a": rows_of(CLASSES), "b": rows_of(CLASSES)},
        Branch(ConstantGate(1, 2), (Return(("a",), "first"), Return(("b",), "second"))),
    )
    program = TestProgram(ControlFlow(INPUTS, OUTPUTS, (block,)), {"only": chain(1).bodies["first"]})
    bodies = {"a": program.bodies["only"]["early"], "b": program.bodies["only"]["early"]}
    program = TestProgram(program.flow, {"only": bodies})
    for run in (run_batch, run_singly):
        _, exits = run(program.flow, program.engine, random_rows(3))
        assert exits == ["second"] * 3
        _, exits = run(force_exit(program.flow, "first"), program.engine, random_rows(3))
        assert exits == ["first"] * 3


def test_a_block_without_results_needs_no_engine() -> None:
    spec = {"x": rows_of(WIDTH)}
    flow = ControlFlow(
        spec,
        {"y": rows_of(WIDTH)},
        (BlockInterface("pass", spec, {}, Return(("x",), "backbone")),),
    )

    def no_engine(block: BlockInterface, static_batch: int | None) -> Engine:
        raise AssertionError

    rows = random_rows(4)
    outputs, _ = BatchExecutor(flow, no_engine).run([rows], 4)
    np.testing.assert_array_equal(outputs[0], rows)
    assert not np.shares_memory(outputs[0], rows)
    np.testing.assert_array_equal(run_singly(flow, no_engine, rows)[0], rows)


def test_an_output_without_rows_is_refused() -> None:
    shared = {"x": ValueSpec((3,), "float32")}
    flow = ControlFlow(shared, shared, (BlockInterface("b", shared, {}, Return(("x",), "e")),))
    for executor in (BatchExecutor, SingleRowExecutor):
        with pytest.raises(VerifyError, match="no batch dimension"):
            executor(flow, chain().engine)


class _RecordingEngine:
    """Adds a vector that belongs to no row, and counts calls."""

    def __init__(self, block: BlockInterface, calls: list[int]) -> None:
        from exitcompiler.controlflow import engine_signature

        self.signature = engine_signature(block)
        self._calls = calls

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        self._calls.append(len(inputs[0]))
        return [inputs[0] + inputs[1]]

    def runner(self) -> object:
        return self.run


@pytest.mark.parametrize("same", [True, False])
def test_rows_that_bring_different_shared_values_stay_apart(same: bool) -> None:
    rows, shared = rows_of(2), ValueSpec((2,), "float32")
    inputs = {"x": rows, "s": shared, "t": shared}
    pick = Branch(
        chain(0).flow.entry.terminator.gate,  # type: ignore[union-attr]
        (Edge("join", ("x", "s")), Edge("join", ("x", "s" if same else "t"))),
    )
    pick = Branch(
        type(pick.gate)(("x",), ((1.0, 0.0), (0.0, 1.0)), (0.0, 0.0)),  # type: ignore[call-arg]
        pick.edges,
    )
    join = BlockInterface("join", {"p": rows, "v": shared}, {"y": rows}, Return(("y",), "out"))
    flow = ControlFlow(inputs, {"y": rows}, (BlockInterface("pick", inputs, {}, pick), join))
    calls: list[int] = []

    class Gate(_RecordingEngine):
        def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
            return [inputs[0].argmax(axis=1).astype(np.int32)]

    def engines(block: BlockInterface, static_batch: int | None) -> Engine:
        return Gate(block, calls) if block.name == "pick" else _RecordingEngine(block, calls)  # type: ignore[return-value]

    x = np.array([[1, 0], [0, 1], [0, 2], [2, 0]], np.float32)
    s, t = np.full(2, 10, np.float32), np.full(2, 20, np.float32)
    outputs, _ = BatchExecutor(flow, engines).run([x, s, t], 4)
    added = np.array([10, 10, 10, 10] if same else [10, 20, 20, 10], np.float32)
    np.testing.assert_array_equal(outputs[0], x + added[:, None])
    assert calls == ([4] if same else [2, 2])
