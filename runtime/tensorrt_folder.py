"""A folder of engines: `exitcompiler export --format trtexec` writes it, its build.sh fills it.

The folder says which ONNX model each engine was built from; an engine is looked up by that model's hash,
never by its name, so that one for an older compilation is not found rather than wrongly used.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exitcompiler.errors import ArtifactError
from exitcompiler.runtime.json_reader import Node, parse_json

__all__ = [
    "BUILD_SCRIPT",
    "DEVICE_FILE",
    "ENGINES_FILE",
    "ENGINES_FORMAT",
    "EXPORT_AGAIN",
    "EngineFolder",
    "PlannedEngine",
    "read_engine_folder",
]

ENGINES_FILE: Final = "engines.json"
DEVICE_FILE: Final = "device.txt"
BUILD_SCRIPT: Final = "build.sh"
ENGINES_FORMAT: Final = "exitcompiler engines 1"

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
EXPORT_AGAIN: Final = "export it again: exitcompiler export OUT.exit --format trtexec -o FOLDER"


@dataclass(frozen=True, slots=True)
class PlannedEngine:
    """An engine that the folder is to hold.

    Args:
        block: Name of the block that it is of.
        plan: The file.
        buckets: The numbers of rows that it has profiles for, in order.
    """

    block: str
    plan: str
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class EngineFolder:
    """What a folder of engines says of itself.

    Args:
        folder: Where it is.
        point: Name of the operating point that its models are of.
        precision: Of the models in it.
        engines: SHA-256 of an ONNX model -> the engine built from it.
        device: Name and compute capability (``"9.0"``) of the device that they were built on; None: they
            are not built, or not all of them.
    """

    folder: Path
    point: str
    precision: str
    engines: dict[str, PlannedEngine]
    device: tuple[str, str] | None

    @property
    def buckets(self) -> tuple[int, ...]:
        """The numbers of rows that every engine is for, rising."""
        shared = set.intersection(*(set(engine.buckets) for engine in self.engines.values()))
        return tuple(sorted(shared))

    @property
    def rebuild(self) -> str:
        """The remedy for engines that are not there or not the ones that are needed."""
        return f"build them here, on this device: run {self.folder / BUILD_SCRIPT}"

    def plan(self, sha256: str, what: str) -> tuple[bytes, PlannedEngine]:
        """The serialised engine of a model, and what it has to be.

        Args:
            sha256: Of the ONNX model.
            what: What it is of, for errors: ``"block 'stem'"``.

        Raises:
            ArtifactError: There is none for exactly this model, or it has not been built.
        """
        planned = self.engines.get(sha256)
        where = f"{self.folder}, {what}"
        if planned is None:
            found = "no engine was built from this model"
            if what in (f"block {engine.block!r}" for engine in self.engines.values()):
                found += ", but from another one for a block of that name"
            raise ArtifactError(
                f"{found}; the folder holds operating point {self.point!r}",
                where=where,
                remedy="load it without engines=, which builds what is missing; or, for another program or "
                "point, save it with that point selected and export that",
            )
        path = self.folder / planned.plan
        try:
            return path.read_bytes(), planned
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{planned.plan} has not been built", where=where, remedy=self.rebuild
            ) from error
        except OSError as error:
            raise ArtifactError(f"{planned.plan} cannot be read: {error.strerror}", where=where) from error

    def require_device(self, name: str, compute_capability: tuple[int, int]) -> None:
        """Refuse engines that were not all built, or built on another device.

        Raises:
            ArtifactError: Naming both devices; or the folder does not say on which they were built, which
                is the last thing that its script does.
        """
        here = (name, "{}.{}".format(*compute_capability))
        if self.device is None:
            raise ArtifactError(
                f"the engines have not been built to the end: there is no {DEVICE_FILE} that names a device",
                where=str(self.folder),
                remedy=self.rebuild,
            )
        if self.device != here:
            built, now = (
                f"{device} (compute capability {version})" for device, version in (self.device, here)
            )
            raise ArtifactError(
                f"the engines were built on {built}, here is {now}",
                where=str(self.folder),
                remedy=self.rebuild,
            )


def read_engine_folder(folder: str | os.PathLike[str]) -> EngineFolder:
    """Read what a folder of engines says of itself; the engines are read when they are needed.

    Raises:
        ArtifactError: It is not such a folder, or damaged.
    """
    root = Path(os.path.abspath(folder))
    path = root / ENGINES_FILE
    try:
        document = Node(parse_json(path.read_bytes(), str(path)), f"{path}: ")
        device = root / DEVICE_FILE
        lines = device.read_text(encoding="utf-8").splitlines() if device.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot be read: {error}", where=str(root), remedy=EXPORT_AGAIN) from error
    document["format"].choice([ENGINES_FORMAT])
    engines = dict(document["engines"].each(_engine))
    if not engines:
        document["engines"].fail("it lists no engines")
    return EngineFolder(
        folder=root,
        point=document["point"].string(),
        precision=document["precision"].string(),
        engines=engines,
        device=(lines[0], lines[1]) if len(lines) == 2 else None,
    )


def _engine(node: Node) -> tuple[str, PlannedEngine]:
    plan = node["plan"].string()
    if not _FILE_NAME.fullmatch(plan):
        node["plan"].fail(f"{plan!r} is not the name of a file in the folder")
    buckets = node["buckets"].each(lambda entry: entry.integer(low=1))
    return node["onnx_sha256"].string(), PlannedEngine(node["block"].string(), plan, buckets)
