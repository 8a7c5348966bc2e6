"""Reads ``budget.toml``: every key is known, every value has a unit that fits, no two limits contradict."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from exitcompiler.budgets.limits import LATENCIES, Budget, Family, Limit, LimitKind, Metric, RunSettings
from exitcompiler.budgets.quantities import describe_value, format_figure, read_quantity, unit_of
from exitcompiler.errors import BudgetError
from exitcompiler.runtime.backends import BACKENDS

__all__ = ["KNOWN_KEYS", "read_budget"]

_EXAMPLE: Final = "[latency.mean]\n       max_ratio = 0.8"
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class _Family:
    """What may stand in a table of limits.

    Args:
        keys: Key -> the metric's name and the kind of the limit.
        kinds: What may stand in a table of its own for each name, as ``[latency.mean]``.
        is_name: Which names there are.
        names: The same for people.
        example: The head of such a table.
    """

    keys: Mapping[str, tuple[str, LimitKind]] = field(default_factory=dict)
    kinds: tuple[LimitKind, ...] = ()
    is_name: Callable[[str], bool] = bool
    names: str = ""
    example: str = ""


_FAMILIES: Final[Mapping[Family, _Family]] = {
    "latency": _Family(
        kinds=("max", "max_ratio", "max_increase", "max_slowdown"),
        is_name=LATENCIES.__contains__,
        names="mean, p50, p95 or p99",
        example="[latency.mean]",
    ),
    "throughput": _Family(
        kinds=("min", "min_ratio", "max_decrease"),
        is_name=lambda name: re.fullmatch(r"[1-9][0-9]{0,8}", name) is not None,
        names="a batch size, a positive whole number",
        example="[throughput.32]",
    ),
    "accuracy": _Family(
        {
            "max_drop": ("drop", "max"),
            "max_drop_increase": ("drop", "max_increase"),
            "max_disagreement": ("disagreement", "max"),
        }
    ),
    "exit_rates": _Family(
        {"tolerance": ("", "tolerance")},
        kinds=("min", "max", "tolerance"),
        names="an exit",
        example='[exit_rates."layer1.0"]',
    ),
    "artifact": _Family({"max_size": ("size", "max"), "max_size_increase": ("size", "max_increase")}),
    "memory": _Family(
        {
            "max_peak": ("peak", "max"),
            "max_peak_ratio": ("peak", "max_ratio"),
            "max_peak_increase": ("peak", "max_increase"),
        }
    ),
    "load": _Family(
        {
            "max_time": ("time", "max"),
            "max_time_ratio": ("time", "max_ratio"),
            "max_time_increase": ("time", "max_increase"),
            "max_time_slowdown": ("time", "max_slowdown"),
        }
    ),
}


def _read_text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BudgetError(f"{describe_value(value)} is not a name", where=where, remedy="give text in quotes")
    return value


def _read_backend(value: object, where: str) -> str:
    names = ("auto", *BACKENDS)
    if value not in names:
        raise _unknown(f"unknown backend {describe_value(value)}", str(value), names, where)
    return str(value)


def _read_count(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BudgetError(
            f"{describe_value(value)} is not a positive whole number", where=where, remedy="for example 4"
        )
    return value


def _read_confidence(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 < value < 1.0:
        raise BudgetError(
            f"{describe_value(value)} is not a confidence between 0.5 and 1",
            where=where,
            remedy="0.95 is 95 %",
        )
    return float(value)


def _read_flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise BudgetError(f"{describe_value(value)} is neither true nor false", where=where)
    return value


_RUN: Final[Mapping[str, Callable[[object, str], Any]]] = {
    "backend": _read_backend,
    "threads": _read_count,
    "operating_point": _read_text,
    "max_rows": _read_count,
    "confidence": _read_confidence,
}

_TOP: Final = ("baseline", "run", *_FAMILIES)
_FRESH_ROWS: Final = "fresh_rows"


def _places() -> Iterator[tuple[str, str]]:
    """Key -> where it belongs, of those that belong to one place only."""
    yield "baseline", "at the top, above the first table"
    yield _FRESH_ROWS, "in [accuracy]"
    yield from ((key, "in [run]") for key in _RUN)
    for family, spec in _FAMILIES.items():
        yield from ((key, f"in [{family}]") for key in spec.keys if key != "tolerance")


_PLACES: Final = dict(_places())

KNOWN_KEYS: Final = tuple(
    {**_PLACES, **{key: "" for spec in _FAMILIES.values() for key in (*spec.keys, *spec.kinds)}}
)
"""Every key that may stand in a budget, whatever the table."""


def read_budget(path: Path) -> Budget:
    """Read a budget.

    Args:
        path: Of ``budget.toml``; a baseline that it names is looked for beside it.

    Raises:
        BudgetError: It is missing, not TOML, holds an unknown key or a value whose unit does not fit, has no
            limit at all, or limits that contradict each other.
    """
    path = Path(path)
    document = _parse(path)
    unknown = [key for key in document if key not in _TOP]
    if unknown:
        raise _unknown(f"unknown table or key {unknown[0]!r}", unknown[0], _TOP, str(path))
    order = list(document)
    tables = {
        name: _require_table(document[name], f"{path}, {name}", name) for name in order if name != "baseline"
    }
    fresh_rows = tables.get("accuracy", {}).pop(_FRESH_ROWS, False)
    limits = tuple(
        limit
        for family in sorted((family for family in _FAMILIES if family in tables), key=order.index)
        for limit in _limits_of(family, tables[family], str(path))
    )
    if not limits:
        raise BudgetError("there is no limit in it", where=str(path), remedy=f"give one: {_EXAMPLE}")
    _require_consistent(limits, path)
    return Budget(
        limits,
        _run_of(tables.get("run", {}), path),
        _read_flag(fresh_rows, f"{path}, accuracy.{_FRESH_ROWS}"),
        _baseline_of(document, path),
    )


def _parse(path: Path) -> dict[str, Any]:
    remedy = f"write a budget.toml with at least one limit: {_EXAMPLE}"
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some editors on Windows begin with a mark
    except IsADirectoryError as error:
        raise BudgetError("is a directory", where=str(path), remedy="name the budget.toml in it") from error
    except OSError as error:
        raise BudgetError(f"cannot be read: {error.strerror}", where=str(path), remedy=remedy) from error
    except UnicodeDecodeError as error:
        raise BudgetError("is not UTF-8 text", where=str(path), remedy=remedy) from error
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the second: tables in tables in tables
        unquoted = any(said in str(error) for said in ("Invalid value", "Expected newline"))
        raise BudgetError(
            f"is not TOML: {error}",
            where=str(path),
            remedy='values with a unit stand in quotes: "2 ms"' if unquoted else None,
        ) from error
    if not document:
        raise BudgetError("is empty", where=str(path), remedy=remedy)
    return document


def _baseline_of(document: Mapping[str, Any], path: Path) -> Path | None:
    if "baseline" not in document:
        return None
    where = f"{path}, baseline"
    name = _read_text(document["baseline"], where)
    baseline = path.parent / name
    if baseline.is_dir() or baseline.resolve() == path.resolve():
        kind = "a folder" if baseline.is_dir() else "the budget itself"
        raise BudgetError(
            f"{name!r} is {kind}", where=where, remedy='name a file: baseline = "baseline.json"'
        )
    return baseline


def _run_of(table: Mapping[str, Any], path: Path) -> RunSettings:
    settings = {}
    for key, value in table.items():
        where = f"{path}, run.{key}"
        if key not in _RUN:
            raise _unknown(f"unknown key {key!r}", key, _RUN, where)
        settings[key] = _RUN[key](value, where)
    return RunSettings(**settings)


def _limits_of(family: Family, table: Mapping[str, Any], file: str) -> Iterator[Limit]:
    """The limits of one table, in their order."""
    spec = _FAMILIES[family]
    for key, value in table.items():
        where = f"{file}, {family}.{key}"
        names = f"a table is for {spec.names}: {spec.example}"
        if isinstance(value, dict) and spec.kinds:
            if not spec.is_name(key):
                known = [name for name in LATENCIES if spec.is_name(name)]
                raise _unknown(f"{key!r} is not {spec.names}", key, known, where, names)
            yield from _limits_of_name(Metric(family, key), spec.kinds, value, file)
        elif key in spec.keys:
            name, kind = spec.keys[key]
            yield _limit(Metric(family, name), kind, value, file)
        elif key in spec.kinds or (spec.kinds and spec.is_name(key)):
            raise BudgetError(f"does not stand in [{family}] itself", where=where, remedy=names)
        else:
            known = [*spec.keys, *([_FRESH_ROWS] if family == "accuracy" else [])]
            raise _unknown(f"unknown key {key!r}", key, known, where, names if spec.kinds else "")


def _limits_of_name(
    metric: Metric, kinds: tuple[LimitKind, ...], table: Mapping[str, Any], file: str
) -> Iterator[Limit]:
    """The limits of a table such as ``[latency.mean]``."""
    for key, value in table.items():
        kind = next((kind for kind in kinds if kind == key), None)
        if kind is not None:
            yield _limit(metric, kind, value, file)
        elif isinstance(value, dict) and metric.family == "exit_rates":
            raise BudgetError(
                f"unknown table {key!r}",
                where=f"{file}, {metric}",
                remedy=f'a name that holds dots stands in quotes: [exit_rates."{metric.name}.{key}"]',
            )
        else:
            raise _unknown(f"unknown key {key!r}", key, kinds, f"{file}, {metric}.{key}")


def _limit(metric: Metric, kind: LimitKind, value: object, file: str) -> Limit:
    where = f"{file}, {Limit(metric, kind, 0.0, '').key}"
    return Limit(metric, kind, read_quantity(value, unit_of(metric, kind), where), str(value))


def _require_table(value: object, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BudgetError(f"{describe_value(value)} is not a table", where=where, remedy=f"write [{name}]")
    return dict(value)


def _unknown(what: str, given: str, known: Iterable[str], where: str, otherwise: str = "") -> BudgetError:
    """An error with where the name belongs, or the known name that is closest, or all that are known."""
    names = list(known)
    if given in _PLACES:
        remedy = f"{given!r} stands {_PLACES[given]}"
    elif close := difflib.get_close_matches(given, names, 1):
        remedy = f"did you mean {close[0]!r}?"
    else:
        remedy = otherwise or f"known: {', '.join(names)}"
    return BudgetError(what, where=where, remedy=remedy)


def _require_consistent(limits: tuple[Limit, ...], path: Path) -> None:
    """Refuse limits that no program can keep together, or of which one makes another void."""
    given = {(limit.metric, limit.kind): limit for limit in limits}
    for limit in limits:
        higher = given.get((limit.metric, "max")) if limit.kind == "min" else None
        if higher is not None and limit.value > higher.value:
            raise _contradiction(limit, "is above", higher, path)
    times = [given.get((Metric("latency", name), "max")) for name in LATENCIES[1:]]
    for lower, higher in pairwise(limit for limit in times if limit is not None):
        if higher.value < lower.value:
            why = f", though {higher.metric.name} is never below {lower.metric.name}"
            raise _contradiction(higher, "is below", lower, path, why)
    minimums = [limit for limit in limits if limit.metric.family == "exit_rates" and limit.kind == "min"]
    total = sum(limit.value for limit in minimums)
    if total > 1.0 + _ROUNDING:
        text = format_figure(minimums[0].metric, "min", total)
        raise BudgetError(
            f"the minimums of {', '.join(limit.metric.name for limit in minimums)} add up to {text}",
            where=f"{path}, exit_rates",
            remedy="each row leaves at one exit: together they may be 100 % at most",
        )


def _contradiction(one: Limit, relation: str, other: Limit, path: Path, why: str = "") -> BudgetError:
    return BudgetError(
        f'"{one.text}" {relation} {other.key} = "{other.text}"{why}',
        where=f"{path}, {one.key}",
        remedy="change one of the two",
    )
