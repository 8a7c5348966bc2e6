"""Graphs built from plans, on a driver that only takes notes: the right nodes in order, nothing left over."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_programs import TestProgram, cascade, chain, diamond, random_program

from exitcompiler.errors import DeviceError, LoweringError, VerifyError
from exitcompiler.runtime.cuda_graphs import BuiltGraph, build, check_captured
from exitcompiler.runtime.cuda_kernels import (
    COMPACT,
    COPY,
    GATHER,
    GUARD,
    KERNELS,
    MOVE,
    PICK_BUCKET,
    ROUTE,
    SHARE_BYTES,
    WAY,
)
from exitcompiler.runtime.device import Captured
from exitcompiler.runtime.graph_plan import (
    LEFT,
    NEXT,
    Buffer,
    Compact,
    Conditional,
    Gather,
    Guard,
    Move,
    PickBucket,
    Plan,
    PlannedWay,
    Route,
    RunBlock,
    Scope,
    steps_of,
)
from exitcompiler.runtime.planning import plan_program

LAYOUTS = {"route": ROUTE, "guard": GUARD, "compact": COMPACT, "pick_bucket": PICK_BUCKET, "gather": GATHER}
BLOCK_TYPES = ["kernel", "memset", "kernel"]


@dataclass
class Node:
    kind: str  # a kernel's name, "child", "if" or "switch"
    number: int
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 1
    arguments: np.void | None = None
    handle: int | None = None
    child: int | None = None
    bodies: list[int] = field(default_factory=list)


@dataclass
class NotingDriver:
    """Notes what it is told. Checks what CUDA would: nodes belong to their graph, handles to theirs."""

    refuse_at: int | None = None
    captured_types: Callable[[int], list[str]] = lambda graph: BLOCK_TYPES
    calls: int = 0
    alive: set[tuple[str, int]] = field(default_factory=set)
    graphs: dict[int, list[Node]] = field(default_factory=dict)
    handles: dict[int, tuple[int, int]] = field(default_factory=dict)  # -> graph, default
    memory: dict[int, np.ndarray] = field(default_factory=dict)
    uploaded: list[int] = field(default_factory=list)
    launched: list[tuple[int, int]] = field(default_factory=list)

    def _call(self) -> int:
        self.calls += 1
        if self.calls == self.refuse_at:
            raise DeviceError(f"call {self.calls} is refused")
        return 4096 * self.calls  # a number that nothing else has

    def _make(self, what: str) -> int:
        number = self._call()
        self.alive.add((what, number))
        return number

    def malloc(self, size_bytes: int) -> int:
        address = self._make("memory")
        self.memory[address] = np.full(size_bytes, 0xA5, np.uint8)
        return address

    def free(self, address: int) -> None:
        self.alive.remove(("memory", address))

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        self._call()
        assert ("stream", stream) in self.alive
        self.memory[address][: array.nbytes] = array

    def create_stream(self) -> int:
        return self._make("stream")

    def destroy_stream(self, stream: int) -> None:
        self.alive.remove(("stream", stream))

    def synchronize(self, stream: int) -> None:
        self._call()
        assert ("stream", stream) in self.alive

    def function(self, module: int, name: str) -> int:
        self._call()
        assert module == 77
        return KERNELS.index(name)

    def create_graph(self) -> int:
        graph = self._make("graph")
        self.graphs[graph] = []
        return graph

    def destroy_graph(self, graph: int) -> None:
        self.alive.remove(("graph", graph))

    def _add(self, graph: int, after: Sequence[int], node: Node) -> int:
        nodes = self.graphs[graph]
        assert list(after) == [n.number for n in nodes[-1:]], "not a chain"
        nodes.append(node)
        return node.number

    def add_kernel(
        self,
        graph: int,
        after: Sequence[int],
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[object],
    ) -> int:
        name = KERNELS[function]
        layout = LAYOUTS[name]
        assert ctypes.sizeof(arguments[0]) == layout.itemsize
        assert [type(a) for a in arguments[1:]] == ([] if name == "gather" else [ctypes.c_uint64])
        values = np.frombuffer(bytes(arguments[0]), layout)[0]
        handle = arguments[1].value if len(arguments) > 1 else 0
        return self._add(graph, after, Node(name, self._call(), grid, threads, values, handle or None))

    def add_child(self, graph: int, after: Sequence[int], child: int) -> int:
        return self._add(graph, after, Node("child", self._call(), child=child))

    def create_condition(self, graph: int, default: int) -> int:
        handle = self._call()
        self.handles[handle] = (graph, default)
        return handle

    def add_conditional(
        self, graph: int, after: Sequence[int], kind: str, handle: int, bodies: int
    ) -> tuple[int, list[int]]:
        assert self.handles[handle][0] == graph
        node = Node(kind, self._call(), handle=handle)
        for index in range(bodies):
            body = node.number + 1 + index
            self.graphs[body] = []
            node.bodies.append(body)
        return self._add(graph, after, node), node.bodies

    def node_types(self, graph: int) -> list[str]:
        self._call()
        return self.captured_types(graph)

    def instantiate(self, graph: int) -> int:
        return self._make("executable")

    def upload_exec(self, executable: int, stream: int) -> None:
        self._call()
        self.uploaded.append(executable)

    def destroy_exec(self, executable: int) -> None:
        self.alive.remove(("executable", executable))

    def launch(self, executable: int, stream: int) -> None:
        self.launched.append((executable, stream))


def addresses_of(plan: Plan) -> dict[str, int]:
    return {name: 2**40 + 256 * i for i, name in enumerate(plan.buffers)}


def captured_for(plan: Plan) -> dict[tuple[str, int], Captured]:
    runs = dict.fromkeys((s.block, s.rows) for s in steps_of(plan.root) if isinstance(s, RunBlock))
    return {key: Captured(5000 + i) for i, key in enumerate(runs)}


def built(plan: Plan, driver: NotingDriver) -> BuiltGraph:
    return build(plan, driver, addresses_of(plan), captured_for(plan), 77)


def root_of(driver: NotingDriver) -> int:
    (root,) = [number for what, number in driver.alive if what == "graph"]
    return root


def outline(driver: NotingDriver, graph: int, names: Mapping[int, str], depth: int = 0) -> Iterator[str]:
    for node in driver.graphs[graph]:
        words = f"run {names[node.child]}" if node.kind == "child" else node.kind
        known = [*driver.handles].index(node.handle) if node.handle is not None else None
        yield "  " * depth + words + ("" if known is None else f" h{known}")
        for body in node.bodies:
            yield from outline(driver, body, names, depth + 1)


def lines(program: TestProgram, *arguments: object) -> list[str]:
    plan, driver = plan_program(program.flow, *arguments), NotingDriver()
    built(plan, driver)
    names = {c.graph: f"{block} on {rows}" for (block, rows), c in captured_for(plan).items()}
    return list(outline(driver, root_of(driver), names))


def table(driver: NotingDriver, address: int, layout: np.dtype, count: int) -> np.ndarray:
    """A table of the built graph, looked up as a kernel does."""
    (start,) = driver.memory
    offset = int(address) - start
    assert offset % 16 == 0
    assert offset >= 0
    assert offset + count * layout.itemsize <= driver.memory[start].nbytes
    return driver.memory[start][offset : offset + count * layout.itemsize].view(layout)


def test_exits_of_one_row_are_bodies_in_bodies() -> None:
    assert lines(chain()) == [
        "run first on 1",
        "route h0",
        "if h0",
        "  run second on 1",
        "  route h1",
        "  if h1",
        "    run third on 1",
        "    route",
    ]


def test_a_join_is_guarded_in_the_scope_of_what_dominates_it() -> None:
    assert lines(cascade()) == [
        "run small on 1",
        "route h0",
        "if h0",
        "  run medium on 1",
        "  route",
        "guard h1",
        "if h1",
        "  run big_stem on 1",
        "  route",
        "  run big on 1",
        "  route",
    ]


def test_many_rows_are_one_graph() -> None:
    assert lines(diamond(), 4, (1, 4)) == [
        "pick_bucket h0",
        "switch h0",
        "  run stem on 1",
        "  run stem on 4",
        "route",
        "compact h1",
        "if h1",
        "  pick_bucket h3",
        "  switch h3",
        "    gather",
        "    run layer on 1",
        "    gather",
        "    run layer on 4",
        "  route",
        "compact h2",
        "if h2",
        "  pick_bucket h4",
        "  switch h4",
        "    gather",
        "    run join on 1",
        "    gather",
        "    run join on 4",
        "  route",
    ]


def compare(plan: Plan, driver: NotingDriver, graph: int, scope: Scope) -> None:
    """One graph against one scope, step by step: nodes, arguments, tables."""
    at, captured = addresses_of(plan), captured_for(plan)
    nodes = driver.graphs[graph]
    assert len(nodes) == len(scope)
    handles: dict[str, int] = {}
    for node, step in zip(nodes, scope, strict=True):
        if isinstance(step, Route | Guard | Compact | PickBucket) and step.condition is not None:
            assert driver.handles[node.handle][0] == graph
            assert step.condition not in handles, "two writers"
            handles[step.condition] = node.handle
        match step:
            case RunBlock():
                assert (node.kind, node.child) == ("child", captured[step.block, step.rows].graph)
            case Conditional():
                assert (node.kind, node.handle) == (step.kind, handles.pop(step.condition))
                nothing = 0 if step.kind == "if" else len(step.bodies)
                assert driver.handles[node.handle] == (graph, nothing)
                for body, inner in zip(node.bodies, step.bodies, strict=True):
                    compare(plan, driver, body, inner)
            case Guard():
                assert node.kind == "guard"
                assert node.arguments.tolist() == (at[NEXT], step.target)
                assert (node.grid, node.threads) == ((1, 1, 1), 1)
            case Compact():
                assert node.kind == "compact"
                assert node.arguments.tolist() == (
                    *(at[name] for name in (NEXT, step.rows, step.count)),
                    plan.capacity,
                    step.target,
                )
                assert node.grid == (1, 1, 1)
                assert plan.capacity <= node.threads < plan.capacity + 32
            case PickBucket():
                assert (node.kind, node.grid, node.threads) == ("pick_bucket", (1, 1, 1), 1)
                count, buckets, number = node.arguments.tolist()
                assert count == at[step.count]
                assert tuple(table(driver, buckets, np.dtype(np.int32), number)) == step.buckets
            case Gather():
                compare_gather(plan, driver, node, step)
            case Route():
                compare_route(plan, driver, node, step)
    assert not handles, "set and not used"


def compare_gather(plan: Plan, driver: NotingDriver, node: Node, step: Gather) -> None:
    at = addresses_of(plan)
    assert node.kind == "gather"
    assert node.grid[1:] == (step.rows, len(step.moves))
    values = node.arguments
    assert values["list"] == (0 if step.list is None else at[step.list])
    assert (values["edge"], values["position"]) == (at["edge"], at["position"])
    moves = table(driver, values["moves"], MOVE, len(step.moves))
    total = sum(len(move.sources) for move in step.moves)
    sources = table(driver, values["sources"], np.dtype(np.uint64), total).tolist()
    for move, entry in zip(step.moves, moves, strict=True):
        buffer = plan.buffers[move.target]
        width = 4 * int(np.prod(buffer.shape[1:] if buffer.rows else buffer.shape))
        assert entry["target"] == at[move.target]
        assert (entry["stride_bytes"], entry["size_bytes"]) == (width if buffer.rows else 0, width)
        first = entry["first_source"]
        assert sources[first : first + len(move.sources)] == [at[source] for source in move.sources]


def compare_route(plan: Plan, driver: NotingDriver, node: Node, step: Route) -> None:
    at = addresses_of(plan)
    assert (node.kind, node.grid[0]) == ("route", plan.capacity)
    values = node.arguments
    for name in ("next", "edge", "position", "exit_index"):
        assert values[name] == at[name]
    assert values["action"] == (0 if step.action is None else at[step.action])
    assert values["rows"] == (0 if step.rows is None else at[step.rows])
    assert values["count"] == at[step.count]
    assert (values["way_count"], values["sets_condition"]) == (len(step.ways), step.condition is not None)
    ways = table(driver, values["ways"], WAY, len(step.ways))
    copies = table(driver, values["copies"], COPY, sum(len(way.copies) for way in step.ways))
    for way, entry in zip(step.ways, ways, strict=True):
        assert entry.tolist()[:4] == (way.target, way.edge, way.exit, way.arm)
        assert entry["copies"] == len(way.copies)
        taken = copies[entry["first_copy"] : entry["first_copy"] + entry["copies"]]
        expected = [(at[source], at[target]) for source, target in way.copies]
        assert [(c["source"], c["target"]) for c in taken] == expected
        for (source, _), copy in zip(way.copies, taken, strict=True):
            width = 4 * int(np.prod(plan.buffers[source].shape[1:]))
            assert (copy["stride_bytes"], copy["size_bytes"]) == (width, width)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.sets(st.integers(2, 12), min_size=1, max_size=3).map(sorted).map(tuple),
)
def test_the_graph_of_any_program_is_its_plan(seed: int, sizes: tuple[int, ...]) -> None:
    program = random_program(seed)
    for plan in (plan_program(program.flow), plan_program(program.flow, sizes[-1], sizes)):
        driver = NotingDriver()
        graph = built(plan, driver)
        compare(plan, driver, root_of(driver), plan.root)
        kinds = [type(step).__name__ for step in steps_of(plan.root)]
        assert graph.node_counts.get("block", 0) == kinds.count("RunBlock")
        assert graph.node_counts["in blocks"] == len(BLOCK_TYPES) * kinds.count("RunBlock")
        assert graph.node_counts["route"] == kinds.count("Route")
        conditionals = graph.node_counts.get("if", 0) + graph.node_counts.get("switch", 0)
        assert conditionals == kinds.count("Conditional") == len(driver.handles)
        graph.close()
        assert driver.alive == set()


def test_a_graph_is_brought_to_the_device_and_launched() -> None:
    driver = NotingDriver()
    graph = built(plan_program(chain().flow), driver)
    assert driver.uploaded == [graph.executable]
    assert {what for what, _ in driver.alive} == {"memory", "graph", "executable"}
    graph.launch(3)
    graph.launch(4)
    assert driver.launched == [(graph.executable, 3), (graph.executable, 4)]
    assert graph.table_bytes == sum(map(len, driver.memory.values()))


@pytest.mark.parametrize("program", [chain, cascade, diamond])
@pytest.mark.parametrize("capacity", [1, 4])
def test_whatever_fails_nothing_is_left(program: Callable[[], TestProgram], capacity: int) -> None:
    plan = plan_program(program().flow, capacity)
    whole = NotingDriver()
    built(plan, whole)
    assert whole.calls > 20
    for refuse_at in range(1, whole.calls + 1):
        driver = NotingDriver(refuse_at)
        with pytest.raises(DeviceError, match=f"call {refuse_at} is refused"):
            built(plan, driver)
        assert driver.alive == set()


@pytest.mark.parametrize("types", [["kernel", "memcpy", "memset", "empty", "graph"], ["kernel"]])
def test_what_a_body_may_hold(types: list[str]) -> None:
    driver = NotingDriver(captured_types=lambda graph: types)
    assert check_captured(driver, "b", 1, Captured(1)) == len(types)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ("host", "callback on the host"),
        ("mem alloc", "memory allocated while it ran"),
        ("mem free", "memory freed while it ran"),
        ("event record", "an event"),
        ("wait event", "waiting for an event"),
        ("ext semas wait", "another API"),
        ("batch mem op", "operation on memory"),
        ("conditional", "control flow of the engine's own"),
        ("memcpy of host memory", "tensor on the host"),
        ("memcpy of an array", "texture"),
    ],
)
def test_what_a_body_must_not_hold_is_named_with_its_block(found: str, why: str) -> None:
    plan = plan_program(chain().flow)
    second = captured_for(plan)["second", 1].graph
    driver = NotingDriver(captured_types=lambda graph: ["kernel", found] if graph == second else BLOCK_TYPES)
    with pytest.raises(LoweringError, match=f"(?s)block 'second', captured for 1 rows.*'{found}'.*{why}"):
        built(plan, driver)
    assert driver.alive == set()


def test_a_node_of_a_type_unknown_here_is_refused() -> None:
    driver = NotingDriver(captured_types=lambda graph: ["fabric cpy batch"])
    with pytest.raises(LoweringError, match="'fabric cpy batch'"):
        check_captured(driver, "b", 2, Captured(1))


def test_a_capture_that_caught_nothing_is_refused() -> None:
    driver = NotingDriver(captured_types=lambda graph: [])
    with pytest.raises(LoweringError, match=r"(?s)block 'first'.*empty.*another stream"):
        built(plan_program(chain().flow), driver)


def test_a_block_that_was_not_captured_is_named() -> None:
    plan, driver = plan_program(chain().flow, 4), NotingDriver()
    captured = captured_for(plan)
    del captured["third", 2]
    with pytest.raises(LoweringError, match=r"block 'third'.*not captured for 2 rows"):
        build(plan, driver, addresses_of(plan), captured, 77)
    assert driver.alive == set()


def test_more_rows_than_one_thread_block_lists_are_refused() -> None:
    plan, driver = plan_program(chain().flow, 1025), NotingDriver()
    with pytest.raises(LoweringError, match="1025 rows"):
        built(plan, driver)
    assert driver.calls == 0


def hand_made(root: Scope, **buffers: Buffer) -> Plan:
    """A plan for one row with one block."""
    numbers = dict.fromkeys(("next", "edge", "position", "exit_index", "count"), Buffer("int32", (1,), True))
    return Plan(1, ("b",), ("e",), {**numbers, **buffers}, (), (), root)


def leave(*copies: tuple[str, str]) -> Route:
    return Route("b", None, (PlannedWay(LEFT, 0, 0, copies),), None, "count")


def test_a_condition_that_no_conditional_of_its_scope_uses_is_refused() -> None:
    plan, driver = hand_made((Guard(0, "c"), leave())), NotingDriver()
    with pytest.raises(VerifyError, match="guard: no conditional of this scope uses 'c'"):
        built(plan, driver)
    assert driver.alive == set()


@pytest.mark.parametrize(
    ("width", "shares"),
    [(1, 1), (SHARE_BYTES // 4, 1), (SHARE_BYTES // 4 + 1, 2), (SHARE_BYTES, 4), (2**26, 256)],
)
def test_large_rows_are_shared_among_thread_blocks(width: int, shares: int) -> None:
    wide = partial(Buffer, "float32", (1, width), True)
    plan = hand_made(
        (Gather("b", (Move("target", ("source",)),), None, 1), leave(("source", "out"))),
        source=wide(),
        target=wide(),
        out=wide(),
    )
    driver = NotingDriver()
    built(plan, driver)
    gather, route = driver.graphs[root_of(driver)]
    assert gather.grid == (shares, 1, 1)
    assert route.grid == (1, shares, 1)


def test_a_row_too_large_to_count_in_32_bits_is_refused() -> None:
    huge = Buffer("float32", (1, 2**29), True)
    plan, driver = hand_made((leave(("source", "out")),), source=huge, out=huge), NotingDriver()
    with pytest.raises(LoweringError, match=r"'source'.*2,147,483,648 bytes"):
        built(plan, driver)
    assert driver.alive == set()


def test_values_without_rows_are_copied_whole() -> None:
    fixed = Buffer("bfloat16", (3, 5), False)
    plan = hand_made(
        (Gather("b", (Move("target", ("source",)),), None, 1), leave()), source=fixed, target=fixed
    )
    driver = NotingDriver()
    built(plan, driver)
    gather = driver.graphs[root_of(driver)][0]
    (move,) = table(driver, gather.arguments["moves"], MOVE, 1)
    assert (move["stride_bytes"], move["size_bytes"]) == (0, 30)


def test_each_way_has_copies_of_its_own() -> None:
    row = Buffer("float32", (1, 3), True)
    ways = (
        PlannedWay(LEFT, 0, 0, (("a", "out"),)),
        PlannedWay(LEFT, 0, 1, (("b", "out"), ("c", "more"))),
        PlannedWay(LEFT, 0, 2, (("c", "out"),)),
    )
    route = Route("b", "action", ways, None, "count")
    action = Buffer("int32", (1,), True)
    plan = hand_made((route,), a=row, b=row, c=row, out=row, more=row, action=action)
    driver = NotingDriver()
    built(plan, driver)
    compare(plan, driver, root_of(driver), plan.root)
