"""Compiling on a GPU, run, saved, loaded. For `make gpu-check`, where all is that compiling needs."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from trained import stripes, trained_network

from exitcompiler.errors import BackendUnavailableError, InputError
from exitcompiler.interpreter import interpret
from exitcompiler.runtime.loading import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    *(
        pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")
        for package in ("onnx", "onnxscript", "safetensors", "scipy", "sklearn")
    ),
]

PRECISIONS = ("fp32", "fp16", "bf16")
BACKENDS = ("cuda", "tensorrt")
CLOSE = {"fp32": 0.01, "fp16": 0.03, "bf16": 0.15}


@functools.cache
def compiled_details(backend: str, precision: str) -> Any:
    from exitcompiler import delivery
    from exitcompiler.compiler import compile_in_detail
    from exitcompiler.settings import Settings
    from exitcompiler.training import HeadRecipe

    settings = Settings(0.05, backend=backend, precision=precision, max_exits=2, recipe=HeadRecipe(epochs=3))
    # Whether exits pay on this machine is not what is tested.
    try:
        with mock.patch.object(delivery, "WORTHWHILE", 0.0):
            return compile_in_detail(
                trained_network(), stripes(1500, seed=2), stripes(1500, seed=3), settings
            )
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_run_save_load(backend: str, precision: str, tmp_path: Path) -> None:
    details = compiled_details(backend, precision)
    compiled = details.compiled
    x, y = stripes(200, seed=4)
    result = compiled.run(x)
    assert details.selection is not None
    oracle = interpret(details.selection.chosen.program, {"image": torch.from_numpy(x)})
    agree = result.exit_index == oracle.exit_index
    assert agree.mean() > 0.95
    expected = oracle.outputs["logits"].numpy()
    atol = CLOSE[precision] * float(np.abs(expected).max())
    np.testing.assert_allclose(result.outputs[agree], expected[agree], atol=atol)
    assert (compiled.plain(x).argmax(axis=1) == y).mean() > 0.9
    compiled.save(tmp_path / "m.exit")
    loaded = load(tmp_path / "m.exit")
    assert (loaded.backend.name, loaded.backend.precision) == (backend, precision)
    np.testing.assert_allclose(loaded(x), result.outputs, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_tensors_in_cuda_tensors_out_and_nobody_waits(backend: str) -> None:
    compiled = compiled_details(backend, "fp16").compiled
    x = torch.from_numpy(stripes(9, seed=5)[0]).cuda()
    expected = compiled.run(x.cpu())
    compiled.run(x)
    compiled.run(x[:1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, one = compiled.run(x), compiled.run(x[:1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found in (result, one):
        assert found.outputs.is_cuda
        assert found.exit_index.is_cuda
        assert found.confidence.is_cuda
    assert torch.equal(result.exit_index.cpu(), expected.exit_index)
    torch.testing.assert_close(result.outputs.cpu(), expected.outputs)
    torch.testing.assert_close(result.confidence.cpu(), expected.confidence)
    torch.testing.assert_close(one.outputs.cpu(), expected.outputs[:1], atol=0.05, rtol=0)
    with pytest.raises(InputError, match="expected float32"):
        compiled(x.half())


def test_costs_are_times_on_the_device() -> None:
    costs = compiled_details("cuda", "fp32").costs
    assert costs is not None
    assert 1.0 < costs.plain_us < 1e4
    assert sum(costs.segment_us) < 3 * costs.plain_us
