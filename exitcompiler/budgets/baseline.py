"""The baseline: a measurement as a small JSON file that is kept with the code, and read strictly."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Final, NoReturn

from exitcompiler.budgets.figures import Answered, Environment, Measurement
from exitcompiler.budgets.figures_json import process_from_json, process_to_json
from exitcompiler.errors import ArtifactError, BudgetError
from exitcompiler.files import write_file
from exitcompiler.runtime.json_reader import Node, parse_json
from exitcompiler.runtime.manifest import Json

__all__ = [
    "SCHEMA_VERSION",
    "looks_like_baseline",
    "measurement_to_json",
    "read_baseline",
    "write_baseline",
]

SCHEMA_VERSION: Final = 1

_DIGITS: Final = 6
_REMEDY: Final = "measure it again: exitcompiler check ... --update-baseline"
_COUNTS: Final = ("right", "plain_right", "lost", "gained")
_LIMIT_BYTES: Final = 64 * 2**20


def write_baseline(path: str | os.PathLike[str], measurement: Measurement) -> None:
    """Write a measurement; a file that is there is replaced in one step.

    Times and rates are rounded to six significant digits, far below their noise, so that a change of the file
    can be read.

    Raises:
        InputError: It cannot be written.
    """
    document = {"schema": SCHEMA_VERSION, **measurement_to_json(measurement)}
    text = json.dumps(_rounded(document), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_file(path, f"{text}\n".encode())


def read_baseline(path: str | os.PathLike[str]) -> Measurement:
    """Read a measurement.

    Raises:
        BudgetError: There is no such file, it is of another schema, keys are missing or unknown, or a value
            is of the wrong type, out of range, not finite, or does not fit the others; names file and place.
    """
    file = Path(path)
    try:
        with file.open("rb") as opened:
            content = opened.read(_LIMIT_BYTES + 1)
    except FileNotFoundError as error:
        raise BudgetError("there is no such baseline", where=str(file), remedy=_REMEDY) from error
    except OSError as error:
        raise BudgetError(f"cannot be read: {error.strerror}", where=str(file), remedy=_REMEDY) from error
    if len(content) > _LIMIT_BYTES:
        raise BudgetError("is too large for a baseline", where=str(file), remedy=_REMEDY)
    try:
        return _measurement(Node(parse_json(content, str(file)), f"{file}: "))
    except ArtifactError as error:
        where = (error.where or str(file)).rstrip(": ")
        raise BudgetError(error.what, where=where, remedy=_REMEDY) from error


def looks_like_baseline(path: str | os.PathLike[str]) -> bool:
    """Whether a file that cannot be read as a baseline was one: of another version, or damaged by a merge."""
    file = Path(path)
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        content = opened.read(_LIMIT_BYTES)
    return not content.strip() or all(key in content for key in (b'"processes"', b'"answered"'))


def measurement_to_json(measurement: Measurement) -> dict[str, Json]:
    """A measurement as an object of JSON, nothing rounded; what is not known is left out."""
    answered = measurement.answered
    known = {name: getattr(answered, name) for name in _COUNTS if getattr(answered, name) is not None}
    return {
        "environment": asdict(measurement.environment),
        "point": measurement.point,
        "size_bytes": measurement.size_bytes,
        "answered": {
            "rows": answered.rows,
            "fingerprint": answered.fingerprint,
            # A list, since keys are sorted and the order of exits is that of the program.
            "exits": [{"name": name, "rows": rows} for name, rows in answered.exits.items()],
            "disagreements": answered.disagreements,
            **known,
        },
        "processes": [process_to_json(figures) for figures in measurement.processes],
    }


def _measurement(node: Node) -> Measurement:
    schema = node["schema"].integer()
    if schema != SCHEMA_VERSION:
        node["schema"].fail(f"schema {schema} is not one that this version reads ({SCHEMA_VERSION})")
    node.only("schema", "environment", "point", "size_bytes", "answered", "processes")
    answered = _answered(node["answered"])
    processes = node["processes"].each(process_from_json)
    if not processes:
        node["processes"].fail("there is no process")
    for index, figures in enumerate(processes):
        if figures.exits_us.keys() != answered.exits.keys():
            _misfit(node, index, f"exits {sorted(figures.exits_us)} are not those of 'answered'")
    return Measurement(
        environment=_environment(node["environment"]),
        point=node["point"].string(),
        size_bytes=node["size_bytes"].integer(1),
        answered=answered,
        processes=processes,
    )


def _misfit(node: Node, index: int, what: str) -> NoReturn:
    Node(None, f"{node['processes'].path}[{index}]").fail(what)


def _environment(node: Node) -> Environment:
    node.only(*Environment.__slots__)
    return Environment(
        cpu=node["cpu"].string(),
        cores=node["cores"].integer(1),
        system=node["system"].string(),
        backend=node["backend"].string(),
        threads=node["threads"].integer(1),
        precision=node["precision"].string(),
        versions={name: version.string() for name, version in node["versions"].items()},
    )


def _answered(node: Node) -> Answered:
    node.only(*Answered.__slots__)
    rows = node["rows"].integer(1)
    exits: dict[str, int] = {}
    for name, count in node["exits"].each(lambda entry: (entry["name"].string(), entry["rows"].integer())):
        if name in exits:
            node["exits"].fail(f"exit {name!r} is there twice")
        exits[name] = count
    if sum(exits.values()) != rows:
        node["exits"].fail(f"{sum(exits.values())} rows left at exits, of {rows}")
    known = [node.mapping().get(name) is not None for name in _COUNTS]
    if any(known) and not all(known):
        node.fail(f"{', '.join(_COUNTS)} are there together, or none of them")
    counts = [node[name].integer(0, rows) if all(known) else None for name in _COUNTS]
    return Answered(
        rows, node["fingerprint"].string(), exits, node["disagreements"].integer(0, rows), *counts
    )


def _rounded(value: Json) -> Json:
    """Fractions to so many significant digits; whole numbers as they are."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{_DIGITS}g}")
    return value
