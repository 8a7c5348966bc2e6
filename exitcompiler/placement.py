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

__all__ = ["Place", "chance_level", "choose_places", "probe"]

PROBE_ROWS = 6000
HELD_OUT_EVERY = 4
PROBE_WIDTH = 1024
MEMORY_BYTES = 512 << 20
RIDGE = 1e-2
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

    The probe is ridge regression on one-hot labels in closed form. Sums of products are kept, and the
    pooled features of the rows that judge; more than ``PROBE_WIDTH`` features are hashed to that many. So
    memory grows neither with the data nor with the width of values.

    Args:
        stream: Gives the value of every cut, and ``target``.
        cuts: All candidates.
        data: Where rows come from; it checks them (``TrainingData.for_model``).
        classes: How many.
        seed: Of the order of rows, and of the hashing.
        step: Progress, one unit a row.
        target: The backbone's logits, whose answers are learned where there are no labels.
        rows: How many to go through; every fourth chunk of them judges, so that a loader whose rows are
            sorted is judged on what it was fitted on, too.

    Raises:
        CalibrationError: A batch cannot be used, there are too few rows, or the backbone's values at a cut
            are not finite.
    """
    fitters = {cut.value: _Ridge(cut.name, classes, seed) for cut in cuts}
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    for number, (inputs, labels) in enumerate(_chunks(data, generator, _chunk_rows(cuts, rows))):
        values = stream(inputs)
        answers = values[target].argmax(dim=1) if labels is None else torch.from_numpy(labels)
        judges = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        for value, fitter in fitters.items():
            (fitter.hold_out if judges else fitter.add)(pool(values[value].float()), answers)
        seen += len(answers)
        step.advance(len(answers))
        if seen >= rows:
            break
    return [fitters[cut.value].accuracy() for cut in cuts]


def _chunk_rows(cuts: Sequence[CutPoint], rows: int) -> int:
    """How many rows fit the memory limit with the values of all cuts held at once."""
    row_bytes = sum(4 * math.prod(int(size) for size in cut.spec.shape[1:]) for cut in cuts)
    return max(1, min(256, -(-rows // 8), MEMORY_BYTES // row_bytes))


def _chunks(data: TrainingData, generator: torch.Generator, size: int) -> Iterator[Batch]:
    for inputs, labels in data.epoch(size, generator):
        yield from Rows(inputs, labels).batches(size)


class _Ridge:
    """Least squares on one-hot labels with a small ridge, from running sums."""

    def __init__(self, cut_name: str, classes: int, seed: int) -> None:
        self._cut_name = cut_name
        self._classes = classes
        self._seed = seed
        self._gram: Tensor | None = None
        self._moment: Tensor | None = None
        self._held_out: list[tuple[Tensor, Labels]] = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Fit on these rows."""
        features = self._prepared(features).double()
        ones = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
        gram, moment = ones.T @ ones, ones.T @ torch.eye(self._classes, dtype=ones.dtype)[labels]
        self._gram = gram if self._gram is None else self._gram + gram
        self._moment = moment if self._moment is None else self._moment + moment

    def hold_out(self, features: Tensor, labels: Tensor) -> None:
        """Keep these rows to judge on."""
        self._held_out.append((self._prepared(features), labels.numpy()))

    def accuracy(self) -> float:
        """On the held-out rows, of the fit on all others."""
        if self._gram is None or self._moment is None or not self._held_out:
            raise CalibrationError(
                "too few rows came for a probe to be fitted and judged",
                where="train_data",
                remedy="give more rows, or a loader that can be gone through several times",
            )
        ridge = RIDGE * self._gram.diagonal().mean()
        damped = self._gram + ridge * torch.eye(len(self._gram), dtype=self._gram.dtype)
        weight = torch.linalg.solve(damped, self._moment)
        right = judged = 0
        for features, labels in self._held_out:
            scores = features.double() @ weight[:-1] + weight[-1]
            right += int((scores.argmax(dim=1).numpy() == labels).sum())
            judged += len(labels)
        return right / judged

    def _prepared(self, features: Tensor) -> Tensor:
        if not bool(torch.isfinite(features).all()):
            raise CalibrationError(
                "the backbone's values hold NaN or Inf",
                where=f"cut {self._cut_name!r}",
                remedy="look for extreme values in the training inputs; are they scaled as in training?",
            )
        return _hashed(features, self._seed) if features.shape[1] > PROBE_WIDTH else features


def _hashed(features: Tensor, seed: int) -> Tensor:
    """Signed feature hashing (Weinberger et al. 2009, section 2): inner products are kept on average."""
    generator = torch.Generator().manual_seed(seed)
    width = features.shape[1]
    sign = 2.0 * torch.randint(0, 2, (width,), generator=generator) - 1.0
    bucket = torch.randint(0, PROBE_WIDTH, (width,), generator=generator)
    return features.new_zeros(len(features), PROBE_WIDTH).index_add_(1, bucket, features * sign)


def chance_level(rows: Rows, classes: int) -> float:
    """The accuracy of always answering with the commonest class; without labels that of guessing."""
    if rows.labels is None:
        return 1.0 / classes
    return float(np.bincount(rows.labels).max() / len(rows.labels))


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
        chance: ``chance_level`` of rows like those that the probes were judged on.
    """
    targets = np.linspace(FIRST, LAST, count + 1)[:count]
    # A fifth better than chance, or a tenth of the way from there to always right where that is less: with
    # many classes an early probe is far from right, with one common class nothing is a fifth better.
    bar = min(1.2 * chance, chance + 0.1 * (1.0 - chance))
    reasons: dict[int, str] = {}
    for i, (share, accuracy) in enumerate(zip(time_shares, accuracies, strict=True)):
        if share < FIRST / 2:
            reasons[i] = f"too early: {share:.0%} of the time"
        elif share > LAST:
            reasons[i] = f"too late: only {1 - share:.0%} of the time is left to save"
        elif accuracy < bar:
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
