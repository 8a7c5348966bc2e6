"""A first look at calibration data, and its checks: against the captured model, and for size."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Final

import numpy as np
import torch

from exitcompiler.controlflow import ControlFlow
from exitcompiler.data import Labels, Rows, RowSplit, TrainingData, is_rows, split_labels
from exitcompiler.errors import CalibrationError
from exitcompiler.model_interface import check_fit, is_array

__all__ = ["peek", "require_apart", "require_fit", "require_rows", "require_unseen"]

logger = logging.getLogger(__name__)

FEWEST_FIT: Final = 100
FEWEST_LEARN: Final = 130
FEWEST_CERTIFY: Final = 30
EXAMPLE_ROWS: Final = 8

SHARED_AT_MOST: Final = 0.01
"""Share of calibration rows that may be training rows: data sets do hold some rows twice."""

COMPARED_FIRST: Final = 64
"""Values from the middle of a row: two rows that differ there need not be read as a whole."""


def peek(data: Any) -> tuple[Any, Any]:
    """The data, still whole, and the inputs of some of its rows.

    Raises:
        CalibrationError: There is no data, or its first rows are no arrays.
    """
    if is_rows(data, None):
        return data, _head(split_labels(data, None)[0])
    try:
        iterator = iter(() if isinstance(data, str | bytes) else data)
    except TypeError:
        iterator = iter(())
    for first in iterator:
        whole = chain([first], iterator) if iterator is data else data
        return whole, _head(split_labels(first, None)[0])
    raise CalibrationError(
        "there is no data",
        where="calib_data",
        remedy="give (inputs, labels) arrays, a DataLoader, or an iterable of (x, y) batches",
    )


def _head(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _first_rows(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_first_rows(value) for value in inputs)
    return _first_rows(inputs)


def _first_rows(value: Any) -> Any:
    if not is_array(value) or value.ndim == 0:
        raise CalibrationError(
            f"{type(value).__name__} is no array with rows along dim 0",
            where="calib_data",
            remedy="give an array for a single input, a dict of arrays by input name for several",
        )
    return value[:EXAMPLE_ROWS]


def require_fit(rows: Rows, program: ControlFlow) -> None:
    """Check rows against the captured inputs.

    Raises:
        CalibrationError: Shapes or dtypes differ, a label is no class of the model, or there is only one.
    """
    check_fit(rows.inputs, rows.labels, program, "calib_data")
    if rows.labels is not None and len(np.unique(rows.labels)) < 2:
        raise CalibrationError(
            f"all rows have label {int(rows.labels[0])}",
            where="calib_data",
            remedy="give rows of all classes, in the proportions to expect in use",
        )


def require_rows(split: RowSplit, *, with_training: bool, batch_size: int) -> None:
    """Check that every part of the calibration rows is large enough for its use.

    Args:
        split: The parts.
        with_training: Whether heads are fitted on training data given apart, so that no part is needed.
        batch_size: Rows per call that costs are measured at, on the rows of a part.

    Raises:
        CalibrationError: A part is too small; says how many rows are needed in all.
    """
    needed = {
        "fit heads": (len(split.fit), 0 if with_training else FEWEST_FIT),
        "learn gates": (len(split.learn), max(FEWEST_LEARN, batch_size)),
        "certify": (len(split.certify), max(FEWEST_CERTIFY, batch_size)),
    }
    total = sum(there for there, _ in needed.values())
    small = [
        f"{there} to {use}, {fewest} are needed" for use, (there, fewest) in needed.items() if there < fewest
    ]
    if not small:
        return
    # The parts keep their shares; one row more makes up for rounding.
    in_all = max(-(-(fewest + 1) * total // max(there, 1)) for there, fewest in needed.values() if fewest)
    raise CalibrationError(
        f"{total} rows are too few: {'; '.join(small)} (batch_size={batch_size})",
        where="calib_data",
        remedy=f"give at least {in_all} rows"
        + ("" if with_training else ", or train_data to fit heads on, so that fewer do"),
    )


def require_apart(calib_data: Any, train_data: Any) -> None:
    """``require_unseen`` for what can be told of data that nobody has looked at: loaders too.

    Raises:
        CalibrationError: They are one and the same object.
    """
    if train_data is calib_data:
        raise CalibrationError(
            "the same data are given for calibration and for training: they would say nothing of fresh rows",
            where="calib_data",
            remedy="keep rows apart that are not trained on",
        )


def require_unseen(rows: Rows, data: TrainingData) -> None:
    """Check that a network is not trained on the rows that its gates are learned and certified on.

    On rows that it was trained on a network is nearly always right, and sure of it: gates leave far too early
    there, and no figure of such rows says anything of fresh ones.

    Args:
        rows: For calibration.
        data: For training; a loader is taken at its word.

    Raises:
        CalibrationError: More than a few calibration rows are training rows too.
    """
    if not isinstance(data.source, Rows):
        return
    shared = _shared_rows(rows, data.source)
    if shared <= SHARED_AT_MOST * len(rows):
        if shared:
            logger.warning("%d of %d calibration rows are training rows too", shared, len(rows))
        return
    raise CalibrationError(
        f"{shared} of {len(rows)} rows are training rows too, and say nothing of fresh ones",
        where="calib_data",
        remedy="keep rows apart that are not trained on (where inputs are bound to come twice, give "
        "train_data as a loader, whose rows are not compared)",
    )


def _shared_rows(rows: Rows, others: Rows) -> int:
    """How many rows are among the others, by all of their inputs."""
    known = set(_digests(rows, COMPARED_FIRST))
    alike = [index for index, digest in enumerate(_digests(others, COMPARED_FIRST)) if digest in known]
    if not alike:
        return 0
    whole = set(_digests(others, None, np.array(alike)))
    return sum(digest in whole for digest in _digests(rows, None))


def _digests(rows: Rows, most: int | None, index: Labels | None = None) -> Iterator[bytes]:
    """A hash of each row, or of ``most`` values from the middle of each input."""
    order = np.arange(len(rows)) if index is None else index
    for start in range(0, len(order), 1024):
        parts = []
        for tensor in rows.take(order[start : start + 1024]).inputs.values():
            flat = tensor.reshape(len(tensor), -1)
            first = 0 if most is None else max(flat.shape[1] - most, 0) // 2
            part = flat[:, first : None if most is None else first + most].contiguous()
            parts.append(part.view(torch.uint8).numpy())
        for row in zip(*parts, strict=True):
            yield hashlib.blake2b(b"".join(part.tobytes() for part in row), digest_size=16).digest()
