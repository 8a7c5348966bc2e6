"""Values with units: how a budget writes them, and how figures are shown, wherever they are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from exitcompiler.budgets.limits import LimitKind, Metric
from exitcompiler.errors import BudgetError
from exitcompiler.runtime.wording import format_duration
from exitcompiler.statistics import Interval

__all__ = [
    "UNKNOWN",
    "Unit",
    "describe_value",
    "format_factor",
    "format_figure",
    "format_now",
    "read_quantity",
    "unit_of",
]

UNKNOWN: Final = "?"
"""Stands for an end that a handful of processes cannot give."""

_LONGEST: Final = 60
_NUMBER: Final = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Unit:
    """What a value is measured in.

    Args:
        noun: With its article, as in "a time".
        example: As it stands in ``budget.toml``.
        scales: Unit -> what one of it is in the unit of `Limit.value`; empty: a bare number.
        show: Writes a value, given in the unit of `Limit.value`.
        least: The smallest value that makes sense.
        most: The largest.
        above_least: Whether it has to be above ``least``.
        hint: What to know beyond the example; may be empty.
    """

    noun: str
    example: str
    scales: Mapping[str, float] = field(repr=False)
    show: Callable[[float], str] = field(repr=False)
    least: float = 0.0
    most: float = math.inf
    above_least: bool = False
    hint: str = ""

    @property
    def accepted(self) -> str:
        """What may be written, in a sentence."""
        if not self.scales:
            return f"give {self.noun}, without quotes: {self.example}{self.hint}"
        return f"give {self.noun} in {_either(self.scales)}: {self.example}{self.hint}"


def _either(names: Mapping[str, float]) -> str:
    *first, last = [name for name in names if name.isascii()]
    return f"{', '.join(first)} or {last}" if first else last


def _show_percent(share: float, sign: str = "") -> str:
    percent = 100 * share
    return f"{percent:{sign}z.{2 if abs(percent) < 9.995 else 1}f} %"


def _show_points(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}z.2f} points"


def _show_number(value: float) -> str:
    """To three digits, without an exponent."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 2
    return f"{rounded:z.{max(digits, 0)}f}"


def _show_size(size: float) -> str:
    rounded = abs(float(f"{size:.3g}"))
    name = next((unit for unit in ("GB", "MB", "kB") if rounded >= _SIZES[unit]), "B")
    return f"{_show_number(size / _SIZES[name])} {name}"


def _show_rate(rate: float) -> str:
    return f"{rate:.0f} rows/s" if abs(rate) >= 1000 else f"{_show_number(rate)} rows/s"


_TIMES: Final = {"us": 1e-3, "\u00b5s": 1e-3, "\u03bcs": 1e-3, "ms": 1.0, "s": 1e3}
_SIZES: Final = {
    "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
}  # fmt: skip
_PERCENT: Final = {"%": 0.01}
_POINTS: Final = {"point": 0.01, "points": 0.01}

_TIME: Final = Unit("a time", '"2 ms"', _TIMES, format_duration, above_least=True)
_SIZE: Final = Unit("a size", '"4 MB"', _SIZES, _show_size, above_least=True)
_RATE: Final = Unit("a throughput", '"2500 rows/s"', {"rows/s": 1.0}, _show_rate, above_least=True)
_RATIO: Final = Unit("a number", "0.7", {}, _show_number, above_least=True)
_SHARE: Final = Unit("a share", '"40 %"', _PERCENT, _show_percent, most=1.0)
_INCREASE: Final = Unit("an increase", '"10 %"', _PERCENT, lambda share: _show_percent(share, "+"))
_DECREASE: Final = Unit("a decrease", '"10 %"', _PERCENT, _show_percent, most=1.0)
_OF_ROWS: Final = "; one point is one row in a hundred"
_DROP: Final = Unit("a drop", '"1 point"', _POINTS, _show_points, most=1.0, hint=_OF_ROWS)
_MORE_DROP: Final = Unit(
    "an increase", '"0.5 points"', _POINTS, lambda share: _show_points(share, "+"), most=1.0, hint=_OF_ROWS
)
_TOLERANCE: Final = Unit("a tolerance", '"3 points"', _POINTS, _show_points, most=1.0, hint=_OF_ROWS)

_OWN: Final[Mapping[str, Unit]] = {
    "latency": _TIME,
    "throughput": _RATE,
    "accuracy.drop": _DROP,
    "accuracy.disagreement": _SHARE,
    "exit_rates": _SHARE,
    "artifact": _SIZE,
    "memory": _SIZE,
    "load": _TIME,
}
"""Family, or family and name -> the unit of the metric itself."""

_OF_KIND: Final[Mapping[LimitKind, Unit]] = {
    "max_ratio": _RATIO,
    "min_ratio": _RATIO,
    "max_increase": _INCREASE,
    "max_decrease": _DECREASE,
    "max_slowdown": _INCREASE,
    "tolerance": _TOLERANCE,
}


def unit_of(metric: Metric, kind: LimitKind) -> Unit:
    """The unit of a limit's value, and of what is found for it.

    Args:
        metric: Of what.
        kind: Compared with what.
    """
    if kind == "max_increase" and metric == Metric("accuracy", "drop"):
        return _MORE_DROP
    return _OF_KIND[kind] if kind in _OF_KIND else _own(metric)


def _own(metric: Metric) -> Unit:
    return _OWN[metric.family] if metric.family in _OWN else _OWN[str(metric)]


def format_figure(metric: Metric, kind: LimitKind, value: float) -> str:
    """Write a limit's value, or what was found for it: ``0.583``, ``+12.3 %``, ``1.40 ms``, ``2.10 points``.

    Args:
        metric: Of what.
        kind: Compared with what.
        value: In the unit of `Limit.value`.
    """
    return unit_of(metric, kind).show(value)


def format_now(metric: Metric, kind: LimitKind, value: float) -> str:
    """Write `Outcome.now` or `Outcome.before`: the metric itself, or its ratio to plain if that is compared.

    Args:
        metric: Of what.
        kind: Of the limit.
        value: As in the outcome.
    """
    return (_RATIO if _compares_ratios(metric, kind) else _own(metric)).show(value)


def format_factor(factor: Interval) -> str:
    """A factor and its interval: ``1.21x (1.18 to 1.24)``; without it where it is as narrow as the digits."""
    value, lower, upper = (
        f"{end:.2f}" if 0.0 < end < math.inf else UNKNOWN
        for end in (factor.value, factor.lower, factor.upper)
    )
    return f"{value}x" if lower == upper == value != UNKNOWN else f"{value}x ({lower} to {upper})"


def _compares_ratios(metric: Metric, kind: LimitKind) -> bool:
    changes = kind in ("max_increase", "max_decrease") and metric.family not in ("accuracy", "artifact")
    return changes or kind in ("max_ratio", "min_ratio")


def read_quantity(value: object, unit: Unit, where: str) -> float:
    """Read a value as it stands in ``budget.toml``.

    Args:
        value: A string such as ``"2 ms"``; for a ratio a number.
        unit: What it has to be.
        where: File and key, for the error.

    Returns:
        In the unit of `Limit.value`: ms, bytes, rows per second, a share of 1, or a ratio.

    Raises:
        BudgetError: It has no unit or one that makes no sense here, or is out of range.
    """
    number = _read_scaled(value, unit, where) if unit.scales else _read_bare(value, unit, where)
    wrong = _out_of_range(number, unit)
    if wrong is not None:
        raise BudgetError(f"{describe_value(value)} is {wrong}", where=where, remedy=unit.accepted)
    return number


def _out_of_range(number: float, unit: Unit) -> str | None:
    if not math.isfinite(number):
        return "not finite"
    if number < unit.least:
        return f"below {unit.least:g}"
    if unit.above_least and number == unit.least:
        return f"not above {unit.least:g}"
    return f"more than {unit.show(unit.most)}" if number > unit.most else None


def _read_bare(value: object, unit: Unit, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(f"{describe_value(value)} is not a number", where=where, remedy=unit.accepted)
    return float(str(value))  # a whole number may be too large for float(), which then raises


def _read_scaled(value: object, unit: Unit, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise BudgetError(f"{value} has no unit", where=where, remedy=unit.accepted)
    found = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise BudgetError(
            f"{describe_value(value)} is not {unit.noun} with a unit", where=where, remedy=unit.accepted
        )
    number, name = found.groups()
    if not name:
        raise BudgetError(f"{describe_value(value)} has no unit", where=where, remedy=unit.accepted)
    if name not in unit.scales:
        raise BudgetError(f"{describe_value(value)} is not {unit.noun}", where=where, remedy=unit.accepted)
    scale = unit.scales[name]
    return float(number) * scale if scale >= 1.0 else float(number) / (1.0 / scale)  # 70 % is 0.7 exactly


def describe_value(value: object) -> str:
    """A value for a message, as it stands in TOML, or what it is if that would be long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
