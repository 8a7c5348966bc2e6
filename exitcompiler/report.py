"""The report of a compiled program as one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from types import ModuleType
from typing import Any

from exitcompiler.controlflow import ControlFlow, Return, successors
from exitcompiler.drawing import draw_control_flow
from exitcompiler.errors import ExitCompilerError
from exitcompiler.files import write_file
from exitcompiler.runtime.explain import (
    certificate_sentence,
    described_point,
    headline,
    measured_point,
    measured_rates,
    points_to_list,
    reason_text,
    runs_sentence,
    taken_exits,
)
from exitcompiler.runtime.explain_cascade import (
    inner_exits,
    is_cascade,
    jump_edges,
    network_facts,
    network_of_exit,
    plain_name,
    reference_name,
)
from exitcompiler.runtime.explain_finetune import tunings
from exitcompiler.runtime.explain_precision import precision_rows, quantization_sentence
from exitcompiler.runtime.manifest import OperatingPoint
from exitcompiler.runtime.wording import format_duration, format_points, format_share

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

        from exitcompiler import cascade_charts, charts
    except ModuleNotFoundError as error:
        raise ExitCompilerError(
            f"the HTML report needs {error.name}", remedy="pip install 'exitcompiler[report]'"
        ) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    environment.filters.update({name: _or_dash(show) for name, show in _FILTERS.items()})
    template = resources.files("exitcompiler").joinpath("templates/report.html").read_text(encoding="utf-8")

    points = report.get("frontier") or []
    chosen: Mapping[str, Any] = next((point for point in points if point.get("chosen")), {})
    measured = measured_point(report, point)
    other = point if measured is not None else None
    rates = taken_exits(chosen if other is None else {"exit_rates": other.estimate.exit_rates})
    drawings = _charts(report, rates, charts, cascade_charts)
    if control_flow is not None:
        running = described_point(report) if other is None else other.name
        block_rates = _block_rates(report, control_flow, running)
        drawings["drawing"] = draw_control_flow(control_flow, rates, block_rates)
    return environment.from_string(template).render(
        name=(report.get("model") or {}).get("name") or "model",
        headline=headline(report, point),
        figures=_figures(report, chosen) if other is None else _estimates(other),
        measured=measured,
        selected=None if other is None else other.name,
        refused=report.get("refused"),
        frontier=[{**point, "taken": taken_exits(point)} for point in points_to_list(points)],
        limit=(report.get("settings") or {}).get("max_accuracy_drop"),
        certificate=certificate_sentence(report.get("certificate") or {}, reference_name(report)),
        latency=_latency(report),
        runs=runs_sentence(report),
        exits=[{**exit, "why": reason_text(exit)} for exit in inner_exits(report)],
        cascade=_cascade(report) if is_cascade(report) else None,
        tunings=tunings(report),
        quantization=quantization_sentence(report),
        precisions=precision_rows(report),
        rounds=report.get("rounds") or [],
        groups=_groups(report),
        notes=report.get("notes") or [],
        # Drawn by this package, with every name in them escaped.
        **{key: markupsafe.Markup(svg) for key, svg in drawings.items()},
    )


def _charts(
    report: Mapping[str, Any], rates: Mapping[str, float], charts: ModuleType, cascade_charts: ModuleType
) -> dict[str, str]:
    """The figures that there is something to draw for, as SVG."""
    cascade = report.get("cascade") or {}
    limit = (report.get("settings") or {}).get("max_accuracy_drop")
    points = [p for p in report.get("frontier") or [] if _has(p, "mean_latency_ms", "accuracy_drop")]
    curves, reliability = report.get("baselines") or {}, report.get("reliability") or {}
    drawn = {}
    if cascade and (points or cascade.get("frontiers")):
        drawn["topologies_chart"] = cascade_charts.draw_topologies(cascade, curves, points, limit)
    elif points:
        drawn["frontier_chart"] = charts.draw_frontier(points, curves, limit)
    if rates:
        drawn["exit_chart"] = charts.draw_exit_histogram(rates)
    if reliability:
        drawn["reliability_chart"] = charts.draw_reliability(reliability)
    if cascade.get("budgets"):
        drawn["budgets_chart"] = cascade_charts.draw_budgets(cascade["budgets"])
    if _has(cascade.get("overlap") or {}, "networks", "patterns"):
        drawn["overlap_chart"] = cascade_charts.draw_overlap(cascade["overlap"])
    return drawn


def _figures(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline figures: label, value, one line of detail."""
    figures = []
    latency = report.get("latency") or {}
    speedup, program, plain = (latency.get(key) or {} for key in ("speedup", "program", "plain"))
    reference = plain_name(report).removeprefix("the ")
    if speedup.get("value") is not None:
        interval = _has(speedup, "lower", "upper")
        detail = f"95% interval {speedup['lower']:.2f} to {speedup['upper']:.2f}" if interval else ""
        figures.append({"label": "speed-up", "value": f"{speedup['value']:.2f}x", "detail": detail})
    if program.get("mean_ms") is not None:
        detail = f"{reference} {format_duration(plain['mean_ms'])}" if _has(plain, "mean_ms") else ""
        figures.append(
            {"label": "mean latency", "value": format_duration(program["mean_ms"]), "detail": detail}
        )
    if chosen.get("accuracy") is not None:
        drop = chosen.get("accuracy_drop")
        detail = "" if drop is None else f"drop {format_points(drop)}"
        figures.append({"label": "accuracy", "value": format_share(chosen["accuracy"]), "detail": detail})
    figures += _kept_figures(report)
    return figures


def _kept_figures(report: Mapping[str, Any]) -> list[dict[str, str]]:
    networks, exits = (report.get("cascade") or {}).get("networks"), inner_exits(report)
    kept = sum(bool(exit.get("kept")) for exit in exits)
    if networks:
        left = sum(bool(network.get("kept")) for network in networks)
        detail = f"exits inside them: {kept} of {len(exits)} places" if exits else ""
        return [{"label": "networks kept", "value": f"{left} of {len(networks)}", "detail": detail}]
    return [{"label": "exits kept", "value": str(kept), "detail": f"of {len(exits)} places"}] if exits else []


def _estimates(point: OperatingPoint) -> list[dict[str, str]]:
    """The headline figures of a point that was not measured as a whole."""
    estimate = point.estimate
    drop = f"drop {format_points(estimate.accuracy_drop)}, excess error {format_share(estimate.excess_error)}"
    return [
        {"label": "operating point", "value": point.name, "detail": "selected; figures are estimates"},
        {"label": "mean latency", "value": format_duration(estimate.mean_latency_ms), "detail": "estimated"},
        {"label": "accuracy", "value": format_share(estimate.accuracy), "detail": drop},
    ]


def _latency(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    latency = report.get("latency") or {}
    program = "cascade" if is_cascade(report) else "with exits"
    reference = plain_name(report).removeprefix("the ")
    rows = ((program, latency.get("program")), (reference, latency.get("plain")))
    return [{"label": label, **figures} for label, figures in rows if figures]


def _cascade(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says about networks."""
    cascade = report.get("cascade") or {}
    networks = network_facts(report, described_point(report), measured_rates(report))
    used = cascade.get("used_edges") or []
    jumps = jump_edges(cascade, used)
    return {
        "reference": cascade.get("reference"),
        "alone": plain_name(report),
        "networks": [{**network, "why": reason_text(network)} for network in networks],
        "edges": [(start, end, jumps.get((start, end), [])) for start, end in used],
        "overlap": cascade.get("overlap") or {},
        "budgets": cascade.get("budgets") or [],
    }


def _block_rates(report: Mapping[str, Any], flow: ControlFlow, point: str | None) -> dict[str, float] | None:
    """Share of the rows that runs the first block of each network, as far as known; None: no cascade.

    A block belongs to the network that answers at its end. Where some block only passes rows on, it is
    not known where networks begin, and nothing is said.
    """
    if not is_cascade(report):
        return None
    networks = network_facts(report, point, {})
    run = {network["name"]: network["share_of_rows_run"] for network in networks}
    starts: dict[str, str] = {}
    for block in flow.blocks:
        exits = [way.exit for way in successors(block.terminator) if isinstance(way, Return)]
        if not exits:
            return {}
        starts.setdefault(str(network_of_exit(report, exits[0])), block.name)
    return {block: run[network] for network, block in starts.items() if run.get(network) is not None}


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


_FILTERS = {
    "share": format_share,
    "points": format_points,
    "count": lambda count: f"{count:,}",
    "duration": format_duration,
    "ratio": lambda ratio: f"{ratio:.2f}x",
}


def _or_dash(show: Any) -> Any:
    """A template filter that shows a dash for what is not in the report."""
    return lambda value: show(value) if isinstance(value, (int, float)) else "-"


def _has(mapping: Mapping[str, Any], *keys: str) -> bool:
    return all(mapping.get(key) is not None for key in keys)
