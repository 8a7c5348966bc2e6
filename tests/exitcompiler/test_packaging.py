"""Packing: torch graphs are made where they are needed, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from programs import aten, exit_chain, row_block, row_program, rows

from exitcompiler import packaging
from exitcompiler.controlflow import OutputStructure, Return
from exitcompiler.engines import Lowerer
from exitcompiler.errors import LoweringError
from exitcompiler.interpreter import interpret
from exitcompiler.packaging import PLAIN, pack
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.loading import load, open_artifact
from exitcompiler.runtime.manifest import Artifact, has_torch_graphs
from exitcompiler.settings import Settings

pytest.importorskip("onnxruntime")

LOWERER = Lowerer()
CHAIN = exit_chain()
BACKBONE = row_program(
    row_block(
        "whole", ["x"], [("h", aten.tanh.default, ("x",)), ("y", aten.mul.Tensor, ("h", "h"))], ["y"],
        Return(("y",), "backbone"),
    )
)  # fmt: skip


def packed(backend: str) -> Artifact:
    estimate = SimpleNamespace(exit_rates={"first": 0.5}, backbone_accuracy=0.9, excess_error=0.02)
    built: Any = SimpleNamespace(
        program=CHAIN, point=SimpleNamespace(accuracy_drop=0.01, estimate=estimate), mean_us=10.0
    )
    engine_backend = create_backend(backend, threads=1)
    structure = OutputStructure("tensor")
    plain: Any = SimpleNamespace(accuracy=0.9, accuracy_drop=0.0, excess_error=0.0)
    return pack([built], BACKBONE, 20.0, plain, structure, engine_backend, LOWERER, Settings())


def refuse(body: object) -> tuple[bytes, bytes]:
    raise LoweringError("complex64 has no word here", where="body")


def test_graphs_that_torch_cannot_store_stop_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packaging, "serialize_body", refuse)
    artifact = packed("onnxruntime")
    assert not any(name.startswith("torch/") for name in artifact.files)
    model = CompiledModel(artifact, create_backend("onnxruntime", threads=1))
    model.save(tmp_path / "m")
    with pytest.raises(LoweringError, match="complex64"):
        model.save(tmp_path / "with", torch=True)
    assert not (tmp_path / "with").exists()
    with pytest.raises(LoweringError, match="complex64"):
        packed("torch")


def test_graphs_are_there_for_torch_and_made_for_others_on_request(tmp_path: Path) -> None:
    artifact = packed("onnxruntime")
    assert not has_torch_graphs(artifact.manifest)
    assert has_torch_graphs(packed("torch").manifest)
    # What changes in the manifest between packing and saving is kept.
    points = [replace(point, execution="single") for point in artifact.manifest.operating_points]
    changed = replace(artifact, manifest=replace(artifact.manifest, operating_points=tuple(points)))
    CompiledModel(changed, create_backend("onnxruntime", threads=1)).save(tmp_path / "m", torch=True)
    loaded = load(tmp_path / "m", "torch", threads=1)
    assert [point.execution for point in loaded.operating_points] == ["single", "single"]
    x = rows(9, CHAIN)
    for model in (loaded, open_artifact(changed, "torch", threads=1)):
        result = model.run(x)
        torch.testing.assert_close(result.outputs, interpret(CHAIN, x).outputs["y"])
        torch.testing.assert_close(model.select(name=PLAIN)(x), interpret(BACKBONE, x).outputs["y"])
