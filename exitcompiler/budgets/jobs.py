"""What a process that measures is told, and what it tells: JSON and arrays in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from exitcompiler.budgets.figures import ProcessFigures
from exitcompiler.budgets.figures_json import process_from_json, process_to_json
from exitcompiler.errors import ExitCompilerError
from exitcompiler.files import write_file
from exitcompiler.runtime.json_reader import Node, parse_json
from exitcompiler.runtime.manifest import Json

__all__ = ["FOLDER_PREFIX", "Job", "Order", "Rows", "read_order", "read_result", "read_rows", "write_error",
           "write_figures", "write_order", "write_rows"]  # fmt: skip

Array: TypeAlias = npt.NDArray[Any]

FOLDER_PREFIX: Final = "exitcompiler-check-"
"""Of the name of the temporary folder."""
_EXIT_INDEX: Final = "exit_index.npy"


@dataclass(frozen=True, slots=True)
class Job:
    """What all processes measure.

    Args:
        artifact: Of the program; a path.
        backend: As for ``exitcompiler.load``.
        threads: Per call.
        operating_point: Its name; None: the selected one.
        batch_sizes: Whose throughput is measured.
        seed: Of rows and of orders; every process draws its own.
        seconds: How long single rows are timed in a process, at least; throughput takes some of
            that again for every batch size.
    """

    artifact: str | os.PathLike[str]
    backend: str = "auto"
    threads: int = 1
    operating_point: str | None = None
    batch_sizes: tuple[int, ...] = ()
    seed: int = 0
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Order:
    """What one process measures.

    Args:
        job: What all do.
        number: Which process this is. In even ones the program is loaded first, in odd ones plain.
        exits: Exit -> rows of all that leave there, in the order of the program.
        inputs: Input names, in the order of their files; None: there is one, without a name.
        result: The file to be written.
    """

    job: Job
    number: int
    exits: Mapping[str, int]
    inputs: tuple[str, ...] | None
    result: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to be timed.

    Args:
        arrays: Input arrays ``[rows, ...]``, in the order of `Order.inputs`.
        names: `Order.inputs`.
        exit_index: Exit of each row, ``int32[rows]``.
    """

    arrays: tuple[Array, ...]
    names: tuple[str, ...] | None
    exit_index: npt.NDArray[np.int32]

    @property
    def row_bytes(self) -> int:
        """Of one row, at least 1."""
        return max(1, sum(array.nbytes for array in self.arrays) // len(self.exit_index))

    def take(self, rows: npt.NDArray[np.intp]) -> Any:
        """Some rows in memory, as a program takes them."""
        taken = [np.ascontiguousarray(array[rows]) for array in self.arrays]
        return taken[0] if self.names is None else dict(zip(self.names, taken, strict=True))


def write_rows(folder: Path, rows: Rows) -> None:
    """Put rows where `read_rows` finds them.

    Raises:
        OSError: The disk is full.
    """
    for index, array in enumerate(rows.arrays):
        np.save(folder / f"input{index}.npy", array, allow_pickle=False)
    np.save(folder / _EXIT_INDEX, rows.exit_index, allow_pickle=False)


def read_rows(folder: Path, names: tuple[str, ...] | None) -> Rows:
    """The rows in a folder; they are read where they are used."""
    count = 1 if names is None else len(names)
    arrays = tuple(_mapped(folder / f"input{index}.npy") for index in range(count))
    return Rows(arrays, names, np.load(folder / _EXIT_INDEX, allow_pickle=False))


def _mapped(path: Path) -> Array:
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def write_order(path: Path, order: Order) -> None:
    """Write it as JSON."""
    document = {
        "job": asdict(order.job),
        "number": order.number,
        "exits": list(order.exits.items()),
        "inputs": order.inputs,
        "result": order.result,
    }
    write_file(path, json.dumps(document, allow_nan=False).encode())


def read_order(path: Path) -> Order:
    """What `write_order` wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    given = {field.name: document["job"][field.name] for field in fields(Job)}
    given["batch_sizes"] = tuple(given["batch_sizes"])
    names = document["inputs"]
    return Order(
        Job(**given),
        document["number"],
        dict(document["exits"]),
        None if names is None else tuple(names),
        document["result"],
    )


def write_figures(path: Path, figures: ProcessFigures) -> None:
    """Write what was measured."""
    _write(path, {"figures": process_to_json(figures)})


def write_error(path: Path, error: ExitCompilerError) -> None:
    """Write why nothing was measured."""
    told: dict[str, Json] = {
        "type": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "remedy": error.remedy,
    }
    _write(path, {"error": told})


def read_result(path: Path) -> ProcessFigures | ExitCompilerError:
    """What was measured, or why it was not.

    Raises:
        ArtifactError: It is not what `write_figures` and `write_error` write.
        OSError: It is not there.
    """
    node = Node(parse_json(path.read_bytes(), "the result"), "the result: ")
    told = node.get("error")
    if told is None:
        return process_from_json(node["figures"])
    what, where, remedy = (told.get(key) for key in ("what", "where", "remedy"))
    kind = _error_types().get(told["type"].string(), ExitCompilerError)
    return kind(
        "" if what is None else what.string(),
        where=None if where is None else where.string(),
        remedy=None if remedy is None else remedy.string(),
    )


def _write(path: Path, document: dict[str, Any]) -> None:
    write_file(path, json.dumps(document, allow_nan=False).encode())


def _error_types() -> dict[str, type[ExitCompilerError]]:
    return {kind.__name__: kind for kind in ExitCompilerError.__subclasses__()}
