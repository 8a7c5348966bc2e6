"""Draws accuracy over mean latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "INK",
    "ORACLE",
    "PROGRAM",
    "STATIC",
    "THRESHOLD",
    "draw",
    "draw_program",
    "draw_static",
    "picture",
]

INK: Final = "#24292f"
PROGRAM: Final = "#c2410c"
THRESHOLD: Final = "#2563eb"
STATIC: Final = "#57606a"
ORACLE: Final = "#15803d"


def draw(
    rows: Sequence[Mapping[str, Any]], gates: Mapping[str, Any], path: Path, *, png: Path | None = None
) -> None:
    """Write the picture.

    Latencies of contenders are wall clock. Those of threshold and oracle come from cached scores and
    measured block times, scaled so that the whole network stands where the wall clock has it.

    Args:
        rows: The table of ONNX Runtime.
        gates: The figures of the gates on cached scores; may be empty.
        path: The SVG file.
        png: Write the same there, to look at.
    """
    whole = next(row for row in rows if row["kind"] == "plain")
    with picture("ResNet-56 on CIFAR-10, ONNX Runtime fp32", whole["mean_ms"], path, png) as axes:
        _draw_gates(axes, gates, whole["mean_ms"])
        draw_program(axes, [row for row in rows if row["kind"] == "program"])
        draw_static(axes, [row for row in rows if row["kind"] != "program"])


@contextmanager
def picture(title: str, whole_ms: float, path: Path, png: Path | None) -> Iterator[Axes]:
    """Axes of accuracy over mean latency; written when left.

    Args:
        title: Above them.
        whole_ms: The whole network's mean latency.
        path: The SVG file.
        png: Write the same there, to look at.
    """
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "path"}):
        figure = Figure(figsize=(7.6, 5.2), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        yield axes
        axes.set_xlim(0.0, whole_ms * 1.12)
        axes.margins(y=0.08)  # room for names
        axes.set_xlabel("mean latency of one image, ms (one thread)")
        axes.set_ylabel("top-1 accuracy on the final rows, %")
        axes.set_title(title, color=INK, loc="left")
        axes.grid(color="#d0d7de", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None})
        if png is not None:
            figure.savefig(png, dpi=110)


def _draw_gates(axes: Axes, gates: Mapping[str, Any], whole_ms: float) -> None:
    if not gates:
        return
    scale = whole_ms / gates["whole_us"]
    best = gates["best_threshold"]
    curve = gates["families"][best]
    points = sorted(zip(curve["mean_us"], curve["accuracy"], strict=True))
    label = f"best threshold baseline ({best.replace('_', ' ')})"
    axes.plot(
        [scale * time_us for time_us, _ in points], [100 * accuracy for _, accuracy in points],
        color=THRESHOLD, marker=".", linewidth=1.0, linestyle="--", label=label,
    )  # fmt: skip
    oracle = gates["oracle"]
    axes.plot(
        scale * oracle["mean_us"], 100 * oracle["accuracy"],
        color=ORACLE, marker="*", markersize=11, linestyle="", label="oracle: knows the labels",
    )  # fmt: skip


def draw_program(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    name: str = "exitcompiler",
    color: str = PROGRAM,
    *,
    joined: bool = True,
) -> None:
    """Shipped points, as they were timed; the one that was asked for in a ring."""
    ordered = sorted(rows, key=lambda row: float(row["mean_ms"]))
    if not ordered:
        return
    axes.plot(
        [row["mean_ms"] for row in ordered], [100 * row["accuracy"] for row in ordered],
        color=color, marker="o", linewidth=1.6 if joined else 0.0, label=f"{name}, shipped points",
    )  # fmt: skip
    for row in ordered:
        if row["chosen"]:
            axes.plot(
                row["mean_ms"], 100 * row["accuracy"],
                marker="o", markersize=12, markerfacecolor="none", markeredgecolor=color, linestyle="",
                label="the point that was asked for" if color == PROGRAM else None,
            )  # fmt: skip


def draw_static(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Networks without exits, as they were timed, by name."""
    labelled = False
    for row in rows:
        x, y = row["mean_ms"], 100 * row["accuracy"]
        hollow = row["kind"] in ("bf16", "int8")
        axes.plot(
            x, y,
            color=STATIC, marker="s", markerfacecolor="white" if hollow else STATIC, linestyle="",
            label=None if labelled or hollow else "static networks (hollow: lower precision)",
        )  # fmt: skip
        labelled = labelled or not hollow
        text = row["name"] + (" (OpenVINO)" if row["kind"] == "bf16" else "")
        # int8 and bf16 lie close together: one is named above, the other below.
        offset = -14 if row["kind"] == "bf16" else 7
        axes.annotate(
            text, (x, y), (0, offset), textcoords="offset points", ha="center", fontsize=8.5, color=INK
        )
