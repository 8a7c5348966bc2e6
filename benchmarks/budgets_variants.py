"""The same program with slower kernels, or with gates that let fewer rows leave early."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from budgets_extra_work import with_extra_work

from exitcompiler.controlflow import BlockInterface, Branch, ControlFlow, LinearGate, Return
from exitcompiler.errors import ArtifactError
from exitcompiler.passes.assemble_onnx import assemble_onnx
from exitcompiler.runtime.manifest import MODEL_FILE, Artifact, Execution, OperatingPoint, block_path

__all__ = ["selected", "with_careful_gates", "with_form", "with_slower_blocks"]


def selected(artifact: Artifact) -> OperatingPoint:
    """The operating point that runs."""
    return artifact.manifest.operating_points[artifact.manifest.selected]


def with_form(artifact: Artifact, form: Execution) -> Artifact:
    """The artifact with one row run by an engine per block, or by one engine of ``model.onnx``.

    Raises:
        ArtifactError: The selected point is not the one in ``model.onnx``, or is the plain backbone.
    """
    manifest = artifact.manifest
    if manifest.one_file != manifest.selected or manifest.selected == manifest.plain:
        raise ArtifactError(
            "the selected point has no exits, or no model.onnx",
            where="the program to measure",
            remedy="take a program with exits, as it was compiled",
        )
    return _with_point(artifact, replace(selected(artifact), execution=form), {})


def with_slower_blocks(artifact: Artifact, columns: Mapping[str, int]) -> Artifact:
    """The artifact with extra work in blocks of the selected point, in the pool and in ``model.onnx`` alike.

    Other points, the plain backbone among them, keep their own.

    Args:
        artifact: Of a program with exits.
        columns: Block -> how much, see `with_extra_work`.
    """
    point = selected(artifact)
    files, names = {}, dict(point.files)
    for block, count in columns.items():
        model = artifact.files[block_path(point.files[block])]
        slower = with_extra_work(model, count)
        names[block] = f"{hashlib.sha256(slower).hexdigest()}.onnx"
        files[block_path(names[block])] = slower
    return _with_point(artifact, replace(point, files=names), files)


def with_careful_gates(artifact: Artifact, shift: float) -> Artifact:
    """The artifact with every gate of the selected point less ready to leave; kernels stay as they are.

    The certificate goes: it was that of the old gates.

    Args:
        artifact: Of a program with linear gates.
        shift: Taken from the bias of every action that leaves.
    """
    point = selected(artifact)
    flow = point.control_flow
    blocks = tuple(_careful(block, shift) for block in flow.blocks)
    changed = replace(point, control_flow=ControlFlow(flow.inputs, flow.outputs, blocks, flow.carried))
    without = replace(artifact, manifest=replace(artifact.manifest, certificate=None))
    return _with_point(without, changed, {})


def _careful(block: BlockInterface, shift: float) -> BlockInterface:
    end = block.terminator
    if not isinstance(end, Branch) or not isinstance(end.gate, LinearGate):
        return block
    bias = tuple(
        value - shift * isinstance(way, Return) for value, way in zip(end.gate.bias, end.edges, strict=True)
    )
    return replace(block, terminator=replace(end, gate=replace(end.gate, bias=bias)))


def _with_point(artifact: Artifact, point: OperatingPoint, files: Mapping[str, bytes]) -> Artifact:
    """The artifact with another selected point, in ``model.onnx`` too."""
    manifest, everything = artifact.manifest, {**artifact.files, **files}
    points = list(manifest.operating_points)
    points[manifest.selected] = replace(point, torch_files={})
    models = {block: everything[block_path(file)] for block, file in point.files.items()}
    everything[MODEL_FILE] = assemble_onnx(point.control_flow, models)
    return Artifact(replace(manifest, operating_points=tuple(points)), everything, artifact.report)
