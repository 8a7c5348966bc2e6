"""Loads a saved program; never imports torch (the torch backend apart)."""

from __future__ import annotations

import logging
import os

from exitcompiler.errors import BackendUnavailableError
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.backends import BACKENDS, Backend, available_backends, create_backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.manifest import Artifact, with_torch_graphs

__all__ = ["load", "open_artifact"]

_log = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    *,
    threads: int | None = None,
    precision: str | None = None,
    check_finite: bool = True,
) -> CompiledModel:
    """Load a program that `CompiledModel.save` wrote.

    Args:
        path: The folder, or the zip file.
        backend: ``"auto"``: the one it was compiled for, or another one that is installed (said in
            ``notes``); or the name of one.
        threads: Threads per call; None: as when it was compiled.
        precision: None: the one its gates were learned at.
        check_finite: Refuse NaN and infinity in floating-point inputs.

    Raises:
        ArtifactError: The artifact is missing, damaged, unsafe, or of a newer schema.
        BackendUnavailableError: The backend is not installed, or has not got the precision.
        InputError: There is no such backend, or ``threads`` is not positive.
    """
    return open_artifact(
        read_artifact(path), backend, threads=threads, precision=precision, check_finite=check_finite
    )


def open_artifact(
    artifact: Artifact,
    backend: str = "auto",
    *,
    threads: int | None = None,
    precision: str | None = None,
    check_finite: bool = True,
) -> CompiledModel:
    """Make a program in memory ready to run; arguments and errors as in `load`."""
    manifest = artifact.manifest
    precision = manifest.precision if precision is None else precision
    threads = manifest.threads if threads is None else threads
    notes: list[str] = []
    if backend == "auto":
        engine_backend = _choose(artifact, precision, threads, notes)
    else:
        engine_backend = create_backend(backend, precision=precision, threads=threads)
    if engine_backend.name != manifest.backend and backend != "auto":
        notes.append(f"compiled and measured for {manifest.backend}, running on {engine_backend.name}")
    if precision != manifest.precision:
        notes.append(f"the gates were learned at {manifest.precision}, running at {precision}")
    for note in notes:
        _log.log(logging.WARNING if backend == "auto" else logging.INFO, "%s", note)
    if engine_backend.name == "torch":
        artifact = with_torch_graphs(artifact)
    return CompiledModel(artifact, engine_backend, check_finite=check_finite, notes=notes)


def _choose(artifact: Artifact, precision: str, threads: int | None, notes: list[str]) -> Backend:
    """The artifact's own backend, else the first other one that can run it."""
    own = artifact.manifest.backend
    has_torch = any(point.torch_files for point in artifact.manifest.operating_points)
    installed = available_backends()
    reasons: list[str] = []
    for name in (own, *(name for name in BACKENDS if name != own)):
        if name not in installed:
            reasons.append(f"{name} is not installed")
            continue
        if name == "torch" and not has_torch:
            reasons.append("the artifact holds no torch graphs")
            continue
        try:
            backend = create_backend(name, precision=precision, threads=threads)
        except BackendUnavailableError as error:
            reasons.append(error.what)
            continue
        if name != own:
            notes.append(f"compiled and measured for {own}, running on {name}: {reasons[0]}")
        return backend
    raise BackendUnavailableError(
        f"no backend here can run this program: {'; '.join(reasons)}",
        where="backend",
        remedy=f"pip install {own}",
    )
