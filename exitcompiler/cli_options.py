"""What commands take: options as they are declared, and how their text is read."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from exitcompiler.image_folder import ImagePreprocessing

__all__ = [
    "ArtifactArgument",
    "BackendOption",
    "BatchSizeOption",
    "BucketsOption",
    "CalibOption",
    "CompileThreadsOption",
    "DataOption",
    "DumpOption",
    "EdgeOption",
    "ExportFormat",
    "FormOption",
    "ImageSizeOption",
    "JsonOption",
    "LatencyBudgetOption",
    "LogitsOption",
    "MaxDropOption",
    "MeanOption",
    "NameOption",
    "NetworksArgument",
    "OutputOption",
    "PrecisionOption",
    "PrecisionsOption",
    "SeedOption",
    "SplitOption",
    "StdOption",
    "ThreadsOption",
    "TrainOption",
    "TransformOption",
    "read_buckets",
    "read_edges",
    "read_logits",
    "read_precisions",
    "read_preprocessing",
    "require_one_per_network",
    "require_one_target",
]


class ExportFormat(StrEnum):
    """What ``export`` writes."""

    ONNX = "onnx"
    BLOCKS = "blocks"
    TRTEXEC = "trtexec"


ArtifactArgument = Annotated[
    Path, typer.Argument(metavar="OUT.exit", help="A compiled program.", show_default=False)
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help=".npz with x and y, a folder of images by class, or package.module:factory.",
        show_default=False,
    ),
]
MeanOption = Annotated[
    str, typer.Option(help="Images: subtracted after /255; one number, or one per channel: 0.49,0.48,0.45.")
]
StdOption = Annotated[str, typer.Option(help="Images: divided by after --mean.")]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(metavar="HEIGHTxWIDTH", help="Images: resize to this (default: the model's input)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout, text on stderr.")]
MaxDropOption = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="Accuracy that may be lost, as a share: 0.01 is one point.", show_default=False
    ),
]
LatencyBudgetOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="Mean latency in milliseconds to stay within.", show_default=False),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads per call (default: as compiled for).", show_default=False)
]
BackendOption = Annotated[
    str, typer.Option(help="auto, onnxruntime, openvino or torch; on a GPU: cuda or tensorrt.")
]
CalibOption = Annotated[
    str, typer.Option("--calib", metavar="DATA", help="Held-out rows with labels.", show_default=False)
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="OUT.exit", show_default=False)]
TrainOption = Annotated[
    str | None,
    typer.Option("--train", metavar="DATA", help="Rows to fit the exit heads on.", show_default=False),
]
PrecisionOption = Annotated[
    str, typer.Option(help="fp32, or opted in: int8, bf16, fp16 (on a GPU), auto: the best of fp32 and int8.")
]
PrecisionsOption = Annotated[
    str, typer.Option(help="As for compile but auto; or int8 or fp32 for each network, with commas.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="The batch size to optimise for.")]
CompileThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads (default: the machine's cores).")
]
SeedOption = Annotated[int, typer.Option(min=0)]
LogitsOption = Annotated[
    str | None, typer.Option(help="Which output holds the logits: its name or number.", show_default=False)
]
DumpOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Write the program before and after every pass there."),
]
NetworksArgument = Annotated[
    list[str],
    typer.Argument(metavar="MODEL", help=".pt2 files, or package.module:factory; in order of cost."),
]
NameOption = Annotated[
    list[str] | None,
    typer.Option("--name", help="What a network is called; once for each.", show_default=False),
]
EdgeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--edge",
        metavar="A:B",
        help="Rows may go from network A to B, by name or position (default: from each to all later ones).",
        show_default=False,
    ),
]
TransformOption = Annotated[
    list[str] | None,
    typer.Option(
        "--transform",
        metavar="package.module:factory",
        help="Makes what is done to a network's input; 'none' for nothing; once for each network.",
        show_default=False,
    ),
]

FormOption = Annotated[
    ExportFormat | None,
    typer.Option(
        "--format",
        help="onnx: the whole program in one file (default); blocks: a folder, one file per block; trtexec: "
        "the same with a script that builds their TensorRT engines.",
        show_default=False,
    ),
]
BucketsOption = Annotated[
    str | None,
    typer.Option(
        metavar="1,2,4",
        help="With --format trtexec: the numbers of rows to build engines for (default: 1,2,4,8,16,32).",
        show_default=False,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="[BLOCK:]BLOCK",
        help="Instead: cut the program at an edge, or at all edges into a block, and write near.exit and "
        "far.exit into FOLDER; '' lists the edges.",
        show_default=False,
    ),
]


def require_one_target(max_drop: float | None, latency_budget_ms: float | None) -> None:
    """Refuse two targets at once.

    Raises:
        BadParameter: Both are given.
    """
    if max_drop is not None and latency_budget_ms is not None:
        raise typer.BadParameter("give --max-drop or --latency-budget-ms, not both")


def read_preprocessing(mean: str, std: str, image_size: str | None) -> ImagePreprocessing:
    """What is done to images.

    Args:
        mean: As given on the command line, like all of these.
        std: Likewise.
        image_size: Likewise; None: as the model's input.

    Raises:
        BadParameter: An option cannot be read.
    """
    from exitcompiler.image_folder import ImagePreprocessing

    size = None
    if image_size is not None:
        height, _, width = image_size.lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise typer.BadParameter(f"--image-size {image_size!r} is not HEIGHTxWIDTH, for example 224x224")
        size = (int(height), int(width))
    return ImagePreprocessing(_numbers(mean, "--mean"), _numbers(std, "--std"), size)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r} is not numbers with commas between") from None


def read_logits(text: str | None) -> str | int | None:
    """Which output holds the logits: a name, or a number."""
    return int(text) if text is not None and text.isdecimal() else text


def read_precisions(text: str) -> str | list[str]:
    """One precision for all networks, or, with commas, one for each."""
    return [part.strip() for part in text.split(",")] if "," in text else text


def read_edges(edges: Sequence[str], names: Sequence[str]) -> list[tuple[str | int, str | int]] | None:
    """Edges between networks, each ``A:B``: names or positions.

    Args:
        edges: As given on the command line; none: the default.
        names: Of the networks, as far as they were given: a number may be a name.

    Raises:
        BadParameter: An edge is not of that form.
    """

    def node(text: str) -> str | int:
        return int(text) if text.isdecimal() and text not in names else text

    pairs = [edge.split(":") for edge in edges]
    for edge, pair in zip(edges, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise typer.BadParameter(f"--edge {edge!r} is not A:B, two networks by name or position")
    return [(node(a), node(b)) for a, b in pairs] or None


def read_buckets(text: str | None, form: ExportFormat | None) -> Sequence[int]:
    """The numbers of rows that engines are built for.

    Args:
        text: As given on the command line; None: the default.
        form: What is exported.

    Raises:
        BadParameter: It is no list of numbers, or given for a format that has none.
    """
    from exitcompiler.trtexec_export import DEFAULT_BUCKETS

    if text is None:
        return DEFAULT_BUCKETS
    if form is not ExportFormat.TRTEXEC:
        raise typer.BadParameter("--buckets goes with --format trtexec")
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise typer.BadParameter(f"--buckets {text!r} is not a list of numbers: 1,2,4")
    return [int(part) for part in text.split(",")]


def require_one_per_network(option: str, given: Sequence[str], networks: int) -> None:
    """Refuse an option that is given for some networks and not for others.

    Raises:
        BadParameter: It is given neither not at all nor once per network.
    """
    if len(given) not in (0, networks):
        raise typer.BadParameter(f"{option} is given {len(given)} times for {networks} networks")
