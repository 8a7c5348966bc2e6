"""What a user may say about fine-tuning."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any, Final

from exitcompiler.errors import InputError

__all__ = ["FineTune", "require_finetune"]

_FEWEST: Final = {"epochs": 1, "batch_size": 2, "accumulate": 1}  # of a single row batch norms know nothing
_POSITIVE: Final = ("lr", "adamw_lr", "head_lr", "head_adamw_lr", "temperature")
_SHARES: Final = ("teacher", "self_distillation", "focus", "label_smoothing", "mixup")
_WEIGHTS: Final = ("weight_decay", "last_weight")
_SWITCHES: Final = ("freeze_batchnorm", "mixed_precision")
_DEVICES: Final = re.compile(r"auto|cpu|cuda(:[0-9]+)?")


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
            the call (one of the two, not both). At least a few thousand; the network's own training rows
            are right.
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
        device: ``"cpu"``; ``"cuda"``, or one of several GPUs, ``"cuda:1"``; or ``"auto"``: a GPU where there
            is one.
        mixed_precision: Multiply in bfloat16 where the device does that faster; weights stay float32.

    Raises:
        InputError: An option makes no sense, or is of another type.
    """

    train_data: Any = None
    epochs: int = 20
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.006
    adamw_lr: float = 1e-3
    head_lr: float = 0.05
    head_adamw_lr: float = 4e-3
    weight_decay: float = 0.02
    freeze_batchnorm: bool = True
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
        for name, fewest in _FEWEST.items():
            self._require(name, self._whole(name) >= fewest, f"a whole number from {fewest} on")
        for name in _POSITIVE:
            self._require(name, 0.0 < self._number(name) < math.inf, "a positive number")
        for name in _SHARES:
            self._require(name, 0.0 <= self._number(name) <= 1.0, "in 0..1")
        for name in _WEIGHTS:
            self._require(name, 0.0 <= self._number(name) < math.inf, "a number from 0 on")
        self._require("checkpoint_minutes", self._number("checkpoint_minutes") >= 0.0, "a number from 0 on")
        for name in _SWITCHES:
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        place = self.checkpoint
        is_path = place is None or (isinstance(place, str | os.PathLike) and place != "")
        self._require("checkpoint", is_path, "the path of a folder, or None")
        is_device = isinstance(self.device, str) and _DEVICES.fullmatch(self.device) is not None
        self._require("device", is_device, "'auto', 'cpu', 'cuda' or, with a number, 'cuda:1'")

    def _whole(self, name: str) -> int:
        """An option that is a whole number, kept as Python's own."""
        given = getattr(self, name)
        if isinstance(given, bool):
            raise self._refusal(name, "a whole number")
        try:
            whole = index(given)
        except TypeError:
            raise self._refusal(name, "a whole number") from None
        object.__setattr__(self, name, whole)
        return whole

    def _number(self, name: str) -> float:
        """An option that is a number, kept as Python's own."""
        given = getattr(self, name)
        if isinstance(given, bool) or not isinstance(given, Real):
            raise self._refusal(name, "a number")
        # 1 is not made 1.0: checkpoints are told apart by how options are written down.
        number = given if isinstance(given, int) else float(given)
        object.__setattr__(self, name, number)
        return number

    def _require(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise self._refusal(name, wanted)

    def _refusal(self, name: str, wanted: str) -> InputError:
        (default,) = (field.default for field in fields(self) if field.name == name)
        what = f"{name}={getattr(self, name)!r} is not {wanted}"
        return InputError(what, where="FineTune", remedy=f"leave it out for the default, {default!r}")

    @property
    def folder(self) -> Path | None:
        """Where checkpoints go."""
        return None if self.checkpoint is None else Path(self.checkpoint)

    def as_dict(self) -> Mapping[str, Any]:
        """What decides the outcome, for the report and to tell checkpoints apart."""
        left_out = {"train_data", "checkpoint", "checkpoint_minutes", "device"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}


def require_finetune(given: Any) -> None:
    """Refuse what is no ``FineTune``, such as True, the class itself, or a dict of options.

    Args:
        given: By a user, as ``finetune``; None: nothing is tuned.

    Raises:
        InputError: It is something else.
    """
    if given is not None and not isinstance(given, FineTune):
        raise InputError(
            f"{given!r} is no FineTune",
            where="finetune",
            remedy="give exitcompiler.FineTune(), options in the brackets; or None, to tune nothing",
        )
