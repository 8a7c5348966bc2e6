"""Programs that take one chosen way, for parity checks and for the latency of each exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exitcompiler.controlflow import (
    Branch,
    ConstantGate,
    ControlFlow,
    Gate,
    Return,
    Successor,
    successors,
)
from exitcompiler.errors import InputError

__all__ = ["force_exit"]


def force_exit(flow: ControlFlow, exit_name: str, route: Sequence[str] | None = None) -> ControlFlow:
    """The same program with gates that send every row to one exit.

    Gates keep their kind and shape, so the same engines run it: a linear gate gets zero weights and a
    bias that picks its action.

    Args:
        flow: The program.
        exit_name: One of ``flow.exits``.
        route: The blocks to pass, from the first one to that with the exit; None: the first ways that lead
            there.

    Raises:
        InputError: There is no such exit, or no such route to it.
    """
    actions = _actions_to(flow, exit_name) if route is None else _actions_along(flow, exit_name, route)
    blocks = []
    for block in flow.blocks:
        action, terminator = actions.get(block.name), block.terminator
        if action is not None and isinstance(terminator, Branch):
            terminator = replace(terminator, gate=_always(terminator.gate, action))
        blocks.append(replace(block, terminator=terminator))
    return replace(flow, blocks=tuple(blocks))


def _always(gate: Gate, action: int) -> Gate:
    if isinstance(gate, ConstantGate):
        return replace(gate, action=action)
    return replace(
        gate,
        weight=tuple(tuple(0.0 for _ in row) for row in gate.weight),
        bias=tuple(float(i == action) for i in range(gate.actions)),
    )


def _actions_along(flow: ControlFlow, exit_name: str, route: Sequence[str]) -> dict[str, int]:
    """The action to take in each block of a route."""
    blocks = {block.name: block for block in flow.blocks}
    actions: dict[str, int] = {}
    for name, following in zip(route, (*route[1:], exit_name), strict=True):
        ways = successors(blocks[name].terminator) if name in blocks else ()
        names = [way.exit if isinstance(way, Return) else way.target for way in ways]
        if following not in names:
            raise InputError(
                f"no way leads from block {name!r} to {following!r}",
                where="route",
                remedy=f"ways lead to {names}" if names else f"blocks: {', '.join(blocks)}",
            )
        actions[name] = names.index(following)
    if not route or route[0] != flow.entry.name:
        raise InputError(f"a route starts at block {flow.entry.name!r}", where="route")
    return actions


def _actions_to(flow: ControlFlow, exit_name: str) -> dict[str, int]:
    """The action to take in each block from which the exit can be reached."""

    def leads(way: Successor) -> bool:
        return way.exit == exit_name if isinstance(way, Return) else way.target in actions

    actions: dict[str, int] = {}
    for block in reversed(flow.blocks):
        chosen = next((i for i, way in enumerate(successors(block.terminator)) if leads(way)), None)
        if chosen is not None:
            actions[block.name] = chosen
    if flow.entry.name not in actions:
        raise InputError(
            f"there is no exit {exit_name!r}", where="exit", remedy=f"choose one of {list(flow.exits)}"
        )
    return actions
