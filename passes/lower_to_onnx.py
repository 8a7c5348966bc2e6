"""Lower the blocks of a program to ONNX: one model per block, all from a single export."""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import onnx
import torch
from onnx import helper
from torch import fx, nn

from exitcompiler.controlflow import (
    ACTION,
    BATCH,
    GATE_BIAS,
    GATE_WEIGHT,
    Branch,
    LinearGate,
    ValueSpec,
    engine_signature,
)
from exitcompiler.errors import LoweringError
from exitcompiler.onnx_utils import (
    MODEL_BYTES,
    GraphIndex,
    keep_constants,
    make_model,
    renamed_node,
    require_model_size,
    round_weights,
    value_info,
)
from exitcompiler.program import Block, torch_dtype

__all__ = ["BFLOAT16_OPSET", "OPSET", "lower_blocks"]

OPSET: Final = 20
"""Gelu is native from here on; from 23 on the exporter emits Attention, which TensorRT refuses."""

BFLOAT16_OPSET: Final = 22
"""Convolutions and pooling take bfloat16 from here on."""

_SAMPLE_ROWS: Final = 2  # torch.export specialises sizes 0 and 1
_NOISY_LOGGERS: Final = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")

_log = logging.getLogger(__name__)


def lower_blocks(blocks: Sequence[Block], *, opset: int = OPSET) -> dict[str, bytes]:
    """Lower every block to the bytes of an ONNX model with the block's engine signature.

    An export costs seconds whatever its size, so all bodies are put side by side, disconnected,
    in one graph, exported once, and each block's model is cut out of the result. The gate is added
    there, reading its parameters from inputs, so that new parameters need no new model:

        h, logits, confidence = body(x)
        ->  scores = Gemm(Concat(confidence, ..), gate_weight^T, gate_bias)
            action = Cast(ArgMax(scores, axis=1), int32)       (a tie goes to the lowest index)

    The bytes depend on the block's contents alone, neither on its name nor on the blocks around it.

    Args:
        blocks: Blocks with unique names; their weights go into the models as they are.
        opset: ONNX operator set version.

    Returns:
        Block name -> model. Inputs and outputs are those of ``engine_signature(block)``, in order,
        with dim 0 named "batch". A block with nothing to compute is left out.

    Raises:
        LoweringError: The exporter cannot translate a block; names the block and the node.
    """
    todo = [block for block in blocks if engine_signature(block).outputs]
    for block in todo:
        _require_lowerable(block)
    if len(todo) == 1 or sum(sum(block.weight_bytes().values()) for block in todo) < MODEL_BYTES:
        try:
            return dict(_lower_together(todo, opset))
        except Exception as error:  # the exporter raises anything
            if len(todo) == 1:
                raise _lowering_error(todo[0], error, opset) from error
            # One by one, to blame the culprit.
            _log.debug("lowering %d blocks at once failed (%s); one by one", len(todo), error)
    return {name: model for block in todo for name, model in lower_blocks([block], opset=opset).items()}


def _require_lowerable(block: Block) -> None:
    if ACTION in engine_signature(block).outputs and not _gate_reads(block):
        raise LoweringError(
            "the gate reads nothing, so it is constant",
            where=f"block {block.name!r}",
            remedy="make it a ConstantGate and run the prune-constant-gates pass",
        )
    weights = block.weight_bytes()
    if weights:
        largest = max(weights, key=weights.__getitem__)
        require_model_size(sum(weights.values()), f"block {block.name!r}, largest weight {largest!r}")


def _lower_together(blocks: Sequence[Block], opset: int) -> Iterator[tuple[str, bytes]]:
    whole = _side_by_side(blocks)
    source = GraphIndex.of(_export(whole, opset))
    for block, part in zip(blocks, whole.parts, strict=True):
        model = _cut_out(source, part, block, opset)
        onnx.checker.check_model(model)
        yield block.name, model.SerializeToString(deterministic=True)


# ---------------------------------------------------------------- one graph for all blocks


@dataclass(frozen=True)
class _Part:
    """Where a block's values are in the whole.

    Args:
        params: Param -> name of the ONNX value, for those that the body computes with.
        results: Result -> name of the ONNX value.
        passed: Result -> the param that it is, unchanged.
    """

    params: dict[str, str]
    results: dict[str, str]
    passed: dict[str, str]


@dataclass(frozen=True)
class _Whole:
    """All bodies in one module, with what the exporter has to know about its inputs and outputs."""

    module: fx.GraphModule
    inputs: dict[str, torch.Tensor]
    dynamic_shapes: tuple[dict[int, Any], ...]
    outputs: tuple[str, ...]
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Needed:
    """What a block's engine has to compute, in the block's body.

    Args:
        results: The results that an edge hands on or the gate reads -> their nodes.
        nodes: Everything that these need.
        params: Placeholder -> param.
    """

    results: dict[str, fx.Node]
    nodes: set[fx.Node]
    params: dict[fx.Node, str]

    @staticmethod
    def by(block: Block) -> _Needed:
        wanted = {*engine_signature(block).outputs, *_gate_reads(block)}
        (values,) = block.body.graph.output_node().args
        assert isinstance(values, tuple)
        nodes = dict(zip(block.results, values, strict=True))
        results = {name: node for name, node in nodes.items() if name in wanted}
        seen = set(results.values())
        todo = list(seen)
        while todo:
            new = [node for node in todo.pop().all_input_nodes if node not in seen]
            seen.update(new)
            todo.extend(new)
        placeholders = block.body.graph.find_nodes(op="placeholder")
        return _Needed(results, seen, dict(zip(placeholders, block.params, strict=True)))

    def computes_with(self, placeholder: fx.Node) -> bool:
        """Whether some operator reads the param, so that it is not only passed through."""
        return not self.nodes.isdisjoint(placeholder.users)


def _gate_reads(block: Block) -> tuple[str, ...]:
    match block.terminator:
        case Branch(LinearGate() as gate, _):
            return gate.reads
        case _:
            return ()


def _side_by_side(blocks: Sequence[Block]) -> _Whole:
    """Copy what the blocks' engines compute into one graph; nothing connects the parts."""
    graph, root = fx.Graph(), nn.Module()
    inputs: dict[str, torch.Tensor] = {}
    shapes: list[dict[int, Any]] = []
    copies: dict[fx.Node, fx.Node] = {}
    needs = [_Needed.by(block) for block in blocks]
    for index, (block, needed) in enumerate(zip(blocks, needs, strict=True)):
        # A dimension of its own per block: with a shared one, all bodies would ask the first block's
        # input for the batch size.
        batch = torch.export.Dim(f"batch_{index}", min=1)
        for placeholder, param in needed.params.items():
            if needed.computes_with(placeholder):
                spec = block.params[param]
                copies[placeholder] = graph.placeholder(f"in_{len(inputs)}")
                inputs[copies[placeholder].name] = _sample(spec)
                shapes.append({0: batch} if spec.batch_axis == 0 else {})
    outputs: dict[fx.Node, str] = {}
    parts = []
    for block, needed in zip(blocks, needs, strict=True):
        _copy_body(block, needed.nodes, copies, graph, root)
        params = {param: copies[node].name for node, param in needed.params.items() if node in copies}
        passed = {r: needed.params[node] for r, node in needed.results.items() if node in needed.params}
        results = {
            result: outputs.setdefault(copies[node], f"out_{len(outputs)}")
            for result, node in needed.results.items()
            if result not in passed
        }
        parts.append(_Part(params, results, passed))
    graph.output(tuple(outputs))
    return _Whole(fx.GraphModule(root, graph), inputs, tuple(shapes), tuple(outputs.values()), tuple(parts))


def _copy_body(
    block: Block, needed: set[fx.Node], copies: dict[fx.Node, fx.Node], graph: fx.Graph, root: nn.Module
) -> None:
    """Append the needed nodes of a body to ``graph``; its tensors go to ``root`` under fresh names."""
    attributes: dict[str, str] = {}
    for node in block.body.graph.nodes:
        if node not in needed or node.op == "placeholder":
            continue
        if node.op != "get_attr":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        if node.target not in attributes:
            attributes[node.target] = f"attribute_{len(root._buffers) + len(root._modules)}"
            _set_attribute(root, attributes[node.target], block.body, node.target)
        copies[node] = graph.get_attr(attributes[node.target])


def _set_attribute(root: nn.Module, name: str, body: nn.Module, target: str) -> None:
    value = operator.attrgetter(target)(body)
    if isinstance(value, nn.Module):  # the body of a higher-order operator
        root.add_module(name, value)
    else:
        root.register_buffer(name, value.detach())


def _sample(spec: ValueSpec) -> torch.Tensor:
    shape = [_SAMPLE_ROWS if size == BATCH else int(size) for size in spec.shape]
    return torch.zeros(shape, dtype=torch_dtype(spec))


def _export(whole: _Whole, opset: int) -> onnx.ModelProto:
    if not whole.outputs:  # only gates and values passed through
        return onnx.ModelProto()
    with torch.no_grad(), _quiet():
        exported = torch.export.export(
            whole.module, tuple(whole.inputs.values()), dynamic_shapes=whole.dynamic_shapes, strict=False
        )
        program = torch.onnx.export(
            exported,
            input_names=list(whole.inputs),
            output_names=list(whole.outputs),
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    keep_constants(program.model)
    model = program.model_proto
    round_weights(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' prints, warnings and log lines off the user's terminal, for a while."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    noise = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(noise),
            contextlib.redirect_stderr(noise),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if noise.getvalue():
            _log.debug("the exporter printed: %s", noise.getvalue())


# ---------------------------------------------------------------- one model per block


def _cut_out(source: GraphIndex, part: _Part, block: Block, opset: int) -> onnx.ModelProto:
    """The model of one block: what its outputs reach, renamed, then the gate."""
    signature = engine_signature(block)
    names = {value: param for param, value in part.params.items()}
    for result in signature.outputs:
        if part.results.get(result) in source.producers:
            names.setdefault(part.results[result], result)
    counts: collections.Counter[str] = collections.Counter()

    def rename(old: str, kind: str) -> str:
        """``conv.3``: depends on this block alone and is never an identifier, as params and results are."""
        if old not in names:
            names[old] = f"{kind}.{counts[kind]}"
            counts[kind] += 1
        return names[old]

    nodes, constants = source.reachable(list(part.results.values()))
    tensors = []
    for value in constants:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(source.initializers[value])
        tensor.ClearField("doc_string")
        tensor.name = rename(value, "constant")
        tensors.append(tensor)
    body = [renamed_node(node, rename) for node in nodes]
    here = {result: names[value] for result, value in part.results.items()} | part.passed
    # What is a param, a constant, or another result as well needs a node to carry the result's name.
    copied = [name for name in signature.outputs if here.get(name, name) != name]
    body.extend(helper.make_node("Identity", [here[name]], [name], f"copy.{name}") for name in copied)
    body.extend(_gate_nodes([here.get(name, name) for name in _gate_reads(block)]))
    graph = helper.make_graph(
        body,
        "block",
        [value_info(name, spec) for name, spec in signature.inputs.items()],
        [value_info(name, spec) for name, spec in signature.outputs.items()],
        tensors,
    )
    domains = {node.domain: source.opsets.get(node.domain, opset) for node in body}
    return make_model(graph, {"": opset, **domains})


def _gate_nodes(reads: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes of a linear gate over these values; none for a block that has no such gate."""
    if not reads:
        return []
    features = reads[0]
    nodes = []
    if len(reads) > 1:
        features = "gate.features"
        nodes.append(helper.make_node("Concat", list(reads), [features], features, axis=1))
    return [
        *nodes,
        helper.make_node(
            "Gemm", [features, GATE_WEIGHT, GATE_BIAS], ["gate.scores"], "gate.scores", transB=1
        ),
        helper.make_node(
            "ArgMax",
            ["gate.scores"],
            ["gate.argmax"],
            "gate.argmax",
            axis=1,
            keepdims=0,
            select_last_index=0,
        ),
        helper.make_node("Cast", ["gate.argmax"], [ACTION], "gate.action", to=onnx.TensorProto.INT32),
    ]


# ---------------------------------------------------------------- whose fault it was


def _lowering_error(block: Block, error: Exception, opset: int) -> LoweringError:
    """Name the block and, as far as the exporter's messages tell, the node it stumbled over."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    node = _blamed_node(block, texts)
    where = f"block {block.name!r}" + ("" if node is None else f", node {node.name!r} ({node.target})")
    return LoweringError(
        f"cannot be lowered to ONNX opset {opset}: {texts[-1].splitlines()[0]}",
        where=where,
        remedy="write this part of the model with operators that ONNX has, or use backend='torch'",
    )


def _blamed_node(block: Block, texts: Sequence[str]) -> fx.Node | None:
    """The node that the messages speak of: by name, by operator, or by what the operator decomposes to."""
    calls: list[fx.Node] = [node for node in block.body.graph.nodes if node.op == "call_function"]
    for text in reversed(texts):  # the first cause is the most precise
        for name in re.findall(r"While executing %(\w+)", text):
            if found := [node for node in calls if node.name == name]:
                return found[0]
        for name in re.findall(r"(?:torch\.ops\.|op=')\w+\.(\w+)", text):
            if found := [node for node in calls if name in str(node.target)]:
                return found[0]
    return None
