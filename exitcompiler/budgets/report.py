"""A check as JSON and as plain text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import geometric_mean
from typing import Any, get_args

from exitcompiler.budgets.figures import Measurement, ProcessFigures, SideFigures
from exitcompiler.budgets.judging import series_of
from exitcompiler.budgets.limits import LATENCIES, Limit, Metric
from exitcompiler.budgets.outcomes import BlockChange, Causes, CheckReport, ExitChange, Outcome, Verdict
from exitcompiler.budgets.quantities import UNKNOWN, format_factor, format_figure, format_now
from exitcompiler.runtime.wording import as_sentence, count_noun, format_duration, format_text_table
from exitcompiler.statistics import Interval

__all__ = [
    "by_growth",
    "closing_line",
    "format_change",
    "format_found",
    "format_rates",
    "outcome_line",
    "remarks",
    "report_lines",
    "report_to_json",
]


def report_to_json(report: CheckReport) -> dict[str, Any]:
    """Everything that a check found.

    Args:
        report: The check.

    Returns:
        Text, numbers that are finite, lists, dicts, and null for what is not known:

        - ``artifact``, ``verdict``, ``exit_code``, ``seconds``, ``looks``, ``confidence``, ``notes``,
          ``baseline_written``;
        - ``limits``, a list: ``key``, ``limit`` (as it was written), ``value``, ``verdict``, ``found`` (an
          interval in the unit of ``value``, or null), ``now``, ``before``, ``note``. An interval is
          ``value``, ``lower``, ``upper``;
        - ``causes``, or null: ``change``, ``kernels``, ``exit_mix`` (intervals), ``named``, ``summary``,
          ``exits`` (``name``, ``rate``, ``before``, ``time``), ``blocks`` (``name``, ``now_us``, ``time``);
        - ``figures`` and, if there is one, ``baseline``: ``environment``, ``operating_point``,
          ``size_bytes``, ``rows``, ``fingerprint``, ``exit_rates``, ``disagreement``, ``accuracy``,
          ``plain_accuracy`` (shares of 1), ``processes`` (how many), and, as geometric means over these,
          ``program`` and ``plain`` (``mean_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms``, ``rows_per_second`` by
          batch size, ``load_ms``, ``peak_bytes``), ``exits_ms``, ``blocks_ms``.
    """
    return {
        "artifact": report.artifact,
        "verdict": report.verdict,
        "exit_code": report.exit_code,
        "limits": [_outcome_to_json(outcome) for outcome in report.outcomes],
        "causes": None if report.causes is None else _causes_to_json(report.causes),
        "figures": _measurement_to_json(report.measurement),
        "baseline": None if report.baseline is None else _measurement_to_json(report.baseline),
        "notes": list(report.notes),
        "seconds": report.seconds,
        "looks": report.looks,
        "confidence": report.confidence,
        "baseline_written": report.baseline_written,
    }


def report_lines(report: CheckReport) -> list[str]:
    """A check in plain text, one line per limit, then why latency changed, notes, and the verdict."""
    lines = [f"{outcome.verdict:<12}  {outcome_line(outcome)}" for outcome in report.outcomes]
    if report.causes is not None:
        lines += ["", *_causes_lines(report.causes)]
    return [*lines, "", *(f"note: {note}" for note in remarks(report)), closing_line(report)]


def outcome_line(outcome: Outcome) -> str:
    """A limit and what was found: ``latency.mean.max_ratio = 0.7: found 0.583 (0.571 to 0.596)``."""
    limit = outcome.limit
    parts = [] if outcome.found is None else [f"found {format_found(outcome)}"]
    parts += [part for part in (format_change(outcome),) if part]
    told = "; ".join(part for part in (", ".join(parts), outcome.note) if part)
    return f"{limit.key} = {limit.text}: {told}"


def format_found(outcome: Outcome) -> str:
    """What a limit is compared with, and its interval unless it is known exactly; a dash if skipped."""
    found, limit = outcome.found, outcome.limit
    if found is None:
        return "-"

    def show(value: float) -> str:
        return format_figure(limit.metric, limit.kind, value) if _is_known(limit, value) else UNKNOWN

    if found.lower == found.upper:
        return show(found.value) + _beside(outcome, found.value, show)
    lower, upper, value = _with_one_unit(show(found.lower), show(found.upper), show(found.value))
    return f"{value} ({lower} to {upper})"


def _beside(outcome: Outcome, value: float, show: Callable[[float], str]) -> str:
    """By how much a figure breaks its limit, where rounding would hide it."""
    limit = outcome.limit.value
    if outcome.verdict != "FAIL" or show(value) != show(limit) or not limit:
        return ""
    return f", {100 * abs(value / limit - 1.0):.1g} % {'above' if value > limit else 'below'}"


def _is_known(limit: Limit, value: float) -> bool:
    """Whether it is no end of an interval whose logarithm is not bounded: times are not zero."""
    nothing = {"max_decrease": 1.0, "max_increase": -1.0, "max_slowdown": -1.0}.get(limit.kind, 0.0)
    return math.isfinite(value) and not (limit.metric.is_timed and value == nothing)


def format_change(outcome: Outcome) -> str:
    """The metric in the baseline and now: ``0.583 -> 0.707``; empty where the limit is about no change."""
    if outcome.before is None or outcome.now is None:
        return ""
    metric, kind = outcome.limit.metric, outcome.limit.kind
    before, now = (format_now(metric, kind, value) for value in (outcome.before, outcome.now))
    return " -> ".join(_with_one_unit(before, now))


def _with_one_unit(*figures: str) -> list[str]:
    """The figures, with the unit at the last one alone if they share it: ``0.80``, ``0.90 points``."""
    known = [figure for figure in figures if figure != UNKNOWN]
    if len({figure.partition(" ")[2] for figure in known}) != 1:
        return list(figures)
    return [*(figure.partition(" ")[0] for figure in figures[:-1]), figures[-1]]


def format_rates(exit: ExitChange) -> str:
    """The share of rows that left at an exit, in the baseline and now: ``40.0 -> 37.9 %``."""
    rate = Metric("exit_rates", exit.name)
    return " -> ".join(
        _with_one_unit(*(format_now(rate, "max", share) for share in (exit.before, exit.rate)))
    )


def by_growth(blocks: Iterable[BlockChange]) -> list[BlockChange]:
    """Blocks, the one first that got slowest."""
    return sorted(blocks, key=lambda block: -block.time.value)


def remarks(report: CheckReport) -> list[str]:
    """The notes of the check; where its limits are inconclusive, what helps; where a baseline was written."""
    notes = [*report.notes, *_advice(report)]
    if report.baseline_written is not None:
        notes.append(f"the baseline was written to {report.baseline_written}")
    return notes


def _advice(report: CheckReport) -> Iterator[str]:
    """What would make inconclusive limits conclusive."""
    keys: dict[str, list[str]] = {}
    for outcome in report.outcomes:
        if outcome.verdict == "INCONCLUSIVE":
            keys.setdefault(_remedy(outcome, report), []).append(outcome.limit.key)
    for remedy, about in keys.items():
        yield f"{', '.join(about)}: {remedy}"


def _remedy(outcome: Outcome, report: CheckReport) -> str:
    limit, found = outcome.limit, outcome.found
    if not limit.metric.is_timed:
        return "the interval straddles the limit: it takes more rows"
    if found is not None and not (_is_known(limit, found.lower) and _is_known(limit, found.upper)):
        return "these are too few processes for an interval: measure longer (--max-seconds)"
    if limit.needs_baseline and report.baseline is not None:
        now, before = (_variance(limit, part) for part in (report.measurement, report.baseline))
        if before >= now:
            return (
                "the interval straddles the limit, mostly since the baseline is unsure: write it anew, with "
                "--update-baseline and a larger --max-seconds"
            )
    return (
        "the interval straddles the limit: measure longer (--max-seconds), or where less else runs, or give "
        "the limit more room"
    )


def _variance(limit: Limit, measurement: Measurement) -> float:
    """Of what a limit on a change compares, as a logarithm; infinite where it is not known."""
    series = series_of(measurement, limit.metric.family, limit.metric.name)
    if series is None:
        return math.inf
    groups = [series.program] if limit.kind == "max_slowdown" else [*series.ratio[0], *series.ratio[1]]
    return sum(float(group.var(ddof=1)) / len(group) if len(group) > 1 else math.inf for group in groups)


def closing_line(report: CheckReport) -> str:
    """The verdict, how many limits came to which, and what that rests on."""
    counts = Counter(outcome.verdict for outcome in report.outcomes)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict) if counts[verdict])
    measurement, environment = report.measurement, report.measurement.environment
    processes = len(measurement.processes)
    effort = [
        f"{processes} process{'' if processes == 1 else 'es'}",
        f"{report.seconds:.0f} s",
        f"{measurement.answered.rows:,} row{'' if measurement.answered.rows == 1 else 's'}",
        count_noun(environment.threads, "thread"),
        environment.backend,
        f"{100 * report.confidence:g} % intervals",
    ]
    return f"{report.verdict}: {count_noun(len(report.outcomes), 'limit')} ({told}); {', '.join(effort)}"


def _causes_lines(causes: Causes) -> list[str]:
    rows = [
        ("all", format_factor(causes.change)),
        ("kernels", format_factor(causes.kernels)),
        ("exit mix", format_factor(causes.exit_mix)),
    ]
    lines = [as_sentence(causes.summary), *format_text_table(("mean latency", "now over before"), rows)]
    exits = [(exit.name, format_rates(exit), format_factor(exit.time)) for exit in causes.exits]
    lines += format_text_table(("exit", "rows before -> now", "latency, now over before"), exits)
    blocks = [
        (block.name, format_duration(block.now_us / 1e3), format_factor(block.time))
        for block in by_growth(causes.blocks)
    ]
    return lines + (format_text_table(("block", "now", "latency, now over before"), blocks) if blocks else [])


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "key": outcome.limit.key,
        "limit": outcome.limit.text,
        "value": outcome.limit.value,
        "verdict": outcome.verdict,
        "found": None if outcome.found is None else _interval_to_json(outcome.found),
        "now": _finite(outcome.now),
        "before": _finite(outcome.before),
        "note": outcome.note,
    }


def _causes_to_json(causes: Causes) -> dict[str, Any]:
    return {
        "change": _interval_to_json(causes.change),
        "kernels": _interval_to_json(causes.kernels),
        "exit_mix": _interval_to_json(causes.exit_mix),
        "named": list(causes.named),
        "summary": causes.summary,
        "exits": [
            {
                "name": exit.name,
                "rate": exit.rate,
                "before": exit.before,
                "time": _interval_to_json(exit.time),
            }
            for exit in causes.exits
        ],
        "blocks": [
            {"name": block.name, "now_us": block.now_us, "time": _interval_to_json(block.time)}
            for block in causes.blocks
        ],
    }


def _measurement_to_json(measurement: Measurement) -> dict[str, Any]:
    answered, processes = measurement.answered, measurement.processes
    return {
        "environment": asdict(measurement.environment),
        "operating_point": measurement.point,
        "size_bytes": measurement.size_bytes,
        "rows": answered.rows,
        "fingerprint": answered.fingerprint,
        "exit_rates": {name: count / answered.rows for name, count in answered.exits.items()},
        "disagreement": answered.disagreements / answered.rows,
        "accuracy": None if answered.right is None else answered.right / answered.rows,
        "plain_accuracy": None if answered.plain_right is None else answered.plain_right / answered.rows,
        "processes": len(processes),
        "program": _side_to_json(
            [part.program for part in processes], [part for part in processes if part.first == "program"]
        ),
        "plain": _side_to_json(
            [part.plain for part in processes], [part for part in processes if part.first == "plain"]
        ),
        "exits_ms": _means([part.exits_us for part in processes], 1e-3),
        "blocks_ms": _means([part.blocks_us for part in processes], 1e-3),
    }


def _side_to_json(sides: Sequence[SideFigures], first: Sequence[ProcessFigures]) -> dict[str, Any]:
    """Of one of the two programs; load time and memory are of the processes that loaded it first."""
    times = {f"{name}_ms": _mean([getattr(side, f"{name}_us") / 1e3 for side in sides]) for name in LATENCIES}
    throughput = _means([side.rows_per_second for side in sides], 1.0)
    return {
        **times,
        "rows_per_second": {str(rows): value for rows, value in throughput.items()},
        "load_ms": _mean([part.load_ms for part in first]),
        "peak_bytes": _mean([float(part.peak_bytes) for part in first]),
    }


def _means(figures: Sequence[Mapping[Any, float]], scale: float) -> dict[Any, float | None]:
    """By name, of those that every process has."""
    names = [name for name in figures[0] if all(name in other for other in figures)] if figures else []
    return {name: _mean([scale * part[name] for part in figures]) for name in names}


def _mean(values: Sequence[float]) -> float | None:
    """The geometric mean, as limits are judged by; None of nothing."""
    return _finite(geometric_mean(values)) if values else None


def _interval_to_json(interval: Interval) -> dict[str, float | None]:
    return {
        "value": _finite(interval.value),
        "lower": _finite(interval.lower),
        "upper": _finite(interval.upper),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
