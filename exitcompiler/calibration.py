"""A first look at calibration data, and its check against the captured model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from exitcompiler.controlflow import ControlFlow
from exitcompiler.data import Rows
from exitcompiler.errors import CalibrationError

__all__ = ["peek", "require_fit"]


def peek(data: Any) -> tuple[Any, Any]:
    """The data, still whole, and the inputs of some of its rows.

    Raises:
        CalibrationError: There is no data.
    """
    pair = isinstance(data, tuple | list) and len(data) == 2 and hasattr(data[1], "shape")
    if pair and (isinstance(data, tuple) or len(data[1].shape) == 1):  # as in read_rows
        return data, _head(data[0])
    if hasattr(data, "shape") or isinstance(data, Mapping):
        return data, _head(data)
    try:
        iterator = iter(data)
        first = next(iterator)
    except (TypeError, StopIteration):
        raise CalibrationError(
            "there is no data",
            where="calib_data",
            remedy="give (inputs, labels) arrays, a DataLoader, or an iterable of (x, y) batches",
        ) from None
    whole = chain([first], iterator) if iterator is data else data
    labelled = isinstance(first, tuple | list) and len(first) == 2
    return whole, _head(first[0] if labelled else first)


def _head(inputs: Any, rows: int = 8) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value[:rows] for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(value[:rows] for value in inputs)
    return inputs[:rows]


def require_fit(rows: Rows, program: ControlFlow) -> None:
    """Check rows against the captured inputs.

    Raises:
        CalibrationError: Shapes or dtypes differ, or a label is no class of the model.
    """
    for name, spec in program.inputs.items():
        tensor = rows.inputs[name]
        found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]))
        if found != (spec.dtype, tuple(spec.shape[1:])):
            raise CalibrationError(
                f"rows are {found[0]}{list(found[1])}, the model takes {spec}", where=f"input {name!r}"
            )
    classes = int(next(iter(program.outputs.values())).shape[1])
    if rows.labels is None:
        return
    if int(rows.labels.max()) >= classes:
        raise CalibrationError(
            f"label {int(rows.labels.max())} is out of range: the model has {classes} classes",
            where="calib_data",
            remedy=f"number the classes 0..{classes - 1} in the order of the model's outputs",
        )
    if len(np.unique(rows.labels)) < 2:
        raise CalibrationError(
            f"all rows have label {int(rows.labels[0])}",
            where="calib_data",
            remedy="give rows of all classes, in the proportions to expect in use",
        )
