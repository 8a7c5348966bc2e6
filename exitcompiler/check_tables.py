"""What ``check`` prints: a row for each limit, why latency changed, and a closing line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from exitcompiler.budgets.outcomes import BlockChange, Causes, CheckReport, ExitChange, Outcome, Verdict
from exitcompiler.budgets.quantities import format_factor
from exitcompiler.budgets.report import (
    by_growth,
    closing_line,
    format_change,
    format_found,
    format_rates,
    remarks,
)
from exitcompiler.runtime.wording import as_sentence, format_duration

__all__ = ["check_parts"]

_STYLES: Final[Mapping[Verdict, str]] = {
    "PASS": "green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "yellow",
    "SKIPPED": "dim",
}
_GAP: Final = 3
"""Between columns of a table."""
_MOST_BLOCKS: Final = 12
_MOST_KEYS: Final = 3


def check_parts(report: CheckReport, width: int) -> list[RenderableType]:
    """A check for people.

    Args:
        report: The check.
        width: Of the terminal, in columns.

    Returns:
        Tables and lines, in the order in which they are printed.
    """
    parts: list[RenderableType] = [_limits_table(report.outcomes, width), *_notes_on_limits(report.outcomes)]
    if report.causes is not None:
        parts += _why(report.causes)
    if notes := remarks(report):
        parts += ["", *(Text.assemble(("note: ", "bold"), note) for note in notes)]
    verdict, colon, rest = closing_line(report).partition(":")
    return [*parts, Text.assemble("\n", (verdict, _STYLES[report.verdict]), colon, rest)]


def _limits_table(outcomes: Sequence[Outcome], width: int) -> Table:
    """One row each; where a terminal is too narrow, rows of two lines, so that no key has to be broken."""
    header = ("verdict", "limit", "allowed", "found", "before -> now")
    rows = [(o.verdict, o.limit.key, o.limit.text, format_found(o), format_change(o)) for o in outcomes]
    columns = len(header) if any(row[-1] for row in rows) else len(header) - 1
    longest = [max(map(len, column)) for column in zip(header, *rows, strict=True)][:columns]
    if sum(longest) + _GAP * (columns - 1) <= width:
        table, shown = _table(header[:columns]), [row[1:columns] for row in rows]
    else:
        table = _table(("verdict", "limit", "found"))
        shown = [(f"{key}\n  = {limit}", f"{found}\n{change}") for _, key, limit, found, change in rows]
    for outcome, cells in zip(outcomes, shown, strict=True):
        table.add_row(Text(outcome.verdict, style=_STYLES[outcome.verdict]), *(Text(cell) for cell in cells))
    return table


def _notes_on_limits(outcomes: Sequence[Outcome]) -> list[RenderableType]:
    """What the table has no room for, each once, with the limits it is about."""
    keys: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.note:
            keys.setdefault(outcome.note, []).append(outcome.limit.key)
    lines = [Text.assemble((_several(about), "bold"), f": {note}") for note, about in keys.items()]
    return ["", *lines] if lines else []


def _several(keys: Sequence[str]) -> str:
    return ", ".join(keys) if len(keys) <= _MOST_KEYS else f"{len(keys)} limits"


def _why(causes: Causes) -> list[RenderableType]:
    factors = _table(("mean latency", "now over before"))
    named = [("all", causes.change), ("kernels", causes.kernels), ("exit mix", causes.exit_mix)]
    for name, factor in named:
        style = "bold" if name in causes.named else ""
        factors.add_row(Text(name, style=style), Text(format_factor(factor), style=style))
    parts: list[RenderableType] = [
        Text.assemble("\n", ("Why: ", "bold"), as_sentence(causes.summary)),
        "",
        factors,
        "",
        _exits_table(causes.exits),
    ]
    return [*parts, "", _blocks_table(causes.blocks)] if causes.blocks else parts


def _exits_table(exits: Sequence[ExitChange]) -> Table:
    table = _table(("exit", "rows before -> now", "latency, now over before"))
    for exit in exits:
        cells = (exit.name, format_rates(exit), format_factor(exit.time))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _blocks_table(blocks: Sequence[BlockChange]) -> Table:
    left_out = len(blocks) - _MOST_BLOCKS
    table = _table(("block", "now", "latency, now over before"))
    for block in by_growth(blocks)[:_MOST_BLOCKS]:
        cells = (block.name, format_duration(block.now_us / 1e3), format_factor(block.time))
        table.add_row(*(Text(cell) for cell in cells))
    if left_out > 0:
        table.caption = f"... and {left_out} more (--json has all)"
    return table


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
