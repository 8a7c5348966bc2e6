"""How figures and sentences are written, wherever people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "as_sentence",
    "count_noun",
    "dict_at",
    "format_duration",
    "format_points",
    "format_share",
    "format_text_table",
    "list_at",
    "section",
    "wrap",
]

_WIDTH = 98


def format_share(share: float) -> str:
    """A share of 1 in per cent, to three digits: ``0.0123`` -> ``1.23%``, ``0.938`` -> ``93.8%``."""
    percent = 100 * share
    return f"{percent:.2f}%" if abs(percent) < 9.995 else f"{percent:.1f}%"


def format_points(drop: float) -> str:
    """A difference of accuracies, as a share of 1, in points: ``0.008`` -> ``0.80 points``."""
    return f"{100 * drop:.2f} points"


def format_duration(milliseconds: float) -> str:
    """A duration to three digits, in microseconds below one tenth of a millisecond."""
    unit, value = "ms", milliseconds
    if value < 0.1:
        unit, value = "us", 1000 * milliseconds
    elif value >= 1000:
        unit, value = "s", milliseconds / 1000
    return f"{f'{value:#.3g}'.removesuffix('.')} {unit}"


def format_text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in plain text: first column left, all others right; two spaces indent."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def count_noun(count: int, noun: str) -> str:
    """A number of things: ``no exit``, ``1 exit``, ``2 exits``."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def as_sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def section(title: str, text: str) -> str:
    """A title and an indented paragraph; nothing without a text."""
    return f"{title}\n{wrap(text, first='  ', rest='  ')}" if text else ""


def wrap(text: str, *, first: str = "", rest: str = "") -> str:
    """The text in lines that fit a terminal.

    Args:
        text: One paragraph.
        first: What the first line begins with.
        rest: What all other lines begin with.
    """
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def dict_at(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What a report holds there; empty if it is missing or null."""
    value = mapping.get(key)
    return {} if value is None else value


def list_at(mapping: Mapping[str, Any], key: str) -> Sequence[Any]:
    """What a report holds there; empty if it is missing or null."""
    value = mapping.get(key)
    return () if value is None else value
