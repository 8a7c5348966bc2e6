"""What is in an artifact, as plain figures, and its ONNX files for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exitcompiler.errors import ArtifactError, InputError
from exitcompiler.files import write_file
from exitcompiler.runtime.manifest import MODEL_FILE, Artifact, block_path
from exitcompiler.runtime.manifest_json import control_flow_to_json

__all__ = ["describe_artifact", "export_blocks", "export_one_file"]


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """The facts of an artifact as a JSON-able dict.

    Args:
        artifact: As loaded.

    Returns:
        ``inputs``, ``outputs`` (name -> type), ``backend``, ``precision``, ``threads``, ``batch_size``,
        ``operating_points``, ``certificate``, ``environment``, ``files``, ``size_bytes``.
    """
    manifest = artifact.manifest
    points = [
        {
            "name": point.name,
            "selected": index == manifest.selected,
            "plain": index == manifest.plain,
            "exits": list(point.control_flow.exits),
            "execution": point.execution,
            "accuracy": point.estimate.accuracy,
            "accuracy_drop": point.estimate.accuracy_drop,
            "excess_error": point.estimate.excess_error,
            "mean_latency_ms": point.estimate.mean_latency_ms,
            "exit_rates": dict(point.estimate.exit_rates),
        }
        for index, point in enumerate(manifest.operating_points)
    ]
    return {
        "inputs": {name: str(spec) for name, spec in manifest.inputs.items()},
        "outputs": {name: str(spec) for name, spec in manifest.outputs.items()},
        "backend": manifest.backend,
        "precision": manifest.precision,
        "threads": manifest.threads,
        "batch_size": manifest.batch_size,
        "operating_points": points,
        "certificate": None if manifest.certificate is None else dict(manifest.certificate),
        "environment": dict(manifest.environment),
        "files": len(artifact.files),
        "size_bytes": sum(map(len, artifact.files.values())),
    }


def export_one_file(artifact: Artifact, path: Path) -> None:
    """Write the program as a single ONNX model.

    Args:
        artifact: As loaded.
        path: Where to write; an existing file is replaced.

    Raises:
        ArtifactError: The artifact holds no such model.
        InputError: The file cannot be written.
    """
    content = artifact.files.get(MODEL_FILE)
    if content is None:
        raise ArtifactError(
            "holds no one-file model",
            where=MODEL_FILE,
            remedy="export with --format blocks, or compile it again",
        )
    write_file(path, content)


def export_blocks(artifact: Artifact, folder: Path) -> None:
    """Write the selected program as one ONNX model per block, and ``program.json`` with the control flow.

    Args:
        artifact: As loaded.
        folder: Where to write; made if it does not exist.

    Raises:
        InputError: A file cannot be written.
    """
    point = artifact.manifest.operating_points[artifact.manifest.selected]
    names = {block: f"{number:02d}_{_safe(block)}.onnx" for number, block in enumerate(point.files)}
    files = {names[block]: artifact.files[block_path(file)] for block, file in point.files.items()}
    flow = {**control_flow_to_json(point.control_flow), "files": names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    for name, content in {**files, "program.json": json.dumps(flow, indent=2).encode()}.items():
        write_file(folder / name, content)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
