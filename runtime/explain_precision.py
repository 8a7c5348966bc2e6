"""What the report says of the precisions that were tried, in words and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exitcompiler.runtime.wording import (
    as_sentence,
    dict_at,
    format_duration,
    format_points,
    format_text_table,
    list_at,
    wrap,
)

__all__ = ["precision_rows", "precisions_text", "quantization_sentence"]

HEADER = ("in turns, on the learning rows", "drop", "mean", "to fp32")


def precisions_text(report: Mapping[str, Any]) -> str:
    """How the network was quantised, and what was compared with what; empty if neither.

    Args:
        report: The report of a compiled program; every key may be missing.
    """
    sentence, rows = quantization_sentence(report), precision_rows(report)
    lines = [wrap(sentence, first="  ", rest="  ")] if sentence else []
    lines += [
        wrap(f"{row['name']}: {as_sentence(row['refused'])}", first="  ", rest="    ")
        for row in list_at(report, "precisions")
        if row.get("refused")
    ]
    if rows:
        marked = [(f"  {name}" if not chosen else f"* {name}", *rest) for chosen, name, *rest in rows]
        lines += format_text_table((f"  {HEADER[0]}", *HEADER[1:]), marked)
    return "\n".join(["Precision  (* chosen)" if rows else "Precision", *lines]) if lines else ""


def precision_rows(report: Mapping[str, Any]) -> list[tuple[bool, str, str, str, str]]:
    """Of all that were compared: whether it was chosen, name, drop, mean, speed-up against float32."""
    entries = [row for row in list_at(report, "precisions") if row.get("mean_latency_ms") is not None]
    whole_ms = next((row["mean_latency_ms"] for row in entries if row.get("name") == "fp32"), None)
    return [
        (
            bool(row.get("chosen")),
            str(row.get("name")) + ("" if row.get("kept") else " (over the limit)"),
            format_points(row.get("accuracy_drop") or 0.0),
            format_duration(row["mean_latency_ms"]),
            "-" if whole_ms is None else f"{whole_ms / row['mean_latency_ms']:.2f}x",
        )
        for row in entries
    ]


def quantization_sentence(report: Mapping[str, Any]) -> str:
    """How the network was quantised, and what that costs and brings; empty if it was not."""
    entry = dict_at(report, "quantization")
    drop = dict_at(entry, "accuracy_drop")
    if drop.get("value") is None:
        return ""
    text = f"Without exits, int8 drops {format_points(drop['value'])}"
    if drop.get("lower") is not None and drop.get("upper") is not None:
        text += f" ({100 * drop['lower']:.2f} to {100 * drop['upper']:.2f}) against float32"
    if entry.get("int8_ms") and entry.get("float_ms"):
        text += (
            f", and takes {format_duration(entry['int8_ms'])} a row, "
            f"{format_duration(entry['float_ms'])} in float32"
        )
    kept = list_at(entry, "kept_float")
    text += f". Left in float32 besides the last layer: {', '.join(map(str, kept)) if kept else 'none'}."
    if entry.get("plain") == "fp32":
        text += " What all is compared with is the network in float32."
    return text
