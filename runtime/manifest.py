"""What an artifact says about itself: plain data, the same in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from exitcompiler.controlflow import ControlFlow, OutputStructure, ValueSpec

__all__ = [
    "MANIFEST_FILE",
    "MODEL_FILE",
    "REPORT_FILE",
    "SCHEMA_VERSION",
    "Artifact",
    "Estimate",
    "Execution",
    "FileEntry",
    "Json",
    "Manifest",
    "OperatingPoint",
    "Part",
    "block_path",
    "can_have_torch_graphs",
    "has_torch_graphs",
    "torch_paths",
    "with_torch_graphs",
]

SCHEMA_VERSION: Final = 2
"""The newest schema: version 2 added parts of split programs. Whole programs are written as version 1."""

MANIFEST_FILE: Final = "manifest.json"
MODEL_FILE: Final = "model.onnx"
REPORT_FILE: Final = "report.json"

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Execution: TypeAlias = Literal["blocks", "single"]
PartKind: TypeAlias = Literal["near", "far"]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file must be to be read.

    Args:
        sha256: Of the content, 64 lower-case hexadecimal digits.
        size_bytes: Its exact length.
    """

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an operating point was measured to do when it was compiled.

    Args:
        accuracy: Share of rows answered right (without labels: as the backbone answers), 0..1.
        accuracy_drop: The backbone's accuracy minus this one, on the same rows (net).
        excess_error: Share of rows wrong here and right in the backbone.
        mean_latency_ms: Per call at the batch size compiled for, weighted by ``exit_rates``.
        exit_rates: Exit name -> share of rows that leave there; one for every exit. In a part of a split
            program, only where it is known.

    A part of a split program has the figures of the whole, with both parts on one machine.
    """

    accuracy: float
    accuracy_drop: float
    excess_error: float
    mean_latency_ms: float
    exit_rates: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """One pruned program over the shared pool of blocks, with its learned gates.

    Args:
        name: Unique in the artifact.
        control_flow: Blocks, edges, gates.
        files: Block name -> file in the pool, ``"<sha256>.onnx"``; blocks that need no engine have none.
        estimate: What it was measured to do.
        execution: How one row is run: an engine per block, or one engine of the one-file model.
        torch_files: Block name -> stem of ``torch/<stem>.json`` and ``.safetensors``; empty without torch.
        extensions: What later versions add; kept as it is, never interpreted here.
    """

    name: str
    control_flow: ControlFlow
    files: Mapping[str, str]
    estimate: Estimate
    execution: Execution = "blocks"
    torch_files: Mapping[str, str] = field(default_factory=dict)
    extensions: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """What makes an artifact one of the two parts of a split program.

    Args:
        kind: ``"near"`` hands rows over, ``"far"`` takes them.
        edges: Where the program was cut, (source block, target block).
        whole: SHA-256 of the whole program and of where it was cut: equal for parts that fit together.
    """

    kind: PartKind
    edges: tuple[tuple[str, str], ...]
    whole: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about an artifact but the weights.

    Args:
        inputs: The model's inputs, in order; of a far part: what is handed over to it.
        outputs: The program's one output: logits, ``[batch, classes]``.
        output_structure: How the logits are wrapped for the caller.
        backend: The backend it was compiled and measured for.
        precision: The precision its gates were learned at.
        threads: The thread count it was measured with; None: the machine's.
        batch_size: The batch size it was optimised for.
        operating_points: The shipped frontier, and the plain backbone.
        selected: Index of the point that runs.
        plain: Index of the untouched backbone, a program of one block; None: it is not here.
        one_file: Index of the point that ``model.onnx`` holds; None: there is no such file.
        certificate: The finite-sample bound on the accuracy drop of the selected point, if there is one;
            ``"point"`` is its name.
        environment: Versions and machine, as found when compiling.
        files: Path in the artifact -> hash and size; filled in when it is saved.
        extensions: What later versions add; kept as it is, never interpreted here.
        part: Which part of a split program this is; None: a whole program.
    """

    inputs: Mapping[str, ValueSpec]
    outputs: Mapping[str, ValueSpec]
    output_structure: OutputStructure
    backend: str
    precision: str
    threads: int | None
    batch_size: int
    operating_points: tuple[OperatingPoint, ...]
    selected: int
    plain: int | None
    one_file: int | None = None
    certificate: Mapping[str, Json] | None = None
    environment: Mapping[str, Json] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    extensions: Mapping[str, Json] = field(default_factory=dict)
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled program: what ``compile`` makes, ``save`` writes and ``load`` reads.

    Args:
        manifest: What it is.
        files: Path in the artifact (``blocks/<sha256>.onnx``, ``model.onnx``, ...) -> content.
        report: What the compiler found out; ``explain`` and the HTML report are drawn from it.
        add_torch_graphs: Gives the same artifact with the torch graphs of its blocks, which are made only
            when asked for, as they take as much memory as the models; None where it was not just compiled.
    """

    manifest: Manifest
    files: Mapping[str, bytes]
    report: Mapping[str, Json] = field(default_factory=dict)
    add_torch_graphs: Callable[[Artifact], Artifact] | None = field(default=None, compare=False, repr=False)


def block_path(file: str) -> str:
    """Where a file of the pool lies in the artifact."""
    return f"blocks/{file}"


def torch_paths(stem: str) -> tuple[str, str]:
    """Where a block's graph and its weights for the torch backend lie in the artifact."""
    return f"torch/{stem}.json", f"torch/{stem}.safetensors"


def with_torch_graphs(artifact: Artifact) -> Artifact:
    """The artifact with the torch graphs of its blocks; as it is if it has them, or has no way to them.

    Raises:
        LoweringError: The graph of a block cannot be written; names the node.
    """
    if artifact.add_torch_graphs is None or has_torch_graphs(artifact.manifest):
        return artifact
    return artifact.add_torch_graphs(artifact)


def can_have_torch_graphs(artifact: Artifact) -> bool:
    """Whether an artifact has torch graphs, or a way to them."""
    return artifact.add_torch_graphs is not None or has_torch_graphs(artifact.manifest)


def has_torch_graphs(manifest: Manifest) -> bool:
    """Whether every block that needs an engine has a torch graph, at every operating point."""
    return all(point.files.keys() <= point.torch_files.keys() for point in manifest.operating_points)
