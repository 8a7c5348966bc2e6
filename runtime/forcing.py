"""Programs that take one chosen way, for parity checks and for the latency of each exit."""

from __future__ import annotations

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


def force_exit(flow: ControlFlow, exit_name: str) -> ControlFlow:
    """The same program with gates that send every row to one exit.

    Gates keep their kind and shape, so the same engines run it: a linear gate gets zero weights and a
    bias that picks its action.

    Args:
        flow: The program.
        exit_name: One of ``flow.exits``.

    Raises:
        InputError: There is no such exit.
    """
    actions = _actions_to(flow, exit_name)
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
