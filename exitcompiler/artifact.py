"""Writes an artifact so that a full disk or a kill at any moment leaves the old one whole.

Everything goes to a temporary sibling first and is flushed to disk; then the sibling takes the place of
the old artifact. A file is replaced in one step. A folder needs two renames, old away and new in;
between them `load` finds the old one under its other name, and the next save puts it back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from exitcompiler.errors import ArtifactError
from exitcompiler.runtime.artifact_files import previous_path
from exitcompiler.runtime.backends import TORCH_BACKENDS
from exitcompiler.runtime.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    REPORT_FILE,
    Artifact,
    FileEntry,
    Manifest,
    block_path,
    can_have_torch_graphs,
    has_torch_graphs,
    torch_paths,
    with_torch_graphs,
)
from exitcompiler.runtime.manifest_json import manifest_to_json

__all__ = ["require_replaceable", "save_artifact"]


def save_artifact(
    artifact: Artifact,
    path: str | os.PathLike[str],
    *,
    torch: bool | None = None,
    overwrite: bool = True,
    as_zip: bool | None = None,
) -> None:
    """Write an artifact to disk, all or nothing.

    Only files that an operating point uses are written; ``model.onnx`` is made anew (which needs the
    onnx package) if it holds another point than the selected one.

    Args:
        artifact: What to write.
        path: Where to.
        torch: Also write the torch graphs of blocks; None: if it was compiled for a backend that runs them.
        overwrite: Replace an artifact that is there.
        as_zip: One zip file instead of a folder; None: if the path ends in ``.zip``.

    Raises:
        ArtifactError: The disk is full or not writable, or the path holds something that is not an
            artifact, or is there and ``overwrite`` is off. What was there before is untouched.
        LoweringError: With ``torch``: the graph of a block cannot be written.
    """
    target = Path(os.path.abspath(path))
    zipped = target.suffix == ".zip" if as_zip is None else as_zip
    if torch is None:
        torch = artifact.manifest.backend in TORCH_BACKENDS and can_have_torch_graphs(artifact)
    files = _contents(with_torch_graphs(artifact) if torch else artifact, torch)
    try:
        _recover(target)
        require_replaceable(target, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
        try:
            new = workplace / "artifact"
            if zipped:
                _write_zip(new, files)
            else:
                _write_folder(new, files)
            _put_in_place(new, target)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    except OSError as error:
        size_mb = sum(map(len, files.values())) / 1e6
        raise ArtifactError(
            f"cannot be saved: {error.strerror or error}",
            where=str(target),
            remedy=f"what was there before is untouched; make room for {size_mb:.1f} MB or choose another "
            "place, and save again",
        ) from error


def _contents(artifact: Artifact, torch: bool) -> dict[str, bytes]:
    """Path -> content of everything to write, the manifest last."""
    manifest = artifact.manifest
    if torch and not has_torch_graphs(manifest):
        raise ArtifactError(
            "the program holds no torch graphs",
            where="save(torch=True)",
            remedy="compile it again, or load an artifact that was saved with torch=True",
        )
    if not torch:
        points = tuple(replace(point, torch_files={}) for point in manifest.operating_points)
        manifest = replace(manifest, operating_points=points)
    files = dict(artifact.files)
    if manifest.one_file not in (None, manifest.selected):
        files[MODEL_FILE] = _one_file(artifact)
        manifest = replace(manifest, one_file=manifest.selected)
    files = {name: files[name] for name in _used(manifest)}
    try:
        files[REPORT_FILE] = json.dumps(artifact.report, indent=1, allow_nan=False).encode()
        entries = {
            name: FileEntry(hashlib.sha256(content).hexdigest(), len(content))
            for name, content in files.items()
        }
        files[MANIFEST_FILE] = manifest_to_json(replace(manifest, files=entries))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the report or the manifest is not plain JSON: {error}", where="save") from error
    return files


def _one_file(artifact: Artifact) -> bytes:
    """The selected operating point in one model, where ``model.onnx`` holds another one."""
    try:
        from exitcompiler.passes.assemble_onnx import assemble_onnx
    except ImportError as error:
        raise ArtifactError(
            f"{MODEL_FILE} has to be made anew for the selected operating point: {error}",
            where="save",
            remedy="pip install onnx, or save the point that was selected when compiling",
        ) from error
    point = artifact.manifest.operating_points[artifact.manifest.selected]
    models = {block: artifact.files[block_path(file)] for block, file in point.files.items()}
    return assemble_onnx(point.control_flow, models)


def _used(manifest: Manifest) -> list[str]:
    names: set[str] = set() if manifest.one_file is None else {MODEL_FILE}
    for point in manifest.operating_points:
        names.update(block_path(file) for file in point.files.values())
        for stem in point.torch_files.values():
            names.update(torch_paths(stem))
    return sorted(names)


def _recover(target: Path) -> None:
    """Finish what a save that was killed left between its two renames."""
    previous = previous_path(target)
    if not previous.exists():
        return
    if target.exists():
        _remove(previous)
    else:
        os.rename(previous, target)


def require_replaceable(path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Refuse a place that a save would refuse, before the work that leads to the save.

    Args:
        path: Where an artifact is to be saved.
        overwrite: Whether an artifact that is there may be replaced.

    Raises:
        ArtifactError: What is there is not an artifact, or ``overwrite`` is off.
    """
    target = Path(os.path.abspath(path))
    if not target.exists():
        return
    if not overwrite:
        raise ArtifactError(
            "something is there already", where=str(target), remedy="pass overwrite=True, or another path"
        )
    ours = (target / MANIFEST_FILE).is_file() if target.is_dir() else zipfile.is_zipfile(target)
    empty = target.is_dir() and not any(target.iterdir())
    if not ours and not empty:
        raise ArtifactError(
            "what is there is not an artifact, so it is not replaced",
            where=str(target),
            remedy="choose another path, or remove it yourself",
        )


def _remove_leftovers(target: Path) -> None:
    """Remove what saves to this path left when they were killed."""
    for leftover in target.parent.glob(f".{target.name}.saving-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_folder(new: Path, files: Mapping[str, bytes]) -> None:
    new.mkdir()
    for name, content in files.items():
        file = new / name
        file.parent.mkdir(exist_ok=True)
        with open(file, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    for folder in {new, *((new / name).parent for name in files)}:
        _sync_folder(folder)


def _write_zip(new: Path, files: Mapping[str, bytes]) -> None:
    with open(new, "wb") as stream:
        # Stored, not compressed: weights hardly shrink, and loading stays fast.
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content)  # a fixed date: equal files, equal bytes
        stream.flush()
        os.fsync(stream.fileno())


def _put_in_place(new: Path, target: Path) -> None:
    """Replace ``target``; at every moment either it or its previous content can be loaded."""
    previous = previous_path(target)
    if target.is_dir() or (target.exists() and new.is_dir()):  # one rename cannot do it
        os.rename(target, previous)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(previous, target)
            raise
    else:
        os.replace(new, target)
    # The new artifact is in place and whole, whatever happens now; the next save would clean up.
    with suppress(OSError):
        _sync_folder(target.parent)
    with suppress(OSError):
        _remove(previous)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
