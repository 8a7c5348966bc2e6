"""Small programs for the runtime's tests, made without torch: in numpy and in ONNX, equal to the bit.

All numbers are small integers, so that every backend and every batch size gives exactly the same, and
ties in gates do happen. A result of a block is ``clip(sum of param @ weight + bias, -9, 9)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from exitcompiler.control_flow_checks import verify_control_flow
from exitcompiler.controlflow import (
    ACTION,
    BATCH,
    GATE_BIAS,
    GATE_WEIGHT,
    BlockInterface,
    Branch,
    ControlFlow,
    Edge,
    EngineSignature,
    Gate,
    Jump,
    LinearGate,
    OutputStructure,
    Return,
    Successor,
    Terminator,
    ValueSpec,
    engine_signature,
)
from exitcompiler.runtime.manifest import Artifact, Estimate, Manifest, OperatingPoint, block_path

Floats = NDArray[np.float32]
WIDTH = 4
CLASSES = 3
LIMIT = 9.0


def rows_of(width: int) -> ValueSpec:
    return ValueSpec((BATCH, width), "float32")


INPUTS = {"x": rows_of(WIDTH)}
OUTPUTS = {"logits": rows_of(CLASSES)}


@dataclass(frozen=True)
class Affine:
    """A result: one weight per param, and a bias."""

    weights: Mapping[str, Floats]
    bias: Floats

    def __call__(self, values: Mapping[str, Floats]) -> Floats:
        total = sum((values[name] @ weight for name, weight in self.weights.items()), self.bias)
        return np.clip(total, -LIMIT, LIMIT).astype(np.float32)


@dataclass(frozen=True)
class TestProgram:
    """A control flow and what its blocks compute."""

    __test__ = False

    flow: ControlFlow
    bodies: Mapping[str, Mapping[str, Affine]]

    def engine(self, block: BlockInterface, static_batch: int | None = None) -> NumpyEngine:
        return NumpyEngine(block, self.bodies[block.name])

    def answer_row(self, row: Floats) -> tuple[Floats, str]:
        """Walk one row through the program, the slow and obvious way."""
        block = self.flow.entry
        values: dict[str, Floats] = {"x": row[None]}
        while True:
            params = dict(values)
            values.update({name: affine(params) for name, affine in self.bodies[block.name].items()})
            way = _way(block.terminator, values)
            if isinstance(way, Return):
                return values[way.values[0]][0], way.exit
            block = self.flow.block(way.target)
            values = dict(zip(block.params, [values[name] for name in way.values], strict=True))


def _way(terminator: Terminator, values: Mapping[str, Floats]) -> Successor:
    if isinstance(terminator, Return):
        return terminator
    if isinstance(terminator, Jump):
        return terminator.edge
    gate = terminator.gate
    if not isinstance(gate, LinearGate):
        return terminator.edges[gate.action]
    features = np.concatenate([values[name][0] for name in gate.reads])
    scores = np.array(gate.weight) @ features + np.array(gate.bias)
    return terminator.edges[int(np.flatnonzero(scores == scores.max())[0])]


class NumpyEngine:
    """An engine that hands out the same buffers again and again, as real ones do."""

    def __init__(self, block: BlockInterface, body: Mapping[str, Affine]) -> None:
        self.signature: EngineSignature = engine_signature(block)
        self._block = block
        self._body = body

    def run(self, inputs: Sequence[Floats]) -> list[Floats]:
        values = dict(zip(self.signature.inputs, inputs, strict=True))
        params = {name: values[name] for name in self._block.params}
        values.update({name: affine(params) for name, affine in self._body.items()})
        if ACTION in self.signature.outputs:
            assert isinstance(self._block.terminator, Branch)
            features = np.concatenate([values[n] for n in self._block.terminator.gate.reads], axis=1)
            scores = features @ values[GATE_WEIGHT].T + values[GATE_BIAS]
            values[ACTION] = scores.argmax(axis=1).astype(np.int32)
        return [values[name] for name in self.signature.outputs]

    def runner(self) -> Callable[[Sequence[Floats]], list[Floats]]:
        kept: list[Floats] = []

        def call(inputs: Sequence[Floats]) -> list[Floats]:
            for old in kept:
                old.fill(-77)  # whoever still reads it will notice
            kept[:] = [np.array(output) for output in self.run(inputs)]
            return kept

        return call

    def bind(self, inputs: Sequence[Floats], outputs: Sequence[Floats]) -> Callable[[], None]:
        def call() -> None:
            for buffer, output in zip(outputs, self.run(inputs), strict=True):
                buffer[...] = output

        return call


def to_onnx(block: BlockInterface, body: Mapping[str, Affine]) -> bytes:
    """A block as ONNX: the body, then the gate, with its parameters as inputs."""
    signature = engine_signature(block)
    nodes, constants = [], {"low": np.float32(-LIMIT), "high": np.float32(LIMIT)}
    for name, affine in body.items():
        terms = []
        for param, weight in affine.weights.items():
            constants[f"{name}_{param}_w"] = weight
            nodes.append(helper.make_node("MatMul", [param, f"{name}_{param}_w"], [f"{name}_{param}_term"]))
            terms.append(f"{name}_{param}_term")
        constants[f"{name}_b"] = affine.bias
        nodes.append(helper.make_node("Sum", [*terms, f"{name}_b"], [f"{name}_sum"]))
        nodes.append(helper.make_node("Clip", [f"{name}_sum", "low", "high"], [name]))
    if ACTION in signature.outputs:
        assert isinstance(block.terminator, Branch)
        nodes += [
            helper.make_node("Concat", list(block.terminator.gate.reads), ["features"], axis=1),
            helper.make_node("Gemm", ["features", GATE_WEIGHT, GATE_BIAS], ["scores"], transB=1),
            helper.make_node("ArgMax", ["scores"], ["action64"], axis=1, keepdims=0),
            helper.make_node("Cast", ["action64"], [ACTION], to=TensorProto.INT32),
        ]
    graph = helper.make_graph(
        nodes,
        block.name,
        [_info(name, spec) for name, spec in signature.inputs.items()],
        [_info(name, spec) for name, spec in signature.outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 20)
    model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    return model


def _info(name: str, spec: ValueSpec) -> object:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), list(spec.shape)
    )


class Builder:
    """Makes blocks with random small-integer weights."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._blocks: list[BlockInterface] = []
        self._bodies: dict[str, dict[str, Affine]] = {}

    def gate(self, reads: Sequence[str], width: int, actions: int) -> LinearGate:
        weight = self._rng.integers(-2, 3, (actions, width)).astype(float).tolist()
        bias = self._rng.integers(-2, 3, actions).astype(float).tolist()
        return LinearGate(tuple(reads), tuple(map(tuple, weight)), tuple(bias))

    def block(
        self, name: str, params: Mapping[str, int], results: Mapping[str, int], terminator: Terminator
    ) -> None:
        self._bodies[name] = {
            result: Affine(
                {p: self._rng.integers(-1, 2, (n, width)).astype(np.float32) for p, n in params.items()},
                self._rng.integers(-1, 2, width).astype(np.float32),
            )
            for result, width in results.items()
        }
        specs = [{name: rows_of(n) for name, n in part.items()} for part in (params, results)]
        self._blocks.append(BlockInterface(name, specs[0], specs[1], terminator))

    def program(self) -> TestProgram:
        flow = ControlFlow(INPUTS, OUTPUTS, tuple(self._blocks))
        verify_control_flow(flow)
        return TestProgram(flow, self._bodies)


def chain(seed: int = 0) -> TestProgram:
    """Three exits; the second gate also reads the first exit's confidence."""
    make = Builder(seed)
    make.block(
        "first",
        {"x": WIDTH},
        {"h": 5, "early": CLASSES, "conf": 2},
        Branch(make.gate(["conf"], 2, 2), (Return(("early",), "exit1"), Edge("second", ("h", "conf")))),
    )
    make.block(
        "second",
        {"p": 5, "earlier": 2},
        {"h": 6, "middle": CLASSES, "conf": 2},
        Branch(make.gate(["conf", "earlier"], 4, 2), (Return(("middle",), "exit2"), Edge("third", ("h",)))),
    )
    make.block("third", {"p": 6}, {"out": CLASSES}, Return(("out",), "backbone"))
    return make.program()


def cascade(seed: int = 0) -> TestProgram:
    """Three networks on the same input: leave, go to the middle one, or straight to the large one."""
    make = Builder(seed)
    ways = (Return(("small_out",), "small"), Edge("medium", ("x",)), Edge("big_stem", ("x",)))
    make.block(
        "small", {"x": WIDTH}, {"small_out": CLASSES, "conf": 3}, Branch(make.gate(["conf"], 3, 3), ways)
    )
    make.block(
        "medium",
        {"x2": WIDTH},
        {"out": CLASSES, "conf": 1},
        Branch(make.gate(["conf"], 1, 2), (Return(("out",), "medium"), Edge("big_stem", ("x2",)))),
    )
    make.block("big_stem", {"x3": WIDTH}, {"h": 7}, Jump(Edge("big", ("h", "x3"))))
    make.block("big", {"h2": 7, "x4": WIDTH}, {"out": CLASSES}, Return(("out",), "large"))
    return make.program()


def diamond(seed: int = 0) -> TestProgram:
    """A layer that rows run or go round; both ways bind the join's params."""
    make = Builder(seed)
    ways = (Edge("join", ("x", "h")), Edge("layer", ("x", "h")))
    make.block("stem", {"x": WIDTH}, {"h": 5, "conf": 2}, Branch(make.gate(["conf"], 2, 2), ways))
    make.block("layer", {"x1": WIDTH, "p": 5}, {"h2": 5}, Jump(Edge("join", ("x1", "h2"))))
    make.block("join", {"x2": WIDTH, "q": 5}, {"out": CLASSES}, Return(("out",), "backbone"))
    return make.program()


def with_shared_value(different: bool) -> TestProgram:
    """A diamond whose join takes a value that does not belong to rows, by both ways the same or not."""
    table = ValueSpec((2,), "float32")
    make = Builder(0)
    ways = (Edge("join", ("x", "t")), Edge("layer", ("x", "t")))
    make.block("stem", {"x": WIDTH}, {"t": 2, "conf": 2}, Branch(make.gate(["conf"], 2, 2), ways))
    make.block(
        "layer", {"x1": WIDTH, "t1": 2}, {"t2": 2}, Jump(Edge("join", ("x1", "t2" if different else "t1")))
    )
    make.block("join", {"x2": WIDTH, "t3": 2}, {"out": CLASSES}, Return(("out",), "end"))
    program = make.program()

    def retype(block: BlockInterface) -> BlockInterface:
        def change(values: dict[str, ValueSpec]) -> dict[str, ValueSpec]:
            return {name: table if name.startswith("t") else spec for name, spec in values.items()}

        return replace(block, params=change(dict(block.params)), results=change(dict(block.results)))

    flow = replace(program.flow, blocks=tuple(map(retype, program.flow.blocks)))
    return TestProgram(flow, program.bodies)


def plain(seed: int = 0) -> TestProgram:
    """One block."""
    make = Builder(seed)
    make.block("whole", {"x": WIDTH}, {"out": CLASSES}, Return(("out",), "backbone"))
    return make.program()


def random_rows(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).integers(-3, 4, (count, WIDTH)).astype(np.float32)


def file_name(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}.onnx"


def artifact_of(
    *programs: TestProgram,
    structure: OutputStructure = OutputStructure("tensor"),  # noqa: B008 (frozen)
    one_file: bytes | None = None,
    selected: int = 0,
) -> Artifact:
    """An artifact whose operating points are the given programs, each a little slower and better."""
    files: dict[str, bytes] = {} if one_file is None else {"model.onnx": one_file}
    points = []
    for index, program in enumerate(programs):
        names = {}
        for block in program.flow.blocks:
            if engine_signature(block).outputs:
                content = to_onnx(block, program.bodies[block.name])
                names[block.name] = file_name(content)
                files[block_path(names[block.name])] = content
        rates = dict.fromkeys(program.flow.exits, 1 / len(program.flow.exits))
        drop = 0.01 * (len(programs) - 1 - index)
        estimate = Estimate(0.9 - drop, drop, drop, 1.0 + index, rates)
        execution = "blocks" if one_file is None or index != selected else "single"
        points.append(OperatingPoint(f"point{index}", program.flow, names, estimate, execution))
    manifest = Manifest(
        inputs=INPUTS,
        outputs=OUTPUTS,
        output_structure=structure,
        backend="onnxruntime",
        precision="fp32",
        threads=1,
        batch_size=1,
        operating_points=tuple(points),
        selected=selected,
        plain=len(points) - 1,
        one_file=None if one_file is None else selected,
        certificate={"bound": 0.02},
        environment={"python": "3.11"},
    )
    return Artifact(manifest, files, {"model": {"name": "test"}})


def random_program(seed: int) -> TestProgram:
    """An acyclic program of up to six blocks: every block leads to the next one, some skip ahead."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 7))
    make = Builder(seed + 1)
    for index in range(count):
        name = f"b{index}"
        params = {"x": WIDTH} if index == 0 else {f"p{index}": 4, f"q{index}": WIDTH}
        feature, passed = f"h{index}", next(reversed(params))
        results = {feature: 4, f"out{index}": CLASSES, f"conf{index}": 2}
        leave = Return((f"out{index}",), f"exit{index}")
        later = [int(n) for n in rng.permutation(np.arange(index + 1, count))[:2]]
        targets = list(dict.fromkeys([index + 1, *later])) if index + 1 < count else []
        ways: list[Successor] = [Edge(f"b{t}", (feature, passed)) for t in targets]
        if rng.random() < 0.6 or not ways:
            ways.insert(0, leave)
        terminator: Terminator
        if len(ways) == 1:
            terminator = leave if ways == [leave] else Jump(ways[0])  # type: ignore[arg-type]
        else:
            gate: Gate = make.gate([f"conf{index}"], 2, len(ways))
            terminator = Branch(gate, tuple(ways))
        make.block(name, params, results, terminator)
    return make.program()
