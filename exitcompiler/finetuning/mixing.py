"""Rows mixed in pairs, and what they should be answered with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from exitcompiler.errors import InputError

__all__ = ["Target", "mix_rows", "require_mixable"]


@dataclass(frozen=True)
class Target:
    """The classes of a batch of rows, each of which may be a mixture of two.

    Args:
        labels: ``int64[batch]``.
        others: The classes of what was mixed in, ``int64[batch]``; None: nothing was.
        share: How much of a row is its own, 0 to 1.
    """

    labels: Tensor
    others: Tensor | None = None
    share: float = 1.0

    def cross_entropy(self, logits: Tensor, label_smoothing: float) -> Tensor:
        """Per row, ``float32[batch]``; of a mixture the mixture of both classes'."""
        own = F.cross_entropy(logits, self.labels, reduction="none", label_smoothing=label_smoothing)
        if self.others is None:
            return own
        other = F.cross_entropy(logits, self.others, reduction="none", label_smoothing=label_smoothing)
        return self.share * own + (1.0 - self.share) * other


def require_mixable(inputs: Mapping[str, str]) -> None:
    """Check that rows can be mixed.

    Args:
        inputs: Name -> dtype, as in ``float32``.

    Raises:
        InputError: An input is not of floating point.
    """
    whole = [name for name, dtype in inputs.items() if not dtype.startswith(("float", "bfloat"))]
    if whole:
        raise InputError(
            f"inputs {whole} cannot be mixed: they are not of floating point",
            where="FineTune",
            remedy="mixup=0",
        )


def mix_rows(
    inputs: dict[str, Tensor], labels: Tensor, generator: torch.Generator
) -> tuple[dict[str, Tensor], Target]:
    """Mix each row with another one of the batch.

    By a random share of all its values (mixup, Zhang et al. 2018), or every other time, where there is one
    image input, by a rectangle of random place and size (CutMix, Yun et al. 2019). The share is
    uniform, the Beta(1, 1) of both papers.

    Args:
        inputs: Name -> floating-point tensor ``[batch, ...]``.
        labels: ``int64[batch]``.
        generator: Draws everything; on the CPU.

    Raises:
        InputError: An input is not of floating point.
    """
    require_mixable({name: str(x.dtype).removeprefix("torch.") for name, x in inputs.items()})
    share, choice, *place = torch.rand(4, generator=generator).tolist()
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    tensors = list(inputs.values())
    if choice < 0.5 and len(tensors) == 1 and tensors[0].ndim == 4:
        (name,) = inputs
        mixed, share = _paste(tensors[0], order, share, place)
        return {name: mixed}, Target(labels, labels[order], share)
    blended = {name: share * x + (1.0 - share) * x[order] for name, x in inputs.items()}
    return blended, Target(labels, labels[order], share)


def _paste(images: Tensor, order: Tensor, share: float, place: list[float]) -> tuple[Tensor, float]:
    """Paste a rectangle of about ``1 - share`` of the area; gives what share is left of each row."""
    rows, columns = images.shape[2:]
    side = math.sqrt(1.0 - share)
    top, bottom = _span(place[0], side, rows)
    left, right = _span(place[1], side, columns)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return mixed, 1.0 - (bottom - top) * (right - left) / (rows * columns)


def _span(centre: float, side: float, size: int) -> tuple[int, int]:
    middle, half = int(centre * size), round(side * size) // 2
    return max(middle - half, 0), min(middle + half, size)
