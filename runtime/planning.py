"""Makes the plan of a device graph from a program: chain, cascade, diamond, any acyclic control flow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from exitcompiler.controlflow import (
    ACTION,
    BATCH,
    GATE_BIAS,
    GATE_WEIGHT,
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    Return,
    Successor,
    ValueSpec,
    engine_signature,
    successors,
    taken_along,
)
from exitcompiler.errors import InputError, LoweringError
from exitcompiler.runtime.graph_plan import (
    COUNT,
    EDGE,
    EXIT_INDEX,
    LEFT,
    NEXT,
    POSITION,
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
    Step,
)

__all__ = ["plan_program", "powers_of_two", "require_buckets", "taken_ways"]


def plan_program(flow: ControlFlow, capacity: int = 1, buckets: Sequence[int] | None = None) -> Plan:
    """What one launch does to answer up to ``capacity`` rows.

    Scopes are nested along the dominator tree: what block X dominates lies behind X, each child of X under
    a condition of its own, in topological order. Rows that wait for anything under a child C wait for C
    itself, as every way there leads through C; so "does any row go to C next" is all that the condition
    asks, and what was not reached costs one untaken condition, however much it is::

        a -> {leave, b};  b -> {leave, c}        run a; route; if b: [run b; route; if c: [run c; route]]
        s -> {j, l};  l -> j  (a diamond)        run s; route; if l: [run l; route]; gather; run j; route

    For one row, values are read where they were written, and a condition is set by the kernel that routes;
    only a join whose edges bring different values gathers them. For more, every block lists its rows,
    gathers their params, and runs in the smallest bucket that holds them.

    Args:
        flow: A well-formed program.
        capacity: The most rows that a call may have.
        buckets: The numbers of rows that blocks are captured for, rising, the last one ``capacity``;
            None: powers of two.

    Raises:
        InputError: ``capacity`` or ``buckets`` make no sense.
        LoweringError: For more than one row: a value that does not belong to rows differs from row to row.
    """
    sizes = powers_of_two(capacity) if buckets is None else tuple(buckets)
    require_buckets(sizes)
    if sizes[-1] != capacity:
        raise InputError(
            f"buckets {list(sizes)} for {capacity} rows", remedy="make the last one the capacity"
        )
    planner = _Planner(flow, capacity, sizes)
    return Plan(
        capacity=capacity,
        blocks=tuple(block.name for block in flow.blocks),
        exits=flow.exits,
        buffers=planner.buffers,
        inputs=tuple(planner.name[flow.entry.name, name] for name in flow.entry.params),
        outputs=planner.outputs,
        root=planner.scope(flow.entry.name),
    )


def require_buckets(buckets: Sequence[int]) -> None:
    """Refuse numbers of rows that blocks cannot be captured for.

    Raises:
        InputError: There are none, or they are not positive and rising.
    """
    if not buckets or buckets[0] < 1 or list(buckets) != sorted({*buckets}):
        raise InputError(f"buckets are {list(buckets)}", remedy="positive and rising: 1, 2, 4, ...")


def powers_of_two(capacity: int) -> tuple[int, ...]:
    """1, 2, 4, ... below ``capacity``, and ``capacity`` itself."""
    sizes = [1]
    while sizes[-1] * 2 < capacity:
        sizes.append(sizes[-1] * 2)
    return (*sizes, capacity) if capacity > 1 else (1,)


def taken_ways(block: BlockInterface) -> tuple[Successor, ...]:
    """The ways out of a block that rows can take: all but those that a constant gate rules out."""
    terminator = block.terminator
    ways = successors(terminator)
    if isinstance(terminator, Branch) and isinstance(terminator.gate, ConstantGate):
        return (ways[terminator.gate.action],)
    return ways


@dataclass(frozen=True)
class _Arrival:
    """An edge that rows can take: from where, by which way, and the values that bind the target's params."""

    source: str
    way: int
    values: tuple[str, ...]


@dataclass
class _Planner:
    flow: ControlFlow
    capacity: int
    buckets: tuple[int, ...]
    buffers: dict[str, Buffer] = field(default_factory=dict)
    name: dict[tuple[str, str], str] = field(default_factory=dict)  # (block, value) -> buffer
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._index = {block.name: i for i, block in enumerate(self.flow.blocks)}
        self._exits = {name: i for i, name in enumerate(self.flow.exits)}
        self._arrivals = _arrivals(self.flow)
        self._children = _dominator_tree(self.flow, self._arrivals)
        self._moves: dict[str, tuple[Move, ...]] = {}
        self._conditions = 0
        for state in (NEXT, EDGE, POSITION, EXIT_INDEX):
            self._add(state, ValueSpec((BATCH,), "int32"))
        self._add(COUNT, ValueSpec((1,), "int32"))
        for block in self.flow.blocks:  # sources before targets
            if block.name in self._arrivals:
                self._wire(block)
        results = {**self.flow.outputs, **self.flow.carried}
        self.outputs = tuple(self._add(f"output/{name}", spec) for name, spec in results.items())

    def scope(self, name: str) -> Scope:
        """Everything that a block dominates, the block first."""
        steps = [*self._visit(name)]
        route = self._route(name)
        children = self._children[name]
        if self.capacity > 1:
            steps.append(route)
            for child in children:
                condition = self._condition()
                steps.append(Compact(self._index[child], _rows_of(child), _count_of(child), condition))
                steps.append(Conditional("if", condition, (self.scope(child),)))
            return tuple(steps)
        direct = [c for c in children if all(a.source == name for a in self._arrivals[c])]
        if len(route.ways) > 1 and direct:  # a block that always goes on needs no condition
            condition = self._condition()
            steps.append(_with_arms(route, condition, [self._index[child] for child in direct]))
            bodies = tuple(self.scope(child) for child in direct)
            steps.append(Conditional("if" if len(direct) == 1 else "switch", condition, bodies))
        else:
            steps.append(route)
            steps += [step for child in direct for step in self.scope(child)]
        for child in children:
            if child in direct:
                continue
            if self._always_reaches(name, child):
                steps += self.scope(child)
                continue
            condition = self._condition()
            steps.append(Guard(self._index[child], condition))
            steps.append(Conditional("if", condition, (self.scope(child),)))
        return tuple(steps)

    def _visit(self, name: str) -> Iterator[Step]:
        """Bring a block's params together and run it."""
        block, moves = self.flow.block(name), self._moves[name]
        signature = engine_signature(block)
        inputs = tuple(self.name[name, value] for value in signature.inputs)
        outputs = tuple(self.name[name, value] for value in signature.outputs)
        first = block is self.flow.entry
        listed = None if self.capacity == 1 or first else _rows_of(name)

        def body(rows: int) -> Iterator[Step]:
            if moves:
                yield Gather(name, moves, listed, rows)
            if outputs:
                yield RunBlock(name, rows, inputs, outputs)

        if len(self.buckets) == 1 or not outputs:
            yield from body(self.capacity)
            return
        condition = self._condition()
        yield PickBucket(COUNT if first else _count_of(name), self.buckets, condition)
        yield Conditional("switch", condition, tuple(tuple(body(rows)) for rows in self.buckets))

    def _route(self, name: str) -> Route:
        block = self.flow.block(name)
        taken = taken_ways(block)
        listed = self.capacity > 1 and block is not self.flow.entry
        ways = []
        for position, way in enumerate(taken):
            if isinstance(way, Return):
                sources = [self.name[name, value] for value in taken_along(way)]
                copies = tuple(zip(sources, self.outputs, strict=False))  # not every exit carries something
                ways.append(PlannedWay(LEFT, 0, self._exits[way.exit], copies))
            else:
                edge = self._arrivals[way.target].index(_Arrival(name, position, way.values))
                ways.append(PlannedWay(self._index[way.target], edge, -1, ()))
        return Route(
            block=name,
            action=self.name[name, ACTION] if len(taken) > 1 else None,
            ways=tuple(ways),
            rows=_rows_of(name) if listed else None,
            count=_count_of(name) if listed else COUNT,
        )

    def _wire(self, block: BlockInterface) -> None:
        """Give every value of a block its buffer; params that can be are read where they were written."""
        arrivals = self._arrivals[block.name]
        moves = []
        for position, (param, spec) in enumerate(block.params.items()):
            sources = tuple(self.name[a.source, a.values[position]] for a in arrivals)
            if not sources:
                self._add(_buffer_of(block.name, param), spec, block.name, param)
                continue
            in_place = self.capacity == 1 or spec.batch_axis is None
            if in_place and len(set(sources)) == 1:
                self.name[block.name, param] = sources[0]
                continue
            if in_place and self.capacity > 1:
                raise LoweringError(
                    f"{param!r} does not belong to rows, and differs by the way that rows came",
                    where=f"block {block.name!r}",
                    remedy="run it one row at a time, or on a CPU backend",
                )
            moves.append(Move(self._add(_buffer_of(block.name, param), spec, block.name, param), sources))
        self._moves[block.name] = tuple(moves)
        signature = engine_signature(block)
        for value, spec in (signature.inputs | signature.outputs).items():
            if value not in block.params:
                parameter = (block.name, value) if value in (GATE_WEIGHT, GATE_BIAS) else None
                self._add(_buffer_of(block.name, value), spec, block.name, value, parameter)
        if arrivals and self.capacity > 1:
            self._add(_rows_of(block.name), ValueSpec((BATCH,), "int32"))
            self._add(_count_of(block.name), ValueSpec((1,), "int32"))

    def _add(
        self,
        buffer: str,
        spec: ValueSpec,
        block: str | None = None,
        value: str | None = None,
        parameter: tuple[str, str] | None = None,
    ) -> str:
        rows = spec.batch_axis == 0
        shape = (self.capacity, *map(int, spec.shape[1:])) if rows else tuple(map(int, spec.shape))
        self.buffers[buffer] = Buffer(spec.dtype, shape, rows, parameter)
        if block is not None and value is not None:
            self.name[block, value] = buffer
        return buffer

    def _condition(self) -> str:
        self._conditions += 1
        return f"c{self._conditions - 1}"

    def _always_reaches(self, name: str, target: str) -> bool:
        """Whether every row of block ``name`` comes to ``target``, so that nothing has to be asked."""
        sure = {target}
        for block in reversed(self.flow.blocks[self._index[name] : self._index[target]]):
            if all(isinstance(way, Edge) and way.target in sure for way in taken_ways(block)):
                sure.add(block.name)
        return name in sure


def _buffer_of(block: str, value: str) -> str:
    return f"{block}/{value}"


def _rows_of(block: str) -> str:
    return f"{block}:rows"


def _count_of(block: str) -> str:
    return f"{block}:count"


def _with_arms(route: Route, condition: str, targets: Sequence[int]) -> Route:
    """The route that also says which of several scopes to open: "if" knows 0 and 1, "switch" the index."""
    single = len(targets) == 1
    none = 0 if single else len(targets)
    arms = {target: 1 if single else index for index, target in enumerate(targets)}
    ways = tuple(
        PlannedWay(way.target, way.edge, way.exit, way.copies, arms.get(way.target, none))
        for way in route.ways
    )
    return Route(route.block, route.action, ways, route.rows, route.count, condition)


def _arrivals(flow: ControlFlow) -> dict[str, list[_Arrival]]:
    """Every block that rows can reach -> the edges into it, in program order."""
    found: dict[str, list[_Arrival]] = {flow.entry.name: []}
    for block in flow.blocks:  # in topological order: all edges into a block come before it
        if block.name in found:
            for position, way in enumerate(taken_ways(block)):
                if isinstance(way, Edge):
                    found.setdefault(way.target, []).append(_Arrival(block.name, position, way.values))
    return found


def _dominator_tree(flow: ControlFlow, arrivals: dict[str, list[_Arrival]]) -> dict[str, list[str]]:
    """Block -> the blocks that it immediately dominates, in program order.

    In an acyclic graph one sweep in topological order is enough: a block's immediate dominator is the
    nearest common one of its predecessors (Cooper, Harvey and Kennedy 2001, figure 3).
    """
    above: dict[str, str] = {}
    depth = {flow.entry.name: 0}
    children: dict[str, list[str]] = {name: [] for name in arrivals}
    for block in flow.blocks:
        edges = arrivals.get(block.name)
        if not edges:
            continue
        common = edges[0].source
        for edge in edges[1:]:
            other = edge.source
            while common != other:
                if depth[common] >= depth[other]:
                    common = above[common]
                else:
                    other = above[other]
        above[block.name], depth[block.name] = common, depth[common] + 1
        children[common].append(block.name)
    return children
