"""The oracle: a slow, obvious interpreter with per-row meaning. Every executor is tested against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exitcompiler.controlflow import Branch, ConstantGate, Gate, Jump, Return, Successor, Terminator
from exitcompiler.errors import InputError
from exitcompiler.program import Program

__all__ = ["Interpretation", "choose_action", "interpret"]


@dataclass(frozen=True)
class Interpretation:
    """What a program did with a batch.

    Args:
        outputs: Output name -> ``[batch, ...]``.
        exit_index: ``int32 [batch]`` into ``program.exits``.
        path: Per row, the names of the blocks it went through.
    """

    outputs: dict[str, torch.Tensor]
    exit_index: np.ndarray[tuple[int], np.dtype[np.int32]]
    path: tuple[tuple[str, ...], ...]


@torch.no_grad()
def interpret(program: Program, inputs: Mapping[str, torch.Tensor]) -> Interpretation:
    """Run every row on its own, in a batch of one, from the entry to a return.

    Args:
        program: A well-formed program.
        inputs: Input name -> tensor of the stated type; all with the same number of rows, at least one.

    Raises:
        InputError: Names or numbers of rows do not fit.
    """
    if inputs.keys() != program.inputs.keys():
        raise InputError(f"inputs {sorted(inputs)} given, {sorted(program.inputs)} expected")
    counts = {len(tensor) for tensor in inputs.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"all inputs need the same number of rows, at least one; got {sorted(counts)}")
    rows = [
        _interpret_row(program, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
        for row in range(counts.pop())
    ]
    outputs = {
        name: torch.cat([values[position] for values, _, _ in rows])
        for position, name in enumerate(program.outputs)
    }
    exits = {name: index for index, name in enumerate(program.exits)}
    exit_index = np.array([exits[left] for _, left, _ in rows], np.int32)
    return Interpretation(outputs, exit_index, tuple(path for _, _, path in rows))


def _interpret_row(
    program: Program, values: Mapping[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], str, tuple[str, ...]]:
    block = program.entry
    path: list[str] = []
    while True:
        path.append(block.name)
        values = {**values, **block.run(values)}
        way = _next(block.terminator, values)
        bound = tuple(values[name] for name in way.values)
        if isinstance(way, Return):
            return bound, way.exit, tuple(path)
        block = program.block(way.target)
        values = dict(zip(block.params, bound, strict=True))


def _next(terminator: Terminator, values: Mapping[str, torch.Tensor]) -> Successor:
    match terminator:
        case Return():
            return terminator
        case Jump(edge):
            return edge
        case Branch(gate, edges):
            return edges[choose_action(gate, [values[name] for name in gate.reads])]


def choose_action(gate: Gate, reads: Sequence[torch.Tensor]) -> int:
    """The action a gate takes for one row: the highest score, a tie goes to the lowest index.

    Args:
        gate: Any gate.
        reads: The values it reads, each ``float32 [1, n]``.
    """
    if isinstance(gate, ConstantGate):
        return gate.action
    features = torch.cat(list(reads), dim=1)[0]
    scores = torch.tensor(gate.weight) @ features + torch.tensor(gate.bias)
    return int(np.argmax(scores.numpy()))  # numpy promises the first of equals
