"""Cached scores: what the learning of gates works on instead of a network.

Every head's logits are computed once, on rows that neither the backbone nor the heads were trained
on; policies are then learned and judged on these numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.errors import CalibrationError
from exitcompiler.naming import BACKBONE

__all__ = [
    "BACKBONE",
    "FEATURES",
    "BoolArray",
    "FloatArray",
    "HeadKey",
    "HeadScores",
    "IntArray",
    "ScoreTable",
    "softmax_confidence",
]

FloatArray: TypeAlias = NDArray[np.floating]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]
HeadKey: TypeAlias = tuple[str, str]
"""An exit's name and the kind of its head, ``("layer1.8", "deep")``."""

FEATURES: Final = 3
"""How many confidence features a head has: max probability, margin, normalised entropy."""


def softmax_confidence(logits: FloatArray) -> NDArray[np.float32]:
    """The confidence features of a head's softmax, as the compiled block computes them.

    With ``p = softmax(logits)``, ``p1 >= p2`` its two largest entries and ``C`` classes:
    ``(p1, p1 - p2, -sum(p * log_softmax(logits)) / log C)``. The log-softmax form of the entropy
    stays finite where a probability underflows to zero.

    Args:
        logits: ``[n, C]`` with at least two classes.

    Returns:
        ``float32[n, 3]``.
    """
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    second, first = np.partition(p, -2, axis=1)[:, -2:].T
    entropy = -(p * log_p).sum(axis=1) / math.log(p.shape[1])
    return np.stack([first, first - second, entropy], axis=1).astype(np.float32)


@dataclass(frozen=True)
class HeadScores:
    """The logits of one head on all rows.

    Args:
        exit: The exit's name.
        head: The kind of head, "linear" or "deep".
        logits: ``float32[n, classes]``.
    """

    exit: str
    head: str
    logits: FloatArray

    @cached_property
    def prediction(self) -> IntArray:
        """The predicted class of each row, ``int64[n]``."""
        return np.asarray(self.logits.argmax(axis=1), np.int64)

    @cached_property
    def confidence(self) -> NDArray[np.float32]:
        """``float32[n, 3]``: see ``softmax_confidence``."""
        return softmax_confidence(self.logits)

    def take(self, rows: NDArray[np.integer]) -> HeadScores:
        """The scores of some rows; what is already derived is not derived again."""
        part = HeadScores(self.exit, self.head, self.logits[rows])
        for name in ("prediction", "confidence"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][rows]
        return part


@dataclass(frozen=True)
class ScoreTable:
    """All heads' scores on the same rows, with the backbone's.

    Args:
        exits: Names, in the order of the program.
        heads: (exit, head kind) -> scores; every exit has at least one head.
        backbone_logits: ``float32[n, classes]``.
        labels: ``int64[n]`` in ``0..classes-1``, or None: the target is then agreement with the backbone.

    Raises:
        CalibrationError: Lengths differ, a score is NaN or infinite, a label is out of range, or
            there are no rows.
    """

    exits: tuple[str, ...]
    heads: Mapping[HeadKey, HeadScores]
    backbone_logits: FloatArray
    labels: IntArray | None = None

    def __post_init__(self) -> None:
        shape = self.backbone_logits.shape
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise CalibrationError(
                f"the backbone's logits have shape {shape}, not [rows, classes] with at least two classes",
                remedy="give at least one row, and a classifier of two classes or more",
            )
        _require_finite(self.backbone_logits, BACKBONE)
        if len(set(self.exits)) != len(self.exits) or BACKBONE in self.exits:
            raise CalibrationError(f"exit names must be unique and not {BACKBONE!r}: {list(self.exits)}")
        for key, scores in self.heads.items():
            where = f"head {key[1]!r} of exit {key[0]!r}"
            if key[0] not in self.exits:
                raise CalibrationError("the table has no such exit", where=where)
            if scores.logits.shape != shape:
                raise CalibrationError(
                    f"logits of shape {scores.logits.shape}, the backbone's have {shape}", where=where
                )
            _require_finite(scores.logits, where)
        for name in self.exits:
            if not self.kinds(name):
                raise CalibrationError("no head has scores here", where=f"exit {name!r}")
        if self.labels is not None:
            _require_labels(self.labels, shape)

    @property
    def rows(self) -> int:
        """How many rows."""
        return int(self.backbone_logits.shape[0])

    @cached_property
    def backbone_prediction(self) -> IntArray:
        """The backbone's class, ``int64[n]``."""
        return np.asarray(self.backbone_logits.argmax(axis=1), np.int64)

    @property
    def targets(self) -> IntArray:
        """What counts as right: the labels, or without them the backbone's own answer."""
        return self.backbone_prediction if self.labels is None else self.labels

    @cached_property
    def backbone_correct(self) -> BoolArray:
        """``bool[n]``."""
        return np.asarray(self.backbone_prediction == self.targets, np.bool_)

    def correct(self, key: HeadKey) -> BoolArray:
        """Where a head is right, ``bool[n]``."""
        return np.asarray(self.heads[key].prediction == self.targets, np.bool_)

    def kinds(self, exit_name: str) -> tuple[str, ...]:
        """The kinds of head an exit has, in the order given."""
        return tuple(kind for name, kind in self.heads if name == exit_name)

    def features(self, reads: Sequence[HeadKey]) -> NDArray[np.float32]:
        """The concatenated confidence features of several heads, ``float32[n, 3 * len(reads)]``."""
        return np.concatenate([self.heads[key].confidence for key in reads], axis=1)

    def take(self, rows: NDArray[np.integer]) -> ScoreTable:
        """The table of some rows, in the order given (repetitions allowed)."""
        part = object.__new__(ScoreTable)
        values = {
            "exits": self.exits,
            "heads": {key: scores.take(rows) for key, scores in self.heads.items()},
            "backbone_logits": self.backbone_logits[rows],
            "labels": None if self.labels is None else self.labels[rows],
        }
        part.__dict__.update(values)  # the rows were checked with the whole table
        return part


def _require_finite(logits: FloatArray, where: str) -> None:
    bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if bad:
        raise CalibrationError(
            f"{bad} of {len(logits)} rows have NaN or infinite logits",
            where=where,
            remedy="look for NaN in the calibration inputs, or compile at a higher precision",
        )


def _require_labels(labels: IntArray, shape: tuple[int, ...]) -> None:
    if labels.shape != shape[:1]:
        raise CalibrationError(f"{labels.shape} labels for {shape[0]} rows", where="labels")
    if not np.issubdtype(labels.dtype, np.integer):
        raise CalibrationError(f"labels are {labels.dtype}, not integers", where="labels")
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise CalibrationError(
            f"labels run from {labels.min()} to {labels.max()}, the model has {shape[1]} classes",
            where="labels",
            remedy=f"number the classes 0..{shape[1] - 1} in the order of the model's outputs",
        )
