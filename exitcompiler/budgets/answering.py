"""Gathers the rows that a check is run on, and answers them with the program and with the plain backbone."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from exitcompiler.benchmarking import Answers, answer_rows, logits_of
from exitcompiler.budgets.figures import Answered
from exitcompiler.data_sources import Inputs, batches_of
from exitcompiler.errors import CalibrationError, InputError

if TYPE_CHECKING:
    from exitcompiler.runtime.compiled import CompiledModel

__all__ = ["RowPool", "answer", "gather_rows"]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RowPool:
    """Rows to check a program on.

    Args:
        inputs: An array, or arrays by input name, ``[rows, ...]``.
        labels: ``int [rows]``, or None.
        rows: How many.
        fingerprint: SHA-256 of names, types, shapes and bytes of all of that, in hexadecimal digits.
    """

    inputs: Inputs
    labels: Array | None
    rows: int
    fingerprint: str


def gather_rows(data: Any, max_rows: int | None = None) -> RowPool:
    """Take all rows of the data, or the first ones.

    Args:
        data: What ``exitcompiler.data_sources.load_data`` returned.
        max_rows: How many at most; None: all.

    Raises:
        InputError: ``max_rows`` is not positive.
        CalibrationError: There are no rows, inputs and labels differ in their number of rows, the data is of
            no known form, or labels are no class numbers.
    """
    if max_rows is not None and max_rows < 1:
        raise InputError(f"max_rows={max_rows} is not positive", where="max_rows")
    # One batch of all that is wanted: an array is not copied, and of a folder no more is read than that.
    batch = next(batches_of(data, sys.maxsize if max_rows is None else max_rows, max_rows), None)
    if batch is None:
        raise CalibrationError("there are no rows", where="data", remedy="give data with at least one row")
    inputs, labels = batch
    arrays = dict(_arrays(inputs))
    counts = {name or "inputs": len(array) for name, array in arrays.items()}
    if labels is not None:
        _require_class_numbers(labels)
        counts["labels"] = len(labels)
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise CalibrationError(f"there are different numbers of rows ({told})", where="data")
    rows = next(iter(counts.values()))
    return RowPool(inputs, labels, rows, _fingerprint(arrays, labels))


def answer(
    program: CompiledModel, plain: CompiledModel, pool: RowPool, batch_size: int = 32
) -> tuple[Answered, npt.NDArray[np.int32]]:
    """Answer all rows with both.

    Args:
        program: To check.
        plain: The backbone that it is compared with.
        pool: The rows.
        batch_size: Rows per call, which the answers do not depend on.

    Returns:
        What came of it, and the exit of every row, ``int32[rows]``, into ``program.exits``.

    Raises:
        InputError: The rows do not fit the program.
        CalibrationError: There is a label of a class that the program has not got.
    """
    if pool.labels is not None:
        _require_known_classes(pool.labels, program, pool.inputs)
    data = pool.inputs if pool.labels is None else (pool.inputs, pool.labels)
    found = answer_rows(program, data, batch_size)
    whole = answer_rows(plain, data, batch_size)
    counts = np.bincount(found.exit_index, minlength=len(found.exits))
    exits = {name: int(count) for name, count in zip(found.exits, counts, strict=True)}
    disagreements = int(np.count_nonzero(found.predictions != whole.predictions))
    answered = Answered(pool.rows, pool.fingerprint, exits, disagreements, *_against_labels(found, whole))
    return answered, found.exit_index.astype(np.int32, copy=False)


def _against_labels(found: Answers, whole: Answers) -> tuple[int | None, int | None, int | None, int | None]:
    """Rows that the program answers right, that the plain backbone does, that are lost, that are gained."""
    if found.labels is None:
        return None, None, None, None
    right, plain_right = found.predictions == found.labels, whole.predictions == found.labels
    counted = (right, plain_right, plain_right & ~right, right & ~plain_right)
    first, second, third, fourth = (int(np.count_nonzero(rows)) for rows in counted)
    return first, second, third, fourth


def _require_class_numbers(labels: Array) -> None:
    """Refuse labels that no answer can equal, so that nothing is lost whatever the program does."""
    if labels.dtype.kind not in "iufb" or not (labels == np.floor(labels)).all() or (labels < 0).any():
        raise CalibrationError("labels are no class numbers", where="labels", remedy="give 0, 1, 2, ...")


def _require_known_classes(labels: Array, program: CompiledModel, inputs: Inputs) -> None:
    one = {name: array[:1] for name, array in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    classes = logits_of(program.run(one).outputs).shape[1]
    if labels.max() >= classes:
        raise CalibrationError(
            f"there is a label {labels.max()}, and the program has the classes 0 to {classes - 1}",
            where="labels",
            remedy="give the class numbers that it was trained with",
        )


def _arrays(inputs: Inputs) -> Iterator[tuple[str, Array]]:
    if isinstance(inputs, dict):
        yield from sorted(inputs.items())
    else:
        yield "", inputs


def _fingerprint(arrays: dict[str, Array], labels: Array | None) -> str:
    digest = hashlib.sha256()
    for kind, name, array in (
        *(("input", name, array) for name, array in arrays.items()),
        *(() if labels is None else (("labels", "", labels),)),
    ):
        digest.update(repr((kind, name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
