"""What the command line prints: rich tables for people, JSON for programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from exitcompiler.runtime.explain import format_duration, format_share, taken_exits

if TYPE_CHECKING:
    from exitcompiler.benchmarking import Answers

__all__ = [
    "Output",
    "answers_table",
    "answers_to_list",
    "answers_to_npz",
    "bench_tables",
    "parts_text",
    "points_table",
    "show_error",
    "show_stopped",
]


class Output:
    """Where a command's results go: figures as JSON or text on stdout, all else on stderr.

    Args:
        as_json: Whether results are JSON; then text for people goes to stderr.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False)

    def show(self, *parts: Any) -> None:
        """Print text or tables for people; text is taken literally, without markup."""
        for part in parts:
            self.console.print(part, markup=False, soft_wrap=isinstance(part, str))

    def result(self, figures: Mapping[str, Any]) -> None:
        """Write figures to stdout if JSON was asked for."""
        if self.as_json:
            json.dump(figures, sys.stdout, indent=2, allow_nan=False)
            sys.stdout.write("\n")


def show_error(error: Exception) -> None:
    """Print an error as one message on stderr."""
    Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)


def show_stopped(interruption: KeyboardInterrupt) -> None:
    """Say on stderr that Ctrl-C stopped the work, and what its notes say, such as how to go on."""
    text = "\n  -> ".join(["stopped", *getattr(interruption, "__notes__", [])])
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def points_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """The operating points of an artifact, the selected one marked."""
    table = _table("Operating points (estimates)", ("point", "accuracy", "drop", "mean", "exits"))
    for point in points:
        name = f"{point['name']} *" if point["selected"] else point["name"]
        rates = ", ".join(f"{exit} {format_share(rate)}" for exit, rate in taken_exits(point).items())
        drop = f"{100 * point['accuracy_drop']:.2f} points"
        table.add_row(
            name, format_share(point["accuracy"]), drop, format_duration(point["mean_latency_ms"]), rates
        )
    return table


def bench_tables(figures: Mapping[str, Any]) -> list[Table]:
    """Latencies of the program and of the whole network, then one line per exit."""
    table = _table(
        f"{figures['rows']} rows, batches of {figures['batch_size']}, {figures['passes']} interleaved passes",
        ("", "accuracy", "mean", "p50", "p95", "p99", "rows/s"),
    )
    for label, key in (("with exits", "program"), ("whole network", "plain")):
        row = figures[key]
        times = [format_duration(row[name]) for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms")]
        table.add_row(label, _share(row.get("accuracy")), *times, f"{row['rows_per_second']:,.0f}")
    exits = _table("Exits", ("exit", "rows", "accuracy there", "mean there"))
    for entry in figures["exits"]:
        mean = entry.get("mean_ms")
        exits.add_row(
            entry["name"],
            format_share(entry["rate"]),
            _share(entry.get("accuracy")),
            "-" if mean is None else format_duration(mean),
        )
    return [table, exits]


def answers_table(answers: Sequence[Mapping[str, Any]], shown: int) -> Table:
    """The first answers, one line per row."""
    table = _table("Answers", ("row", "class", "confidence", "exit"))
    for number, answer in enumerate(answers[:shown]):
        table.add_row(str(number), str(answer["class"]), f"{answer['confidence']:.3f}", answer["exit"])
    return table


def answers_to_list(answers: Answers) -> list[dict[str, Any]]:
    """Each row's class, confidence and exit."""
    rows = zip(answers.predictions, answers.confidence, answers.exit_index, strict=True)
    return [
        {"class": int(label), "confidence": float(confidence), "exit": answers.exits[index]}
        for label, confidence, index in rows
    ]


def answers_to_npz(answers: Answers) -> bytes:
    """An ``.npz`` file of ``prediction``, ``exit_index``, ``confidence``, and ``exits``, the names."""
    import numpy as np

    content = io.BytesIO()
    np.savez(
        content,
        prediction=answers.predictions,
        exit_index=answers.exit_index,
        confidence=answers.confidence,
        exits=np.array(answers.exits),
    )
    return content.getvalue()


def parts_text(figures: Mapping[str, Any]) -> list[str]:
    """What a program was cut into, and what goes from one part to the other."""
    hand_over = figures["hand_over"]
    lines = [
        f"Cut at {', '.join(figures['edges'])}: near part {figures['near_bytes'] / 1e6:.2f} MB, "
        f"far part {figures['far_bytes'] / 1e6:.2f} MB.",
        f"Handed over, {hand_over['bytes_per_row']} bytes per row: "
        + ", ".join(f"{name}: {spec}" for name, spec in hand_over["values"].items()),
    ]
    if figures["share"] is not None:
        lines.append(f"Estimated: {format_share(figures['share'])} of the rows go on to the far part.")
    if figures["shared"]:
        lines.append(
            f"In both parts, as other edges lead there: {', '.join(figures['shared'])}. "
            "To cut all edges into a block, give its name alone."
        )
    return lines


def _share(share: float | None) -> str:
    return "-" if share is None else format_share(share)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    return table
