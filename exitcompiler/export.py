"""Exports modules with torch.export: a dynamic batch, functional operators, errors that say what to do."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from exitcompiler.blame import node_place
from exitcompiler.errors import UnsupportedModelError
from exitcompiler.fx_utils import extract_body
from exitcompiler.normal_form import normalise
from exitcompiler.program import BATCH, ValueSpec, torch_dtype
from exitcompiler.specialisation import find_specialisation

__all__ = ["MAX_BATCH", "abbreviated", "export_with_batch", "functional_graph", "trace_body"]

logger = logging.getLogger(__name__)

MAX_BATCH = 65_536
"""The largest batch that a captured graph promises to take."""


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

    def export(*, strict: bool = False) -> ExportedProgram:
        with torch.no_grad(), _quiet():
            return torch.export.export(
                module, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=strict
            )

    try:
        return export()
    except Exception as error:
        if _fixes_batch(error):
            # Python code may have done it, as len(x) does: the compiler of Python code in torch sees through.
            with contextlib.suppress(Exception):
                return export(strict=True)
        raise _explain(error, module, export) from error


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
                where=node_place(node),
                remedy="compute both ways and choose per row with torch.where",
            )
    normalise(graph)
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


def _explain(
    error: Exception, module: nn.Module, export: Callable[[], ExportedProgram]
) -> UnsupportedModelError:
    """Turn what torch.export raises into what the model does and what to do about it."""
    text = f"{type(error).__name__} {error}"
    where = _place(_frames(error), module)
    if any(sign in text for sign in ("DataDependent", "data-dependent", "Could not guard", "unbacked")):
        return UnsupportedModelError(
            "the model's control flow or a shape depends on the values of its input",
            where=where,
            remedy="rows of one batch would need different ways: choose per row with torch.where or a mask",
        )
    if _fixes_batch(error):
        return UnsupportedModelError(
            "the model's code fixes the batch size",
            where=_place(find_specialisation(export), module),
            remedy="read the batch size as x.shape[0]: a number, or a loop over the rows, fixes it",
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


def _fixes_batch(error: Exception) -> bool:
    return any(sign in f"{type(error).__name__} {error}" for sign in ("Constraints violated", "specialized"))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _place(frames: Iterable[tuple[Any, int]], module: nn.Module) -> str:
    """The innermost submodule among frames, and the line of its code; else the model's class."""
    paths = {id(child): path for path, child in module.named_modules()}
    place = type(module).__name__
    for frame, line in frames:
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
