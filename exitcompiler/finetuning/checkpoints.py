"""Checkpoints of a training: one file, written at once or not at all, without pickle.

``training.safetensors`` holds every tensor; its metadata is JSON: what run it is of, how far it has come.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exitcompiler.errors import TrainingError

__all__ = [
    "FILE",
    "Checkpoint",
    "read_checkpoint",
    "read_notes",
    "require_writable_folder",
    "write_checkpoint",
]

FILE: Final = "training.safetensors"
SCHEMA: Final = 1

STALE_SECONDS: Final = 24 * 3600.0
"""A part of a file that is older was left by a process that was killed."""


@dataclass(frozen=True)
class Checkpoint:
    """A training at one moment, between two steps.

    Args:
        run: Tells trainings apart: a hash of network, exits, options, the data's extent and seed.
        epoch: Passes that are complete.
        batches: Batches of the next pass that are done.
        steps: Steps of the optimiser so far.
        history: Mean loss of each exit, per complete pass.
        sums: Sum of the losses of each exit over the batches of the pass that is not complete.
        numbers: What the optimiser remembers besides tensors.
        notes: What the training was begun with that may not come out the same again: the exits that were
            chosen on measured times.
        tensors: Path -> tensor: weights, statistics, moments, states of random generators.
    """

    run: str
    epoch: int
    batches: int
    steps: int
    history: list[list[float]]
    sums: list[float]
    numbers: dict[str, Any]
    notes: dict[str, Any]
    tensors: dict[str, Tensor]


def require_writable_folder(folder: Path) -> None:
    """Refuse a folder where nothing can be written, before the work for it; makes it where there is none.

    Raises:
        TrainingError: It cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write it in place of the last one.

    Raises:
        TrainingError: The folder cannot be written; the last checkpoint is whole.
    """
    facts = {name: value for name, value in vars(checkpoint).items() if name != "tensors"}
    metadata = {"schema": str(SCHEMA), "facts": json.dumps(facts)}
    tensors = {
        path: tensor.detach().cpu().clone().contiguous() for path, tensor in checkpoint.tensors.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        handle, name = tempfile.mkstemp(prefix=f".{FILE}.", suffix=".part", dir=folder)
        os.close(handle)
        part = Path(name)
        try:
            save_file(tensors, part, metadata=metadata)
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.replace(folder / FILE)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"the checkpoint cannot be written: {error}",
        where=str(folder),
        remedy="make room, or give FineTune another checkpoint folder, and run again",
    )


def _clear(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left."""
    for part in folder.glob(f".{FILE}*.part"):
        with suppress(OSError):
            if part.stat().st_mtime < time.time() - STALE_SECONDS:
                part.unlink()


def read_checkpoint(folder: Path, run: str) -> Checkpoint | None:
    """The checkpoint in a folder; None where there is none.

    Args:
        folder: Where ``write_checkpoint`` wrote.
        run: What the checkpoint has to be of.

    Raises:
        TrainingError: It is damaged, of another schema, or of another training.
    """
    with _opened(folder) as file:
        if file is None:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checkpoint = Checkpoint(**_facts(file, folder), tensors=tensors)
    if checkpoint.run != run:
        raise TrainingError(
            "the checkpoint is of another training: network, exits, options, data or seed differ",
            where=str(folder / FILE),
            remedy="give another checkpoint folder, or remove this one",
        )
    return checkpoint


def read_notes(folder: Path) -> dict[str, Any] | None:
    """The notes of the checkpoint in a folder; None where there is none.

    Raises:
        TrainingError: It is damaged, or of another schema.
    """
    with _opened(folder) as file:
        if file is None:
            return None
        notes: dict[str, Any] = _facts(file, folder)["notes"]
        return notes


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """The file of a checkpoint, or None; what goes wrong in the block is blamed on it."""
    path = folder / FILE
    if not path.is_file():
        yield None
        return
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"the checkpoint cannot be read: {error}",
            where=str(path),
            remedy="it is damaged: remove it and train anew",
        ) from error


def _facts(file: Any, folder: Path) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if metadata.get("schema") != str(SCHEMA):
        raise TrainingError(
            f"a checkpoint of schema {metadata.get('schema')}, this version reads {SCHEMA}",
            where=str(folder / FILE),
            remedy="train anew in another folder",
        )
    facts = json.loads(metadata["facts"])
    if not isinstance(facts, dict):
        raise TypeError("its facts are no object")
    _require_sound(facts)
    return facts


def _require_sound(facts: Mapping[str, Any]) -> None:
    """Check the facts that are read, whatever wrote them.

    Raises:
        KeyError, TypeError: One is missing, or is not what it should be.
    """
    history, sums = facts["history"], facts["sums"]
    sound = {
        "run": isinstance(facts["run"], str),
        **{name: _is_count(facts[name]) for name in ("epoch", "batches", "steps")},
        "sums": _are_losses(sums),
        "numbers": isinstance(facts["numbers"], dict),
        "notes": isinstance(facts["notes"], dict),
    }
    sound["history"] = sound["epoch"] and sound["sums"] and isinstance(history, list)
    sound["history"] = sound["history"] and len(history) == facts["epoch"]
    sound["history"] = sound["history"] and all(_are_losses(e) and len(e) == len(sums) for e in history)
    bad = sorted(name for name, is_sound in sound.items() if not is_sound)
    if bad:
        raise TypeError(f"{', '.join(bad)} cannot be so")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_losses(values: object) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
