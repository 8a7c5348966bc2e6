"""The report of a compiled program as one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from exitcompiler.controlflow import ControlFlow
from exitcompiler.drawing import draw_control_flow
from exitcompiler.errors import ExitCompilerError
from exitcompiler.files import write_file
from exitcompiler.runtime.explain import (
    certificate_sentence,
    format_duration,
    format_share,
    headline,
    measured_point,
    points_to_list,
    reason_text,
    runs_sentence,
    taken_exits,
)
from exitcompiler.runtime.manifest import OperatingPoint

__all__ = ["render_report", "write_report"]


def write_report(
    report: Mapping[str, Any],
    control_flow: ControlFlow | None,
    path: str | os.PathLike[str],
    *,
    point: OperatingPoint | None = None,
) -> None:
    """Write the report as a self-contained HTML file; an existing file is replaced as a whole.

    Args:
        report: The report of a compiled program; what is missing in it is left out.
        control_flow: The selected program, to be drawn.
        path: Where to write.
        point: The operating point that is selected; None: the one that was measured.

    Raises:
        InputError: The file cannot be written.
        ExitCompilerError: jinja2 or matplotlib is not installed.
    """
    write_file(path, render_report(report, control_flow, point).encode())


def render_report(
    report: Mapping[str, Any], control_flow: ControlFlow | None, point: OperatingPoint | None = None
) -> str:
    """The HTML text that ``write_report`` writes.

    Args:
        report: The report of a compiled program; what is missing in it is left out.
        control_flow: The selected program, to be drawn.
        point: The operating point that is selected; None: the one that was measured.

    Raises:
        ExitCompilerError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import markupsafe

        from exitcompiler import charts
    except ModuleNotFoundError as error:
        raise ExitCompilerError(
            f"the HTML report needs {error.name}", remedy="pip install 'exitcompiler[report]'"
        ) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    environment.filters.update({name: _or_dash(show) for name, show in _FILTERS.items()})
    template = resources.files("exitcompiler").joinpath("templates/report.html").read_text(encoding="utf-8")

    points = report.get("frontier") or []
    chosen: Mapping[str, Any] = next((point for point in points if point.get("chosen")), {})
    limit = (report.get("settings") or {}).get("max_accuracy_drop")
    plotted = [p for p in points if _has(p, "mean_latency_ms", "accuracy_drop")]
    measured = measured_point(report, point)
    other = point if measured is not None else None
    rates = taken_exits(chosen if other is None else {"exit_rates": other.estimate.exit_rates})
    reliability = report.get("reliability") or {}
    curves = report.get("baselines") or {}
    drawings = {
        "frontier_chart": charts.draw_frontier(plotted, curves, limit) if plotted else "",
        "exit_chart": charts.draw_exit_histogram(rates) if rates else "",
        "reliability_chart": charts.draw_reliability(reliability) if reliability else "",
        "drawing": draw_control_flow(control_flow, rates) if control_flow is not None else "",
    }
    return environment.from_string(template).render(
        name=(report.get("model") or {}).get("name") or "model",
        headline=headline(report, point),
        figures=_figures(report, chosen) if other is None else _estimates(other),
        measured=measured,
        selected=None if other is None else other.name,
        refused=report.get("refused"),
        frontier=[{**point, "taken": taken_exits(point)} for point in points_to_list(points)],
        limit=limit,
        certificate=certificate_sentence(report.get("certificate") or {}),
        latency=_latency(report.get("latency") or {}),
        runs=runs_sentence(report),
        exits=[{**exit, "why": reason_text(exit)} for exit in report.get("exits") or []],
        rounds=report.get("rounds") or [],
        groups=_groups(report),
        notes=report.get("notes") or [],
        # Drawn by this package, with every name in them escaped.
        **{key: markupsafe.Markup(svg) for key, svg in drawings.items()},
    )


def _figures(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline figures: label, value, one line of detail."""
    figures = []
    latency = report.get("latency") or {}
    speedup, program, plain = (latency.get(key) or {} for key in ("speedup", "program", "plain"))
    if speedup.get("value") is not None:
        interval = _has(speedup, "lower", "upper")
        detail = f"95% interval {speedup['lower']:.2f} to {speedup['upper']:.2f}" if interval else ""
        figures.append({"label": "speed-up", "value": f"{speedup['value']:.2f}x", "detail": detail})
    if program.get("mean_ms") is not None:
        detail = f"whole network {format_duration(plain['mean_ms'])}" if _has(plain, "mean_ms") else ""
        figures.append(
            {"label": "mean latency", "value": format_duration(program["mean_ms"]), "detail": detail}
        )
    if chosen.get("accuracy") is not None:
        drop = chosen.get("accuracy_drop")
        detail = "" if drop is None else f"drop {_points(drop)}"
        figures.append({"label": "accuracy", "value": format_share(chosen["accuracy"]), "detail": detail})
    if report.get("exits"):
        kept = sum(bool(exit.get("kept")) for exit in report["exits"])
        figures.append(
            {"label": "exits kept", "value": str(kept), "detail": f"of {len(report['exits'])} places"}
        )
    return figures


def _estimates(point: OperatingPoint) -> list[dict[str, str]]:
    """The headline figures of a point that was not measured as a whole."""
    estimate = point.estimate
    drop = f"drop {_points(estimate.accuracy_drop)}, excess error {format_share(estimate.excess_error)}"
    return [
        {"label": "operating point", "value": point.name, "detail": "selected; figures are estimates"},
        {"label": "mean latency", "value": format_duration(estimate.mean_latency_ms), "detail": "estimated"},
        {"label": "accuracy", "value": format_share(estimate.accuracy), "detail": drop},
    ]


def _latency(latency: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = (("with exits", latency.get("program")), ("whole network", latency.get("plain")))
    return [{"label": label, **figures} for label, figures in rows if figures]


def _groups(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    titles = (("Model", "model"), ("Settings", "settings"), ("Rows", "rows"), ("Environment", "environment"))
    groups = []
    for title, key in titles:
        entries = [(name.replace("_", " "), _plain(value)) for name, value in (report.get(key) or {}).items()]
        if entries:
            groups.append((title, entries))
    return groups


def _plain(value: Any) -> str:
    """A value of settings or environment as people write it."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case Mapping():
            return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
        case str():
            return value
        case Sequence():
            return ", ".join(map(_plain, value))
        case _:
            return str(value)


def _points(drop: float) -> str:
    return f"{100 * drop:.2f} points"


_FILTERS = {
    "share": format_share,
    "points": _points,
    "duration": format_duration,
    "ratio": lambda ratio: f"{ratio:.2f}x",
}


def _or_dash(show: Any) -> Any:
    """A template filter that shows a dash for what is not in the report."""
    return lambda value: show(value) if isinstance(value, (int, float)) else "-"


def _has(mapping: Mapping[str, Any], *keys: str) -> bool:
    return all(mapping.get(key) is not None for key in keys)
