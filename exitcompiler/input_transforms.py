"""What comes before a network of a cascade: sizes, normalisation and the like, as a part of its graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from exitcompiler.errors import InputError, UnsupportedModelError
from exitcompiler.export import export_with_batch, functional_graph
from exitcompiler.function_module import FunctionModule
from exitcompiler.fx_utils import compose_bodies, extract_body, node_spec, nodes_by_name, result_nodes
from exitcompiler.model_interface import sample_rows
from exitcompiler.program import Block, Program
from exitcompiler.row_independence import check_row_independence, take_rows, tolerance

__all__ = ["Transform", "apply_transform", "compose_transform"]

Transform: TypeAlias = Callable[..., Any]
"""From the cascade's input tensors, in order, to a network's: one tensor, or a tuple of them."""

_WHERE: Final = "its transform"


def apply_transform(transform: Transform, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What a transform makes of some rows.

    Args:
        transform: A function or module; a module's mode stays as it is.
        inputs: The cascade's inputs by name, in order.

    Returns:
        The network's inputs, in order.

    Raises:
        InputError: It fails, or gives no tensors with a row for every row.
        UnsupportedModelError: It is random.
    """
    transform = _frozen(transform)
    made, again = _apply(transform, inputs), _apply(transform, inputs)
    if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(made, again, strict=True)):
        raise UnsupportedModelError(
            "it is random: two runs on the same rows differ",
            where=_WHERE,
            remedy="augmentation belongs to training: leave it out",
        )
    return made


def _frozen(transform: Transform) -> Transform:
    if not isinstance(transform, nn.Module):
        return transform
    return copy.deepcopy(transform).eval().requires_grad_(requires_grad=False).cpu()


def _apply(transform: Transform, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    rows = next(iter(inputs.values())).shape[0]
    try:
        with torch.no_grad():
            made = transform(*(value.clone() for value in inputs.values()))
    except Exception as error:
        raise InputError(
            f"it fails on the example: {type(error).__name__}: {error}",
            where=_WHERE,
            remedy=f"it gets a batch of each of {list(inputs)}, as tensors",
        ) from error
    tensors = tuple(made) if isinstance(made, tuple | list) else (made,)
    if not tensors or not all(isinstance(value, Tensor) for value in tensors):
        raise InputError(
            f"it returns {type(made).__name__}",
            where=_WHERE,
            remedy="return a tensor, or a tuple of tensors in the order of the network's parameters",
        )
    wrong = [list(value.shape) for value in tensors if not value.ndim or value.shape[0] != rows]
    if wrong:
        raise InputError(
            f"it makes shapes {wrong} out of {rows} rows", where=_WHERE, remedy="rows stay along dim 0"
        )
    return tensors


def compose_transform(transform: Transform, program: Program, inputs: Mapping[str, Tensor]) -> Program:
    """Put a transform in front of a captured network.

    ::

        backbone(x) -> (y)   =>   backbone(image) -> (y): x = transform(image); ...

    Args:
        transform: From the cascade's inputs to the network's.
        program: The network, one block.
        inputs: Rows of the cascade's inputs by name, in order.

    Returns:
        One block that takes all of the cascade's inputs.

    Raises:
        UnsupportedModelError: The transform cannot be captured, or lets rows influence each other.
        InputError: It does not give one tensor per input of the network.
    """
    transform = _frozen(transform)
    whole = program.entry
    body = _compose(_capture(transform, inputs), whole)
    nodes = nodes_by_name(body)
    params = {name: spec for name in inputs if (spec := node_spec(nodes[name])) is not None}
    composed = Program(
        params, program.outputs, (Block(whole.name, params, whole.results, whole.terminator, body),)
    )
    _check(transform, program, composed, inputs)
    return composed


def _capture(transform: Transform, inputs: Mapping[str, Tensor]) -> fx.GraphModule:
    """The transform as a body with a param for every input of the cascade, and a result for each value."""
    samples = tuple(take_rows(sample_rows(inputs), (0, 1)).values())
    graph = functional_graph(export_with_batch(FunctionModule(transform, list(inputs)), samples, {}))
    names = {node.name: str(node.target) for node in graph.graph.nodes if node.op == "placeholder"}
    outputs = [node.name for node in pytree.tree_leaves(graph.graph.output_node().args)]
    body = extract_body(graph, list(names), outputs, rename=names)
    for node in body.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # exits are named after the network's modules
    # What a function has at hand outside of its arguments is still the caller's.
    for path, value in (*body.named_parameters(), *body.named_buffers()):
        owner, _, name = path.rpartition(".")
        mine = value.detach().clone()
        if isinstance(value, nn.Parameter):
            mine = nn.Parameter(mine, requires_grad=False)
        setattr(body.get_submodule(owner), name, mine)
    return body


def _compose(first: fx.GraphModule, network: Block) -> fx.GraphModule:
    values = [node.name for node in result_nodes(first)]
    if len(values) != len(network.params):
        raise InputError(
            f"it makes {len(values)} tensors for a network that takes {list(network.params)}", where=_WHERE
        )
    return compose_bodies(
        first, network.body, dict(zip(network.params, values, strict=True)), list(network.results)
    )


def _check(transform: Transform, network: Program, composed: Program, inputs: Mapping[str, Tensor]) -> None:
    """Compare with the transform as it is, followed by the network; and rows with one another."""
    (result,) = composed.entry.results

    def run(values: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return composed.entry.run(values)[result]

    check_row_independence(run, inputs)
    rows = sample_rows(inputs)
    for batch in ((0,), (0, 1, 1)):
        sample = take_rows(rows, batch)
        made = _apply(transform, sample)
        with torch.no_grad():
            expected = network.entry.run(dict(zip(network.inputs, made, strict=True)))[result]
        difference = float((run(sample) - expected).abs().max())
        if not difference <= tolerance(expected):
            raise UnsupportedModelError(
                f"captured, it changes the logits by {difference:.3g} in a batch of {len(batch)}",
                where=_WHERE,
                remedy="it has to be made of tensor operations, and to depend on nothing but its arguments",
            )
