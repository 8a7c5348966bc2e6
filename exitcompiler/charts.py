"""The figures of a report as inline SVG, drawn with matplotlib and coloured by the page's style sheet.

Matplotlib writes fixed colours. Here every colour is drawn as a placeholder and replaced by a CSS
variable of the page, so that the same figure reads well on a light and on a dark background.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from exitcompiler.runtime.wording import format_share

__all__ = [
    "ACCENT",
    "GRID",
    "INK",
    "MUTED",
    "SERIES",
    "STYLE",
    "SURFACE",
    "draw_exit_histogram",
    "draw_frontier",
    "draw_reliability",
    "to_svg",
    "undominated",
]

INK, MUTED, GRID, ACCENT = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808", "#090909")
SURFACE = "#0a0a0a"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ACCENT: "--accent",
    SURFACE: "--surface",
    **{color: f"--series-{i}" for i, color in enumerate(SERIES)},
}
_MARKERS = ("s", "^", "D", "v", "P")
_DASHES = ("--", "-.", ":", (0, (5, 1)), (0, (1, 2)))
_BASELINES = {
    "max_probability": "max-probability threshold",
    "entropy": "entropy threshold",
    "patience": "patience",
    "random": "random routing",
    "oracle": "soft oracle (a bound)",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def draw_frontier(
    frontier: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Sequence[Mapping[str, Any]]],
    max_accuracy_drop: float | None,
) -> str:
    """Draw accuracy drop over mean latency: the frontier, the chosen point, the baselines.

    Args:
        frontier: Points with ``mean_latency_ms`` and ``accuracy_drop`` (a share of 1).
        baselines: Name -> points with the same two keys.
        max_accuracy_drop: A dashed line there, if given.

    Returns:
        An ``<svg>`` element.

    Raises:
        KeyError: A point lacks one of the two.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.4), layout="constrained")
        axes = figure.subplots()
        for index, (name, points) in enumerate(baselines.items()):
            look = index % len(SERIES)
            xy = undominated((p["mean_latency_ms"], 100 * p["accuracy_drop"]) for p in points)
            axes.plot(
                *_columns(xy),
                color=SERIES[look],
                linestyle=_DASHES[look],
                marker=_MARKERS[look],
                markersize=4,
                linewidth=1.2,
                label=_BASELINES.get(name, name.replace("_", " ")),
            )
        xy = [(p["mean_latency_ms"], 100 * p["accuracy_drop"]) for p in frontier]
        axes.plot(*_columns(xy), color=ACCENT, marker="o", markersize=4, linestyle="none", fillstyle="none")
        best = undominated(xy)
        axes.plot(
            *_columns(best), color=ACCENT, marker="o", markersize=5, linewidth=2.2, label="learned gates"
        )
        for point in frontier:
            if point.get("chosen"):
                x, y = point["mean_latency_ms"], 100 * point["accuracy_drop"]
                axes.plot(
                    [x], [y], marker="*", markersize=17, color=ACCENT, markeredgecolor=SURFACE, zorder=5
                )
                axes.annotate("chosen", (x, y), (9, 8), textcoords="offset points", weight="bold")
        if max_accuracy_drop is not None:
            axes.axhline(100 * max_accuracy_drop, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        drops = [100 * point["accuracy_drop"] for points in baselines.values() for point in points]
        _limit_drop(axes, frontier, max_accuracy_drop, best=min([*drops, 0.0]))
        axes.set_xlabel("mean latency per row (ms), further left is faster")
        axes.set_ylabel("accuracy drop (points), higher is better")
        axes.legend(loc="best", fontsize=9)
        return to_svg(figure, "frontier")


def draw_exit_histogram(exit_rates: Mapping[str, float]) -> str:
    """Draw the share of rows that leaves at each exit, from the first to the deepest.

    Args:
        exit_rates: Exit name -> share of rows, in program order.

    Returns:
        An ``<svg>`` element.
    """
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(8.2, 0.5 + 0.42 * max(len(exit_rates), 1)), layout="constrained")
        axes = figure.subplots()
        names = list(exit_rates)
        shares = [100 * rate for rate in exit_rates.values()]
        bars = axes.barh(names, shares, color=ACCENT, height=0.62)
        axes.bar_label(bars, [format_share(rate) for rate in exit_rates.values()], padding=4)
        axes.invert_yaxis()
        axes.set_xlim(0, max([*shares, 1.0]) * 1.15)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return to_svg(figure, "exits")


def draw_reliability(reliability: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Draw, per exit, how often its head is right over how sure it says it is.

    Args:
        reliability: Exit name -> ``confidence``, ``accuracy`` and ``count`` of the bins.

    Returns:
        An ``<svg>`` element: one small diagram per exit, areas of the dots by number of rows.

    Raises:
        KeyError: An entry lacks one of the three.
    """
    columns = min(len(reliability), 4)
    lines = -(-len(reliability) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 2.35 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(reliability) :]:
            axes.set_visible(False)
        for axes, (name, bins) in zip(grid.flat, reliability.items(), strict=False):
            most = max([*bins["count"], 1])
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
            axes.plot(bins["confidence"], bins["accuracy"], color=ACCENT, linewidth=1.4)
            sizes = [6 + 60 * count / most for count in bins["count"]]
            axes.scatter(bins["confidence"], bins["accuracy"], s=sizes, color=ACCENT, zorder=3)
            axes.set(xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axes.set_title(name, fontsize=10, parse_math=False)
        figure.supxlabel("confidence (max probability)", fontsize=10)
        figure.supylabel("share that is right", fontsize=10)
        return to_svg(figure, "reliability")


def _limit_drop(
    axes: Axes, frontier: Sequence[Mapping[str, Any]], limit: float | None, *, best: float
) -> None:
    """Show the part of the picture where the decision is made; a baseline may lose 80 points."""
    drops = [100 * point["accuracy_drop"] for point in frontier]
    worst = max([*drops, 100 * limit if limit is not None else 0.0, 0.5])
    if limit is not None:
        worst = min(
            worst, max(400 * limit, *(100 * p["accuracy_drop"] for p in frontier if p.get("chosen")), 1.0)
        )
    best = min([*drops, best])
    margin = 0.12 * (worst - best)
    axes.set_ylim(worst + margin, best - margin)


def undominated(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points, by latency, that drop less than every faster one."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an element to put into a page: no prologue, no fixed size, colours as variables."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        FigureCanvasSVG(figure).print_figure(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'(<g id|id)="(figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend)[^"]*"', _drop_id, text
    )
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def _drop_id(match: re.Match[str]) -> str:
    """Ids of groups repeat from figure to figure and nothing refers to them."""
    return "<g" if match[1] == "<g id" else ""
