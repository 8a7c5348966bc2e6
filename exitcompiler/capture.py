"""Captures a trained model as a program of one block, or says why it cannot be one.

    capture(model, x)  ->  backbone(x: float32[batch, ...]):
                               ...
                               return (logits) at exit "backbone"

Rows of a batch take different exits later, so capture insists that a row's answer is its own: the
same for every batch size, neighbour, order and earlier call.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from exitcompiler.blame import find_failing_node, find_random_module, find_row_mixing, node_place
from exitcompiler.controlflow import RESERVED, OutputStructure
from exitcompiler.errors import InputError, UnsupportedModelError
from exitcompiler.export import MAX_BATCH, abbreviated, export_with_batch, functional_graph
from exitcompiler.fx_utils import extract_body, is_batch_size, node_spec, nodes_by_name
from exitcompiler.model_interface import (
    Example,
    as_tensors,
    bind_example,
    check_logits,
    sample_rows,
    select_logits,
)
from exitcompiler.naming import BACKBONE
from exitcompiler.program import Block, Program, Return, ValueSpec
from exitcompiler.row_independence import check_row_independence, take_rows, tolerance

__all__ = ["BACKBONE", "Captured", "Example", "capture", "load_exported"]

_RowFunction: TypeAlias = Callable[[Mapping[str, Tensor]], Any]


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Args:
        program: One block ``backbone`` whose params are the model's inputs, by its parameter names.
        structure: How the model hands over its logits.
    """

    program: Program
    structure: OutputStructure


def capture(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    example: Example | None = None,
    *,
    logits: str | int | None = None,
    max_batch: int = MAX_BATCH,
) -> Captured:
    """Capture a trained model as a program of one block.

    A module is copied first, and the copy set to ``eval()`` on the CPU; the original stays as it is.

    Args:
        model: A module; or an exported program, or the path of a ``.pt2`` file, with a dynamic batch.
        example: Rows of calibration data, batch first: a tensor, a tuple in the order of the model's
            parameters, or a dict by their names. One row is enough; more make the checks sharper. May
            be left out for an exported program that carries its own.
        logits: Which output holds the logits, for a model with several: its key or its index.
        max_batch: The largest batch size that the captured graph promises to take.

    Returns:
        The program, with the logits as its only output, and the structure they come in.

    Raises:
        UnsupportedModelError: The model branches on data, changes its state, is random, lets rows
            influence each other, fixes the batch size, or does not return float32 logits [batch, classes].
        CalibrationError: The example or the logits for it hold NaN or infinite values.
        InputError: The example does not fit the model's parameters.
    """
    if isinstance(model, str | os.PathLike):
        model = load_exported(Path(model))
    if isinstance(model, ExportedProgram):
        return _capture_exported(model, example, logits)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"a model is a torch.nn.Module, an ExportedProgram or a .pt2 file, not {type(model).__name__}"
        )
    module = _frozen_copy(model)
    inputs = bind_example(module, example)
    rows = sample_rows(inputs)

    def run(values: Mapping[str, Tensor]) -> Any:
        with torch.no_grad():
            return module(**{name: value.clone() for name, value in values.items()})

    def export() -> fx.GraphModule:
        two = take_rows(rows, (0, 1))
        return functional_graph(export_with_batch(module, (), two, max_batch=max_batch))

    return _capture_checked(module, run, export, inputs, logits)


def _capture_exported(
    exported: ExportedProgram, example: Example | None, logits: str | int | None
) -> Captured:
    from torch.export.passes import move_to_device_pass

    state = (*exported.state_dict.values(), *exported.constants.values())
    if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in state):
        exported = move_to_device_pass(exported, "cpu")
    graph = functional_graph(exported)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    _check_dynamic_batch(graph)
    if example is None:
        if exported.example_inputs is None:
            raise InputError("the exported program carries no example", remedy="pass example=")
        args, kwargs = exported.example_inputs
        example = dict(zip(names, pytree.tree_leaves((args, kwargs)), strict=True))
    inputs = as_tensors(example, names)
    if len(inputs) != len(names):
        raise InputError(f"the example lacks {[name for name in names if name not in inputs]}")

    def run(values: Mapping[str, Tensor]) -> Any:
        leaves = [values[name].clone() for name in names]
        in_spec = exported.call_spec.in_spec
        args, kwargs = pytree.tree_unflatten(leaves, in_spec)
        with torch.no_grad():
            return graph(*args, **kwargs)

    return _capture_checked(graph, run, lambda: graph, inputs, logits)


def _capture_checked(
    module: nn.Module,
    run: _RowFunction,
    export: Callable[[], fx.GraphModule],
    inputs: Mapping[str, Tensor],
    logits: str | int | None,
) -> Captured:
    """Check the model, export it, check the graph: the part that all kinds of models share."""
    rows = sample_rows(inputs)
    answer = _check_repeatable(module, run, rows)
    structure, chosen, key = select_logits(answer, logits)
    check_logits(chosen, rows)
    program = _one_block(export(), _leaf_index(answer, chosen), key)
    _check_program(program, lambda values: select_logits(run(values), logits)[1], inputs)
    return Captured(program, structure)


def load_exported(path: Path) -> ExportedProgram:
    """Read an exported program.

    Args:
        path: A ``.pt2`` file.

    Raises:
        InputError: There is none.
        UnsupportedModelError: It is not an exported program.
    """
    if not path.is_file():
        raise InputError(
            f"there is no file {path}", remedy="write one with torch.export.save(exported, path)"
        )
    try:
        return torch.export.load(path)
    except Exception as error:
        raise UnsupportedModelError(
            f"not a readable exported program: {error}",
            where=str(path),
            remedy="write it with torch.export.save, with this version of torch",
        ) from error


def _frozen_copy(model: nn.Module) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "a TorchScript module cannot be captured", remedy="pass the nn.Module that it was made from"
        )
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    original = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    try:
        module = copy.deepcopy(original)
        assert isinstance(module, nn.Module)
        return module.eval().requires_grad_(False).cpu()
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the model cannot be copied and frozen: {error}",
            remedy="run lazy modules once before; remove weight norm and other parametrizations",
        ) from error


def _check_repeatable(module: nn.Module, run: _RowFunction, rows: Mapping[str, Tensor]) -> Any:
    """Run the model and return its answer, having checked that running leaves no trace.

    The first run may fill caches; from then on nothing may change any more.
    """
    try:
        run(rows)
        before = _state(module)
        first = run(rows)
        changed = [name for name, value in _state(module).items() if before.get(name) != value]
        second = run(rows)
    except Exception as error:
        shapes = {name: f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for name, x in rows.items()}
        raise UnsupportedModelError(
            f"the model fails on the example: {error}",
            where=f"inputs {shapes}",
            remedy="give inputs with the shapes and dtypes that the model takes, batch first",
        ) from error
    if changed:
        raise UnsupportedModelError(
            f"the model changes its own state {abbreviated(changed)} when it runs",
            where=type(module).__name__,
            remedy="an answer must not depend on earlier calls: remove the update from forward()",
        )
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    if any(isinstance(a, Tensor) and not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        raise UnsupportedModelError(
            "the model is random: two runs on the same input differ",
            where=find_random_module(module, lambda: run(rows)),
            remedy="dropout that ignores eval() (training=True) or noise in forward() has to go",
        )
    return first


def _state(module: nn.Module) -> dict[str, object]:
    """What a run could leave behind: versions of parameters and buffers, plain attributes."""
    state: dict[str, object] = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            state[prefix + name] = None if tensor is None else (id(tensor), tensor._version)
        for name, value in vars(child).items():
            if isinstance(value, bool | int | float | str):
                state[prefix + name] = value
    return state


def _leaf_index(answer: Any, chosen: Tensor) -> int:
    return next(i for i, leaf in enumerate(pytree.tree_leaves(answer)) if leaf is chosen)


def _check_dynamic_batch(graph: fx.GraphModule) -> None:
    """Check that the batch, and nothing else, is dynamic in an exported program's inputs."""
    batch = None
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            continue
        where = f"input {node.target!r}"
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise UnsupportedModelError("inputs must be tensors", where=where)
        example = f'dynamic_shapes={{"{node.target}": {{0: torch.export.Dim("batch")}}}}'
        remedy = f"export again, all inputs sharing one Dim: torch.export.export(model, (x,), {example})"
        rows: Any = value.shape[0] if value.ndim else None
        if not is_batch_size(rows):
            raise UnsupportedModelError("its batch dimension is static", where=where, remedy=remedy)
        if any(not isinstance(size, int) for size in value.shape[1:]):
            raise UnsupportedModelError("only dim 0 may be dynamic", where=where, remedy=remedy)
        if batch is not None and rows.node.expr != batch:
            raise UnsupportedModelError(
                "its batch is another one than the first input's", where=where, remedy=remedy
            )
        batch = rows.node.expr


def _one_block(graph: fx.GraphModule, leaf: int, key: str) -> Program:
    """Cut the computation of the logits out of an exported graph, as a program."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    logits = pytree.tree_leaves(graph.graph.output_node().args[0])[leaf]
    if not isinstance(logits, fx.Node) or logits.op == "placeholder":
        raise UnsupportedModelError(
            "the logits do not depend on the input",
            where=f"output {key!r}",
            remedy="choose another output with logits=",
        )
    # FX keeps the parameter's name in `target` and renames the node where it shadows a builtin.
    inputs = {node.name: str(node.target) for node in placeholders}
    taken = RESERVED | set(inputs.values())
    rename = {name: f"{name}_value" for name in nodes_by_name(graph) if name not in inputs and name in taken}
    body = extract_body(graph, list(inputs), [logits.name], rename={**rename, **inputs})
    _check_symbols(body)
    params = {
        name: _require_spec(node) for name, node in nodes_by_name(body).items() if node.op == "placeholder"
    }
    (result,) = body.graph.output_node().all_input_nodes
    spec = _require_spec(result)
    end = Return((result.name,), BACKBONE)
    block = Block(BACKBONE, params, {result.name: spec}, end, body)
    return Program(params, {key: spec}, (block,))


def _require_spec(node: fx.Node) -> ValueSpec:
    spec = node_spec(node)
    if spec is None or spec.batch_axis != 0:
        raise UnsupportedModelError(
            f"dim 0 is not the batch, or another dim is not fixed: {list(node.meta['val'].shape)}",
            where=f"value {node.name!r}",
            remedy="rows must stay along dim 0",
        )
    return spec


def _check_symbols(body: fx.GraphModule) -> None:
    """Check that the batch is the only size that is not fixed."""
    batch: set[object] = set()
    for node in body.graph.nodes:
        values = pytree.tree_leaves(node.meta.get("val"))
        sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
        symbols: set[object] = set()
        symbols.update(*(size.node.expr.free_symbols for size in sizes if not isinstance(size, int)))
        if node.op == "placeholder":
            batch |= symbols
        elif not symbols <= batch:
            raise UnsupportedModelError(
                f"the shape of {node.name!r} depends on the values of the input",
                where=node_place(node),
                remedy="select positions with a mask (torch.where) instead of indexing with nonzero()",
            )


def _check_program(
    program: Program,
    reference: Callable[[Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
) -> None:
    """Compare the program with the model at batch 1 and 3, and its rows with one another."""
    block = program.entry
    (result,) = block.results

    def run(values: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return block.run(values)[result]

    def place(rows: Mapping[str, Tensor], batch: Sequence[int]) -> str | None:
        node = find_failing_node(block.body, rows, batch) or find_row_mixing(block.body, rows, batch)
        return None if node is None else node_place(node)

    check_row_independence(run, inputs, place)
    rows = sample_rows(inputs)
    for batch in ((0,), (0, 1, 1)):
        sample = take_rows(rows, batch)
        try:
            expected = reference(sample)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModelError(
                f"the model fails for a batch of {len(batch)}: {error}",
                where="forward()",
                remedy="it has to take any batch size: read it from the input (x.shape[0])",
            ) from error
        difference = float((run(sample) - expected).abs().max())
        if not difference <= tolerance(expected):
            raise UnsupportedModelError(
                f"the captured graph differs from the model by {difference:.3g} in a batch of {len(batch)}",
                where="forward()",
                remedy="something in forward() depends on more than the values of its inputs "
                "(the batch size, global state)",
            )
