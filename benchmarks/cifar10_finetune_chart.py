"""Draws all frontiers of the fine-tuning benchmark on the same axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cifar10_chart import INK, ORACLE, PROGRAM, STATIC, THRESHOLD, picture
from cifar10_finetune_latency import SERIES
from matplotlib.axes import Axes

__all__ = ["draw_frontiers", "hull"]

_STYLES: Final[dict[str, dict[str, Any]]] = {
    "ResNet-56 tuned": {"color": PROGRAM, "label": "ResNet-56, tuned with exits"},
    "ResNet-20 tuned": {"color": ORACLE, "label": "ResNet-20, tuned with exits"},
    "cascade tuned": {"color": "#7c3aed", "label": "cascade of both, tuned with exits"},
    "ResNet-56 frozen": {"color": THRESHOLD, "linestyle": "--", "label": "ResNet-56, frozen, with exits"},
    "cascade as given": {"color": "#0891b2", "linestyle": "--", "label": "cascade of both, as given"},
}
LOWEST: Final = 4.0
"""Points of accuracy below ResNet-56 that are still shown."""


def draw_frontiers(figures: Mapping[str, Any], path: Path, *, png: Path | None = None) -> None:
    """Write the picture: every point was timed, all in turns; lines join the points that are a trade.

    Args:
        figures: Of all stages.
        path: The SVG file.
        png: Write the same there, to look at.
    """
    rows = figures["table"]["onnxruntime"]
    whole = next(row for row in rows if row["kind"] == "plain")
    title = "Fine-tuned exits on CIFAR-10, ONNX Runtime fp32"
    with picture(title, whole["mean_ms"], path, png) as axes:
        _draw_networks(axes, rows)
        for series, style in _STYLES.items():
            points = [(r["mean_ms"], 100 * r["accuracy"]) for r in rows if r["series"] in SERIES[series]]
            if points:
                _draw_points(axes, points, style)
        _draw_chosen(axes, rows)
        best = max(100 * row["accuracy"] for row in rows)
        axes.set_ylim(100 * whole["accuracy"] - LOWEST, best + 0.4)


def _draw_points(axes: Axes, points: Sequence[tuple[float, float]], style: Mapping[str, Any]) -> None:
    line = hull(points)
    axes.plot(*zip(*line, strict=True), **{"linewidth": 1.5, "zorder": 3, **style}, marker="o", markersize=5)
    rest = [point for point in points if point not in line]
    if rest:
        axes.plot(
            *zip(*rest, strict=True), color=style["color"], marker="o", markersize=3, linestyle="", alpha=0.5,
        )  # fmt: skip


def _draw_chosen(axes: Axes, rows: Iterable[Mapping[str, Any]]) -> None:
    chosen = [(row["mean_ms"], 100 * row["accuracy"]) for row in rows if row["chosen"]]
    if chosen:
        axes.plot(
            *zip(*chosen, strict=True),
            marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=0.8,
            linestyle="", label="the points that were asked for",
        )  # fmt: skip


def _draw_networks(axes: Axes, rows: Iterable[Mapping[str, Any]]) -> None:
    """Networks without exits by name, and the line of what lies between those that were given."""
    given = [row for row in rows if row["kind"] in ("plain", "static")]
    line = hull([(row["mean_ms"], 100 * row["accuracy"]) for row in given])
    axes.plot(*zip(*line, strict=True), color=STATIC, linewidth=1.2, linestyle=":", zorder=2)
    tuned = [row for row in rows if row["kind"] == "tuned"]
    for kind, group in (("as given", given), ("tuned, without exits", tuned)):
        for number, row in enumerate(group):
            x, y = row["mean_ms"], 100 * row["accuracy"]
            axes.plot(
                x, y,
                color=STATIC, marker="s", linestyle="", zorder=4,
                markerfacecolor=STATIC if group is given else "white",
                label=None if number else f"networks {kind}",
            )  # fmt: skip
            # A tuned network lies close to the one that it comes from: one name beside, the other below.
            place, side = ((6, 4), "left") if group is given else ((0, -16), "center")
            axes.annotate(
                row["name"].removesuffix(", no exits"), (x, y), place,
                textcoords="offset points", ha=side, fontsize=8.5, color=INK,
            )  # fmt: skip


def hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point and no mixture of two is faster than at the same accuracy, in order.

    Args:
        points: (time, accuracy).
    """
    line: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if line and y <= line[-1][1]:
            continue
        while len(line) > 1 and _steepness(line[-2], (x, y)) >= _steepness(line[-2], line[-1]):
            line.pop()
        line.append((x, y))
    return line


def _steepness(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else float("inf")
