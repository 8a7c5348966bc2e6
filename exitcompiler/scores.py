"""Cached scores: what the learning of gates works on instead of a network.

Every head's logits are computed once, on rows that neither the backbone nor the heads were trained
on; policies are then learned and judged on these numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.errors import CalibrationError
from exitcompiler.naming import BACKBONE
from exitcompiler.topology import Topology

__all__ = [
    "BACKBONE",
    "FEATURES",
    "Agreement",
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
"""A site's name and the kind of head there, ``("layer1.8", "deep")``."""

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
        exit: The site's name.
        head: The kind of head, "linear" or "deep"; at the end of a network of a cascade also others.
        logits: ``float32[n, classes]``.
        needs: Other sites whose scores go into these: the head exists only where all of them were
            passed on every way in.
    """

    exit: str
    head: str
    logits: FloatArray
    needs: tuple[str, ...] = ()

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
        part = HeadScores(self.exit, self.head, self.logits[rows], self.needs)
        for name in ("prediction", "confidence"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][rows]
        return part


@dataclass(frozen=True)
class Agreement:
    """How far a network agrees with one that ran before it, on all rows.

    Args:
        confidence: ``float32[n, 3]``, in 0..1. With ``p``, ``q`` the softmax of this network and of the
            other: ``(q[argmax p], p[argmax q], sum_c p[c] q[c])``. Of equally likely classes the first
            counts.
        needs: The other network's site.
    """

    confidence: FloatArray
    needs: tuple[str, ...]

    def take(self, rows: NDArray[np.integer]) -> Agreement:
        """The features of some rows."""
        return Agreement(self.confidence[rows], self.needs)


@dataclass(frozen=True)
class ScoreTable:
    """All heads' scores on the same rows, with the backbone's.

    Args:
        topology: The sites, and where rows may go from each.
        heads: (site, head kind) -> scores; every site has at least one head that needs no other site.
        backbone_logits: ``float32[n, classes]``; in a cascade those of the reference network.
        labels: ``int64[n]`` in ``0..classes-1``, or None: the target is then agreement with the backbone.
        agreements: (site, kind) -> further features that gates may read there.
        original_logits: ``float32[n, classes]`` of the backbone as it was before it was fine-tuned, which
            accuracy drops are counted from; None: it is the backbone itself.
        plain_logits: ``float32[n, classes]`` of the plain engine that comes back where no exit pays, if it
            answers otherwise than the original does: it is quantised, for one. None: it does not.

    Raises:
        CalibrationError: Lengths differ, a score is NaN or infinite, a label is out of range, or
            there are no rows.
    """

    topology: Topology
    heads: Mapping[HeadKey, HeadScores]
    backbone_logits: FloatArray
    labels: IntArray | None = None
    agreements: Mapping[HeadKey, Agreement] = field(default_factory=dict)
    original_logits: FloatArray | None = None
    plain_logits: FloatArray | None = None

    def __post_init__(self) -> None:
        shape = self.backbone_logits.shape
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise CalibrationError(
                f"the backbone's logits have shape {shape}, not [rows, classes] with at least two classes",
                remedy="give at least one row, and a classifier of two classes or more",
            )
        _require_finite(self.backbone_logits, BACKBONE)
        others = {"the original backbone": self.original_logits, "the plain engine": self.plain_logits}
        for where, logits in others.items():
            if logits is not None:
                if logits.shape != shape:
                    raise CalibrationError(
                        f"logits of shape {logits.shape}, the backbone's have {shape}", where=where
                    )
                _require_finite(logits, where)
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
            if all(self.heads[name, kind].needs for kind in self.kinds(name)):
                raise CalibrationError("no head has scores here", where=f"exit {name!r}")
        if self.labels is not None:
            _require_labels(self.labels, shape)

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the sites, in the order of the program."""
        return self.topology.sites

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
        """What counts as right: the labels, or without them the original backbone's own answer."""
        if self.labels is not None:
            return self.labels
        if self.original_logits is None:
            return self.backbone_prediction
        return np.asarray(self.original_logits.argmax(axis=1), np.int64)

    @cached_property
    def backbone_correct(self) -> BoolArray:
        """``bool[n]``."""
        return np.asarray(self.backbone_prediction == self.targets, np.bool_)

    @cached_property
    def reference_correct(self) -> BoolArray:
        """Where what accuracy is counted from is right, ``bool[n]``: the backbone as it was given."""
        if self.original_logits is None:
            return self.backbone_correct
        return np.asarray(self.original_logits.argmax(axis=1) == self.targets, np.bool_)

    @cached_property
    def plain_correct(self) -> BoolArray:
        """Where the plain engine is right, ``bool[n]``."""
        if self.plain_logits is None:
            return self.reference_correct
        return np.asarray(self.plain_logits.argmax(axis=1) == self.targets, np.bool_)

    def correct(self, key: HeadKey) -> BoolArray:
        """Where a head is right, ``bool[n]``."""
        return np.asarray(self.heads[key].prediction == self.targets, np.bool_)

    def kinds(self, exit_name: str) -> tuple[str, ...]:
        """The kinds of head a site has, in the order given."""
        return tuple(kind for name, kind in self.heads if name == exit_name)

    def needs(self, key: HeadKey) -> tuple[str, ...]:
        """The other sites that have to be passed before these scores can be had."""
        return (self.heads[key] if key in self.heads else self.agreements[key]).needs

    def features(self, reads: Sequence[HeadKey]) -> NDArray[np.float32]:
        """The concatenated features of several heads or agreements, ``float32[n, 3 * len(reads)]``."""
        sources = [self.heads[key] if key in self.heads else self.agreements[key] for key in reads]
        return np.concatenate([source.confidence for source in sources], axis=1)

    def take(self, rows: NDArray[np.integer]) -> ScoreTable:
        """The table of some rows, in the order given (repetitions allowed)."""
        part = object.__new__(ScoreTable)
        values = {
            "topology": self.topology,
            "heads": {key: scores.take(rows) for key, scores in self.heads.items()},
            "backbone_logits": self.backbone_logits[rows],
            "labels": None if self.labels is None else self.labels[rows],
            "agreements": {key: found.take(rows) for key, found in self.agreements.items()},
            "original_logits": None if self.original_logits is None else self.original_logits[rows],
            "plain_logits": None if self.plain_logits is None else self.plain_logits[rows],
        }
        part.__dict__.update(values)  # the rows were checked with the whole table
        return part

    def restrict(self, sites: Collection[str]) -> ScoreTable:
        """The table of some sites; what needs another one is left out."""
        topology = self.topology.restrict(sites)
        names = set(topology.sites)

        def kept(key: HeadKey) -> bool:
            return key[0] in names and names.issuperset(self.needs(key))

        heads = {key: scores for key, scores in self.heads.items() if kept(key)}
        agreements = {key: found for key, found in self.agreements.items() if kept(key)}
        return ScoreTable(
            topology,
            heads,
            self.backbone_logits,
            self.labels,
            agreements,
            self.original_logits,
            self.plain_logits,
        )


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
