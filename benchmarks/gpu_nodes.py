"""What a conditional node costs: chains of our own kernels with and without them, as plans of the project.

Every chain begins with one ``route`` kernel, the smallest thing that can set a condition; so a chain of no
conditional nodes is one kernel. What a node costs is the slope over 0, 1, 8 and 64 nodes, above a plain chain
of as many kernels as really run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from gpu_lab import Contender, Lab, device_times, in_turns

from exitcompiler.errors import ExitCompilerError
from exitcompiler.runtime.cuda_graphs import BuiltGraph, build
from exitcompiler.runtime.graph_plan import (
    COUNT,
    EDGE,
    EXIT_INDEX,
    LEFT,
    NEXT,
    POSITION,
    Buffer,
    Conditional,
    Plan,
    PlannedWay,
    Route,
    Scope,
)

__all__ = [
    "COUNTS",
    "FLAT",
    "INSIDE",
    "NESTED",
    "chain_plan",
    "fit_slope",
    "measure_nodes",
    "node_costs",
    "state_of_one_row",
]

COUNTS: Final = (0, 1, 8, 64)
BODIES: Final = 6
"""Of a SWITCH: as many as there are buckets for up to 32 rows."""

_Chain: TypeAlias = Callable[[int], Scope]
_Chains: TypeAlias = Mapping[str, tuple[_Chain, Callable[[int], int]]]
"""Name -> chain of so many nodes, and how many kernels it runs besides the first one."""


def _route(condition: str | None = None, arm: int = 0) -> Route:
    """The kernel, for one row that leaves; sets a condition to ``arm`` where it has one."""
    way = PlannedWay(target=LEFT, edge=0, exit=0, copies=(), arm=arm)
    return Route("a", None, (way,), None, COUNT, condition)


def _plain(nodes: int) -> Scope:
    return (_route(),) * (nodes + 1)


def _ifs(taken: bool) -> _Chain:
    def chain(nodes: int) -> Scope:
        scope: list[Any] = [_route()]
        for i in range(nodes):
            scope += [_route(f"c{i}", int(taken)), Conditional("if", f"c{i}", ((_route(),),))]
        return tuple(scope)

    return chain


def _switches(taken: bool) -> _Chain:
    def chain(nodes: int) -> Scope:
        scope: list[Any] = [_route()]
        for i in range(nodes):
            arm = i % BODIES if taken else BODIES
            scope += [_route(f"c{i}", arm), Conditional("switch", f"c{i}", ((_route(),),) * BODIES)]
        return tuple(scope)

    return chain


def _nested(taken: bool) -> _Chain:
    """IF in IF; where they are taken all are, where not the outermost one is not."""

    def chain(nodes: int) -> Scope:
        scope: Scope = (_route(),)
        for i in reversed(range(nodes)):
            scope = (_route(f"c{i}", int(taken)), Conditional("if", f"c{i}", (scope,)))
        return scope

    return chain


FLAT: Final[_Chains] = {
    "IF, not taken": (_ifs(False), lambda nodes: nodes),
    "IF, taken": (_ifs(True), lambda nodes: 2 * nodes),
    "SWITCH, not taken": (_switches(False), lambda nodes: nodes),
    "SWITCH, taken": (_switches(True), lambda nodes: 2 * nodes),
}
"""One after another."""
NESTED: Final[_Chains] = {"IF in IF, all taken": (_nested(True), lambda nodes: nodes)}
"""One in another."""
INSIDE: Final = "IF in IF, inside one that is not taken"
"""Slope over the nodes inside an IF that is not taken: what a skipped part costs by its size."""


def chain_plan(scope: Scope) -> Plan:
    """A plan for one row around some steps."""
    row = Buffer("int32", (1,), rows=True)
    buffers = dict.fromkeys((NEXT, EDGE, POSITION, EXIT_INDEX), row)
    buffers[COUNT] = Buffer("int32", (1,), rows=False)
    return Plan(1, ("a",), ("a",), buffers, (), (), scope)


class _Launch:
    """One chain as a contender: it reads nothing."""

    def __init__(self, lab: Lab, graph: BuiltGraph) -> None:
        self._lab = lab
        self._graph = graph

    def stage(self, x: npt.NDArray[np.float32]) -> None:
        """See `Contender`: there is nothing to bring."""

    def launch(self) -> None:
        """See `Contender`."""
        self._graph.launch(self._lab.stream)


def measure_nodes(lab: Lab, chains: _Chains, counts: tuple[int, ...] = COUNTS) -> dict[str, Any]:
    """Microseconds by kind of conditional node; what cannot be built is told with its reason.

    Args:
        lab: Where.
        chains: `FLAT`, or `NESTED`: then also what is inside a node that is not taken.
        counts: Conditional nodes of the chains, at least two different numbers.
    """
    addresses = state_of_one_row(lab)
    module = lab.driver.load_module(lab.compile_image(lab.driver.architecture))
    lab.owned.callback(lab.driver.unload_module, module)
    scopes = dict(_scopes(chains, counts))
    contenders: dict[str, Contender] = {}
    refused: dict[str, str] = {}
    for name, scope in scopes.items():
        try:
            graph = build(chain_plan(scope), lab.driver, addresses, {}, module)
        except ExitCompilerError as error:
            refused[name] = str(error)
            continue
        lab.owned.callback(graph.close)
        contenders[name] = _Launch(lab, graph)
    nothing = [np.zeros(1, np.float32)]
    times = in_turns(lab, contenders, nothing, device_times(lab))
    median_us = {name: float(np.median(found)) for name, found in times.items()}
    return {"counts": list(counts), "refused": refused, **_costs(chains, counts, median_us)}


def _costs(chains: _Chains, counts: tuple[int, ...], median_us: Mapping[str, float]) -> dict[str, Any]:
    plain_us = {int(name.split()[1]): t for name, t in median_us.items() if name.startswith("plain ")}
    found: dict[str, Any] = {}
    for kind, (_, kernels) in chains.items():
        chain_us = {
            n: median_us[f"{kind} {n}"]
            for n in counts
            if f"{kind} {n}" in median_us and kernels(n) in plain_us
        }
        if len(chain_us) > 1:
            found[kind] = node_costs(chain_us, plain_us, {n: kernels(n) for n in chain_us})
    inside_us = {n: median_us[f"{INSIDE} {n}"] for n in counts if n and f"{INSIDE} {n}" in median_us}
    if len(inside_us) > 1:
        slope_us, _ = fit_slope(list(inside_us), list(inside_us.values()))
        found[INSIDE] = {"us_per_node": slope_us, "chain_us": {str(n): t for n, t in inside_us.items()}}
    kernel_us, launch_us = fit_slope(list(plain_us), list(plain_us.values()))
    return {"kinds": found, "us_per_kernel": kernel_us, "us_of_a_launch": launch_us}


def _scopes(chains: _Chains, counts: tuple[int, ...]) -> Iterator[tuple[str, Scope]]:
    sizes = {0} | {kernels(n) for _, kernels in chains.values() for n in counts}
    for size in sorted(sizes):
        yield f"plain {size}", _plain(size)
    for kind, (chain, _) in chains.items():
        for n in counts:
            yield f"{kind} {n}", chain(n)
    for n in counts if chains is NESTED else ():
        yield f"{INSIDE} {n}", _nested(False)(n)


def fit_slope(counts: Sequence[float], times_us: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the straight line that fits best (least squares).

    Args:
        counts: How many nodes, at least two different numbers.
        times_us: Microseconds.
    """
    slope, intercept = np.polyfit(np.asarray(counts, np.float64), np.asarray(times_us, np.float64), 1)
    return float(slope), float(intercept)


def node_costs(
    chain_us: Mapping[int, float], matched_us: Mapping[int, float], kernels: Mapping[int, int]
) -> dict[str, Any]:
    """What one conditional node costs: the slope of chains with them above the same kernels without.

    Args:
        chain_us: Conditional nodes -> time of the chain.
        matched_us: Kernels -> time of a plain chain of as many.
        kernels: Conditional nodes -> how many kernels their chain runs.

    Returns:
        ``us_per_node``; ``chain_us``, ``matched_us`` and ``above_us`` by the number of nodes.
    """
    above_us = {n: chain_us[n] - matched_us[kernels[n]] for n in chain_us}
    slope_us, _ = fit_slope(list(above_us), list(above_us.values()))
    return {
        "us_per_node": slope_us,
        "chain_us": {str(n): chain_us[n] for n in chain_us},
        "matched_us": {str(n): matched_us[kernels[n]] for n in chain_us},
        "above_us": {str(n): value for n, value in above_us.items()},
    }


def state_of_one_row(lab: Lab) -> dict[str, int]:
    """The numbers that a route reads and writes."""
    names = (NEXT, EDGE, POSITION, EXIT_INDEX, COUNT)
    start = lab.driver.malloc(256 * len(names))
    lab.owned.callback(lab.driver.free, start)
    addresses = {name: start + 256 * i for i, name in enumerate(names)}
    lab.driver.fill(start, 0, 256 * len(names), lab.stream)
    lab.driver.set_word(addresses[COUNT], 1, lab.stream)
    lab.wait()
    return addresses
