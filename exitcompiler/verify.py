"""What a well-formed program is: checked after every pass."""

from __future__ import annotations

import torch
from torch import fx

from exitcompiler.control_flow_checks import verify_control_flow
from exitcompiler.controlflow import BATCH, ValueSpec
from exitcompiler.errors import VerifyError
from exitcompiler.program import Block, Program

__all__ = ["verify"]


def verify(program: Program) -> None:
    """Check that a program is well-formed: its control flow, and every body against its interface.

    A body has one placeholder per param and one output per result, in order and of the stated type;
    it is straight-line and functional: only operator calls, no in-place operator, no submodule call,
    and no symbolic size but those it computes from its own params.

    Raises:
        VerifyError: Naming the block and the node at fault.
    """
    verify_control_flow(program)
    for block in program.blocks:
        _verify_body(block)


def _verify_body(block: Block) -> None:
    where = f"block {block.name!r}"
    graph = block.body.graph
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        raise VerifyError(f"the body is not a well-formed graph: {error}", where=where) from error
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if [node.name for node in placeholders] != list(block.params):
        names = [node.name for node in placeholders]
        raise VerifyError(f"placeholders {names} differ from params {list(block.params)}", where=where)
    for node, spec in zip(placeholders, block.params.values(), strict=True):
        _verify_type(node, spec, where)
    outputs = graph.output_node().args[0]
    if not isinstance(outputs, tuple) or len(outputs) != len(block.results):
        raise VerifyError(f"the body's output is not a tuple of {len(block.results)} results", where=where)
    for name, value, spec in zip(block.results, outputs, block.results.values(), strict=True):
        if not isinstance(value, fx.Node) or value.name != name:
            raise VerifyError(f"result {name!r} is not the node of that name but {value}", where=where)
        _verify_type(value, spec, where)
    for node in graph.nodes:
        _verify_node(node, where)


def _verify_node(node: fx.Node, where: str) -> None:
    if node.op in ("call_module", "call_method"):
        raise VerifyError(f"node {node.name!r} is a {node.op}: bodies hold operator calls only", where=where)
    schema = getattr(node.target, "_schema", None)
    if node.op == "call_function" and schema is not None and schema.is_mutable:
        raise VerifyError(f"node {node.name!r} calls the in-place operator {node.target}", where=where)


def _verify_type(node: fx.Node, spec: ValueSpec, where: str) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise VerifyError(f"node {node.name!r} has no tensor type in meta['val']", where=where)
    found = (str(value.dtype).removeprefix("torch."), len(value.shape))
    if found != (spec.dtype, len(spec.shape)):
        raise VerifyError(f"node {node.name!r} is {found[0]} of rank {found[1]}, not {spec}", where=where)
    for size, expected in zip(value.shape, spec.shape, strict=True):
        if expected == BATCH:
            continue
        if not isinstance(size, int) or size != expected:
            raise VerifyError(f"node {node.name!r} has shape {tuple(value.shape)}, not {spec}", where=where)
