"""What stands in the table: the program at its points, smaller networks, bf16, int8."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from cifar import load_resnet
from cifar10_compile import settings_of
from cifar10_setup import THREADS, Array, Job
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from exitcompiler.benchmarking import logits_of
from exitcompiler.capture import capture
from exitcompiler.controlflow import OutputStructure
from exitcompiler.engines import Lowerer
from exitcompiler.errors import BackendUnavailableError
from exitcompiler.packaging import pack
from exitcompiler.program import Program
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.loading import open_artifact
from exitcompiler.runtime.manifest import Artifact, Execution, block_path
from exitcompiler.runtime.timing import measure_interleaved

__all__ = [
    "BACKENDS",
    "INT8",
    "PLAIN",
    "Contender",
    "answers",
    "contenders_of",
    "logits_in_batches",
    "open_static",
    "static_artifact",
    "static_artifacts",
    "without_exits",
]

logger = logging.getLogger("cifar10")

BACKENDS: Final = ("onnxruntime", "openvino")
PLAIN: Final = "ResNet-56"
STATIC_DEPTHS: Final = (44, 32, 20)
CALIBRATION_ROWS: Final = 512
BATCH: Final = 64
INT8: Final = "ResNet-56 int8"

_TITLES: Final = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_WAYS: Final[tuple[Execution, ...]] = ("blocks", "single")


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Args:
        name: Unique in its table.
        kind: "plain" (the whole ResNet-56 at fp32), "program", "static", "bf16" or "int8".
        engine: Backend and precision.
        model: What is called.
        chosen: It is the operating point that the compiler was asked for.
        series: What it is an operating point of; empty where it is none.
        beside: Another contender that it is compared with as well, by name; empty: none.
    """

    name: str
    kind: str
    engine: str
    model: CompiledModel
    chosen: bool = False
    series: str = ""
    beside: str = ""


def static_artifacts(job: Job) -> dict[str, Artifact]:
    """The networks without exits, each captured and lowered once: by name, for every backend."""
    found = {f"ResNet-{depth}": static_artifact(job, depth) for depth in (*STATIC_DEPTHS, 56)}
    found[INT8] = _int8(found[PLAIN], job.split.x[:CALIBRATION_ROWS])
    return found


def contenders_of(
    job: Job, programs: Mapping[str, CompiledModel], statics: Mapping[str, Artifact], backend: str
) -> list[Contender]:
    """Everything that is compared on one backend; the whole ResNet-56 first.

    Args:
        job: Development rows.
        programs: What was compiled for ONNX Runtime, by name; the same artifacts are opened on ``backend``.
        statics: What ``static_artifacts`` made.
        backend: "onnxruntime" or "openvino".
    """
    engine = f"{_TITLES[backend]} fp32"
    found: list[Contender] = []
    for series, compiled in programs.items():
        program = compiled if backend == compiled.backend.name else _reopen(compiled, backend, job)
        plain_name = program.plain.operating_point.name
        if not found:
            found.append(Contender(PLAIN, "plain", engine, program.plain))
        for point in program.operating_points:
            if point.name != plain_name:
                model, chosen = program.select(name=point.name), point.name == program.operating_point.name
                found.append(Contender(f"{series}, {point.name}", "program", engine, model, chosen, series))
    for depth in STATIC_DEPTHS:
        name = f"ResNet-{depth}"
        found.append(Contender(name, "static", engine, open_static(statics[name], backend)))
    found.append(Contender(INT8, "int8", f"{_TITLES[backend]} int8", open_static(statics[INT8], backend)))
    try:
        reduced = open_artifact(statics[PLAIN], "openvino", threads=THREADS, precision="bf16")
        found.append(Contender("ResNet-56 bf16", "bf16", "OpenVINO bf16", reduced))
    except BackendUnavailableError as error:
        logger.warning("bf16 is not measured: %s", error)
    return found


def open_static(artifact: Artifact, backend: str) -> CompiledModel:
    """A network without exits, on a backend."""
    return open_artifact(artifact, backend, threads=THREADS)


def answers(model: CompiledModel, x: Array, batch: int = BATCH) -> tuple[Array, Array]:
    """Predicted class and exit index of every row."""
    classes, exits = [], []
    for start in range(0, len(x), batch):
        result = model.run(x[start : start + batch])
        classes.append(logits_of(result.outputs).argmax(axis=1))
        exits.append(np.asarray(result.exit_index))
    return np.concatenate(classes), np.concatenate(exits)


def logits_in_batches(model: CompiledModel, x: Array, batch: int = BATCH) -> Array:
    """Logits of all rows, ``float32[rows, classes]``."""
    return np.concatenate([logits_of(model(x[i : i + batch])) for i in range(0, len(x), batch)])


def _reopen(compiled: CompiledModel, backend: str, job: Job) -> CompiledModel:
    """The same artifact on another backend, single rows run in whichever way is faster there."""
    models: dict[str, CompiledModel] = {
        way: open_artifact(_with_execution(compiled.artifact, way), backend, threads=THREADS) for way in _WAYS
    }
    if compiled.exits == compiled.plain.exits:  # refused: there is nothing but the plain network
        return models["blocks"]
    inputs = [(job.split.x[i : i + 1],) for i in range(200)]
    times = measure_interleaved(models, inputs, repeats=200, warmup=10)
    return models[min(_WAYS, key=lambda way: float(times[way].mean()))]


def _with_execution(artifact: Artifact, execution: Execution) -> Artifact:
    first, *others = artifact.manifest.operating_points
    points = (replace(first, execution=execution), *others)
    return replace(artifact, manifest=replace(artifact.manifest, operating_points=points))


def static_artifact(job: Job, depth: int) -> Artifact:
    """A whole network through the same capture, lowering and call as the program."""
    captured = capture(load_resnet(job.weights, depth), job.split.x[:8])
    return without_exits(job, captured.program, captured.structure)


def without_exits(job: Job, program: Program, structure: OutputStructure) -> Artifact:
    """A captured network of one block as an artifact that has nothing else.

    Args:
        job: What the compiler is asked for.
        program: The network.
        structure: How it hands over its logits.
    """
    settings = settings_of(job)
    backend = create_backend(settings.backend, threads=THREADS)
    return pack(
        [],
        program,
        0.0,  # estimates are not read here
        None,
        structure,
        backend,
        Lowerer(),
        settings,
    )


def _int8(artifact: Artifact, x: Array) -> Artifact:
    """A whole network, quantised by ONNX Runtime's own tool; it is run through the same call."""
    (point,) = artifact.manifest.operating_points
    ((block, file),) = point.files.items()
    quantised = quantise(artifact.files[block_path(file)], x)
    name = f"{hashlib.sha256(quantised).hexdigest()}.onnx"
    manifest = replace(artifact.manifest, operating_points=(replace(point, files={block: name}),))
    return replace(artifact, manifest=manifest, files={**artifact.files, block_path(name): quantised})


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, x: Array) -> None:
        self._batches: Iterator[dict[str, Array]] = iter(
            [{name: x[start : start + BATCH]} for start in range(0, len(x), BATCH)]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def quantise(model: bytes, x: Array) -> bytes:
    """Static int8 quantisation: QDQ, weights per channel.

    Args:
        model: ONNX, float32.
        x: Calibration rows, ``float32 [rows, 3, 32, 32]``.
    """
    name = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (Path(folder) / f"{stem}.onnx" for stem in ("fp32", "prepared", "int8"))
        source.write_bytes(model)
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(target),
            _Rows(name, x),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()
