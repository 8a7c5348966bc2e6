"""Why a compiled program is what it is, in plain text, from its report.

The report is the JSON-able dict that ``compile`` makes and ``save`` writes as ``report.json``. Every key
of it may be missing: what is there is shown. What was measured and certified is one operating point;
where another one is selected, the text says whose the figures are, and gives that one's estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exitcompiler.runtime.backends import DEVICE_BACKENDS
from exitcompiler.runtime.explain_cascade import (
    baselines_text,
    inner_exits,
    is_cascade,
    kept_text,
    networks_text,
    plain_name,
    reference_name,
)
from exitcompiler.runtime.explain_finetune import finetune_text
from exitcompiler.runtime.explain_precision import precisions_text
from exitcompiler.runtime.manifest import OperatingPoint
from exitcompiler.runtime.wording import (
    as_sentence,
    count_noun,
    dict_at,
    format_duration,
    format_points,
    format_share,
    format_text_table,
    list_at,
    section,
    wrap,
)

__all__ = [
    "certificate_sentence",
    "described_point",
    "explain",
    "format_duration",
    "format_share",
    "format_text_table",
    "headline",
    "measured_point",
    "measured_rates",
    "points_to_list",
    "reason_text",
    "runs_sentence",
    "taken_exits",
]

_MOST_POINTS = 10


def explain(report: Mapping[str, Any], point: OperatingPoint | None = None) -> str:
    """Say what was chosen and why: per network and exit kept or pruned, the frontier, the certificate.

    Args:
        report: The report of a compiled program.
        point: The operating point that is selected; None: the one that was measured.

    Returns:
        Lines of at most 98 columns, without a newline at the end.

    Raises:
        TypeError: A value of the report has another type than the schema says.
    """
    measured = measured_point(report, point)
    scope = "" if measured is None else f", as they are at {measured}"
    others = (
        "Other ways to use these networks" if is_cascade(report) else "The same heads without learned gates"
    )
    sections = (
        wrap(headline(report, point)),
        _facts(report, point),
        precisions_text(report),
        finetune_text(report),
        networks_text(report, described_point(report), measured_rates(report), title=f"Networks{scope}"),
        _exits(report, scope),
        _frontier(list_at(report, "frontier"), point),
        section(others, baselines_text(report)),
        _certificate(report, point),
        _rounds(list_at(report, "rounds")),
        _notes(list_at(report, "notes")),
    )
    return "\n\n".join(text for text in sections if text)


def measured_point(report: Mapping[str, Any], point: OperatingPoint | None) -> str | None:
    """The operating point whose latency, exits and certificate the report gives, if it is not ``point``.

    Args:
        report: The report of a compiled program.
        point: The operating point that is selected.

    Returns:
        Its name; None if it is ``point``, if no point is selected, or if nothing was measured.
    """
    name = described_point(report)
    return None if point is None or name in (None, point.name) else name


def described_point(report: Mapping[str, Any]) -> str | None:
    """The operating point whose latency, exits and certificate the report gives; None: of none."""
    name = dict_at(report, "latency").get("point") or dict_at(report, "certificate").get("point")
    name = name or _chosen(report).get("name")
    return None if name is None else str(name)


def measured_rates(report: Mapping[str, Any]) -> dict[str, float]:
    """Exit name -> share of the rows, as seen at the point that was measured, or else as estimated."""
    exits = list_at(report, "exits")
    if is_cascade(report) and any(exit.get("exit_rate") is not None for exit in exits):
        return {exit["name"]: exit["exit_rate"] for exit in exits if exit.get("exit_rate")}
    return taken_exits(_chosen(report))


def headline(report: Mapping[str, Any], point: OperatingPoint | None = None) -> str:
    """One sentence: what the compilation came to.

    Args:
        report: The report of a compiled program.
        point: The operating point that is selected; None: the one that was measured.

    Raises:
        TypeError: A value of the report has another type than the schema says.
    """
    name = dict_at(report, "model").get("name") or "model"
    if report.get("refused"):
        kept = plain_name(report).replace("the whole network", "the plain network")
        result = f"no exits were added, {kept} is returned"
        if is_cascade(report):
            result = f"no cascade was made, {plain_name(report)} is returned"
        return f"{name}: {result}. {as_sentence(report['refused'])}"
    measured = measured_point(report, point)
    if point is not None and measured is not None:
        return f"{name}: operating point {point.name}; the point that was measured is {measured}."
    text = f"{name}: {kept_text(report)}"
    speedup = dict_at(dict_at(report, "latency"), "speedup")
    if speedup.get("value") is not None:
        text += f", {speedup['value']:.2f}x as fast as {plain_name(report)}"
        if speedup.get("lower") is not None and speedup.get("upper") is not None:
            text += f" (95% interval {speedup['lower']:.2f} to {speedup['upper']:.2f})"
    chosen = _chosen(report)
    if chosen.get("accuracy_drop") is not None:
        text += f", accuracy drop {format_points(chosen['accuracy_drop'])}"
    return text + "."


def certificate_sentence(certificate: Mapping[str, Any], reference: str = "the whole network") -> str:
    """What the certify rows prove about the excess error, and what a tighter proof would take.

    Args:
        certificate: ``rows``, ``errors``, ``bound`` and ``confidence``; also ``target`` and
            ``rows_needed`` where the bound is above the accuracy drop that was asked for.
        reference: What the excess error is against.

    Returns:
        Empty if there is no bound.
    """
    bound = certificate.get("bound")
    if bound is None:
        return ""
    text = (
        f"With {100 * certificate.get('confidence', 0.95):g}% confidence the excess error "
        f"(wrong where {reference} is right) is at most {format_share(bound)}"
    )
    rows, errors = certificate.get("rows"), certificate.get("errors")
    if rows is not None and errors is not None:
        text += f": it was seen on {errors} of {count_noun(rows, 'held-out row')}"
    text += ". It bounds the accuracy drop."
    target, needed = certificate.get("target"), certificate.get("rows_needed")
    if target is not None and needed is not None and (rows is None or needed > rows):
        text += (
            f" To show {format_share(target)} you would need about {needed} certify rows at this error rate."
        )
    elif target is not None and needed is None and bound > target:
        text += (
            f" The error rate seen is too close to {format_share(target)} to show it with any number of rows."
        )
    return text


def runs_sentence(report: Mapping[str, Any]) -> str:
    """On what, and how, the program runs: backend, precision, threads, batch size, engines."""
    settings, latency = dict_at(report, "settings"), dict_at(report, "latency")
    parts = []
    backend = latency.get("backend") or settings.get("backend")
    if backend:
        parts.append(f"on {backend}")
    precision = report.get("precision") or settings.get("precision")
    if precision:
        parts.append(f"in {precision}")
    threads = latency.get("threads") or settings.get("threads")
    if threads and backend not in DEVICE_BACKENDS:
        parts.append(f"with {count_noun(threads, 'thread')}")
    if settings.get("batch_size"):
        parts.append(f"for batches of {settings['batch_size']}")
    execution = latency.get("execution")
    if execution:
        known = {
            "device": "in one launch, decided on the GPU",
            "single": "as one engine (the faster way here)",
            "blocks": "as one engine per block (the faster way here)",
        }
        parts.append(known.get(execution, str(execution)))
    return ", ".join(parts)


def reason_text(exit: Mapping[str, Any]) -> str:
    """Why an exit was kept or pruned, as a sentence that does not say which of the two again."""
    reason = exit.get("reason") or ""
    return as_sentence(reason.removeprefix("kept: ").removeprefix("pruned: ")) if reason else ""


def points_to_list(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points of a frontier that a table has room for: all if few, else those that can be selected."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    return [point for point in points if point.get("shipped") or point.get("chosen")]


def taken_exits(point: Mapping[str, Any]) -> dict[str, float]:
    """Exit name -> share of the rows, of the exits that any row takes at this point."""
    return {name: rate for name, rate in (point.get("exit_rates") or {}).items() if rate > 0}


def _facts(report: Mapping[str, Any], point: OperatingPoint | None) -> str:
    lines = []
    measured = measured_point(report, point)
    if point is not None and measured is not None:
        lines.append(("Selected", _estimate_text(point)))
    chosen, latency, rows = _chosen(report), dict_at(report, "latency"), dict_at(report, "rows")
    if chosen:
        text = str(chosen.get("name", "the chosen point"))
        if chosen.get("accuracy") is not None:
            text += f": accuracy {format_share(chosen['accuracy'])}"
        if chosen.get("excess_error") is not None:
            text += f", excess error {format_share(chosen['excess_error'])}"
        lines.append(("Chosen", text))
    program, plain = dict_at(latency, "program"), dict_at(latency, "plain")
    if program.get("mean_ms") is not None:
        text = f"mean {format_duration(program['mean_ms'])}"
        if plain.get("mean_ms") is not None:
            text += f" against {format_duration(plain['mean_ms'])} for {plain_name(report)}"
        if program.get("p99_ms") is not None and plain.get("p99_ms") is not None:
            text += f" (p99 {format_duration(program['p99_ms'])} against {format_duration(plain['p99_ms'])})"
        if measured is not None:
            text = f"of {measured}: {text}"
        lines.append(("Latency", text))
    runs = runs_sentence(report)
    if runs:
        lines.append(("Runs" if measured is None else "Measured", runs))
    if rows:
        lines.append(
            ("Rows", ", ".join(f"{count} to {use}" for use, count in rows.items() if count is not None))
        )
    return "\n".join(wrap(text, first=f"  {label:<9}", rest=" " * 11) for label, text in lines)


def _estimate_text(point: OperatingPoint) -> str:
    estimate = point.estimate
    rates = taken_exits({"exit_rates": estimate.exit_rates})
    return (
        f"{point.name}, as estimated: accuracy {format_share(estimate.accuracy)}, drop "
        f"{format_points(estimate.accuracy_drop)}, excess error {format_share(estimate.excess_error)}, mean "
        f"{format_duration(estimate.mean_latency_ms)}; rows leave at "
        + ", ".join(f"{name} {format_share(rate)}" for name, rate in rates.items())
    )


def _certificate(report: Mapping[str, Any], point: OperatingPoint | None) -> str:
    certificate = dict_at(report, "certificate")
    text = certificate_sentence(certificate, reference_name(report))
    measured = certificate.get("point") or _chosen(report).get("name")
    if not text or point is None or measured in (None, point.name):
        return section("Certificate", text)
    return section(f"Certificate of {measured}, not of {point.name}", text)


def _exits(report: Mapping[str, Any], scope: str) -> str:
    exits = inner_exits(report)
    if not exits:
        return ""
    width = max(len(str(exit.get("name"))) for exit in exits)
    lines = [f"Exits{' inside networks' if is_cascade(report) else ''}{scope}"]
    for exit in exits:
        verdict = "kept  " if exit.get("kept") else "pruned"
        first = f"  {exit.get('name')!s:<{width}}  {verdict}  "
        lines.append(wrap(_exit_text(exit), first=first, rest=" " * len(first)))
    return "\n".join(lines)


def _exit_text(exit: Mapping[str, Any]) -> str:
    facts = []
    if exit.get("depth") is not None:
        facts.append(f"at {100 * exit['depth']:.0f}% of {exit.get('network') or 'the network'}'s time")
    if exit.get("head"):
        accuracy = exit.get("head_accuracy")
        facts.append(
            f"{exit['head']} head" + ("" if accuracy is None else f" right on {format_share(accuracy)}")
        )
    elif exit.get("probe_accuracy") is not None:
        facts.append(f"linear probe right on {format_share(exit['probe_accuracy'])}")
    if exit.get("kept") and exit.get("exit_rate") is not None:
        leaves = f"{format_share(exit['exit_rate'])} of the rows leave here"
        if exit.get("exit_accuracy") is not None:
            leaves += f", {format_share(exit['exit_accuracy'])} of them right"
        facts.append(leaves)
    text = "; ".join(facts)
    reason = reason_text(exit)
    return f"{text}. {reason}" if text and reason else f"{text}{reason}"


def _frontier(points: Sequence[Mapping[str, Any]], selected: OperatingPoint | None) -> str:
    if not points:
        return ""
    rows = []
    chosen = next((point.get("name") for point in points if point.get("chosen")), None)
    # Told apart only where they are different points.
    running = None if selected is None or selected.name == chosen else selected.name
    for point in points_to_list(points):
        rates = ", ".join(f"{name} {100 * rate:.0f}" for name, rate in taken_exits(point).items())
        mark = "*" if point.get("chosen") else "+" if point.get("shipped") else " "
        rows.append((
            f"{'>' if running and point.get('name') == running else mark} {point.get('name', '')}",
            _or_dash(point.get("accuracy"), format_share),
            _or_dash(point.get("accuracy_drop"), format_points),
            _or_dash(point.get("mean_latency_ms"), format_duration),
            _or_dash(point.get("speedup"), lambda ratio: f"{ratio:.2f}x"),
            rates,
        ))  # fmt: skip
    marks = "* chosen, + in the artifact" + ("" if running is None else ", > selected")
    lines = [f"Frontier, {len(points)} points, estimated  ({marks}; exits in % of the rows)"]
    table = format_text_table(("  point", "accuracy", "drop", "mean", "speed-up"), [row[:5] for row in rows])
    lines.append(table[0] + "  exits")
    for line, row in zip(table[1:], rows, strict=True):
        lines.append(wrap(row[5], first=line + "  ", rest=" " * (len(line) + 2)) if row[5] else line)
    return "\n".join(lines)


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for number, done in enumerate(rounds, start=1):
        exits = ", ".join(done.get("exits") or ()) or "no exit"
        mean = _or_dash(done.get("mean_latency_ms"), format_duration)
        lines.append(wrap(f"{exits}: mean {mean}", first=f"  {number}  ", rest=" " * 5))
    return "\n".join(["Rounds of learning and pruning", *lines]) if lines else ""


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(["Notes", *(wrap(note, first="  - ", rest="    ") for note in notes)]) if notes else ""


def _chosen(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((point for point in list_at(report, "frontier") if point.get("chosen")), {})


def _or_dash(value: Any, show: Any) -> str:
    return "-" if value is None else str(show(value))
