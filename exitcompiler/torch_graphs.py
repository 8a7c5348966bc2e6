"""Writes a block's body as JSON and safetensors, for executors that run it in torch, without pickle."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import fx

from exitcompiler.controlflow import DTYPES
from exitcompiler.errors import LoweringError
from exitcompiler.runtime.torch_graphs import (
    EXECUTION_DEVICE,
    FORMAT,
    FUNCTIONS,
    LAYOUTS,
    MAX_NODES,
    MEMORY_FORMATS,
    VERSION,
    is_name,
    resolve_operator,
)

__all__ = ["serialize_body"]

_REMEDY = "save without torch=True; the ONNX backends do not need the torch graphs"


def serialize_body(body: fx.GraphModule) -> tuple[bytes, bytes]:
    """Write a body in the form that ``load_body`` reads; exitcompiler.runtime.torch_graphs describes it.

    The same body gives the same bytes. Tensors that several names share are written once per name.

    Args:
        body: A block's body: functional operators only, its output a tuple.

    Returns:
        The graph as JSON, the weights as safetensors.

    Raises:
        LoweringError: The body calls what the format has no word for; names the node.
    """
    tensors: dict[str, torch.Tensor] = {}
    attributes: dict[str, str] = {}
    params: list[str] = []
    nodes: list[dict[str, Any]] = []
    names = _names(body.graph)
    if len(names) > MAX_NODES:
        raise LoweringError(f"{len(names)} nodes, more than {MAX_NODES}", where="body", remedy=_REMEDY)
    for node in body.graph.nodes:
        match node.op:
            case "placeholder":
                params.append(names[node])
            case "get_attr":
                if node.target not in attributes:
                    attributes[node.target] = f"tensor_{len(tensors)}"
                    tensors[attributes[node.target]] = _tensor(body, node)
                nodes.append({"name": names[node], "tensor": attributes[node.target]})
            case "call_function":
                nodes.append(_call(node, names))
            case "output":
                results = [names[value] for value in node.args[0]]
            case _:
                raise _refuse(node, f"{node.op} {node.target!r} cannot be saved")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "params": params,
        "tensors": {name: _declare(tensor) for name, tensor in tensors.items()},
        "nodes": nodes,
        "results": results,
    }
    text = json.dumps(document, allow_nan=False, separators=(",", ":"), sort_keys=True)
    return text.encode(), safetensors.torch.save(tensors)


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A name for every node: params by their own, so that errors at run time speak of them."""
    names = {node: node.name for node in graph.nodes if node.op != "output"}
    for node, name in names.items():
        if not is_name(name):
            raise _refuse(node, f"{name!r} cannot name a value")
    return names


def _tensor(body: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    value = operator.attrgetter(str(node.target))(body)
    if isinstance(value, torch.nn.Module):
        raise _refuse(node, "it is the inner graph of a higher-order operator, which cannot be saved")
    if not isinstance(value, torch.Tensor) or _short(value.dtype) not in DTYPES:
        raise _refuse(node, f"{node.target!r} is not a tensor of a known dtype")
    return value.detach().cpu().contiguous().clone()  # a clone of its own: safetensors refuses shared memory


def _declare(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": _short(tensor.dtype)}


def _call(node: fx.Node, names: Mapping[fx.Node, str]) -> dict[str, Any]:
    name = _operator_name(node)
    return {
        "name": names[node],
        "target": name,
        "args": [_argument(node, value, names) for value in node.args],
        "kwargs": {key: _argument(node, value, names) for key, value in node.kwargs.items()},
    }


def _operator_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise _refuse(node, f"{node.target} is a higher-order operator, whose inner graph cannot be saved")
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        if resolve_operator(name) is not node.target:
            raise _refuse(node, f"{name} is in-place or not on the list of operators that may be loaded")
        return name
    for name, function in FUNCTIONS.items():
        if function is node.target:
            return name
    raise _refuse(node, f"{node.target} is not on the list of functions that may be loaded")


def _argument(node: fx.Node, value: Any, names: Mapping[fx.Node, str]) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return {"float": repr(value)}
        case fx.Node():
            return {"node": names[value]}
        case tuple():
            return {"tuple": [_argument(node, entry, names) for entry in value]}
        case list():
            return [_argument(node, entry, names) for entry in value]
        case dict():
            return {"dict": {str(key): _argument(node, entry, names) for key, entry in value.items()}}
        case torch.device():
            return {"device": EXECUTION_DEVICE}
        case torch.dtype() if _short(value) in DTYPES:
            return {"dtype": _short(value)}
        case torch.layout() if _short(value) in LAYOUTS:
            return {"layout": _short(value)}
        case torch.memory_format() if _short(value) in MEMORY_FORMATS:
            return {"memory_format": _short(value)}
        case _:
            raise _refuse(node, f"an argument of type {type(value).__name__} ({value!r}) cannot be saved")


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")


def _refuse(node: fx.Node, what: str) -> LoweringError:
    return LoweringError(what, where=f"node {node.name!r}", remedy=_REMEDY)
