"""What commands load and save: programs, rows, and the checks that come before the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitcompiler import cli_options as options
from exitcompiler.cli_tables import Output

if TYPE_CHECKING:
    from exitcompiler.image_folder import ImagePreprocessing
    from exitcompiler.runtime.compiled import CompiledModel
    from exitcompiler.runtime.manifest import Artifact

__all__ = ["load_both", "load_program", "load_rows", "require_place", "save_program"]


def require_place(output: Path) -> None:
    """Refuse a place where no artifact can be saved, before the work for it.

    Raises:
        InputError: Nothing can be written there.
        ArtifactError: What is there is no artifact.
    """
    from exitcompiler.artifact import require_replaceable
    from exitcompiler.files import require_writable

    require_writable(output)
    require_replaceable(output)


def load_both(calib: str, train: str | None, shape: Any, preprocessing: ImagePreprocessing) -> Any:
    """The calibration rows, and the training rows or None.

    Args:
        calib: DATA, as given on the command line.
        train: Likewise; None: none.
        shape: Of the model's input, as far as it is known.
        preprocessing: What is done to images.
    """
    from exitcompiler.data_sources import load_data

    loaded = [load_data(calib, input_shape=shape, preprocessing=preprocessing), None]
    if train is not None:
        loaded[1] = load_data(train, input_shape=shape, preprocessing=preprocessing)
    return loaded


def load_program(
    path: Path,
    backend: str,
    threads: int | None,
    max_drop: float | None,
    latency_budget_ms: float | None,
) -> CompiledModel:
    """Open an artifact, at the operating point that is asked for.

    Args:
        path: Of the artifact.
        backend: As for ``exitcompiler.load``.
        threads: Per call; None: as compiled for.
        max_drop: Of accuracy; None: no target.
        latency_budget_ms: Mean; None: no target.

    Raises:
        BadParameter: There are two targets.
        ArtifactError: It cannot be read.
        BackendUnavailableError: It cannot run here.
    """
    from exitcompiler.runtime import backends
    from exitcompiler.runtime.artifact_files import read_artifact
    from exitcompiler.runtime.loading import open_artifact

    options.require_one_target(max_drop, latency_budget_ms)
    read = read_artifact(path)
    backends.share_threads(backend, read.manifest.threads if threads is None else threads)
    compiled = open_artifact(read, backend, threads=threads)
    if max_drop is None and latency_budget_ms is None:
        return compiled
    return compiled.select(max_accuracy_drop=max_drop, latency_budget_ms=latency_budget_ms)


def load_rows(artifact: Artifact, data: str, preprocessing: ImagePreprocessing) -> Any:
    """The rows that DATA names; images as large as the program takes them."""
    from exitcompiler.data_sources import load_data

    specs = list(artifact.manifest.inputs.values())
    shape = specs[0].shape if len(specs) == 1 else None
    return load_data(data, input_shape=shape, preprocessing=preprocessing)


def save_program(compiled: CompiledModel, output: Path, out: Output) -> None:
    """Save what was compiled, and show what came of it."""
    compiled.save(output)
    out.show(compiled.explain(), f"\nSaved to {output}.")
    out.result({"artifact": str(output), "report": compiled.artifact.report})
