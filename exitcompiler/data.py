"""Calibration and training data: what users give, checked and brought into one form.

Accepted: a pair (inputs, labels) of arrays or tensors; a DataLoader or any iterable of (x, y) batches;
or x alone, as an array, a dict by input name, or an iterable of either. Without labels the target is
agreement with the backbone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from exitcompiler.controlflow import ControlFlow
from exitcompiler.errors import CalibrationError
from exitcompiler.model_interface import check_fit, is_array, to_tensor

__all__ = [
    "Batch",
    "Extent",
    "RowSplit",
    "Rows",
    "TrainingData",
    "is_rows",
    "read_rows",
    "read_training_data",
    "split_labels",
    "split_rows",
]

Labels: TypeAlias = npt.NDArray[np.int64]
Inputs: TypeAlias = dict[str, torch.Tensor]
Batch: TypeAlias = tuple[Inputs, Labels | None]

MEMORY_LIMIT_BYTES: Final = 8 << 30
"""How much calibration data is drawn into memory from an iterable, at most."""

COUNT_LIMIT: Final = 10_000_000
"""How many rows of a loader without a length are counted before it is taken to be endless."""


@dataclass(frozen=True)
class Rows:
    """Rows held as tensors (possibly memory-mapped by their owner).

    Args:
        inputs: Input name -> tensor ``[rows, ...]``.
        labels: ``int64 [rows]``, or None: the target is agreement with the backbone.
    """

    inputs: Inputs
    labels: Labels | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, index: npt.NDArray[np.int64] | slice) -> Rows:
        """Some of the rows, in the given order."""
        chosen = index if isinstance(index, slice) else torch.from_numpy(index)
        labels = None if self.labels is None else self.labels[index]
        return Rows({name: tensor[chosen] for name, tensor in self.inputs.items()}, labels)

    def batches(self, size: int) -> Iterator[Batch]:
        """All rows in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            part = self.take(slice(start, start + size))
            yield part.inputs, part.labels


@dataclass(frozen=True, slots=True)
class Extent:
    """How much there is in one epoch.

    Args:
        rows: Exact for rows, lists and loaders without a length; else the first batch stands for all.
        batches: Of ``TrainingData.epoch`` with the batch size that was asked about.
        labelled: Whether rows have labels.
    """

    rows: int
    batches: int
    labelled: bool


@dataclass(frozen=True)
class TrainingData:
    """A source of training batches that can be gone through several times.

    Args:
        source: Rows, shuffled anew in every epoch; or the user's own re-iterable of batches, whose
            shuffling and augmentation are taken as they come.
        input_names: Names for a single unnamed input or a tuple of inputs.
        minimum: The fewest rows that make sense.
        model: What every batch is checked against; None: shapes and classes are not known yet.
    """

    source: Rows | Iterable[Any]
    input_names: tuple[str, ...]
    minimum: int = 1
    model: ControlFlow | None = None

    def for_model(self, model: ControlFlow) -> TrainingData:
        """The same data, every batch of which has to fit the model's inputs and classes.

        Raises:
            CalibrationError: The source is rows, and they do not fit; batches are checked as they come.
        """
        if isinstance(self.source, Rows):
            check_fit(self.source.inputs, self.source.labels, model, "train_data")
        return replace(self, model=model)

    def count(self, batch_size: int) -> Extent:
        """How much there is in one epoch of batches of ``batch_size``: at most one pass.

        Raises:
            CalibrationError: A batch cannot be used, there are too few rows, or they do not end.
        """
        if isinstance(self.source, Rows):
            rows = len(self.source)
            return Extent(rows, -(-rows // batch_size), self.source.labels is not None)
        length = None if isinstance(self.source, Sequence) else _length(self.source)
        rows = batches = pending = 0
        labelled = False
        for inputs, labels in self._checked():
            size, labelled = _row_count(inputs), labels is not None
            if length is not None:
                rows, batches = size * length, -(-length // -(-batch_size // size))
                break
            rows, pending = rows + size, pending + size
            if pending >= batch_size:
                batches, pending = batches + 1, 0
            if rows > COUNT_LIMIT:
                raise CalibrationError(
                    f"more than {COUNT_LIMIT:,} rows, and no end",
                    where="train_data",
                    remedy="give the loader a length (__len__: batches in an epoch), or let its pass end",
                )
        _require_rows(rows, self.minimum, "train_data", "give at least that many training rows")
        return Extent(rows, batches + (pending > 0), labelled)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass over the data, in batches of ``batch_size`` rows.

        A loader's own batches are joined until they have at least that many; none is split. The last
        batch is what remains.

        Args:
            batch_size: How many rows.
            generator: Draws the order of rows.

        Raises:
            CalibrationError: A batch is not of a known form, does not fit the model, has no labels where
                others have, or holds NaN or Inf.
        """
        if isinstance(self.source, Rows):
            order = torch.randperm(len(self.source), generator=generator).numpy()
            for start in range(0, len(order), batch_size):
                part = self.source.take(order[start : start + batch_size])
                yield part.inputs, part.labels
            return
        held: list[Batch] = []
        rows = 0
        for batch in self._checked():
            held.append(batch)
            rows += _row_count(batch[0])
            if rows >= batch_size:
                yield _join(held)
                held, rows = [], 0
        if held:
            yield _join(held)

    def _checked(self) -> Iterator[Batch]:
        """A user's own batches, checked one by one; empty ones are left out."""
        assert not isinstance(self.source, Rows)
        labelled: bool | None = None
        for batch in self.source:
            inputs, labels = _read_batch(batch, self.input_names, "train_data")
            if labelled is not None and labelled != (labels is not None):
                raise CalibrationError("some batches have labels and some have not", where="train_data")
            labelled = labels is not None
            _check_finite(inputs, "train_data")
            if self.model is not None:
                check_fit(inputs, labels, self.model, "train_data")
            if _row_count(inputs):
                yield inputs, labels


@dataclass(frozen=True, slots=True)
class RowSplit:
    """Disjoint row numbers: fit heads, learn and tune gates, certify; each ``int64``, sorted."""

    fit: Labels
    learn: Labels
    certify: Labels


def split_rows(rows: int, *, fit: float, certify: float, seed: int) -> RowSplit:
    """Split calibration rows at random into three disjoint parts.

    Args:
        rows: How many there are.
        fit: Share for fitting heads; 0 where training data is given.
        certify: Share for the certificate.
        seed: Of the permutation.
    """
    order = np.random.default_rng(seed).permutation(rows)
    first, second = round(rows * fit), round(rows * (fit + certify))
    fitted, certified, learned = np.split(order, [first, second])
    return RowSplit(np.sort(fitted), np.sort(learned), np.sort(certified))


def read_rows(data: Any, input_names: Sequence[str], *, minimum: int, argument: str = "calib_data") -> Rows:
    """Bring a user's data into memory as rows.

    Args:
        data: Any of the forms in this module's docstring. Arrays are not copied.
        input_names: The model's inputs, in order.
        minimum: The fewest rows that make sense.
        argument: What to call the data in messages.

    Raises:
        CalibrationError: Unknown form, no rows, too few rows, lengths that differ, labels that are not
            whole numbers from 0 up, NaN or Inf, or more than 8 GiB from an iterable.
    """
    names = tuple(input_names)
    if is_rows(data, names):
        inputs, labels = _read_batch(data, names, argument)
    else:
        inputs, labels = _concatenate(_batches_of(data, names, argument), argument)
    rows = Rows(inputs, labels)
    remedy = "give a few thousand held-out rows, ones that the model was not trained on"
    _require_rows(len(rows), minimum, argument, remedy)
    for start in range(0, len(rows), 1024):
        _check_finite(rows.take(slice(start, start + 1024)).inputs, argument)
    return rows


def read_training_data(data: Any, input_names: Sequence[str], *, minimum: int) -> TrainingData:
    """Bring a user's training data into a form that can be gone through once an epoch.

    Raises:
        CalibrationError: As ``read_rows``; or an iterator that can be gone through only once and is
            too large to be kept.
    """
    names = tuple(input_names)
    if not is_rows(data, names) and isinstance(data, Iterable) and not isinstance(data, Iterator):
        return TrainingData(data, names, minimum)
    return TrainingData(read_rows(data, names, minimum=minimum, argument="train_data"), names, minimum)


def is_rows(data: Any, names: tuple[str, ...] | None) -> bool:
    """Whether ``data`` is one big batch, and not an iterable of batches.

    Args:
        data: What a user gave.
        names: The model's inputs; None: not known yet.
    """
    if is_array(data) or isinstance(data, Mapping):
        return True
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    inputs, labels = data
    if not (is_array(labels) and _inputs_like(inputs, names)):
        return False
    # A tuple is a pair, whatever the labels look like; a list may as well hold two batches of inputs.
    return isinstance(data, tuple) or np.ndim(labels) == 1


def split_labels(batch: Any, names: tuple[str, ...] | None) -> tuple[Any, Any]:
    """The inputs of a batch and its labels, or None for these; ``names`` as for ``is_rows``."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and _inputs_like(batch[0], names):
        return batch[0], batch[1]
    return batch, None


def _inputs_like(value: Any, names: tuple[str, ...] | None) -> bool:
    if isinstance(value, tuple | list):
        return (names is None or len(value) == len(names)) and all(is_array(part) for part in value)
    return is_array(value) or isinstance(value, Mapping)


def _length(source: Iterable[Any]) -> int | None:
    # A DataLoader over an iterable dataset has __len__, and raises when it is called.
    try:
        return len(source)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _row_count(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def _require_rows(rows: int, minimum: int, argument: str, remedy: str) -> None:
    if rows < minimum:
        raise CalibrationError(
            f"{rows} rows are too few, at least {minimum} are needed", where=argument, remedy=remedy
        )


def _join(batches: Sequence[Batch]) -> Batch:
    return batches[0] if len(batches) == 1 else _concatenate(iter(batches), "train_data")


def _batches_of(data: Any, names: tuple[str, ...], argument: str) -> Iterator[Batch]:
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise CalibrationError(
            f"{type(data).__name__} is not data",
            where=argument,
            remedy="give (inputs, labels) arrays, a DataLoader, or an iterable of (x, y) batches",
        )
    for batch in data:
        yield _read_batch(batch, names, argument)


def _read_batch(batch: Any, names: tuple[str, ...], argument: str) -> Batch:
    batch, labels = split_labels(batch, names)
    inputs = _read_inputs(batch, names, argument)
    count = {len(tensor) for tensor in inputs.values()}
    if len(count) != 1:
        sizes = {name: len(tensor) for name, tensor in inputs.items()}
        raise CalibrationError(f"inputs have different numbers of rows: {sizes}", where=argument)
    return inputs, None if labels is None else _read_labels(labels, count.pop(), argument)


def _read_inputs(value: Any, names: tuple[str, ...], argument: str) -> Inputs:
    if isinstance(value, Mapping):
        missing, unknown = set(names) - set(value), set(map(str, value)) - set(names)
        if missing or unknown:
            raise CalibrationError(
                f"inputs {sorted(map(str, value))} given, the model takes {list(names)}", where=argument
            )
        parts = [value[name] for name in names]
    else:
        parts = list(value) if isinstance(value, tuple | list) else [value]
    if len(parts) != len(names) or not all(is_array(part) and np.ndim(part) > 0 for part in parts):
        raise CalibrationError(
            f"cannot read {type(value).__name__} as the model's inputs {list(names)}",
            where=argument,
            remedy="give an array for a single input, a dict by input name for several",
        )
    return {
        name: to_tensor(part, f"{argument}, input {name!r}") for name, part in zip(names, parts, strict=True)
    }


def _read_labels(value: Any, rows: int, argument: str) -> Labels:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (TypeError, ValueError) as error:  # bfloat16; lists within lists
        raise CalibrationError(f"labels cannot be read: {error}", where=argument) from None
    if array.shape != (rows,):
        raise CalibrationError(
            f"labels have shape {array.shape}, one per row is needed: ({rows},)", where=argument
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise CalibrationError(f"labels are {array.dtype}, whole class numbers are needed", where=argument)
    if rows and int(array.min()) < 0:
        raise CalibrationError(f"label {int(array.min())} is below 0", where=argument)
    return array.astype(np.int64)


def _concatenate(batches: Iterator[Batch], argument: str) -> Batch:
    parts: list[Inputs] = []
    labels: list[Labels | None] = []
    held_bytes = 0
    for inputs, batch_labels in batches:
        held_bytes += sum(tensor.nbytes for tensor in inputs.values())
        if held_bytes > MEMORY_LIMIT_BYTES:
            raise CalibrationError(
                f"more than {MEMORY_LIMIT_BYTES >> 30} GiB of rows",
                where=argument,
                remedy="give fewer rows (a few thousand do), or memory-mapped arrays",
            )
        parts.append(inputs)
        labels.append(batch_labels)
    if not parts:
        raise CalibrationError("there are no rows", where=argument, remedy="give a few thousand rows")
    if len({label is None for label in labels}) != 1:
        raise CalibrationError("some batches have labels and some have not", where=argument)
    for name in parts[0]:
        kinds = {(part[name].dtype, part[name].shape[1:]) for part in parts}
        if len(kinds) > 1:
            shown = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in kinds)
            raise CalibrationError(f"rows of different types: {shown}", where=f"{argument}, input {name!r}")
    inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    known = [label for label in labels if label is not None]
    return inputs, np.concatenate(known) if known else None


def _check_finite(inputs: Inputs, argument: str) -> None:
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CalibrationError(
                "the data holds NaN or Inf", where=f"{argument}, input {name!r}", remedy="clean the rows"
            )
