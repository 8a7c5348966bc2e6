"""Loads a saved program; never imports torch (the torch backend apart)."""

from __future__ import annotations

import logging
import os

from exitcompiler.errors import BackendUnavailableError, InputError
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.backends import (
    BACKENDS,
    DEVICE_BACKENDS,
    TORCH_BACKENDS,
    Backend,
    create_backend,
    unavailable_reason,
)
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
    engines: str | os.PathLike[str] | None = None,
) -> CompiledModel:
    """Load a program that `CompiledModel.save` wrote.

    Args:
        path: The folder, or the zip file.
        backend: ``"auto"``: the one it was compiled for, or another one that is installed (said in
            ``notes``), but one for a GPU only if it was compiled for a GPU; or the name of one.
        threads: Threads per call; None: as when it was compiled.
        precision: None: the one its gates were learned at. On a GPU that is final, as the types are in the
            models.
        check_finite: Refuse NaN and infinity in floating-point inputs.
        engines: With ``backend="tensorrt"``: a folder of engines that trtexec built for this program; None:
            they are built here.

    Raises:
        ArtifactError: The artifact is missing, damaged, unsafe, or of a newer schema; or the folder of
            engines is for another device, version or precision.
        BackendUnavailableError: The backend is not installed, or has not got the precision.
        InputError: There is no such backend, ``threads`` is not positive, or the program's models are typed
            for another precision.
    """
    return open_artifact(
        read_artifact(path),
        backend,
        threads=threads,
        precision=precision,
        check_finite=check_finite,
        engines=engines,
    )


def open_artifact(
    artifact: Artifact,
    backend: str = "auto",
    *,
    threads: int | None = None,
    precision: str | None = None,
    check_finite: bool = True,
    engines: str | os.PathLike[str] | None = None,
) -> CompiledModel:
    """Make a program in memory ready to run; arguments and errors as in `load`."""
    manifest = artifact.manifest
    on_device = backend in DEVICE_BACKENDS or (backend == "auto" and manifest.backend in DEVICE_BACKENDS)
    if on_device or "int8" in (manifest.precision, precision):
        precision = _typed_precision(artifact, precision)
    precision = manifest.precision if precision is None else precision
    threads = manifest.threads if threads is None else threads
    notes: list[str] = []
    if engines is not None:
        engine_backend = _with_engines(engines, backend, precision)
    elif backend == "auto":
        engine_backend = _choose(artifact, precision, threads, notes)
    else:
        engine_backend = create_backend(backend, precision=precision, threads=threads)
    if engine_backend.name != manifest.backend and backend != "auto":
        notes.append(f"compiled and measured for {manifest.backend}, running on {engine_backend.name}")
    if precision != manifest.precision:
        notes.append(f"the gates were learned at {manifest.precision}, running at {precision}")
    for note in notes:
        _log.log(logging.WARNING if backend == "auto" else logging.INFO, "%s", note)
    if engine_backend.form == "torch":
        artifact = with_torch_graphs(artifact)
    return CompiledModel(artifact, engine_backend, check_finite=check_finite, notes=notes)


def _typed_precision(artifact: Artifact, asked: str | None) -> str:
    """The precision of a program's models, which is the only one that they have on a GPU, or if it is int8.

    Raises:
        InputError: Another one is asked for.
    """
    manifest = artifact.manifest
    # For a CPU, models are float32 whatever is asked for: there the backend lowers the precision.
    in_types = manifest.backend in DEVICE_BACKENDS or manifest.precision == "int8"
    typed = manifest.precision if in_types else "fp32"
    if asked not in (None, typed):
        others = "" if "int8" in (asked, typed) else "on a GPU "
        raise InputError(
            f"the program's models are typed for {typed}: {others}they do not run at {asked}",
            where="precision",
            remedy=f"leave precision out, or compile the model {'for a GPU ' if others else ''}with "
            f"precision={asked!r}",
        )
    return typed


def _with_engines(engines: str | os.PathLike[str], backend: str, precision: str) -> Backend:
    """The TensorRT backend with a folder of engines."""
    if backend != "tensorrt":
        raise InputError(
            f"engines are for TensorRT, not for backend={backend!r}",
            where="engines",
            remedy="pass backend='tensorrt', or no engines",
        )
    from exitcompiler.runtime.tensorrt_backend import TensorRtBackend

    return TensorRtBackend(precision=precision, engines=engines)


def _choose(artifact: Artifact, precision: str, threads: int | None, notes: list[str]) -> Backend:
    """The artifact's own backend, else the first other one that can run it."""
    own = artifact.manifest.backend
    has_torch = any(point.torch_files for point in artifact.manifest.operating_points)
    reasons: list[str] = []
    for name in _in_order(own):
        if (reason := unavailable_reason(name)) is not None:
            reasons.append(reason)
            continue
        if name in TORCH_BACKENDS and not has_torch:
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
        remedy=f"pip install {own}"
        if own not in DEVICE_BACKENDS
        else f"load it where there is a GPU; a program for CPUs is compiled with precision='fp32' "
        f"(this one: {precision!r})",
    )


def _in_order(own: str) -> list[str]:
    """A program's own backend, then others: what runs on CPUs stays there."""
    others = [name for name in BACKENDS if name != own]
    if own not in DEVICE_BACKENDS:
        return [own, *(name for name in others if name not in DEVICE_BACKENDS)]
    return [own, *sorted(others, key=lambda name: name not in DEVICE_BACKENDS)]
