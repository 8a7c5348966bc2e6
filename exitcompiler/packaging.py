"""Puts operating points, their blocks and the plain backbone together as an artifact."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Final, cast

from exitcompiler.controlflow import ControlFlow, OutputStructure
from exitcompiler.engines import Lowerer
from exitcompiler.evaluation import Evaluation
from exitcompiler.machine import processor_name
from exitcompiler.passes.assemble_onnx import assemble_onnx
from exitcompiler.program import BlockInterface, Program
from exitcompiler.quantized_body import is_quantized
from exitcompiler.runtime.backends import Backend
from exitcompiler.runtime.device_engines import DeviceBackend
from exitcompiler.runtime.manifest import (
    MODEL_FILE,
    Artifact,
    Estimate,
    Json,
    Manifest,
    OperatingPoint,
    block_path,
    torch_paths,
    with_torch_graphs,
)
from exitcompiler.selection import Built
from exitcompiler.settings import Settings
from exitcompiler.torch_graphs import serialize_body

__all__ = ["PLAIN", "environment", "pack", "point_name"]

PLAIN = "plain"
"""The operating point that is the untouched backbone."""

_PACKAGES: Final = (
    "exitcompiler", "torch", "onnx", "onnxruntime", "openvino", "cuda-bindings", "tensorrt", "tensorrt_rtx",
    "numpy",
)  # fmt: skip


def point_name(accuracy_drop: float) -> str:
    """An operating point is called by its drop in percentage points: ``drop+0.98``."""
    return f"drop{round(100 * accuracy_drop, 2) + 0.0:+.2f}"  # adding 0.0 makes -0.0 a plain zero


def pack(
    points: Sequence[Built],
    plain: Program,
    plain_us: float,
    plain_estimate: Evaluation | None,
    structure: OutputStructure,
    backend: Backend,
    lowerer: Lowerer,
    settings: Settings,
) -> Artifact:
    """An artifact whose first point is selected, or the plain backbone where there is no other.

    The torch graphs of blocks are in it only where the backend needs them; else they are made from
    the programs, which the artifact keeps alive for this, when it is saved with them.

    Args:
        points: The operating points, the chosen one first; told apart by their accuracy drops.
        plain: The untouched backbone.
        plain_us: Its time per row.
        plain_estimate: How it does on the learning rows; None: nobody has looked.
        structure: How the model hands over its logits.
        backend: What everything was measured on.
        lowerer: Where ONNX models come from.
        settings: What was asked for.

    Raises:
        LoweringError: A block cannot be lowered, or, for a backend that runs torch graphs, be written.
    """
    files: dict[str, bytes] = {}
    programs = {point_name(built.point.accuracy_drop): built.program for built in points} | {PLAIN: plain}
    estimates = [_estimate(built, settings) for built in points]
    estimates.append(_plain_estimate(plain, plain_us, plain_estimate, settings))
    packed = [
        _point(name, program, estimate, lowerer, files)
        for (name, program), estimate in zip(programs.items(), estimates, strict=True)
    ]
    chosen = points[0].program if points else plain
    files[MODEL_FILE] = assemble_onnx(_interfaces(chosen), lowerer.models(chosen))
    manifest = Manifest(
        inputs=plain.inputs,
        outputs=plain.outputs,
        output_structure=structure,
        backend=backend.name,
        precision=_precision(backend, programs.values()),
        threads=backend.threads,
        batch_size=settings.batch_size,
        operating_points=tuple(packed),
        selected=0,
        plain=len(packed) - 1,
        one_file=0,
        environment=environment(backend),
    )
    artifact = Artifact(manifest, files, {}, partial(_add_torch_graphs, programs))
    return with_torch_graphs(artifact) if backend.form == "torch" else artifact


def _precision(backend: Backend, programs: Iterable[Program]) -> str:
    """What the models are in: where nothing turned out to be quantised, that is float32 after all."""
    if backend.precision != "int8":
        return backend.precision
    bodies = [block.body for program in programs for block in program.blocks]
    return "int8" if any(map(is_quantized, bodies)) else "fp32"


def _point(
    name: str, program: Program, estimate: Estimate, lowerer: Lowerer, files: dict[str, bytes]
) -> OperatingPoint:
    names: dict[str, str] = {}
    for block, model in lowerer.models(program).items():
        names[block] = f"{hashlib.sha256(model).hexdigest()}.onnx"
        files[block_path(names[block])] = model
    return OperatingPoint(name, _interfaces(program), names, estimate)


def _add_torch_graphs(programs: Mapping[str, Program], artifact: Artifact) -> Artifact:
    """The artifact with the torch graphs of its blocks.

    Args:
        programs: Operating point -> program.
        artifact: Of these programs; its manifest may have changed in other ways since it was packed.

    Raises:
        LoweringError: The graph of a block cannot be written; names the node.
    """
    files = dict(artifact.files)
    points = []
    for point in artifact.manifest.operating_points:
        stems: dict[str, str] = {}
        for block in point.files:
            graph, weights = serialize_body(programs[point.name].block(block).body)
            stems[block] = hashlib.sha256(graph + weights).hexdigest()
            files.update(zip(torch_paths(stems[block]), (graph, weights), strict=True))
        points.append(replace(point, torch_files=stems))
    manifest = replace(artifact.manifest, operating_points=tuple(points))
    return replace(artifact, manifest=manifest, files=files)


def _interfaces(program: Program) -> ControlFlow:
    """The program without its bodies."""
    blocks = tuple(BlockInterface(b.name, b.params, b.results, b.terminator) for b in program.blocks)
    return ControlFlow(program.inputs, program.outputs, blocks)


def _estimate(built: Built, settings: Settings) -> Estimate:
    estimate: Evaluation = built.point.estimate
    exits = built.program.exits
    rates = {name: float(estimate.exit_rates.get(name, 0.0)) for name in exits}
    # Folds may differ in which exits they keep: what left elsewhere leaves at the end here.
    rates[exits[-1]] += 1.0 - sum(rates.values())
    return Estimate(
        accuracy=float(estimate.backbone_accuracy - built.point.accuracy_drop),
        accuracy_drop=float(built.point.accuracy_drop),
        excess_error=float(estimate.excess_error),
        mean_latency_ms=built.mean_us * settings.batch_size / 1000.0,
        exit_rates=rates,
    )


def _plain_estimate(
    plain: Program, plain_us: float, estimate: Evaluation | None, settings: Settings
) -> Estimate:
    """What the untouched backbone does, in the precision that it runs in."""
    latency_ms = plain_us * settings.batch_size / 1000.0
    everything = dict.fromkeys(plain.exits, 1.0)
    if estimate is None:
        return Estimate(1.0, 0.0, 0.0, latency_ms, everything)
    return Estimate(estimate.accuracy, estimate.accuracy_drop, estimate.excess_error, latency_ms, everything)


def environment(backend: Backend | None = None) -> dict[str, Json]:
    """Versions and machine, for the manifest and the report; with the GPU of a backend that runs on one."""
    versions: dict[str, Json] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "cpus": os.cpu_count() or 1,
        **({} if backend is None else _device(backend)),
        **versions,
    }


def _device(backend: Backend) -> dict[str, Json]:
    if not backend.on_device:
        return {}
    driver = cast(DeviceBackend, backend).driver
    return {
        "device": driver.name,
        "compute_capability": list(driver.compute_capability),
        "cuda_driver": driver.driver_version,
    }
