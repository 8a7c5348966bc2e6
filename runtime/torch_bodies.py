"""Blocks in torch: a body and the gate after it; bodies moved to another device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.fx.node import map_aggregate

from exitcompiler.controlflow import ACTION, GATE_BIAS, GATE_WEIGHT, BlockInterface, Branch, LinearGate

__all__ = ["Body", "Place", "move_body", "place_of", "run_block"]

Body: TypeAlias = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""A block's body: its params, in order, to its results, in order."""

Place: TypeAlias = "tuple[object, ...]"


def run_block(
    block: BlockInterface, body: Body, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run a block's body and, where it ends in a linear gate, the gate.

    Args:
        block: Tells what the gate reads.
        body: Its body.
        inputs: Its params, and the gate's weight and bias.

    Returns:
        Params and results by name, and the gate's decision as ``ACTION``, ``int64[batch]``: on a GPU whoever
        stores it casts it on the way.
    """
    values = {name: inputs[name] for name in block.params}
    values.update(zip(block.results, body(list(values.values())), strict=True))
    terminator = block.terminator
    if isinstance(terminator, Branch) and isinstance(terminator.gate, LinearGate):
        reads = [values[name] for name in terminator.gate.reads]
        features = reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)
        # Not a product of matrices, which PyTorch may be told to compute in TF32.
        scores = (features.unsqueeze(1) * inputs[GATE_WEIGHT]).sum(dim=2) + inputs[GATE_BIAS]
        values[ACTION] = scores.argmax(dim=1)  # the first of equals
    return values


def move_body(
    body: fx.GraphModule, device: torch.device, moved: MutableMapping[Place, torch.Tensor]
) -> fx.GraphModule:
    """A copy of a body whose tensors lie on a device, and whose operators make theirs there.

    Args:
        body: Left as it is.
        device: Where to.
        moved: Tensors that are there already, by `place_of` the originals, so that bodies with the same
            weights share them; new ones are added.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    names: dict[str, str] = {}
    for node in body.graph.nodes:
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr":
            copy.target = names.setdefault(str(node.target), f"tensor_{len(names)}")
            root.register_buffer(copy.target, _moved(_attribute(body, str(node.target)), device, moved))
        elif node.op == "call_function":
            copy.args, copy.kwargs = map_aggregate(
                (copy.args, copy.kwargs),
                lambda argument: device if isinstance(argument, torch.device) else argument,
            )
    return fx.GraphModule(root, graph)


def _attribute(body: fx.GraphModule, target: str) -> Any:
    value: Any = body
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _moved(
    tensor: torch.Tensor, device: torch.device, moved: MutableMapping[Place, torch.Tensor]
) -> torch.Tensor:
    place = place_of(tensor)
    found = moved.get(place)
    if found is None:
        found = moved[place] = tensor.detach().to(device)
    return found


def place_of(tensor: torch.Tensor) -> Place:
    """Where a tensor lies and what it is; means something only as long as it lives."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
