"""What the report of a fine-tuned program says about the tuning, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exitcompiler.runtime.wording import (
    as_sentence,
    count_noun,
    dict_at,
    format_points,
    format_share,
    format_text_table,
    list_at,
    wrap,
)

__all__ = ["Tuning", "finetune_text", "tunings"]


@dataclass(frozen=True)
class Tuning:
    """What is said of one network that was tuned.

    Args:
        title: Of the section.
        paragraphs: Sentences.
        tried: The sets of exits that were compared, the chosen one first: exits, speed-up, drop.
    """

    title: str
    paragraphs: tuple[str, ...]
    tried: tuple[tuple[str, str, str], ...]


def finetune_text(report: Mapping[str, Any]) -> str:
    """What was tuned: how long, how far the network itself moved by that, which exits were compared.

    Args:
        report: The report of a compiled program; every key may be missing.

    Returns:
        A section, in a cascade one for each network that was tuned; empty if none was.
    """
    sections = []
    for tuning in tunings(report):
        lines = [tuning.title, *(wrap(text, first="  ", rest="  ") for text in tuning.paragraphs)]
        if tuning.tried:
            marked = [
                (f"{' ' if i else '*'} {exits}", *rest) for i, (exits, *rest) in enumerate(tuning.tried)
            ]
            lines += format_text_table(("  exits compared", "speed-up", "drop"), marked)
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def tunings(report: Mapping[str, Any]) -> list[Tuning]:
    """What the report says of each network that was tuned."""
    limit = dict_at(report, "settings").get("max_accuracy_drop")
    entries = [("Fine-tuning", dict_at(report, "finetune"))]
    for network in list_at(dict_at(report, "cascade"), "networks"):
        entries.append((f"Fine-tuning of {network.get('name')}", dict_at(network, "finetune")))
    found = []
    for title, finetune in entries:
        search = dict_at(finetune, "search")
        paragraphs = tuple(filter(None, (_training(finetune), _moved(finetune), _search(search, limit))))
        if paragraphs:
            tried = tuple(_row(entry) for entry in list_at(search, "tried"))
            found.append(Tuning(title, paragraphs, tried))
    return found


def _training(finetune: Mapping[str, Any]) -> str:
    """How much was trained, and how long it took."""
    epochs, rows, seconds = (finetune.get(key) for key in ("epochs", "rows", "seconds"))
    if epochs is None:
        return ""
    text = f"network and exits were trained together for {epochs} {'pass' if epochs == 1 else 'passes'}"
    if rows is not None:
        text += f" over {rows:,} rows"
    if seconds is not None:
        text += f", in {_long_duration(seconds)}"
    if finetune.get("device") is not None:
        text += f" on {finetune['device']}"
        text += "" if finetune.get("precision") is None else f" in {finetune['precision']}"
    resumed_at = min(finetune.get("resumed_at") or 0, epochs)
    if resumed_at:
        which = "all" if resumed_at == epochs else f"the first {resumed_at}"
        text += f"; {which} of these passes were made in an earlier run, whose time is not in this"
    return as_sentence(text)


def _moved(finetune: Mapping[str, Any]) -> str:
    """How far the network itself came from where it was."""
    tuned, original = finetune.get("tuned_accuracy"), finetune.get("original_accuracy")
    moved = dict_at(finetune, "moved")
    text = ""
    if tuned is not None:
        text = f"without exits the tuned network is right on {format_share(tuned)}"
        text += "" if original is None else f", the original on {format_share(original)}"
        if finetune.get("judged_on") is not None:
            text += f", of {finetune['judged_on']:,} rows that it was not trained on"
    if moved.get("value") is not None:
        subject = f"{text}; it" if text else "without exits the network"
        text = f"{subject} moved by {100 * moved['value']:+.2f} points"
        if moved.get("lower") is not None and moved.get("upper") is not None:
            text += f" (95% interval {100 * moved['lower']:+.2f} to {100 * moved['upper']:+.2f})"
    return f"{as_sentence(text)} Accuracy drops count from the original." if text else ""


def _search(search: Mapping[str, Any], limit: float | None) -> str:
    """How the sets of exits were compared."""
    if not list_at(search, "tried"):
        return ""
    text = "exits were chosen"
    if search.get("sets") is not None:
        text += f" among {count_noun(search['sets'], 'set')}"
    text += " by heads trained for a short while on the frozen network"
    if search.get("rows") is not None:
        text += f", judged on {search['rows']:,} training rows"
    within, limit = search.get("within"), search.get("asked", limit)
    if within == 1.0:
        text += ", whatever they lose, as none of them kept the accuracy"
    elif within is not None:
        text += f" at a drop of at most {format_points(within)}"
        if limit is not None and within > limit:
            text += " (more than was asked for: before they are tuned, exits are weaker)"
    if search.get("seconds") is not None:
        text += f", in {_long_duration(search['seconds'])}"
    note = "The figures only rank the sets: exits are not tuned yet, and the rows are not fresh."
    return f"{as_sentence(text)} {note}"


def _row(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    speedup, drop = entry.get("speedup"), entry.get("accuracy_drop")
    return (
        ", ".join(entry.get("exits") or ()),
        "-" if speedup is None else f"{speedup:.2f}x",
        "-" if drop is None else format_points(drop),
    )


def _long_duration(seconds: float) -> str:
    """Seconds, minutes or hours: ``45 s``, ``12 min``, ``1.9 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
