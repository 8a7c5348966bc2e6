"""What a user may say about fine-tuning."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from exitcompiler.errors import InputError

__all__ = ["FineTune"]

_POSITIVE: Final = ("lr", "adamw_lr", "head_lr", "head_adamw_lr", "temperature")
_SHARES: Final = ("teacher", "self_distillation", "focus", "label_smoothing", "mixup")
_COUNTS: Final = ("epochs", "batch_size", "accumulate")


@dataclass(frozen=True)
class FineTune:
    """How a network and its exits are trained together, as one program.

    The loss of each exit, and of the network's own end, is

        (1 - teacher) * cross_entropy(exit, label) + teacher * T^2 * KL(original || exit)
        + self_distillation * T^2 * KL(last || exit)

    with all softmaxes in a KL at temperature ``T`` (Hinton et al. 2015, section 2), and ``original`` the
    network as it was given; self-distillation from the network's own end after Zhang et al. 2019, "Be Your
    Own Teacher". Without labels the original's answers stand for them.

    Args:
        train_data: Rows with the user's own augmentation, forms as for ``compile``; None: ``train_data`` of
            the call. At least a few thousand; the network's own training rows are right.
        epochs: Passes over the data.
        batch_size: Rows per step; a loader's own batches are joined until they have as many.
        accumulate: Batches per step whose gradients are added up, where memory is short: a step then
            sees ``accumulate * batch_size`` rows.
        lr: Peak learning rate of the network's convolutions and hidden layers, under Muon.
        adamw_lr: Of its other parameters, under AdamW.
        head_lr: As ``lr``, of the exit heads.
        head_adamw_lr: As ``adamw_lr``, of the exit heads.
        weight_decay: Of convolutions and hidden layers.
        freeze_batchnorm: Keep the statistics of the network's batch norms. Off, rows are normalised by
            their batch, as when the network was trained.
        label_smoothing: Of the cross entropy, 0 to 1.
        teacher: Share of the loss that is distilled from the original network, 0 to 1.
        self_distillation: Weight of what exits learn from the network's own end.
        temperature: Of both distillations.
        mixup: Share of steps whose rows are mixed in pairs (Zhang et al. 2018; half of them by a cut-out
            rectangle where an input is an image, Yun et al. 2019). Needs inputs of floating point.
        focus: How much less a row counts at an exit that earlier exits are already sure of, 0 to 1: the
            weight is ``1 - focus * their greatest max probability``, scaled to a mean of 1.
        last_weight: Weight of the network's own end among the losses; every exit has 1.
        checkpoint: A folder: training is kept there, goes on from there, and is not done again once complete.
        checkpoint_minutes: How often to write it, besides after every epoch.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU where there is one.
        mixed_precision: Multiply in bfloat16 where the device does that faster; weights stay float32.

    Raises:
        InputError: An option makes no sense.
    """

    train_data: Any = None
    epochs: int = 20
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.01
    adamw_lr: float = 1e-3
    head_lr: float = 0.05
    head_adamw_lr: float = 4e-3
    weight_decay: float = 0.02
    freeze_batchnorm: bool = False
    label_smoothing: float = 0.0
    teacher: float = 0.0
    self_distillation: float = 0.5
    temperature: float = 2.0
    mixup: float = 0.0
    focus: float = 0.0
    last_weight: float = 1.0
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_minutes: float = 5.0
    device: str = "auto"
    mixed_precision: bool = True

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}={value!r} is not a positive whole number", where="FineTune")
        if self.batch_size < 2:
            raise InputError("batch_size=1 is too small: batch norms need two rows", where="FineTune")
        for name in _POSITIVE:
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)!r} is not a positive number", where="FineTune")
        for name in _SHARES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name}={getattr(self, name)!r} is not in 0..1", where="FineTune")
        for name in ("weight_decay", "last_weight", "checkpoint_minutes"):
            if not getattr(self, name) >= 0.0:
                raise InputError(f"{name}={getattr(self, name)!r} is negative", where="FineTune")

    @property
    def folder(self) -> Path | None:
        """Where checkpoints go."""
        return None if self.checkpoint is None else Path(self.checkpoint)

    def as_dict(self) -> Mapping[str, Any]:
        """What decides the outcome, for the report and to tell checkpoints apart."""
        left_out = {"train_data", "checkpoint", "checkpoint_minutes", "device"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
