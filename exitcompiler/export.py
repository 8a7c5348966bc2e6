"""Exports modules with torch.export: a dynamic batch, functional operators, errors that say what to do."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from exitcompiler.errors import UnsupportedModelError
from exitcompiler.fx_utils import extract_body
from exitcompiler.program import BATCH, ValueSpec, torch_dtype

__all__ = ["MAX_BATCH", "abbreviated", "export_with_batch", "functional_graph", "module_path", "trace_body"]

logger = logging.getLogger(__name__)

MAX_BATCH = 65_536
"""The largest batch that a captured graph promises to take."""

_aten = torch.ops.aten
_FILLS: dict[object, int | None] = {
    _aten.zeros_like.default: 0,
    _aten.ones_like.default: 1,
    _aten.full_like.default: None,
    _aten.new_zeros.default: 0,
    _aten.new_ones.default: 1,
    _aten.new_full.default: None,
}
"""Operators that use a tensor's shape and dtype alone -> what they fill in (None: an argument)."""


def export_with_batch(
    module: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], *, max_batch: int = MAX_BATCH
) -> ExportedProgram:
    """Export a module with dim 0 of every input as one shared dynamic batch.

    Args:
        module: In ``eval()`` mode, parameters frozen.
        args: Positional samples, two rows each (torch.export specialises on 0 and 1).
        kwargs: Samples by parameter name, two rows each.
        max_batch: The largest batch size promised.

    Raises:
        UnsupportedModelError: The module cannot be exported; says where and what to do.
    """
    batch = Dim(BATCH, min=1, max=max_batch)
    names = _parameter_names(module, len(args))
    dims: dict[str, Any] = {name: {0: batch} for name in (*names, *kwargs)}
    shapes: Any = dims if args == () or names else tuple({0: batch} for _ in args)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _explain(error, module) from error


def functional_graph(exported: ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program: functional, without guards, parameters as ``get_attr``.

    Raises:
        UnsupportedModelError: The program changes its buffers, or chooses its way by a value.
    """
    with torch.no_grad(), _quiet():
        functional = exported.run_decompositions({})
    mutated = sorted(set(functional.graph_signature.buffers_to_mutate.values()))
    if mutated:
        raise UnsupportedModelError(
            f"the model changes its own buffers {abbreviated(mutated)} when it runs",
            remedy="an answer must not depend on earlier calls: remove the update, or call model.eval() "
            "before exporting if it belongs to training",
        )
    with _quiet():
        graph = functional.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    for node in graph.graph.nodes:
        if node.target in (torch.ops.higher_order.cond, torch.ops.higher_order.while_loop):
            raise UnsupportedModelError(
                f"{node.target} takes one way for the whole batch",
                where=module_path(node),
                remedy="compute both ways and choose per row with torch.where",
            )
    _detach_fills(graph)
    return graph


def trace_body(module: nn.Module, params: Mapping[str, ValueSpec], results: Sequence[str]) -> fx.GraphModule:
    """Make a body out of a module, for example an exit head.

    Args:
        module: Takes one tensor per param, in order; returns a tensor, or a tuple with one per result.
            Left as it is but for ``eval()``; its parameters are shared.
        params: Name -> type of what it takes; all with a batch.
        results: Names for what it returns.

    Raises:
        UnsupportedModelError: The module cannot be exported.
    """
    samples = tuple(torch.zeros((2, *map(int, s.shape[1:])), dtype=torch_dtype(s)) for s in params.values())
    exported = export_with_batch(module.eval(), samples, {})
    graph = functional_graph(exported)
    placeholders = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    outputs = [node.name for node in graph.graph.output_node().all_input_nodes]
    rename = dict(zip((*placeholders, *outputs), (*params, *results), strict=True))
    return extract_body(graph, placeholders, outputs, rename=rename)


def module_path(node: fx.Node) -> str | None:
    """The module that a node was captured in, as ``module 'layer1.0'``; None where that is unknown."""
    stack = node.meta.get("nn_module_stack")
    paths = [path for path, _ in stack.values() if path] if stack else []
    return f"module {paths[-1]!r}" if paths else None


def abbreviated(names: Sequence[str], shown: int = 3) -> str:
    """The first few of a list of names, and how many there are besides."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


def _quiet() -> warnings.catch_warnings[None]:
    # torch warns about its own deprecations while it exports; the user can do nothing about them.
    return warnings.catch_warnings(action="ignore")


def _parameter_names(module: nn.Module, count: int) -> tuple[str, ...]:
    """Names of the first ``count`` parameters of ``forward``; empty where it takes ``*args``."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ()
    return tuple(p.name for p in parameters[:count])


def _detach_fills(graph: fx.GraphModule) -> None:
    """Rewrite ``zeros_like(x)`` and its kin to ``full(sizes)``, so that they do not count as using ``x``."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _FILLS:
            continue
        value = node.meta["val"]
        fill = _FILLS[node.target]
        with graph.graph.inserting_before(node):
            if "_like" in node.target.name():
                sizes = [_size(graph, node.args[0], axis) for axis in range(value.ndim)]
                fill = node.args[1] if fill is None else fill
            else:
                sizes = list(node.args[1])
                fill = node.args[2] if fill is None else fill
            options = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
            full = graph.graph.call_function(_aten.full.default, (sizes, fill), options)
        full.meta = dict(node.meta)
        node.replace_all_uses_with(full)
        graph.graph.erase_node(node)
    graph.graph.lint()


def _size(graph: fx.GraphModule, source: fx.Node, axis: int) -> int | fx.Node:
    size = source.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    node = graph.graph.call_function(_aten.sym_size.int, (source, axis))
    node.meta["val"] = size
    return node


def _explain(error: Exception, module: nn.Module) -> UnsupportedModelError:
    """Turn what torch.export raises into what the model does and what to do about it."""
    text = f"{type(error).__name__} {error}"
    where = _place(error, module)
    if any(sign in text for sign in ("DataDependent", "data-dependent", "Could not guard", "unbacked")):
        return UnsupportedModelError(
            "the model's control flow or a shape depends on the values of its input",
            where=where,
            remedy="rows of one batch would need different ways: choose per row with torch.where or a mask",
        )
    if "Constraints violated" in text or "specialized" in text:
        return UnsupportedModelError(
            "the model's code fixes the batch size",
            where=where,
            remedy="read the batch size from the input: x.view(x.shape[0], -1) instead of a number",
        )
    if "assigned during export" in text:
        return UnsupportedModelError(
            f"the model changes its own state: {_first_line(error)}",
            where=where,
            remedy="an answer must not depend on earlier calls: do not assign attributes in forward()",
        )
    return UnsupportedModelError(
        f"torch.export cannot capture the model: {type(error).__name__}: {_first_line(error)}",
        where=where,
        remedy="make torch.export.export(model, (x,)) work, or hand over an ExportedProgram",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _place(error: BaseException, module: nn.Module) -> str | None:
    """The innermost submodule, and the line of its code, in which an error arose."""
    paths = {id(child): path for path, child in module.named_modules()}
    place = None
    for frame, line in _frames(error):
        owner = frame.f_locals.get("self")
        path = paths.get(id(owner))
        if path is None or frame.f_code.co_name != "forward" or not isinstance(owner, nn.Module):
            continue
        shown = f"module {path!r}" if path else type(owner).__name__
        place = f"{shown} ({Path(frame.f_code.co_filename).name}:{line})"
    return place


def _frames(error: BaseException | None) -> Iterator[tuple[Any, int]]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for one in chain:
        trace = one.__traceback__
        while trace is not None:
            yield trace.tb_frame, trace.tb_lineno
            trace = trace.tb_next
