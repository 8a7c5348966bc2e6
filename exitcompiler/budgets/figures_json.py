"""What a process measured as JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from exitcompiler.budgets.figures import ProcessFigures, SideFigures, Which
from exitcompiler.runtime.json_reader import Node
from exitcompiler.runtime.manifest import Json

__all__ = ["process_from_json", "process_to_json"]

_TIMES = ("mean_us", "p50_us", "p95_us", "p99_us")


def process_to_json(figures: ProcessFigures) -> dict[str, Json]:
    """A process as an object of JSON, nothing rounded."""
    return {
        "program": _side_to_json(figures.program),
        "plain": _side_to_json(figures.plain),
        "exits_us": _numbers(figures.exits_us),
        "blocks_us": _numbers(figures.blocks_us),
        "first": figures.first,
        "load_ms": figures.load_ms,
        "peak_bytes": figures.peak_bytes,
        "seconds": figures.seconds,
    }


def process_from_json(node: Node) -> ProcessFigures:
    """A process, read strictly.

    Raises:
        ArtifactError: Keys are missing or unknown, or a value is of the wrong type, not positive or not
            finite; names the place.
    """
    node.only(*ProcessFigures.__slots__)
    return ProcessFigures(
        program=_side_from_json(node["program"]),
        plain=_side_from_json(node["plain"]),
        exits_us={name: _positive(entry) for name, entry in node["exits_us"].items()},
        blocks_us={name: _positive(entry) for name, entry in node["blocks_us"].items()},
        first=cast("Which", node["first"].choice(("program", "plain"))),
        load_ms=_positive(node["load_ms"]),
        peak_bytes=node["peak_bytes"].integer(1),
        seconds=_positive(node["seconds"]),
    )


def _positive(node: Node) -> float:
    """A finite number above zero: all that is measured is, and is divided by.

    Raises:
        ArtifactError: It is not.
    """
    number = node.number()
    if number <= 0:
        node.fail(f"{number} is not positive")
    return number


def _side_to_json(side: SideFigures) -> Json:
    rates = {str(size): rate for size, rate in side.rows_per_second.items()}
    return {**{name: getattr(side, name) for name in _TIMES}, "rows_per_second": _numbers(rates)}


def _side_from_json(node: Node) -> SideFigures:
    node.only(*_TIMES, "rows_per_second")
    rates = {}
    for size, rate in node["rows_per_second"].items():
        if not (size.isascii() and size.isdigit() and int(size) > 0 and str(int(size)) == size):
            node["rows_per_second"].fail(f"{size!r} is not a batch size")
        rates[int(size)] = _positive(rate)
    mean, p50, p95, p99 = (_positive(node[name]) for name in _TIMES)
    return SideFigures(mean, p50, p95, p99, rates)


def _numbers(figures: Mapping[str, float]) -> dict[str, Json]:
    return dict(figures)
