"""How the networks of a cascade are tuned: one setting for all, or one for each, and on which data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from exitcompiler.calibration import require_apart
from exitcompiler.errors import InputError
from exitcompiler.finetuning.options import FineTune, require_finetune
from exitcompiler.preparation import require_training_device, training_source

__all__ = ["Tuning", "listed_tunings", "named_tunings", "training_sources"]

Tuning: TypeAlias = FineTune | Sequence[FineTune | None] | None


def listed_tunings(finetune: Tuning, count: int) -> list[FineTune | None]:
    """How each network is tuned, in the order that they were given in; None: not at all.

    Args:
        finetune: As the user gave it.
        count: Of networks.

    Raises:
        InputError: It is no ``FineTune``; there is not one for each; or two have one checkpoint folder,
            where the second would find, after hours, the training of the first.
    """
    if not isinstance(finetune, Sequence) or isinstance(finetune, str | bytes):
        require_finetune(finetune)
        return [finetune] * count
    for tuning in finetune:
        require_finetune(tuning)
    if len(finetune) != count:
        raise InputError(
            f"finetune has {len(finetune)} entries for {count} networks",
            where="finetune",
            remedy="give one for each, None where a network stays as it is; or one FineTune for all",
        )
    folders = [tuning.folder.resolve() for tuning in finetune if tuning is not None and tuning.folder]
    twice = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
    if twice:
        raise InputError(
            f"several networks have the same checkpoint folder: {', '.join(twice)}",
            where="finetune",
            remedy="give another folder for each; or one FineTune for all, which makes a folder for each",
        )
    return list(finetune)


def named_tunings(finetune: Tuning, names: Sequence[str]) -> dict[str, FineTune | None]:
    """How each network is tuned, by name; of one for all each gets a checkpoint folder of its own.

    Args:
        finetune: As the user gave it.
        names: Of the networks, in the order that they were given in.

    Raises:
        InputError: As ``listed_tunings``.
    """
    tunings = dict(zip(names, listed_tunings(finetune, len(names)), strict=True))
    if isinstance(finetune, FineTune) and finetune.folder is not None:
        return {name: replace(finetune, checkpoint=finetune.folder / name) for name in names}
    return tunings


def training_sources(train_data: Any, calib_data: Any, tunings: Sequence[FineTune | None]) -> list[Any]:
    """What each network, or its heads alone, are trained on; None: nothing is given.

    Args:
        train_data: As the user gave it: for all that have no data of their own.
        calib_data: As the user gave it.
        tunings: How each network is tuned.

    Raises:
        InputError: One that is tuned has no data; or ``train_data`` is for none, as all have their own.
        CalibrationError: A network would be tuned on calibration data.
        TrainingError: A device to train on cannot be used.
    """
    own = [tuning is not None and tuning.train_data is not None for tuning in tunings]
    sources = [
        training_source(None if has and not all(own) else train_data, tuning)
        for tuning, has in zip(tunings, own, strict=True)
    ]
    for tuning, source in zip(tunings, sources, strict=True):
        require_training_device(tuning)
        if tuning is not None:
            require_apart(calib_data, source)
    return sources
