"""The figures of a cascade's report: those of Bolukbasi et al. 2017, section 4, for the data at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from exitcompiler.charts import (
    ACCENT,
    GRID,
    INK,
    MUTED,
    SERIES,
    STYLE,
    SURFACE,
    to_svg,
    undominated,
)
from exitcompiler.runtime.explain_cascade import full_topology
from exitcompiler.runtime.wording import format_duration, format_share

__all__ = ["draw_budgets", "draw_overlap", "draw_topologies"]

_DASHES: Sequence[Any] = ("-", (0, (5, 1.5)), (0, (2, 1)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (9, 2)))
_BASELINES: Mapping[str, Any] = {
    "oracle": {"linestyle": (0, (1, 1)), "marker": "P", "markersize": 7},
    "myopic": {"linestyle": "--", "marker": "^", "markersize": 4},
    "uniform": {"linestyle": "-.", "marker": "v", "markersize": 4},
}
_BASELINE_LABELS = {"oracle": "soft oracle (single networks)", "myopic": "myopic", "uniform": "uniform"}
_COLORS = (*SERIES, ACCENT, MUTED)
_LOGARITHMIC = 8  # networks further apart than this times are drawn on a logarithmic axis
_READABLE = 0.055  # a segment must be this wide, as a share of the bar, to be labelled
_MOST_PATTERNS = 16


def draw_topologies(
    cascade: Mapping[str, Any],
    baselines: Mapping[str, Sequence[Mapping[str, Any]]],
    frontier: Sequence[Mapping[str, Any]] = (),
    max_accuracy_drop: float | None = None,
) -> str:
    """Draw accuracy over mean latency for all sub-topologies, every network alone and the baselines.

    Sub-topologies have the colour of the network that they start with.

    Args:
        cascade: The report's part about the cascade.
        baselines: Name -> points with ``mean_latency_ms`` and ``accuracy_drop``; ``networks`` is not
            drawn, for the networks themselves have names.
        frontier: The report's frontier: the chosen point is marked, and where the cascade has no line for
            the full topology, these points are that line.
        max_accuracy_drop: A dashed line there, if given.

    Returns:
        An ``<svg>`` element; the accuracy axis is the drop where the reference's accuracy is missing.

    Raises:
        KeyError: A point lacks one of the two.
    """
    networks = [n for n in cascade.get("networks") or () if n.get("latency_ms") is not None]
    colors = _network_colors([network["name"] for network in cascade.get("networks") or ()])
    best = next((n.get("accuracy") for n in networks if n["name"] == cascade.get("reference")), None)
    level = 0.0 if best is None else 100 * best
    full = full_topology(cascade)
    lines = dict(cascade.get("frontiers") or {})
    learned = lines.pop(full, None) or [p for p in frontier if "accuracy_drop" in p]

    def place(points: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
        return [
            (x, level - drop)
            for x, drop in undominated((p["mean_latency_ms"], 100 * p["accuracy_drop"]) for p in points)
        ]

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, max(4.6, 0.17 * (len(lines) + 5))), layout="constrained")
        axes = figure.subplots()
        _plot(axes, place(learned), color=ACCENT, linewidth=2.6, zorder=4, label="all networks, learned")
        for name, look in _BASELINES.items():
            if baselines.get(name):
                color = INK if name == "oracle" else MUTED
                xy = place(baselines[name])
                _plot(axes, xy, color=color, linewidth=1.3, zorder=3, label=_BASELINE_LABELS[name], **look)
        seen: dict[str, int] = {}
        for topology, points in lines.items():
            start = topology.split(" > ")[0]
            dash = _DASHES[seen.setdefault(start, 0) % len(_DASHES)]
            seen[start] += 1
            color = colors.get(start, MUTED)
            _plot(axes, place(points), color=color, linestyle=dash, linewidth=1.1, alpha=0.75, label=topology)
        _mark_networks(axes, networks, colors, level)
        _mark_chosen(axes, frontier, level)
        if max_accuracy_drop is not None:
            axes.axhline(level - 100 * max_accuracy_drop, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        _scale_time(axes, networks)
        axes.set_xlabel("mean latency per row (ms), further left is faster")
        axes.set_ylabel("accuracy drop (points, negated)" if best is None else "accuracy (%)")
        legend = figure.legend(loc="outside right upper", fontsize=8, handlelength=2.6, labelspacing=0.45)
        _plain_text(legend.get_texts())
        return to_svg(figure, "topologies")


def draw_budgets(budgets: Sequence[Mapping[str, Any]]) -> str:
    """Draw, per budget, which networks answer the rows and which take the time: two bars each.

    Args:
        budgets: Each with ``point``, ``mean_latency_ms``, and ``networks`` with their ``name``,
            ``share_of_rows_answered`` and ``share_of_time``.

    Returns:
        An ``<svg>`` element.

    Raises:
        KeyError: A network has no name.
    """
    names = list(dict.fromkeys(n["name"] for budget in budgets for n in budget.get("networks") or ()))
    colors = _network_colors(names)
    kinds = (("rows", "share_of_rows_answered"), ("time", "share_of_time"))
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(8.2, 0.6 + 0.95 * len(budgets)), layout="constrained")
        axes = figure.subplots()
        ticks: list[tuple[float, str]] = []
        for row, budget in enumerate(budgets):
            for offset, (label, key) in zip((-0.2, 0.2), kinds, strict=True):
                _stack(axes, row + offset, budget.get("networks") or (), key, colors)
                ticks.append((row + offset, label))
            axes.annotate(
                _budget_label(budget), (0, row), (-46, 0), xycoords="data", textcoords="offset points",
                ha="right", va="center", parse_math=False,
            )  # fmt: skip
        axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
        axes.set_ylim(len(budgets) - 0.45, -0.55)
        axes.set_xlim(0, 1)
        axes.xaxis.set_visible(False)
        axes.tick_params(axis="y", length=0)
        for side in ("bottom", "left"):
            axes.spines[side].set_visible(False)
        patches = [Patch(color=colors[name], label=name) for name in names]
        columns = max(1, min(len(names), 90 // (8 + max(map(len, names), default=0))))
        legend = figure.legend(handles=patches, loc="outside upper right", ncols=columns, fontsize=9)
        _plain_text(legend.get_texts())
        return to_svg(figure, "budgets")


def draw_overlap(overlap: Mapping[str, Any]) -> str:
    """Draw which networks are right on the same rows: per pattern dots for those, and its share as a bar.

    Where all are right, or none, the bar is cut off: nearly all rows are there, and beside them no other
    bar could be told from the next.

    Args:
        overlap: ``networks`` and ``patterns``, these with ``right`` and ``share``, by falling share.

    Returns:
        An ``<svg>`` element: the most frequent patterns.

    Raises:
        KeyError: A pattern lacks one of the two.
    """
    names = list(overlap["networks"])
    colors = _network_colors(names)
    patterns, others = overlap["patterns"][:_MOST_PATTERNS], overlap["patterns"][_MOST_PATTERNS:]
    mixed = [p["share"] for p in patterns if 0 < len(p["right"]) < len(names)]
    longest = 1.25 * max(mixed, default=max((p["share"] for p in patterns), default=1.0))
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(8.2, 1.0 + 0.3 * (len(patterns) + bool(others))), layout="constrained")
        dots, bars = figure.subplots(1, 2, width_ratios=(max(2, len(names)), 9), sharey=True)
        for row, pattern in enumerate(patterns):
            right = [i for i, name in enumerate(names) if name in pattern["right"]]
            dots.plot(range(len(names)), [row] * len(names), "o", color=GRID, markersize=8)
            dots.plot(right, [row] * len(right), color=MUTED, linewidth=1.6, zorder=1)
            for i in right:
                dots.plot([i], [row], "o", color=colors[names[i]], markersize=8, zorder=2)
            _overlap_bar(bars, row, pattern, len(names), longest)
        if others:
            rest = format_share(sum(pattern["share"] for pattern in others))
            bars.text(0, len(patterns), f"{len(others)} rarer patterns: {rest}", color=MUTED, va="center")
        dots.set_xticks(range(len(names)), names, rotation=40, ha="left", rotation_mode="anchor")
        _plain_text(dots.get_xticklabels())
        dots.xaxis.tick_top()
        dots.set_xlim(-0.6, len(names) - 0.4)
        bars.set_ylim(len(patterns) + bool(others) - 0.4, -0.6)
        bars.set_xlim(0, 1.3 * longest)
        for axes in (dots, bars):
            axes.tick_params(axis="both", length=0)
            axes.spines[:].set_visible(False)
        dots.set_yticks([])
        bars.xaxis.set_visible(False)
        return to_svg(figure, "overlap")


def _network_colors(names: Sequence[str]) -> dict[str, str]:
    """Name -> colour, the same in all figures."""
    return {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}


def _plot(axes: Axes, xy: Sequence[tuple[float, float]], *, label: str, **look: Any) -> None:
    # A label that begins with an underscore would be left out of the legend.
    axes.plot(
        [x for x, _ in xy], [y for _, y in xy], label=label if label[:1] != "_" else f" {label}", **look
    )


def _mark_networks(
    axes: Axes, networks: Sequence[Mapping[str, Any]], colors: Mapping[str, str], level: float
) -> None:
    for network in networks:
        if network.get("accuracy") is not None and level:
            x, y = network["latency_ms"], 100 * network["accuracy"]
            axes.plot(
                [x], [y], "D", color=colors[network["name"]], markersize=7, markeredgecolor=SURFACE, zorder=6
            )
            axes.annotate(
                network["name"], (x, y), (7, -11), textcoords="offset points", fontsize=9, weight="bold",
                parse_math=False, zorder=7,
            )  # fmt: skip
    axes.margins(x=0.12)


def _mark_chosen(axes: Axes, frontier: Sequence[Mapping[str, Any]], level: float) -> None:
    for point in frontier:
        if point.get("chosen") and {"mean_latency_ms", "accuracy_drop"} <= point.keys():
            x, y = point["mean_latency_ms"], level - 100 * point["accuracy_drop"]
            axes.plot([x], [y], "*", markersize=17, color=ACCENT, markeredgecolor=SURFACE, zorder=8)
            axes.annotate("chosen", (x, y), (-9, 6), textcoords="offset points", ha="right", weight="bold")


def _scale_time(axes: Axes, networks: Sequence[Mapping[str, Any]]) -> None:
    times = [network["latency_ms"] for network in networks]
    if times and max(times) > _LOGARITHMIC * min(times):
        axes.set_xscale("log")
        for axis_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis_format(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:g}".strip("0.")[:1] in "125" else ""))


def _plain_text(texts: Iterable[Text]) -> None:
    """A name may hold a dollar sign."""
    for text in texts:
        text.set_parse_math(False)


def _budget_label(budget: Mapping[str, Any]) -> str:
    lines = [str(budget.get("point", ""))]
    if budget.get("mean_latency_ms") is not None:
        lines.append(format_duration(budget["mean_latency_ms"]))
    return "\n".join(lines)


def _stack(
    axes: Axes, y: float, networks: Sequence[Mapping[str, Any]], key: str, colors: Mapping[str, str]
) -> None:
    left = 0.0
    for network in networks:
        share = network.get(key) or 0.0
        axes.barh([y], [share], left=left, height=0.36, color=colors[network["name"]], edgecolor=SURFACE)
        if share >= _READABLE:
            axes.text(
                left + share / 2,
                y,
                f"{100 * share:.0f}%",
                color=SURFACE,
                ha="center",
                va="center",
                fontsize=9,
            )
        left += share


def _overlap_bar(axes: Axes, row: int, pattern: Mapping[str, Any], networks: int, longest: float) -> None:
    share, uniform = pattern["share"], len(pattern["right"]) in (0, networks)
    length = min(share, longest)
    axes.barh([row], [length], height=0.62, color=MUTED if uniform else ACCENT)
    if share > longest:  # two strokes through it: the bar goes on
        for x in (0.9 * longest, 0.93 * longest):
            axes.plot([x, x + 0.012 * longest], [row + 0.42, row - 0.42], color=SURFACE, linewidth=2.2)
    words = {0: "  none is right", networks: "  all are right"}.get(len(pattern["right"]), "")
    axes.annotate(
        f"{format_share(share)}{words}", (length, row), (5, 0), textcoords="offset points", va="center"
    )
