"""The torch backend and the executors against the interpreter, on any program."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import exit_chain, programs, rows

from exitcompiler.artifact import save_artifact
from exitcompiler.controlflow import BlockInterface, ControlFlow, OutputStructure, engine_signature
from exitcompiler.interpreter import interpret
from exitcompiler.program import Program
from exitcompiler.runtime.backends import Engine
from exitcompiler.runtime.loading import load
from exitcompiler.runtime.manifest import (
    Artifact,
    Estimate,
    Manifest,
    OperatingPoint,
    block_path,
    torch_paths,
)
from exitcompiler.runtime.rows import BatchExecutor
from exitcompiler.runtime.single_row import SingleRowExecutor
from exitcompiler.runtime.torch_backend import torch_engine
from exitcompiler.torch_graphs import serialize_body


def interfaces(program: Program) -> ControlFlow:
    blocks = tuple(BlockInterface(b.name, b.params, b.results, b.terminator) for b in program.blocks)
    return ControlFlow(program.inputs, program.outputs, blocks)


@given(program=programs(), count=st.integers(1, 12), seed=st.integers(0, 100))
def test_executors_agree_with_the_interpreter(program: Program, count: int, seed: int) -> None:
    def engines(block: BlockInterface, static_batch: int | None) -> Engine:
        body = program.block(block.name).body
        return torch_engine(block, lambda tensors: body(*tensors))

    inputs = rows(count, program, seed)
    expected = interpret(program, inputs)
    arrays = [tensor.numpy() for tensor in inputs.values()]
    outputs, exit_index = BatchExecutor(program, engines).run(arrays, count)
    np.testing.assert_allclose(outputs[0], expected.outputs["y"], atol=1e-5)
    np.testing.assert_array_equal(exit_index, expected.exit_index)
    single = SingleRowExecutor(program, engines)
    for row in range(count):
        for buffer, array in zip(single.inputs, arrays, strict=True):
            buffer[...] = array[row : row + 1]
        values, index = single.run()
        np.testing.assert_allclose(values[0][0], expected.outputs["y"][row], atol=1e-5)
        assert index == expected.exit_index[row]


def packed(program: Program) -> Artifact:
    files, names, stems = {}, {}, {}
    for block in program.blocks:
        if not engine_signature(block).outputs:
            continue
        graph, weights = serialize_body(block.body)
        stem = stems[block.name] = hashlib.sha256(graph + weights).hexdigest()
        files |= dict(zip(torch_paths(stem), (graph, weights), strict=True))
        content = b"\x08" + block.name.encode()  # stands in for ONNX, which is not read here
        names[block.name] = f"{hashlib.sha256(content).hexdigest()}.onnx"
        files[block_path(names[block.name])] = content
    flow = interfaces(program)
    estimate = Estimate(0.9, 0.0, 0.0, 1.0, dict.fromkeys(flow.exits, 1 / len(flow.exits)))
    point = OperatingPoint("only", flow, names, estimate, torch_files=stems)
    structure = OutputStructure("tensor")
    manifest = Manifest(flow.inputs, flow.outputs, structure, "torch", "fp32", 1, 1, (point,), 0, 0)
    return Artifact(manifest, files)


def test_an_artifact_with_torch_graphs(tmp_path: Path) -> None:
    program = exit_chain()
    save_artifact(packed(program), tmp_path / "m")  # made for torch, so with what that runs
    model = load(tmp_path / "m")
    assert model.backend.name == "torch"
    x = torch.linspace(-2, 2, 60).reshape(20, 3)
    expected = interpret(program, {next(iter(program.inputs)): x})
    result = model.run(x)
    torch.testing.assert_close(result.outputs, expected.outputs["y"])
    for row in range(20):
        alone = model.run(x[row : row + 1])
        torch.testing.assert_close(alone.outputs[0], result.outputs[row])
        assert alone.exit_index[0] == result.exit_index[row]
    model.save(tmp_path / "without", torch=False)
    assert not (tmp_path / "without" / "torch").exists()
