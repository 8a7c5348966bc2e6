"""The readable text form of programs: what ``print(program)`` shows and what tests compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import fx

from exitcompiler.controlflow import (
    Branch,
    ConstantGate,
    Gate,
    Jump,
    Return,
    Successor,
    Terminator,
    ValueSpec,
)
from exitcompiler.program import Block, Program

__all__ = ["print_program"]


def print_program(program: Program, *, bodies: bool = False) -> str:
    """The text form of a program.

    Args:
        program: Any program, well-formed or not.
        bodies: Print every operator; else a summary such as ``3 conv2d, 2 relu``.

    Returns:
        Several lines, deterministic, without a trailing newline::

            program (x: float32[batch, 4]) -> (logits: float32[batch, 2])
            stem(x: float32[batch, 4]) -> (h: float32[batch, 8]):
                1 linear, 1 relu
                branch [confidence] . [[9, 0, 0], [0, 0, 0]] + [-7, 0]:
                    return "stem" (logits)
                    rest(h)
    """
    lines = [f"program {_signature(program.inputs, program.outputs)}"]
    for block in program.blocks:
        lines.append(f"{block.name}{_signature(block.params, block.results)}:")
        lines.extend("    " + line for line in (*_body(block, bodies), *_terminator(block.terminator)))
    return "\n".join(lines)


def _signature(params: Mapping[str, ValueSpec], results: Mapping[str, ValueSpec]) -> str:
    return f"({_specs(params)}) -> ({_specs(results)})"


def _specs(specs: Mapping[str, ValueSpec]) -> str:
    return ", ".join(f"{name}: {spec}" for name, spec in specs.items())


def _body(block: Block, full: bool) -> Iterator[str]:
    calls = [node for node in block.body.graph.nodes if node.op.startswith("call_")]
    if full:
        for node in calls:
            yield f"{node.name} = {_operator(node)}({_arguments(node)})"
    elif calls:
        counts = Counter(_operator(node) for node in calls)
        yield ", ".join(f"{n} {op}" for op, n in counts.most_common())


def _operator(node: fx.Node) -> str:
    name = (
        str(node.target)
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
    )
    return name.removesuffix(".default")


def _arguments(node: fx.Node) -> str:
    positional = [str(argument) for argument in node.args]
    return ", ".join(positional + [f"{key}={value}" for key, value in node.kwargs.items()])


def _terminator(terminator: Terminator) -> Iterator[str]:
    match terminator:
        case Return():
            yield _successor(terminator)
        case Jump(edge):
            yield f"jump {_successor(edge)}"
        case Branch(gate, edges):
            yield f"branch {_gate(gate)}:"
            for way in edges:
                yield f"    {_successor(way)}"


def _successor(way: Successor) -> str:
    values = ", ".join(way.values)
    return f'return "{way.exit}" ({values})' if isinstance(way, Return) else f"{way.target}({values})"


def _gate(gate: Gate) -> str:
    if isinstance(gate, ConstantGate):
        return f"always {gate.action}"
    rows = ", ".join(_numbers(row) for row in gate.weight)
    return f"[{', '.join(gate.reads)}] . [{rows}] + {_numbers(gate.bias)}"


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"
