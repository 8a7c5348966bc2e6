"""What has been lowered or loaded is found again, and never mistaken for anything else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from programs import ROW, aten, build_body, diamond, exit_chain, row_block

from exitcompiler import engines as module
from exitcompiler.engines import Engines, Lowerer, block_key, lowerer_for
from exitcompiler.passes.lower_to_onnx import BFLOAT16_OPSET, OPSET
from exitcompiler.program import Block, Branch, LinearGate, Return
from exitcompiler.runtime.backends import create_backend


def scaled(weight: torch.Tensor, name: str = "b") -> Block:
    body = build_body({"x": ROW}, [("y", aten.mul.Tensor, ("x", "w"))], ["y"], {"w": weight})
    return Block(name, {"x": ROW}, {"y": ROW}, Return(("y",), "backbone"), body)


def test_the_same_weights_and_operators_are_the_same_block() -> None:
    weight = torch.ones(3)
    assert block_key(scaled(weight)) == block_key(scaled(weight, "other"))
    assert block_key(scaled(weight)) != block_key(scaled(torch.ones(3)))
    other = row_block("b", ["x"], [("y", aten.neg.default, ("x",))], ["y"], Return(("y",), "backbone"))
    assert block_key(other) != block_key(scaled(weight))


def test_views_of_one_memory_are_told_apart() -> None:
    memory = torch.arange(9.0)
    views = (memory[:3], memory[:1], memory[:6:2], memory[:3].view(torch.int32), memory[1:4])
    assert len({block_key(scaled(view)) for view in views}) == len(views)


def test_numbers_of_a_gate_do_not_count_but_what_it_reads_does() -> None:
    block = row_block(
        "b", ["x"], [("y", aten.neg.default, ("x",)), ("z", aten.tanh.default, ("x",))], ["y", "z"],
        Return(("y",), "backbone"),
    )  # fmt: skip
    ways = (Return(("y",), "here"), Return(("z",), "there"))

    def gated(weight: float, reads: str) -> str:
        gate = LinearGate((reads,), ((weight,) * 3, (0.0,) * 3), (0.0, 0.0))
        return block_key(replace(block, terminator=Branch(gate, ways)))

    assert gated(1.0, "y") == gated(2.0, "y") != gated(1.0, "z")


class _Models:
    """Stands in for the export: the model of a block is its weights."""

    def __init__(self) -> None:
        self.lowered = 0

    def __call__(self, blocks: list[Block], *, opset: int) -> dict[str, bytes]:
        assert opset == OPSET
        self.lowered += len(blocks)
        return {block.name: block.body.get_buffer("w").numpy().tobytes() for block in blocks}


def test_models_of_blocks_that_are_gone_are_never_given_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    models = _Models()
    monkeypatch.setattr(module, "lower_blocks", models)
    lowerer = Lowerer()
    for number in range(50):  # freed memory is given out again at once
        block = scaled(torch.full((3,), float(number)))
        assert lowerer.model(block) == np.full(3, number, np.float32).tobytes()
        assert lowerer.model(block) == np.full(3, number, np.float32).tobytes()
        del block.body.w  # what a block that is collected does
    assert models.lowered == 50


def test_engines_of_blocks_that_are_gone_are_never_given_to_others() -> None:
    engines = Engines(create_backend("torch", threads=1), Lowerer())
    x = np.ones((2, 3), np.float32)
    for number in range(50):
        block = scaled(torch.full((3,), float(number)))
        engine = engines.engine(block)
        assert engines.engine(scaled(block.body.get_buffer("w"))) is engine
        np.testing.assert_array_equal(engine.run([x])[0], x * number)
        del block.body.w


def test_programs_are_cast_for_a_gpu_alone() -> None:
    """A backend for CPUs lowers the precision by itself; one on a GPU computes in the types it is given."""

    def backend(precision: str, *, on_device: bool) -> Any:
        return SimpleNamespace(precision=precision, on_device=on_device)

    program = exit_chain()
    on_device = Engines(backend("bf16", on_device=True), Lowerer())
    cast = on_device.typed(program)
    assert any(spec.dtype == "bfloat16" for spec in on_device.typed(diamond()).blocks[1].params.values())
    assert on_device.typed(program) is cast  # so that it is lowered once
    for other in (backend("bf16", on_device=False), backend("fp32", on_device=True)):
        assert Engines(other, Lowerer()).typed(program) is program
    assert lowerer_for([backend("bf16", on_device=True)]).opset == BFLOAT16_OPSET
    assert lowerer_for([backend("bf16", on_device=False), backend("fp16", on_device=True)]).opset == OPSET
