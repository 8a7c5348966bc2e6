"""Assemble the lowered blocks of a program into one ONNX model: a flat chain of ``If`` nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import helper

from exitcompiler.controlflow import (
    ACTION,
    BATCH,
    GATE_BIAS,
    GATE_WEIGHT,
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    LinearGate,
    Return,
    Successor,
    ValueSpec,
    engine_signature,
    successors,
)
from exitcompiler.errors import LoweringError
from exitcompiler.onnx_branches import Arrival, Guard, Scope
from exitcompiler.onnx_utils import make_model, renamed_node, require_model_size, value_info

__all__ = ["EXIT_INDEX", "assemble_onnx"]

EXIT_INDEX: Final = "exit_index"
"""The model's last output: ``int32[batch]``, the place in ``flow.exits`` where each row left."""

_ROWS: Final = ValueSpec((BATCH,), "bool")
_SOME: Final = ValueSpec((), "bool")
_INDEX: Final = ValueSpec((BATCH,), "int32")


def assemble_onnx(flow: ControlFlow, models: Mapping[str, bytes]) -> bytes:
    """Put a whole program into one ONNX model that skips the blocks which no row reaches.

    The file runs wherever ONNX runs, with no executor of ours. A block runs if any row of the batch
    arrives there, then on all rows; masks say whose results count. So every batch gets the right
    answers, and time is saved when all rows leave early: at batch 1 always.

        b0: body, gate                            rows1 = action == 1;  some1 = any(rows1)
        b1: h, out, rows2, some2 = If(some1)
              then: body, gate; out' = Where(rows1, logits, out); rows2 = rows1 and action == 1
              else: zeros; out; rows1; some1                 (both false: nobody goes on from here)

    The ``If`` nodes stand side by side, not inside one another (TensorRT refuses nested ones where
    the batch size varies), and weights stay inside the branches (ONNX Runtime is 40 % slower where
    they are captured from outside). A row may be overwritten by a later block of its own way only, so
    the last one to write is the one that returned it.

    Args:
        flow: A well-formed program with linear or constant gates; their parameters become constants.
        models: Block name -> ONNX model with the block's engine signature, for all blocks with outputs.

    Returns:
        The model. Inputs: the program's; outputs: the program's, then ``exit_index``.

    Raises:
        LoweringError: A model is missing or has other inputs and outputs, names clash, or the program
            carries values, which one file has no place for.
    """
    if flow.carried:
        raise LoweringError(
            "the near part of a split program carries values to another one",
            where="assemble-onnx",
            remedy="use one file per block",
        )
    taken = flow.inputs.keys() & {*flow.outputs, EXIT_INDEX}
    if taken or EXIT_INDEX in flow.outputs:
        raise LoweringError(
            f"{sorted(taken) or [EXIT_INDEX]} would name two values of the model",
            where="assemble-onnx",
            remedy="rename the program's inputs or outputs",
        )
    size_bytes = sum(len(models[block.name]) for block in flow.blocks if block.name in models)
    require_model_size(size_bytes, "assemble-onnx")
    model = _Assembler(flow, models).assemble()
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(f"the assembled model is not valid: {error}", where="assemble-onnx") from error
    content: bytes = model.SerializeToString(deterministic=True)
    return content


@dataclass(frozen=True)
class _State:
    """What is known after a block, as names of values.

    Args:
        values: The block's params, results and action.
        edges: Its live edges, and who goes there.
        outputs: Program output -> what has been returned so far; empty before the first return.
        exit_index: Where rows have left so far.
    """

    values: dict[str, str]
    edges: tuple[tuple[Edge, Arrival | None], ...]
    outputs: dict[str, str]
    exit_index: str


class _Assembler:
    """Emits the blocks in topological order.

    ``_arrivals`` holds, for blocks not yet emitted, who arrives and the params they bring.
    """

    def __init__(self, flow: ControlFlow, models: Mapping[str, bytes]) -> None:
        self._flow = flow
        self._models = models
        self._top = Scope("")
        self._opsets: dict[str, int] = {}
        self._arrivals: dict[str, list[tuple[Arrival | None, dict[str, str]]]] = {
            flow.entry.name: [(None, {name: name for name in flow.inputs})]
        }
        self._batch_size = ""
        self._outputs: dict[str, str] = {}
        self._exit_index = ""

    def assemble(self) -> onnx.ModelProto:
        """The model."""
        inputs, outputs = self._flow.inputs, {**self._flow.outputs, EXIT_INDEX: _INDEX}
        self._batch_size = self._read_batch_size()
        for number, block in enumerate(self._flow.blocks):
            if block.name in self._arrivals:  # else only constant gates that go elsewhere lead here
                self._emit(block, f"{number}.{block.name}/")
        for name, value in {**self._outputs, EXIT_INDEX: self._exit_index}.items():
            self._top.node("Identity", value, name=name)
        graph = helper.make_graph(
            self._top.nodes,
            "program",
            [value_info(name, spec) for name, spec in inputs.items()],
            [value_info(name, spec) for name, spec in outputs.items()],
            self._top.constants,
        )
        return make_model(graph, self._opsets)

    def _read_batch_size(self) -> str:
        for name, spec in self._flow.inputs.items():
            if spec.batch_axis == 0:
                return self._top.node("Shape", name, start=0, end=1)
        raise LoweringError("no input of the program has rows", where="assemble-onnx")

    def _emit(self, block: BlockInterface, prefix: str) -> None:
        """Emit a block, as it is where every row arrives and else in an ``If``; send its rows on."""
        who, params = self._join(block, self._top.within(f"{prefix}join/"))
        if who is None:
            state = self._run(self._top.within(prefix), block, who, params)
        else:
            state = self._run_if_needed(block, who, params, prefix)
        self._outputs, self._exit_index = state.outputs, state.exit_index
        for edge, going in state.edges:
            bound = [state.values[value] for value in edge.values]
            ways = self._arrivals.setdefault(edge.target, [])
            ways.append((going, dict(zip(self._flow.block(edge.target).params, bound, strict=True))))

    def _join(self, block: BlockInterface, scope: Scope) -> tuple[Arrival | None, dict[str, str]]:
        """Merge the ways into a block: params by ``Where``, masks by ``Or``."""
        (who, params), *others = self._arrivals.pop(block.name)
        for other, values in others:
            assert who is not None  # one way for all rows leaves nobody for another
            assert other is not None
            for name, value in values.items():
                if value != params[name]:
                    mask = scope.mask(other, block.params[name])
                    params = {**params, name: scope.node("Where", mask, value, params[name])}
            who = Arrival(scope.node("Or", who.rows, other.rows), scope.node("Or", who.some, other.some))
        return who, params

    def _run(
        self, scope: Scope, block: BlockInterface, who: Arrival | None, params: dict[str, str]
    ) -> _State:
        """Emit a block's body and what its terminator does with the rows that arrived."""
        values = {**params, **self._body(scope, block, params)}
        ways = _live_ways(block)
        outputs, exit_index = self._return(scope, block, who, values)
        edges = tuple(
            (way, _going(scope, block, who, values, index))
            for index, way in ways.items()
            if isinstance(way, Edge)
        )
        return _State(values, edges, outputs, exit_index)

    def _run_if_needed(
        self, block: BlockInterface, who: Arrival, params: dict[str, str], prefix: str
    ) -> _State:
        """Emit a block into an ``If`` that skips it when no row arrives."""
        if not self._outputs and any(isinstance(way, Return) for way in successors(block.terminator)):
            scope = self._top.within(f"{prefix}start/")
            specs = self._flow.outputs
            self._outputs = {name: scope.filled(spec, self._batch_size) for name, spec in specs.items()}
            self._exit_index = scope.filled(_INDEX, self._batch_size)
        then = Scope(f"{prefix}then/")
        inside = self._run(then, block, who, params)
        branch = Guard(who, then, prefix, self._batch_size)
        handed_on = {value for edge, _ in inside.edges for value in edge.values}
        values = dict(params)
        for name in (name for name in block.results if name in handed_on):
            values[name] = branch.export(inside.values[name], block.results[name])
        edges = []
        for edge, going in inside.edges:
            if going is not None and going != who:
                rows = branch.export(going.rows, _ROWS, who.rows)
                going = Arrival(rows, branch.export(going.some, _SOME, who.some))
            edges.append((edge, going))
        outputs, exit_index = inside.outputs, inside.exit_index
        if exit_index != self._exit_index:
            before, specs = self._outputs, self._flow.outputs
            outputs = {name: branch.export(outputs[name], specs[name], before[name]) for name in outputs}
            exit_index = branch.export(exit_index, _INDEX, self._exit_index)
        self._top.nodes.extend(branch.nodes())
        return _State(values, tuple(edges), outputs, exit_index)

    def _return(
        self, scope: Scope, block: BlockInterface, who: Arrival | None, values: Mapping[str, str]
    ) -> tuple[dict[str, str], str]:
        """Write what the block returns over what has been returned so far."""
        outputs, exit_index = self._outputs, self._exit_index
        returns = [(i, way) for i, way in _live_ways(block).items() if isinstance(way, Return)]
        for count, (index, way) in enumerate(returns):
            # The first return may write to all who arrived: who goes on is written again further on.
            leaving = who if count == 0 else _going(scope, block, who, values, index)
            new = {name: values[value] for name, value in zip(self._flow.outputs, way.values, strict=True)}
            place = self._flow.exits.index(way.exit)
            if leaving is None:
                outputs, exit_index = new, scope.filled(_INDEX, self._batch_size, place)
                continue
            outputs = {
                name: scope.node("Where", scope.mask(leaving, spec), new[name], outputs[name])
                for name, spec in self._flow.outputs.items()
            }
            exit_index = scope.node("Where", leaving.rows, scope.constant(place, "int32"), exit_index)
        return outputs, exit_index

    def _body(self, scope: Scope, block: BlockInterface, params: Mapping[str, str]) -> dict[str, str]:
        """Emit a block's model, with its gate's parameters as constants; returns its outputs' names."""
        signature = engine_signature(block)
        if not signature.outputs:
            return {}
        model = self._load(block)
        names = dict(params)
        if isinstance(block.terminator, Branch) and isinstance(block.terminator.gate, LinearGate):
            names[GATE_WEIGHT] = scope.constant(block.terminator.gate.weight, "float32")
            names[GATE_BIAS] = scope.constant(block.terminator.gate.bias, "float32")

        def rename(name: str, _: str) -> str:
            return names.setdefault(name, f"{scope.prefix}body/{name}")

        for tensor in model.graph.initializer:
            tensor.name = rename(tensor.name, "constant")
            scope.constants.append(tensor)
        scope.nodes.extend(renamed_node(node, rename) for node in model.graph.node)
        return {name: names[name] for name in signature.outputs}

    def _load(self, block: BlockInterface) -> onnx.ModelProto:
        where, signature = f"block {block.name!r}", engine_signature(block)
        if block.name not in self._models:
            raise LoweringError("there is no model for it", where=where, remedy="lower it first")
        model = onnx.ModelProto()
        model.ParseFromString(self._models[block.name])
        found = ([v.name for v in model.graph.input], [v.name for v in model.graph.output])
        if found != (list(signature.inputs), list(signature.outputs)):
            raise LoweringError(
                f"its model maps {found[0]} to {found[1]}, not {list(signature.inputs)} to "
                f"{list(signature.outputs)}",
                where=where,
                remedy="lower it again after changing the program",
            )
        for opset in model.opset_import:
            if self._opsets.setdefault(opset.domain, opset.version) != opset.version:
                raise LoweringError(
                    f"its model is for opset {opset.version}, others for {self._opsets[opset.domain]}",
                    where=where,
                    remedy="lower all blocks with the same opset",
                )
        return model


def _live_ways(block: BlockInterface) -> dict[int, Successor]:
    """Action -> way, for the ways that rows can take."""
    ways = dict(enumerate(successors(block.terminator)))
    match block.terminator:
        case Branch(ConstantGate(action=action), _):
            return {action: ways[action]}
        case _:
            return ways


def _going(
    scope: Scope, block: BlockInterface, who: Arrival | None, values: Mapping[str, str], index: int
) -> Arrival | None:
    """Of those who arrived in a block, who takes way ``index``."""
    ways = _live_ways(block)
    if len(ways) == 1:
        return who
    action = values[ACTION]
    if len(ways) == 2 and index == 1:
        taken = scope.node("Cast", action, to=onnx.TensorProto.BOOL)
    else:
        taken = scope.node("Equal", action, scope.constant(index, "int32"))
    rows = taken if who is None else scope.node("And", who.rows, taken)
    highest = scope.node("ReduceMax", scope.node("Cast", rows, to=onnx.TensorProto.INT32), keepdims=0)
    return Arrival(rows, scope.node("Cast", highest, to=onnx.TensorProto.BOOL))
