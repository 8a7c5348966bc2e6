"""Tensors on a GPU as inputs: what is taken, what is refused; here they are tensors that only say so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from onnx_programs import CLASSES, artifact_of, chain, plain, random_rows

from exitcompiler.controlflow import BlockInterface, Branch, ConstantGate, ControlFlow, Return, ValueSpec
from exitcompiler.errors import InputError
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.hand_over import take_on_device
from exitcompiler.runtime.inputs import InputReader
from exitcompiler.runtime.loading import open_artifact

X = ValueSpec(("batch", 4), "float32")
IDS = ValueSpec(("batch", 2), "int64")
LONG = torch.int64


class OnGpu(torch.Tensor):
    """A tensor without memory that says that it lies on a GPU."""

    @staticmethod
    def __new__(
        cls,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cuda:0",
        requires_grad: bool = False,
    ) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        assert isinstance(made, OnGpu)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default, f"{func} would wait for the device, or copy"
        (tensor,) = args
        return cls(*tensor.shape, dtype=tensor.dtype, device=str(tensor.device))


def test_they_are_taken_as_they_are() -> None:
    reader = InputReader({"x": X, "ids": IDS}, on_device=True)
    given = OnGpu(3, 4, requires_grad=True), OnGpu(3, 2, dtype=LONG)
    for args, named in ((given, {}), ((), dict(zip(("x", "ids"), given, strict=True)))):
        values, rows, kind = reader.read(args, named)
        assert (rows, kind) == (3, "device")
        assert [tuple(value.shape) for value in values] == [(3, 4), (3, 2)]
        assert not values[0].requires_grad


@pytest.mark.parametrize(
    ("x", "ids", "message"),
    [
        (OnGpu(3, 5), OnGpu(3, 2, dtype=LONG), r"input 'x': expected float32\[batch, 4\], found shape"),
        (OnGpu(3, 4, dtype=torch.float16), OnGpu(3, 2, dtype=LONG), r"found float16\n.*to\(torch.float32\)"),
        (OnGpu(3, 4), OnGpu(2, 2, dtype=LONG), "input 'ids': 2 rows, others have 3"),
        (OnGpu(0, 4), OnGpu(0, 2, dtype=LONG), "0 rows"),
        (OnGpu(3, 4, device="cuda:1"), OnGpu(3, 2, dtype=LONG), r"on 'cuda:1'.*\n.*CUDA_VISIBLE_DEVICES"),
        (OnGpu(3, 4, device="xpu:0"), OnGpu(3, 2, dtype=LONG), r"on device 'xpu:0'\n.*cuda:0"),
        (OnGpu(3, 4), torch.zeros(3, 2, dtype=LONG), "input 'ids': it is in the host's memory"),
        (np.zeros((3, 4), np.float32), OnGpu(3, 2, dtype=LONG), "input 'x': it is in the host's memory"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(x: Any, ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        InputReader({"x": X, "ids": IDS}, on_device=True).read((x, ids), {})


def test_host_memory_goes_as_ever() -> None:
    reader = InputReader({"x": X}, on_device=True)
    x = random_rows(2)
    for value, kind in ((x, "numpy"), (torch.from_numpy(x), "torch")):
        (found,), rows, given = reader.read((value,), {})
        assert (rows, given) == (2, kind)
        np.testing.assert_array_equal(found, x)


def test_a_program_on_the_cpu_refuses_them() -> None:
    with pytest.raises(InputError, match=re.escape("on the CPU: pass x.cpu()")):
        InputReader({"x": X}).read((OnGpu(3, 4),), {})


class _Executor:
    """Answers on "the device", with tensors on the CPU to look at."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def run_device(self, inputs: Sequence[Any], rows: int) -> tuple[list[Any], Any]:
        self.seen.append(tuple(inputs[0].shape))
        logits = torch.tensor([[3.0, 0.0, 0.0]] * rows)
        return [logits], torch.zeros(rows, dtype=torch.int32)


def test_a_model_gives_tensors_for_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model: CompiledModel = open_artifact(artifact_of(chain(3), plain(3)), "onnxruntime")
    executor = _Executor()
    monkeypatch.setattr(type(model.backend), "on_device", True)
    model = CompiledModel(model.artifact, model.backend)
    monkeypatch.setattr(model, "_make_device", lambda: executor)
    result = model.run(OnGpu(5, 4))
    assert result.outputs.shape == (5, CLASSES)
    assert result.exit_index.dtype is torch.int32
    torch.testing.assert_close(result.confidence, torch.softmax(result.outputs, dim=1)[:, 0])
    assert torch.equal(model(OnGpu(1, 4)), result.outputs[:1])
    assert executor.seen == [(5, 4), (1, 4)]
    assert model.execution == "blocks"


def test_what_a_near_part_hands_over_stays_on_the_device() -> None:
    ways = (Return(("x",), "near"), Return(("x",), "near:far", ("x", "ids")))
    block = BlockInterface("near", {"x": X, "ids": IDS}, {}, Branch(ConstantGate(0, 2), ways))
    flow = ControlFlow(block.params, {"y": X}, (block,), {"x": X, "ids": IDS})
    x, ids = torch.randn(5, 4), torch.arange(10).reshape(5, 2)
    for exits, rows in (([0, 1, 0, 1, 1], [1, 3, 4]), ([0] * 5, [])):
        handed_over = take_on_device(flow, [x, ids], torch.tensor(exits, dtype=torch.int32))
        assert handed_over.rows.tolist() == rows
        assert handed_over.values.keys() == {"x", "ids"}
        assert torch.equal(handed_over.values["x"], x[rows])
        assert torch.equal(handed_over.values["ids"], ids[rows])
