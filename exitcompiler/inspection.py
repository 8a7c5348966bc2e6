"""What is in an artifact, as plain figures, and its ONNX files for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exitcompiler.artifact import require_replaceable, save_artifact
from exitcompiler.errors import ArtifactError, InputError
from exitcompiler.files import write_file
from exitcompiler.runtime.explain import explain
from exitcompiler.runtime.hand_over import HandOver, describe_part, hand_over_of
from exitcompiler.runtime.manifest import MODEL_FILE, Artifact, Manifest, block_path
from exitcompiler.runtime.manifest_json import control_flow_to_json
from exitcompiler.splitting import SplitArtifacts, split_artifact

__all__ = [
    "describe_artifact",
    "describe_hand_over",
    "describe_parts",
    "explain_artifact",
    "export_blocks",
    "export_one_file",
    "export_parts",
    "require_report",
]

NEAR = "near.exit"
FAR = "far.exit"
"""What the parts of a split program are called in their folder."""


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """The facts of an artifact as a JSON-able dict.

    Args:
        artifact: As loaded.

    Returns:
        ``inputs``, ``outputs`` (name -> type), ``backend``, ``precision``, ``threads``, ``batch_size``,
        ``operating_points``, ``certificate``, ``environment``, ``part``, ``files``, ``size_bytes``.
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
        "part": _describe_part(manifest),
        "files": len(artifact.files),
        "size_bytes": sum(map(len, artifact.files.values())),
    }


def _describe_part(manifest: Manifest) -> dict[str, Any] | None:
    if manifest.part is None:
        return None
    return {
        "kind": manifest.part.kind,
        "edges": [list(edge) for edge in manifest.part.edges],
        "hand_over": describe_hand_over(hand_over_of(manifest)),
    }


def describe_hand_over(hand_over: HandOver) -> dict[str, Any]:
    """What is handed over, as a JSON-able dict: ``values`` (name -> type) and ``bytes_per_row``."""
    return {
        "values": {name: str(spec) for name, spec in hand_over.values.items()},
        "bytes_per_row": hand_over.bytes_per_row,
    }


def describe_parts(parts: SplitArtifacts) -> dict[str, Any]:
    """The facts of a split program as a JSON-able dict.

    Returns:
        ``edges`` (names), ``hand_over`` (``values``, ``bytes_per_row``), ``share`` of the rows that is handed
        over (None: not known), ``shared`` blocks that are in both parts, ``near_bytes``, ``far_bytes``.
    """
    part = parts.near.manifest.part
    assert part is not None
    return {
        "edges": [":".join(edge) for edge in part.edges],
        "hand_over": describe_hand_over(parts.hand_over),
        "share": parts.share,
        "shared": list(parts.shared),
        "near_bytes": sum(map(len, parts.near.files.values())),
        "far_bytes": sum(map(len, parts.far.files.values())),
    }


def require_report(artifact: Artifact) -> None:
    """Refuse a part of a split program: it has no report.

    Raises:
        InputError: It is one.
    """
    if artifact.manifest.part is not None:
        raise InputError(
            "a part of a split program has no report", where="report", remedy="use the one of the whole"
        )


def explain_artifact(artifact: Artifact) -> str:
    """What was kept and pruned, and why; of a part of a split program, what it is a part of."""
    manifest = artifact.manifest
    if manifest.part is not None:
        return describe_part(manifest, manifest.part)
    return explain(artifact.report, manifest.operating_points[manifest.selected])


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


def export_parts(artifact: Artifact, edge: str, folder: Path) -> SplitArtifacts:
    """Cut the selected program in two and write ``near.exit`` and ``far.exit``.

    Args:
        artifact: As loaded.
        edge: ``source:target``, or the target alone for all edges that lead there.
        folder: Where to write; made if it does not exist.

    Raises:
        InputError: The program cannot be cut there, or the folder cannot be made.
        ArtifactError: A part cannot be written.
    """
    parts = split_artifact(artifact, edge)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    require_replaceable(folder / FAR)
    for name, part in ((NEAR, parts.near), (FAR, parts.far)):
        save_artifact(part, folder / name)
    return parts


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
