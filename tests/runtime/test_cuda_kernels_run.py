"""What the kernels of a device graph compute, run thread by thread on the emulated device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from emulated_cuda import Emulator, emulated_device, kernel_image
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_kernels import COMPACT, COPY, GATHER, GUARD, MOVE, PICK_BUCKET, ROUTE, WAY
from exitcompiler.runtime.graph_plan import LEFT

Ints = NDArray[np.int32]
UNSET = -7  # of what a kernel must not write


class Bench:
    """Arrays on the device, and launches of one kernel in a graph of its own."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.driver = Driver.open()
        self.stream = self.driver.create_stream()
        self.module = self.driver.load_module(kernel_image())

    def put(self, array: object, dtype: object = np.int32, offset: int = 0) -> int:
        """The address of a copy, ``offset`` bytes into its memory."""
        values = np.ascontiguousarray(np.array(array, dtype))
        address = self.driver.malloc(values.nbytes + offset) + offset
        self.driver.upload(address, values, self.stream)
        return address

    def get(self, address: int, *shape: int, dtype: object = np.int32) -> NDArray[np.generic]:
        values = np.zeros(shape, dtype)
        self.driver.download(values, address, self.stream)
        self.driver.synchronize(self.stream)
        return values

    def launch(
        self,
        name: str,
        layout: np.dtype,
        values: tuple[int, ...],
        grid: tuple[int, int, int] = (1, 1, 1),
        threads: int = 1,
        default: int = 99,
    ) -> int | None:
        """Run a kernel before a SWITCH; what its condition was set to, ``default`` where it was not."""
        driver = self.driver
        graph = driver.create_graph()
        data = np.array(values, layout).tobytes()
        arguments: list[object] = [(ctypes.c_uint8 * len(data)).from_buffer_copy(data)]
        handle = None
        if name != "gather":
            handle = driver.create_condition(graph, default)
            arguments.append(ctypes.c_uint64(handle))
        function = driver.function(self.module, name)
        node = driver.add_kernel(graph, [], function, grid, threads, arguments)
        if handle is not None:
            driver.add_conditional(graph, [node], "switch", handle, 1)
        executable = driver.instantiate(graph)
        driver.launch(executable, self.stream)
        driver.synchronize(self.stream)
        executed = self.emulator.executed()
        assert executed[0] == f"kernel {name}"
        assert self.emulator.take_violations() == []
        driver.destroy_exec(executable)
        driver.destroy_graph(graph)
        return None if handle is None else int(executed[1].split()[1])


@pytest.fixture(scope="module")
def on() -> Iterator[Bench]:
    with emulated_device() as emulator:
        yield Bench(emulator)


@given(
    following=st.lists(st.integers(-1, 3), min_size=1, max_size=80),
    target=st.integers(0, 3),
    spare=st.integers(0, 2),
)
def test_compact_lists_the_rows_of_a_target_in_order(
    on: Bench, following: list[int], target: int, spare: int
) -> None:
    capacity, threads = len(following), (-(-len(following) // 32) + spare) * 32
    rows, count = on.put([UNSET] * capacity), on.put([UNSET])
    value = on.launch("compact", COMPACT, (on.put(following), rows, count, capacity, target), threads=threads)
    expected = np.flatnonzero(np.array(following) == target)
    assert on.get(count, 1)[0] == expected.size
    assert value == (expected.size > 0)
    padding = expected[:1].repeat(capacity - expected.size) if expected.size else [UNSET] * capacity
    np.testing.assert_array_equal(on.get(rows, capacity), [*expected, *padding])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_compact_takes_as_many_rows_as_a_thread_block_has_threads(on: Bench, share: float) -> None:
    following = np.where(np.random.default_rng(0).random(1024) < share, 4, 2)
    rows, count = on.put([UNSET] * 1024), on.put([UNSET])
    on.launch("compact", COMPACT, (on.put(following), rows, count, 1024, 4), threads=1024)
    expected = np.flatnonzero(following == 4)
    assert on.get(count, 1)[0] == expected.size
    np.testing.assert_array_equal(on.get(rows, 1024)[: expected.size], expected)


@pytest.mark.parametrize(("following", "target", "value"), [(3, 3, 1), (3, 2, 0), (LEFT, 0, 0), (0, 0, 1)])
def test_guard_asks_where_the_row_goes(on: Bench, following: int, target: int, value: int) -> None:
    assert on.launch("guard", GUARD, (on.put([following]), target)) == value


@pytest.mark.parametrize(
    ("buckets", "count", "bucket"),
    [([1, 2, 4], 1, 0), ([1, 2, 4], 2, 1), ([1, 2, 4], 3, 2), ([1, 2, 4], 4, 2), ([3, 5], 1, 0), ([8], 8, 0)],
)
def test_the_smallest_bucket_that_holds_all_rows_is_picked(
    on: Bench, buckets: list[int], count: int, bucket: int
) -> None:
    values = (on.put([count]), on.put(buckets), len(buckets))
    assert on.launch("pick_bucket", PICK_BUCKET, values) == bucket


@given(
    widths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    places=st.integers(1, 5),
    listed=st.booleans(),
    offset=st.sampled_from([0, 1, 4, 8]),
    threads=st.sampled_from([1, 2, 32]),
    shares=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_gather_brings_every_row_from_where_it_lies(
    on: Bench, widths: list[int], places: int, listed: bool, offset: int, threads: int, shares: int, seed: int
) -> None:
    """Whatever the width of rows in bytes, where they begin, and however many threads there are."""
    rng, capacity, edges = np.random.default_rng(seed), 6, 3
    places = places if listed else 1
    edge, position = rng.integers(0, edges, capacity), rng.permutation(capacity)
    order = rng.integers(0, capacity, places)
    sources = [rng.integers(0, 256, (edges, capacity, width)) for width in widths]
    moves, addresses = [], []
    for width, source in zip(widths, sources, strict=True):
        target = on.put(np.full((capacity, width), 0xEE), np.uint8, offset)
        moves.append((target, width, width, len(addresses)))
        addresses += [on.put(part, np.uint8, offset) for part in source]
    lists = on.put(order) if listed else 0
    state = (on.put(edge), on.put(position))
    tables = (on.put(moves, MOVE), on.put(addresses, np.uint64))
    on.launch("gather", GATHER, (*tables, lists, *state), (shares, places, len(widths)), threads)
    rows = order if listed else np.zeros(1, int)
    for (target, width, *_), source in zip(moves, sources, strict=True):
        expected = np.full((capacity, width), 0xEE)
        expected[:places] = source[edge[rows], position[rows]]
        np.testing.assert_array_equal(on.get(target, capacity, width, dtype=np.uint8), expected)


def test_gather_copies_a_value_without_rows_whole(on: Bench) -> None:
    one, other = (on.put(np.arange(12) + add, np.uint8) for add in (0, 100))
    target = on.put(np.zeros(12), np.uint8)
    tables = (on.put([(target, 0, 12, 0)], MOVE), on.put([one, other], np.uint64))
    on.launch("gather", GATHER, (*tables, 0, on.put([1]), on.put([3])))
    np.testing.assert_array_equal(on.get(target, 12, dtype=np.uint8), np.arange(12) + 100)


def route(
    on: Bench,
    ways: list[tuple[int, int, int, int, list[tuple[int, int, int, int]]]],
    action: list[int] | None,
    rows: list[int] | None,
    count: int,
    *,
    capacity: int = 6,
    condition: bool = False,
    shares: int = 1,
    threads: int = 32,
) -> tuple[dict[str, Ints], int | None]:
    """Run a route of ``(target, edge, exit, arm, copies)``; the rows' numbers, and the condition."""
    names = ("next", "edge", "position", "exit_index")
    state = [on.put([UNSET] * capacity) for _ in names]
    copies = [copy for *_, mine in ways for copy in mine]
    first, table = 0, []
    for target, edge, exit_index, arm, mine in ways:
        table.append((target, edge, exit_index, arm, first, len(mine)))
        first += len(mine)
    values = (
        on.put(table, WAY),
        on.put(copies, COPY) if copies else 0,
        0 if action is None else on.put(action),
        0 if rows is None else on.put(rows),
        on.put([count]),
        *state,
        len(ways),
        condition,
    )
    value = on.launch("route", ROUTE, values, (capacity, shares, 1), threads)
    numbers = {name: on.get(address, capacity) for name, address in zip(names, state, strict=True)}
    return numbers, value


@given(
    actions=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    count=st.integers(1, 6),
    listed=st.booleans(),
    width=st.integers(1, 40),
    threads=st.sampled_from([1, 3, 32]),
    shares=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_route_sends_rows_on_or_copies_their_answers(
    on: Bench, actions: list[int], count: int, listed: bool, width: int, threads: int, shares: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(6).tolist()
    early, late = rng.integers(0, 256, (2, 6, width))
    answer = on.put(np.full((6, width), 0xEE), np.uint8)
    more = on.put(np.full((6, width), 0xEE), np.uint8)
    first, second = on.put(early, np.uint8), on.put(late, np.uint8)
    ways = [
        (LEFT, 0, 4, 0, [(first, answer, width, width)]),
        (2, 1, -1, 0, []),
        (LEFT, 0, 5, 0, [(second, answer, width, width), (first, more, width, width)]),
    ]
    found, value = route(on, ways, actions, rows if listed else None, count, shares=shares, threads=threads)
    got = [on.get(a, 6, width, dtype=np.uint8) for a in (answer, more)]
    assert value == 99  # not set
    expected = {name: np.full(6, UNSET) for name in found}
    wanted = [np.full((6, width), 0xEE), np.full((6, width), 0xEE)]
    if not listed:
        expected["next"][count:] = LEFT
        expected["exit_index"][count:] = -1
    for position in range(count):
        row = rows[position] if listed else position
        target, edge, exit_index, _, _ = ways[actions[position]]
        expected["next"][row], expected["edge"][row], expected["position"][row] = target, edge, position
        expected["exit_index"][row] = exit_index if target == LEFT else -1
        if actions[position] == 0:
            wanted[0][row] = early[position]
        if actions[position] == 2:
            wanted[0][row], wanted[1][row] = late[position], early[position]
    for name, numbers in expected.items():
        np.testing.assert_array_equal(found[name], numbers, err_msg=name)
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])


@pytest.mark.parametrize(("action", "arm"), [(0, 2), (1, 0), (2, 1)])
def test_route_of_one_row_sets_its_condition_once(on: Bench, action: int, arm: int) -> None:
    ways = [(LEFT, 0, 0, 2, []), (1, 0, -1, 0, []), (2, 0, -1, 1, [])]
    found, value = route(on, ways, [action], None, 1, capacity=1, condition=True, shares=3)
    assert value == arm
    assert found["next"][0] == ways[action][0]


def test_without_an_action_rows_take_the_first_way(on: Bench) -> None:
    found, _ = route(on, [(3, 1, -1, 0, [])], None, None, 4)
    np.testing.assert_array_equal(found["next"], [3, 3, 3, 3, LEFT, LEFT])
    np.testing.assert_array_equal(found["position"], [0, 1, 2, 3, UNSET, UNSET])


@pytest.mark.parametrize("action", [-1, 2, 2**31 - 1])
def test_an_action_that_names_no_way_lets_the_row_leave_without_an_exit(on: Bench, action: int) -> None:
    ways = [(LEFT, 0, 0, 0, []), (1, 0, -1, 1, [])]
    found, value = route(on, ways, [action], None, 1, capacity=1, condition=True)
    assert (found["next"][0], found["exit_index"][0]) == (LEFT, -1)
    assert value == 99  # as nothing was set: no body runs
