"""Draws the accuracy of cascades, their parts and baselines over mean latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cifar10_chart import ORACLE, PROGRAM, STATIC, THRESHOLD, draw_program, draw_static, picture
from matplotlib.axes import Axes

__all__ = ["draw_cascade"]

INSIDE: Final = "#7c3aed"
PART: Final = "#c9d1d9"

_LINES: Final[dict[str, dict[str, Any]]] = {
    "learned": {"color": PROGRAM, "linestyle": "-", "label": "learned cascade, modelled"},
    "learned, with exits inside": {"color": INSIDE, "linestyle": "-", "label": "with exits inside, modelled"},
    "myopic": {"color": THRESHOLD, "linestyle": "--", "label": "myopic thresholds"},
    "uniform": {"color": STATIC, "linestyle": ":", "label": "uniform chance"},
    "soft oracle": {
        "color": ORACLE,
        "linestyle": "-.",
        "marker": "*",
        "markersize": 9,
        "label": "soft oracle: knows the labels",
    },
}


def draw_cascade(figures: Mapping[str, Any], path: Path, *, png: Path | None = None) -> None:
    """Write the picture.

    Shipped points and networks alone are wall clock. All that is learned on scores is modelled from
    measured block times, scaled so that the reference network stands where the wall clock has it.

    Args:
        figures: Of all stages.
        path: The SVG file.
        png: Write the same there, to look at.
    """
    rows = figures["table"]["onnxruntime"]
    whole_ms = next(row["mean_ms"] for row in rows if row["kind"] == "plain")
    found = figures["families"]
    scale = whole_ms / found["whole_us"]
    title = "A cascade of ResNets on CIFAR-10, ONNX Runtime fp32"
    with picture(title, whole_ms, path, png) as axes:
        label: str | None = "every sub-topology, learned alike"
        for name in found["groups"]["topologies"]:
            style = {"color": PART, "linestyle": "-", "zorder": 1, "label": label}
            _draw_line(axes, found["families"][name], scale, {**style, "linewidth": 0.8})
            label = None
        for name, style in _LINES.items():
            _draw_line(axes, found["families"][name], scale, {"linewidth": 1.2, **style})
        for series, color in (("cascade", PROGRAM), ("cascade with exits", INSIDE)):
            shipped = [row for row in rows if row["series"] == series]
            draw_program(axes, shipped, series, color, joined=False)
        draw_static(axes, [row for row in rows if row["kind"] != "program"])


def _draw_line(axes: Axes, family: Mapping[str, Any], scale: float, style: Mapping[str, Any]) -> None:
    points: list[tuple[float, float]] = []
    for time_us, accuracy in sorted(zip(family["mean_us"], family["accuracy"], strict=True)):
        if not points or accuracy > points[-1][1]:
            points.append((time_us, accuracy))
    axes.plot([scale * time_us for time_us, _ in points], [100 * accuracy for _, accuracy in points], **style)
