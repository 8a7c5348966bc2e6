"""Graphs and conditions of the emulated CUDA driver keep to what CUDA's documentation says."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from emulated_cuda import emulated_device, primary_context
from emulated_cuda.bench import Bench

from exitcompiler.errors import DeviceError, LoweringError


@pytest.fixture
def bench() -> Iterator[Bench]:
    with emulated_device() as emulator:
        yield Bench(emulator)


# Graphs


def test_nodes_run_in_any_order_that_their_dependencies_leave(bench: Bench) -> None:
    free, chained = bench.driver.create_graph(), bench.driver.create_graph()
    last: list[int] = []
    for number in (1, 2, 3):
        bench.add(free, [], number)
        last = [bench.add(chained, last, number)]
    assert {bench.run(free) for _ in range(60)} == {123, 132, 213, 231, 312, 321}
    assert {bench.run(chained) for _ in range(10)} == {123}
    assert bench.emulator.executed() == ["kernel add"] * 3


def test_nodes_hold_copies_of_what_they_were_given(bench: Bench) -> None:
    child, graph = bench.driver.create_graph(), bench.driver.create_graph()
    number = ctypes.c_int(1)
    bench.kernel(child, [], "add", bench.word(), number)
    bench.driver.add_child(graph, [], child)
    number.value = 2
    bench.add(child, [], 3)
    bench.driver.destroy_graph(child)
    assert bench.run(graph) == 1
    assert bench.emulator.executed() == ["graph", "kernel add"]
    assert bench.driver.node_types(graph) == ["graph", "kernel"]


def test_dependencies_are_other_nodes_of_the_graph(bench: Bench) -> None:
    graph, other = bench.driver.create_graph(), bench.driver.create_graph()
    node, stranger = bench.add(graph, [], 1), bench.add(other, [], 1)
    for after in ([stranger], [node, node]):
        with pytest.raises(LoweringError, match="INVALID_VALUE"):
            bench.add(graph, after, 2)


def test_copies_are_nodes_too(bench: Bench) -> None:
    driver, graph = bench.driver, bench.driver.create_graph()
    pinned = driver.host_alloc(8).view(np.int32)
    pinned[:] = 5, 0
    first = driver.add_copy(graph, [], bench.words, pinned.ctypes.data, 4)
    second = driver.add_copy(graph, [first], bench.words + 4, bench.words, 4)
    driver.add_copy(graph, [second], pinned.ctypes.data + 4, bench.words + 4, 4)
    assert bench.run(graph) == 5
    assert pinned[1] == 5
    beyond = driver.create_graph()
    driver.add_copy(beyond, [], bench.words + 4, bench.words, 64 * 4)
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        bench.run(beyond)
    assert bench.emulator.take_violations() == ["a copy goes beyond an allocation"]


def test_a_kernel_does_not_outlive_its_module(bench: Bench) -> None:
    graph = bench.driver.create_graph()
    bench.add(graph, [], 1)
    executable = bench.driver.instantiate(graph)
    bench.driver.unload_module(bench.module)
    with pytest.raises(LoweringError, match="INVALID_VALUE"):
        bench.driver.instantiate(graph)
    bench.driver.launch(executable, bench.stream)
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        bench.driver.synchronize(bench.stream)
    assert bench.emulator.take_violations() == ["kernel add runs after its module is unloaded"]


# Conditions


@pytest.mark.parametrize(
    ("kind", "bodies", "runs"),
    [
        ("if", 1, {0: 0, 1: 1, 7: 1}),
        ("if", 2, {0: 2, 1: 1, 7: 1}),
        ("switch", 3, {0: 1, 1: 2, 2: 3, 3: 0, 9: 0}),
    ],
)
def test_a_condition_chooses_the_body(bench: Bench, kind: str, bodies: int, runs: dict[int, int]) -> None:
    graph, _, _ = bench.conditional(kind, bodies)
    for value, expected in runs.items():
        bench.write(1, value)
        assert bench.run(graph) == expected
        none = "" if expected else " none"
        assert bench.emulator.executed()[:2] == ["kernel set_from", f"{kind} {value}{none}"]


def test_a_default_holds_for_every_launch_that_sets_nothing(bench: Bench) -> None:
    outer, _, (body,) = bench.conditional("if", 1)
    handle = bench.driver.create_condition(outer, 1)  # for a node in a body
    setter = bench.kernel(body, [], "set_from", bench.word(2), ctypes.c_uint64(handle))
    _, (inner,) = bench.driver.add_conditional(body, [setter], "if", handle, 1)
    bench.add(inner, [], 5, word=3)
    graph, counted = bench.driver.create_graph(), bench.driver.create_condition
    switch = bench.driver.add_conditional(graph, [], "switch", counted(graph, 2), 3)[1]
    for number, part in enumerate(switch):
        bench.add(part, [], number)
    assert [bench.run(graph) for _ in range(2)] == [2, 2]
    bench.write(1, 1)
    bench.run(outer)
    assert bench.read(3) == 0  # set to 0 in the launch
    bench.write(2, 1)
    bench.run(outer)
    assert bench.read(3) == 5


def test_without_a_default_a_condition_holds_anything(bench: Bench) -> None:
    graph = bench.driver.create_graph()
    with primary_context() as (cuda, context):
        error, handle = cuda.cuGraphConditionalHandleCreate(graph, context, 0, 0)
    assert int(error) == 0
    bench.driver.add_conditional(graph, [], "switch", int(handle), 1)
    seen = set()
    for _ in range(5):
        bench.run(graph)
        seen.update(bench.emulator.executed())
    assert len(seen) == 5


def test_a_condition_read_too_early_shows(bench: Bench) -> None:
    graph = bench.driver.create_graph()
    handle = bench.driver.create_condition(graph, 0)
    bench.kernel(graph, [], "set_from", bench.word(1), ctypes.c_uint64(handle))
    _, (body,) = bench.driver.add_conditional(graph, [], "if", handle, 1)  # should come after
    bench.add(body, [], 1)
    bench.write(1, 1)
    assert {bench.run(graph) for _ in range(20)} == {0, 1}
    assert set(bench.emulator.take_violations()) == {"a condition is set after it was read"}


def test_a_condition_has_one_writer(bench: Bench) -> None:
    _, handle, _ = bench.conditional("if", 1)
    twice = bench.driver.create_graph()
    shared = bench.driver.create_condition(twice, 0)
    nodes = [bench.kernel(twice, [], "set_from", bench.word(), ctypes.c_uint64(shared)) for _ in range(2)]
    bench.driver.add_conditional(twice, nodes, "if", shared, 1)
    bench.run(twice)
    assert bench.emulator.take_violations() == ["two kernels set one condition"]
    many = bench.driver.create_graph()
    raced = bench.driver.create_condition(many, 0)
    node = bench.kernel(many, [], "set_by_all", bench.word(), ctypes.c_uint64(raced), threads=2)
    bench.driver.add_conditional(many, [node], "if", raced, 1)
    bench.run(many)
    assert bench.emulator.take_violations() == ["kernel set_by_all: several threads set one condition"]
    blocks = bench.driver.create_graph()
    raced = bench.driver.create_condition(blocks, 0)
    function = bench.driver.function(bench.module, "set_by_all")
    values = [bench.word(), ctypes.c_uint64(raced)]
    node = bench.driver.add_kernel(blocks, [], function, (2, 1, 1), 1, values)
    bench.driver.add_conditional(blocks, [node], "if", raced, 1)
    bench.run(blocks)
    assert bench.emulator.take_violations() == ["kernel set_by_all: several threads set one condition"]
    foreign = bench.driver.create_graph()
    bench.kernel(foreign, [], "set_from", bench.word(), ctypes.c_uint64(handle))
    with pytest.raises(DeviceError, match="LAUNCH_FAILED"):
        bench.run(foreign)
    assert "what is no condition" in bench.emulator.take_violations()[0]


def test_a_condition_belongs_to_one_node_of_its_graph(bench: Bench) -> None:
    graph, handle, (body,) = bench.conditional("if", 1)
    other = bench.driver.create_graph()
    inner = bench.driver.create_condition(body, 0)
    free = bench.driver.create_condition(graph, 0)
    refused: list[tuple[int, str, int, int]] = [
        (graph, "if", handle, 1),  # has a node
        (other, "if", free, 1),  # of another graph
        (graph, "if", inner, 1),  # of a graph below
        (graph, "if", free, 3),
        (graph, "switch", free, 0),
        (graph, "if", free + 1000, 1),
    ]
    for where, kind, condition, bodies in refused:
        with pytest.raises(LoweringError, match="INVALID_VALUE"):
            bench.driver.add_conditional(where, [], kind, condition, bodies)  # type: ignore[arg-type]
    with pytest.raises(LoweringError, match="CONDITIONAL_HANDLE_UNUSED"):
        bench.driver.instantiate(graph)
    bench.driver.add_conditional(body, [], "if", free, 1)
    bench.driver.add_conditional(body, [], "switch", inner, 2)
    with pytest.raises(LoweringError, match="INVALID_VALUE"):
        bench.driver.add_child(other, [], graph)
    bench.run(graph)


def test_a_graph_with_conditions_is_executable_once_at_a_time(bench: Bench) -> None:
    graph, _, (body,) = bench.conditional("if", 1)
    executable = bench.driver.instantiate(graph)
    with pytest.raises(LoweringError, match="INVALID_VALUE"):
        bench.driver.instantiate(graph)
    bench.driver.destroy_exec(executable)
    bench.driver.destroy_exec(bench.driver.instantiate(graph))
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        bench.driver.destroy_graph(body)
    assert bench.emulator.take_violations() == ["a graph is destroyed that belongs to a node"]
