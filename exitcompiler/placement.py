"""Decides where deep heads are worth training: probes everywhere, measured times, then a few places."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exitcompiler.cut_points import CutPoint
from exitcompiler.data import Batch, Labels, Rows, TrainingData
from exitcompiler.errors import CalibrationError
from exitcompiler.heads import pool
from exitcompiler.progress import Step
from exitcompiler.training import FeatureStream

__all__ = ["Place", "choose_places", "probe"]

PROBE_ROWS = 6000
HELD_OUT = 0.25
MEMORY_BYTES = 512 << 20
RIDGE = 1e-2
BETTER_THAN_CHANCE = 1.2
FIRST, LAST = 0.08, 0.82
"""Between which shares of the backbone's time exits are placed. In trials a deep head was hardly worse at
9 % of the time than at 30 %, so the first place is early; after LAST there is too little left to save."""


@dataclass(frozen=True, slots=True)
class Place:
    """A candidate exit.

    Args:
        cut: Where.
        time_share: Share of the backbone's measured time that is spent up to here, 0 to 1.
        probe_accuracy: Of a linear probe on pooled features, on rows it was not fitted on.
        chosen: Whether heads are trained here.
        reason: Why, or why not.
    """

    cut: CutPoint
    time_share: float
    probe_accuracy: float
    chosen: bool
    reason: str


@torch.no_grad()
def probe(
    stream: FeatureStream,
    cuts: Sequence[CutPoint],
    data: TrainingData,
    classes: int,
    *,
    seed: int,
    step: Step,
    target: str,
    rows: int,
) -> list[float]:
    """Accuracy of a linear probe on pooled features at every cut, on held-out rows of one short pass.

    The probe is ridge regression on one-hot labels in closed form: sums of products are kept, not
    rows, so memory does not grow with the data.

    Args:
        stream: Gives the value of every cut, and ``target``.
        cuts: All candidates.
        data: Where rows come from.
        classes: How many.
        seed: Of the order of rows.
        step: Progress, one unit a row.
        target: The backbone's logits, whose answers are learned where there are no labels.
        rows: How many to go through; the last quarter judges.
    """
    fitters = {cut.value: _Ridge(classes) for cut in cuts}
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    for inputs, labels in _chunks(data, generator, _chunk_rows(cuts, rows)):
        values = stream(inputs)
        answers = _answers(labels, values[target], classes)
        held_out = seen >= rows * (1.0 - HELD_OUT)
        for value, fitter in fitters.items():
            features = pool(values[value].float()).double()
            fitter.judge(features, answers) if held_out else fitter.add(features, answers)
        seen += len(answers)
        step.advance(len(answers))
        if seen >= rows:
            break
    return [fitters[cut.value].accuracy for cut in cuts]


def _chunk_rows(cuts: Sequence[CutPoint], rows: int) -> int:
    """How many rows fit the memory limit with the values of all cuts held at once."""
    row_bytes = sum(4 * math.prod(int(size) for size in cut.spec.shape[1:]) for cut in cuts)
    return max(1, min(256, -(-rows // 8), MEMORY_BYTES // row_bytes))


def _chunks(data: TrainingData, generator: torch.Generator, size: int) -> Iterator[Batch]:
    for inputs, labels in data.epoch(size, generator):
        yield from Rows(inputs, labels).batches(size)


def _answers(labels: Labels | None, backbone: Tensor, classes: int) -> Tensor:
    if labels is None:
        return backbone.argmax(dim=1)
    if len(labels) and int(labels.max()) >= classes:
        raise CalibrationError(
            f"label {int(labels.max())} is out of range: the model has {classes} classes",
            where="train_data",
            remedy=f"number the classes 0..{classes - 1} in the order of the model's outputs",
        )
    return torch.from_numpy(labels)


class _Ridge:
    """Least squares on one-hot labels with a small ridge, from running sums."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._gram: Tensor | None = None
        self._moment: Tensor | None = None
        self._weight: Tensor | None = None
        self._right = 0
        self._judged = 0

    def add(self, features: Tensor, labels: Tensor) -> None:
        ones = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
        gram, moment = ones.T @ ones, ones.T @ torch.eye(self._classes, dtype=ones.dtype)[labels]
        self._gram = gram if self._gram is None else self._gram + gram
        self._moment = moment if self._moment is None else self._moment + moment

    def judge(self, features: Tensor, labels: Tensor) -> None:
        if self._gram is None or self._moment is None:
            return
        if self._weight is None:
            ridge = RIDGE * self._gram.diagonal().mean()
            damped = self._gram + ridge * torch.eye(len(self._gram), dtype=self._gram.dtype)
            self._weight = torch.linalg.solve(damped, self._moment)
        scores = features @ self._weight[:-1] + self._weight[-1]
        self._right += int((scores.argmax(dim=1) == labels).sum())
        self._judged += len(labels)

    @property
    def accuracy(self) -> float:
        return self._right / self._judged if self._judged else float("nan")


def choose_places(
    cuts: Sequence[CutPoint],
    time_shares: Sequence[float],
    accuracies: Sequence[float],
    *,
    count: int,
    chance: float,
) -> list[Place]:
    """Choose the handful of cuts that get deep heads.

    Places are spread evenly over the backbone's time, the first one early; each is the nearest cut at
    which the probe knows something, and no cut is taken twice.

    Args:
        cuts: All candidates, in order.
        time_shares: Of the backbone's measured time, up to each cut.
        accuracies: Of the probes.
        count: How many places at most.
        chance: The accuracy of always answering with the commonest class.
    """
    targets = np.linspace(FIRST, LAST, count + 1)[:count]
    reasons: dict[int, str] = {}
    for i, (share, accuracy) in enumerate(zip(time_shares, accuracies, strict=True)):
        if share < FIRST / 2:
            reasons[i] = f"too early: {share:.0%} of the time"
        elif share > LAST:
            reasons[i] = f"too late: only {1 - share:.0%} of the time is left to save"
        elif accuracy < chance * BETTER_THAN_CHANCE:
            reasons[i] = f"the probe knows nothing here: {accuracy:.1%} right"
    chosen: set[int] = set()
    for target in targets:
        free = [i for i in range(len(cuts)) if i not in reasons and i not in chosen]
        if free:
            chosen.add(min(free, key=lambda i: abs(time_shares[i] - target)))
    return [
        Place(cut, share, accuracy, i in chosen, _reason(i, chosen, reasons))
        for i, (cut, share, accuracy) in enumerate(zip(cuts, time_shares, accuracies, strict=True))
    ]


def _reason(index: int, chosen: set[int], reasons: Mapping[int, str]) -> str:
    if index in chosen:
        return "one of the places spread evenly over the network's time"
    return reasons.get(index, "no head was tried here: another place is near")
