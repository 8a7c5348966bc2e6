"""Reads a block's torch graph: JSON and safetensors, no pickle, only operators on a list.

The document (``FORMAT``, ``VERSION``), one object with these keys:

    params   names of the placeholders, in order
    tensors  name -> {"shape": [..], "dtype": "float32"} of what the safetensors file holds
    nodes    in order: {"name", "tensor"} reads a tensor, {"name", "target", "args", "kwargs"} calls
    results  names of nodes or params

Arguments are null, truth values, whole numbers, strings and arrays as they are; everything else is an
object with one key: ``{"node": name}``, ``{"float": "0.1"}`` (so that infinities can be told),
``{"tuple": [..]}``, ``{"dict": {..}}``, ``{"dtype": "float32"}``, ``{"layout": "strided"}``,
``{"memory_format": "contiguous_format"}`` and ``{"device": "execution"}``, the device the body runs on.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import fx, nn

from exitcompiler.controlflow import DTYPES
from exitcompiler.errors import ArtifactError
from exitcompiler.runtime.json_reader import Node, parse_json

__all__ = [
    "EXECUTION_DEVICE",
    "FORMAT",
    "FUNCTIONS",
    "LAYOUTS",
    "MAX_NODES",
    "MEMORY_FORMATS",
    "VERSION",
    "is_name",
    "load_body",
    "resolve_operator",
]

FORMAT: Final = "exitcompiler-torch-graph"
VERSION: Final = 1

MAX_NODES: Final = 200_000
"""More than any block has; keeps a forged file from filling the memory."""

EXECUTION_DEVICE: Final = "execution"

LAYOUTS: Final = ("strided",)
MEMORY_FORMATS: Final = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")

_NAMESPACES: Final = ("aten", "prims", "quantized")
_REFUSED: Final = frozenset({"from_file"})  # opens any file that the graph names
_MAX_DEPTH: Final = 8
_INT64: Final = (-(2**63), 2**63 - 1)

FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        **{
            f"operator.{name}": getattr(operator, name)
            for name in (
                *("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow"),
                *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "getitem"),
            )
        },
        **{
            f"torch.{name}": getattr(torch, name)
            for name in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum")
        },
    }
)
"""Functions that a graph may call besides operators: arithmetic on sizes, and picking from a tuple."""


def load_body(
    graph: bytes,
    weights: bytes,
    *,
    device: str = "cpu",
    rewrite: Callable[[fx.GraphModule], object] | None = None,
) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
    """Rebuild a block's body from what ``serialize_body`` wrote.

    Args:
        graph: The JSON document.
        weights: The safetensors file.
        device: Where the weights go and the body runs.
        rewrite: Changes the body in place before it is used, as a backend would have it.

    Returns:
        The body: the params, in order, to the results, in order.

    Raises:
        ArtifactError: The document is malformed, calls what is not on the list, or the weights do not
            fit it; names the place.
    """
    root = Node(parse_json(graph, "torch graph"), "torch graph: ")
    if root["format"].string() != FORMAT or root["version"].integer() != VERSION:
        root.fail(f"not a {FORMAT} of version {VERSION}")
    root.only("format", "version", "params", "tensors", "nodes", "results")
    body = fx.GraphModule(_load_tensors(root["tensors"], weights, device), _read_graph(root, device))
    if rewrite is not None:
        rewrite(body)

    def run(params: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        results: tuple[torch.Tensor, ...] = body(*params)
        return results

    return run


def is_name(name: str) -> bool:
    """Whether a string may name a value: it becomes an identifier in generated code."""
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", name) is not None and not keyword.iskeyword(name)


def resolve_operator(name: str) -> Callable[..., Any] | None:
    """The operator or function called ``name`` (``aten.relu.default``, ``operator.mul``); None if refused.

    In-place operators are refused: bodies are functional.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    match = re.fullmatch(
        r"([a-z]+)\.([A-Za-z][A-Za-z0-9_]*|_[A-Za-z0-9][A-Za-z0-9_]*)\.([A-Za-z0-9_]+)", name
    )
    if match is None or match[1] not in _NAMESPACES or match[2] in _REFUSED:
        return None
    packet = getattr(getattr(torch.ops, match[1]), match[2], None)
    overload = getattr(packet, match[3], None)
    if not isinstance(overload, torch._ops.OpOverload) or overload._schema.is_mutable:
        return None
    return overload


def _load_tensors(declared: Node, weights: bytes, device: str) -> nn.Module:
    try:
        tensors = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"not a safetensors file: {error}", where=declared.path) from error
    if tensors.keys() != declared.mapping().keys():
        declared.fail(f"the weights hold other tensors: {sorted(tensors.keys() ^ declared.mapping().keys())}")
    root = nn.Module()
    for name, entry in declared.items():
        tensor = tensors[name]
        entry.only("shape", "dtype")
        shape = entry["shape"].each(Node.integer)
        if tuple(tensor.shape) != shape or str(tensor.dtype) != f"torch.{entry['dtype'].string()}":
            entry.fail(f"the weights hold {tensor.dtype}{list(tensor.shape)} for it")
        if not is_name(name) or hasattr(root, name):
            entry.fail(f"{name!r} cannot name a tensor")
        root.register_buffer(name, tensor.to(device))
    return root


def _read_graph(root: Node, device: str) -> fx.Graph:
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}

    def define(name: Node, node: fx.Node) -> None:
        if not is_name(name.string()) or name.string() in values:
            name.fail(f"{name.string()!r} is taken, or cannot name a value")
        values[name.string()] = node

    def value(name: Node) -> fx.Node:
        if name.string() not in values:
            name.fail(f"no value is called {name.string()!r} here")
        return values[name.string()]

    def read(node: Node) -> None:
        if node.get("tensor") is not None:
            node.only("name", "tensor")
            tensor = node["tensor"].choice(tuple(root["tensors"].mapping()))
            define(node["name"], graph.get_attr(tensor))
            return
        node.only("name", "target", "args", "kwargs")
        target = resolve_operator(node["target"].string())
        if target is None:
            node["target"].fail(f"{node['target'].string()!r} is not an operator that a graph may call")
        args = node["args"].each(lambda argument: _read_argument(argument, value, device))
        kwargs = {key: _read_argument(entry, value, device) for key, entry in node["kwargs"].items()}
        if not all(map(is_name, kwargs)):
            node["kwargs"].fail("keywords have to be identifiers")
        define(node["name"], graph.call_function(target, args, kwargs))

    if not isinstance(root["nodes"].value, list) or len(root["nodes"].value) > MAX_NODES:
        root["nodes"].fail(f"expected an array of at most {MAX_NODES} nodes")
    for name in root["params"].each(lambda node: node):
        if not is_name(name.string()):
            name.fail(f"{name.string()!r} cannot name a value")
        define(name, graph.placeholder(name.string()))
    root["nodes"].each(read)
    graph.output(root["results"].each(value))
    return graph


def _read_argument(node: Node, value: Callable[[Node], fx.Node], device: str, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        node.fail(f"nested deeper than {_MAX_DEPTH}")

    def inner(entry: Node) -> Any:
        return _read_argument(entry, value, device, depth + 1)

    match node.value:
        case None | bool() | str():
            return node.value
        case int():
            return node.integer(*_INT64)
        case list():
            return list(node.each(inner))
        case dict() if len(node.value) == 1:
            (kind,) = node.value
            return _read_tagged(kind, node[kind], value, device, inner)
        case _:
            return node.fail("not an argument")


def _read_tagged(
    kind: str, node: Node, value: Callable[[Node], fx.Node], device: str, inner: Callable[[Node], Any]
) -> Any:
    match kind:
        case "node":
            return value(node)
        case "float":
            return _read_float(node)
        case "tuple":
            return node.each(inner)
        case "dict":
            return {key: inner(entry) for key, entry in node.items()}
        case "dtype":
            return getattr(torch, node.choice(sorted(DTYPES)))
        case "layout":
            return getattr(torch, node.choice(LAYOUTS))
        case "memory_format":
            return getattr(torch, node.choice(MEMORY_FORMATS))
        case "device":
            node.choice((EXECUTION_DEVICE,))
            return torch.device(device)
        case _:
            return node.fail(f"{kind!r} is no kind of argument")


def _read_float(node: Node) -> float:
    try:
        return float(node.string())
    except ValueError:
        node.fail(f"{node.string()!r} is not a number")
