"""Builds one executable CUDA graph from a plan: launched, it answers a call without the host."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from exitcompiler.errors import LoweringError, VerifyError
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_kernels import (
    COMPACT,
    COPY,
    GATHER,
    GATHER_THREADS,
    GUARD,
    KERNELS,
    MOST_ROW_BYTES,
    MOST_ROWS,
    MOVE,
    PICK_BUCKET,
    ROUTE,
    ROUTE_THREADS,
    SHARE_BYTES,
    WAY,
)
from exitcompiler.runtime.device import Captured, size_bytes
from exitcompiler.runtime.graph_plan import (
    EDGE,
    EXIT_INDEX,
    NEXT,
    POSITION,
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

__all__ = ["BuiltGraph", "build", "check_captured"]

# What the body of a conditional node may hold (CUDA Programming Guide 4.2.4); a conditional node it may, too,
# but a graph that is added as a child may not.
_ALLOWED: Final = frozenset(("kernel", "memcpy", "memset", "empty", "graph"))
_MOST_SHARES: Final = 256
_CAUSES: Final = {
    "batch mem op": "an operation on memory by the stream itself",
    "conditional": "control flow of the engine's own; a block has to be straight-line",
    "event record": "an event that somebody outside of the capture waits for",
    "ext semas signal": "something shared with another API or process",
    "ext semas wait": "something shared with another API or process",
    "host": "a callback on the host",
    "mem alloc": "memory allocated while it ran (PyTorch: the allocator has to be the native one)",
    "mem free": "memory freed while it ran (PyTorch: the allocator has to be the native one)",
    "memcpy of an array": "a texture or another CUDA array",
    "memcpy of host memory": "a tensor on the host that is read or written",
    "wait event": "waiting for an event of somebody outside of the capture",
}


@dataclass
class BuiltGraph:
    """A graph that can be launched.

    Args:
        executable: The handle (``CUgraphExec``).
        node_counts: How many nodes of each sort it has: ``"route"``, ``"block"``, ``"if"``, ``"switch"`` ...
        table_bytes: Device memory that the kernels' tables take.
    """

    executable: int
    node_counts: Mapping[str, int]
    table_bytes: int
    _driver: Driver
    _owned: ExitStack

    def launch(self, stream: int) -> None:
        """Answer the rows that lie in the plan's input buffers, in the order of the stream."""
        self._driver.launch(self.executable, stream)

    def close(self) -> None:
        """Free it; nothing of it may be running."""
        self._owned.close()


def build(
    plan: Plan,
    driver: Driver,
    addresses: Mapping[str, int],
    captured: Mapping[tuple[str, int], Captured],
    module: int,
) -> BuiltGraph:
    """Build the graph of a plan, and bring it to the device.

    The steps of a scope become nodes that follow one another; every conditional has a handle of its own,
    made in the graph (the root or a body) that it and the kernel that sets it stand in. What is not set in a
    launch runs nothing.

    Args:
        plan: Well-formed.
        driver: The device.
        addresses: Of all buffers of the plan; have to stay valid.
        captured: (block, rows) -> its graph; it is copied, what it keeps has to stay alive.
        module: The kernels, compiled for this device and loaded; has to stay loaded.

    Returns:
        The graph; the caller closes it.

    Raises:
        LoweringError: A block was not captured or holds what a body must not; the plan is for too many rows,
            or copies too large a row; the driver refuses the graph.
        DeviceError: The device is out of memory.
    """
    if plan.capacity > MOST_ROWS:
        raise LoweringError(
            f"{plan.capacity} rows in one graph, {MOST_ROWS} are the most", remedy="take a smaller batch size"
        )
    nodes_of = {key: check_captured(driver, *key, block) for key, block in captured.items()}
    tables = _Tables(plan, addresses)
    with ExitStack() as owned, ExitStack() as passing:
        stream = driver.create_stream()
        passing.callback(driver.destroy_stream, stream)
        memory = driver.malloc(len(tables.image))
        owned.callback(driver.free, memory)
        driver.upload(memory, tables.image, stream)
        root = driver.create_graph()
        owned.callback(driver.destroy_graph, root)
        functions = {name: driver.function(module, name) for name in KERNELS}
        builder = _Builder(plan, driver, addresses, captured, functions, tables.at(memory))
        builder.scope(root, plan.root)
        executable = driver.instantiate(root)
        owned.callback(driver.destroy_exec, executable)
        driver.upload_exec(executable, stream)
        driver.synchronize(stream)
        inside = sum(nodes_of[key] * times for key, times in builder.blocks.items())
        counts = {**builder.counts, "in blocks": inside}
        return BuiltGraph(executable, counts, len(tables.image), driver, owned.pop_all())


def check_captured(driver: Driver, block: str, rows: int, captured: Captured) -> int:
    """See that a captured block can stand in the body of a conditional node; how many nodes it has.

    Raises:
        LoweringError: It cannot; names the block, the sort of node and what usually makes one.
    """
    types = driver.node_types(captured.graph)
    where = f"block {block!r}, captured for {rows} rows"
    if not types:
        raise LoweringError("the captured graph is empty: the engine ran on another stream", where=where)
    for found in types:
        if found not in _ALLOWED:
            cause = _CAUSES.get(found)
            raise LoweringError(
                f"a node of type {found!r} cannot run under a condition on the device",
                where=where,
                remedy=None if cause is None else f"what makes such a node: {cause}",
            )
    return len(types)


class _Tables:
    """What kernels look up: one piece of memory for all steps.

    Args:
        plan: The plan.
        addresses: Of its buffers, which the tables hold.

    Attributes:
        image: What that memory is filled with, ``uint8``.
    """

    def __init__(self, plan: Plan, addresses: Mapping[str, int]) -> None:
        self._plan = plan
        self._addresses = addresses
        self._parts: list[bytes] = []
        self._size = 0
        self._offsets: dict[Step, tuple[int, ...]] = {}
        for step in steps_of(plan.root):
            match step:
                case Route():
                    self._offsets[step] = self._route(step)
                case Gather():
                    self._offsets[step] = self._gather(step)
                case PickBucket():
                    self._offsets[step] = (self._add(np.array(step.buckets, np.int32)),)
                case _:
                    pass
        self.image: NDArray[np.uint8] = np.frombuffer(b"".join(self._parts), np.uint8)

    def at(self, memory: int) -> dict[Step, tuple[int, ...]]:
        """Step -> the addresses of its tables, when the image lies at ``memory``."""
        return {step: tuple(memory + place for place in places) for step, places in self._offsets.items()}

    def _add(self, table: NDArray[Any]) -> int:
        """Where, from the beginning, a table comes to lie."""
        padding = -self._size % 16
        self._parts += [bytes(padding), table.tobytes()]
        offset = self._size + padding
        self._size = offset + table.nbytes
        return offset

    def _route(self, step: Route) -> tuple[int, int]:
        ways = np.zeros(len(step.ways), WAY)
        copies: list[tuple[int, ...]] = []
        for index, way in enumerate(step.ways):
            ways[index] = (way.target, way.edge, way.exit, way.arm, len(copies), len(way.copies))
            copies += [
                (self._addresses[source], self._addresses[target], *_extent(self._plan, source))
                for source, target in way.copies
            ]
        return self._add(ways), self._add(np.array(copies, COPY))

    def _gather(self, step: Gather) -> tuple[int, int]:
        moves = np.zeros(len(step.moves), MOVE)
        sources: list[int] = []
        for index, move in enumerate(step.moves):
            moves[index] = (self._addresses[move.target], *_extent(self._plan, move.target), len(sources))
            sources += [self._addresses[source] for source in move.sources]
        return self._add(moves), self._add(np.array(sources, np.uint64))


@dataclass
class _Builder:
    plan: Plan
    driver: Driver
    addresses: Mapping[str, int]
    captured: Mapping[tuple[str, int], Captured]
    functions: Mapping[str, int]
    tables: Mapping[Step, tuple[int, ...]]
    counts: Counter[str] = field(default_factory=Counter)
    blocks: Counter[tuple[str, int]] = field(default_factory=Counter)

    def scope(self, graph: int, scope: Scope) -> None:
        """Fill a graph with the steps of a scope, one after another."""
        handles = {}
        for step in scope:
            if isinstance(step, Conditional):
                nothing = 0 if step.kind == "if" else len(step.bodies)
                handles[step.condition] = self.driver.create_condition(graph, nothing)
        last: list[int] = []
        for step in scope:
            last = [self._node(graph, last, step, handles)]

    def _node(self, graph: int, after: list[int], step: Step, handles: Mapping[str, int]) -> int:
        match step:
            case RunBlock():
                return self._block(graph, after, step)
            case Conditional():
                self.counts[step.kind] += 1
                handle = handles[step.condition]
                node, bodies = self.driver.add_conditional(graph, after, step.kind, handle, len(step.bodies))
                for body, inner in zip(bodies, step.bodies, strict=True):
                    self.scope(body, inner)
                return node
        name, grid, threads, arguments = self._kernel(step)
        self.counts[name] += 1
        values: list[object] = [arguments]
        if not isinstance(step, Gather):
            if step.condition is not None and step.condition not in handles:
                raise VerifyError(
                    f"no conditional of this scope uses {step.condition!r}", where=f"plan, {name}"
                )
            values.append(ctypes.c_uint64(handles[step.condition] if step.condition else 0))
        return self.driver.add_kernel(graph, after, self.functions[name], grid, threads, values)

    def _block(self, graph: int, after: list[int], step: RunBlock) -> int:
        key = (step.block, step.rows)
        if key not in self.captured:
            raise LoweringError(
                f"it was not captured for {step.rows} rows", where=f"block {step.block!r} of a device graph"
            )
        self.counts["block"] += 1
        self.blocks[key] += 1
        return self.driver.add_child(graph, after, self.captured[key].graph)

    def _kernel(
        self, step: Route | Guard | Compact | PickBucket | Gather
    ) -> tuple[str, tuple[int, int, int], int, ctypes.Array[ctypes.c_uint8]]:
        """Which kernel, its blocks, its threads, and its structure of arguments."""
        at = self.addresses
        one = (1, 1, 1)
        match step:
            case Route():
                sources = [source for way in step.ways for source, _ in way.copies]
                state = (at[NEXT], at[EDGE], at[POSITION], at[EXIT_INDEX])
                reads = (self._optional(step.action), self._optional(step.rows), at[step.count])
                flags = (len(step.ways), step.condition is not None)
                values = (*self.tables[step], *reads, *state, *flags)
                grid = (self.plan.capacity, self._shares(sources), 1)
                return "route", grid, ROUTE_THREADS, _argument(ROUTE, values)
            case Guard():
                return "guard", one, 1, _argument(GUARD, (at[NEXT], step.target))
            case Compact():
                values = (at[NEXT], at[step.rows], at[step.count], self.plan.capacity, step.target)
                return "compact", one, -(-self.plan.capacity // 32) * 32, _argument(COMPACT, values)
            case PickBucket():
                values = (at[step.count], *self.tables[step], len(step.buckets))
                return "pick_bucket", one, 1, _argument(PICK_BUCKET, values)
            case Gather():
                values = (*self.tables[step], self._optional(step.list), at[EDGE], at[POSITION])
                shares = self._shares([move.target for move in step.moves])
                grid = (shares, step.rows, len(step.moves))
                return "gather", grid, GATHER_THREADS, _argument(GATHER, values)

    def _optional(self, buffer: str | None) -> int:
        return 0 if buffer is None else self.addresses[buffer]

    def _shares(self, copied: Sequence[str]) -> int:
        """How many blocks of threads copy a row."""
        largest = max((_extent(self.plan, name)[1] for name in copied), default=0)
        return min(max(-(-largest // SHARE_BYTES), 1), _MOST_SHARES)


def _extent(plan: Plan, name: str) -> tuple[int, int]:
    """Bytes from row to row of a buffer (0: it does not belong to rows), and bytes that are copied of it."""
    buffer = plan.buffers[name]
    shape = buffer.shape[1:] if buffer.rows else buffer.shape
    size = size_bytes(shape, buffer.dtype)
    if size > MOST_ROW_BYTES:
        raise LoweringError(
            f"{size:,} bytes are copied at once, {MOST_ROW_BYTES:,} are the most", where=f"buffer {name!r}"
        )
    return (size if buffer.rows else 0), size


def _argument(layout: np.dtype[np.void], values: tuple[int, ...]) -> ctypes.Array[ctypes.c_uint8]:
    """A structure as a kernel takes it by value."""
    data = np.array(values, layout).tobytes()
    return (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
