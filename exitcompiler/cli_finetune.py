"""What ``compile`` and ``cascade`` take for fine-tuning: options as declared, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from exitcompiler.errors import InputError

if TYPE_CHECKING:
    from exitcompiler.finetuning.options import FineTune

__all__ = [
    "AccumulateOption",
    "CheckpointOption",
    "DeviceOption",
    "EpochsOption",
    "FinetuneOption",
    "FreezeBatchnormOption",
    "LearningRateOption",
    "MixupOption",
    "TrainBatchSizeOption",
    "TuneOption",
    "read_finetune",
]

_PANEL: Final = "Fine-tuning"

FinetuneOption = Annotated[
    bool,
    typer.Option(
        "--finetune",
        help="Train the network together with its exits, on the rows of --train; the model itself stays.",
        rich_help_panel=_PANEL,
    ),
]
EpochsOption = Annotated[
    int | None,
    typer.Option("--epochs", min=1, help="Passes over the rows.", show_default=False, rich_help_panel=_PANEL),
]
TrainBatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--train-batch-size",
        min=2,
        help="Rows per step (--batch-size is that of the compiled program).",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
AccumulateOption = Annotated[
    int | None,
    typer.Option(
        "--accumulate",
        min=1,
        help="Batches whose gradients are added up for one step, where memory is short.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
LearningRateOption = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Peak learning rate of the network's convolutions and hidden layers, under Muon.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
FreezeBatchnormOption = Annotated[
    bool | None,
    typer.Option(
        "--freeze-batchnorm/--train-batchnorm",
        help="Keep the statistics of the network's batch norms, or learn them anew.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
MixupOption = Annotated[
    float | None,
    typer.Option(
        "--mixup",
        min=0.0,
        max=1.0,
        help="Share of steps whose rows are mixed in pairs.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FOLDER",
        file_okay=False,
        help="Keep the training there, and go on from there when the same command is run again.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="What to train on: cpu, cuda (cuda:1, ...), or auto: a GPU where there is one.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
TuneOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tune",
        metavar="NAME=VALUE",
        help="Any other option of FineTune by its name there, such as teacher=0.5; once for each.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]

_OPTIONS: Final = {
    "epochs": "--epochs",
    "batch_size": "--train-batch-size",
    "accumulate": "--accumulate",
    "lr": "--lr",
    "freeze_batchnorm": "--freeze-batchnorm/--train-batchnorm",
    "mixup": "--mixup",
    "checkpoint": "--checkpoint",
    "device": "--device",
}
"""Field of ``FineTune`` -> the option that sets it."""

_SAID: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_READERS: Final[dict[type, tuple[Callable[[str], Any], str]]] = {
    bool: (lambda text: _SAID[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}


def read_finetune(
    wanted: bool,
    train: str | None,
    calib: str,
    tune: Sequence[str] | None,
    *,
    has_exits: bool = True,
    **given: Any,
) -> FineTune | None:
    """How the network is to be trained together with its exits; None: not at all.

    Args:
        wanted: Whether ``--finetune`` was given.
        train: DATA of ``--train``; None: none.
        calib: DATA of ``--calib``.
        tune: Of ``--tune``, NAME=VALUE each; None: none.
        has_exits: Whether networks get exits.
        given: Field of ``FineTune`` -> as given on the command line; None: the default.

    Raises:
        BadParameter: Options contradict each other, or one makes no sense.
    """
    from exitcompiler.finetuning.options import FineTune

    said = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        if said or tune:
            option = _OPTIONS[next(iter(said))] if said else "--tune"
            raise typer.BadParameter(f"{option} goes with --finetune")
        return None
    if train is None:
        raise typer.BadParameter("--finetune needs --train: the rows that the network was trained on")
    if _is_same(train, calib):
        raise typer.BadParameter(
            "--train and --calib are the same: a tuned network is too sure of rows that it was trained on "
            "for gates to be learned on them; hold some out of --train, for --calib"
        )
    if not has_exits:
        raise typer.BadParameter("--finetune goes with --early-exits: without, there is nothing to tune for")
    for text in tune or ():
        name, value = _read_tuned(text)
        if name in said:
            raise typer.BadParameter(f"{name} is given twice, the second time by --tune {text}")
        said[name] = value
    try:
        return FineTune(**said)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


def _is_same(train: str, calib: str) -> bool:
    """Whether two DATA are the same factory, or the same file or folder."""
    return train == calib or (Path(train).exists() and Path(train).resolve() == Path(calib).resolve())


def _read_tuned(text: str) -> tuple[str, Any]:
    """The field of ``FineTune`` that NAME=VALUE sets, and the value, of the type that the field has.

    Raises:
        BadParameter: There is no such field, or the value is of another type.
    """
    from exitcompiler.finetuning.options import FineTune

    defaults: dict[str, object] = {f.name: f.default for f in fields(FineTune) if f.name != "train_data"}
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name not in defaults:
        raise typer.BadParameter(f"--tune {text}: give NAME=VALUE, and NAME is one of {', '.join(defaults)}")
    read, wanted = _READERS.get(type(defaults[name]), (str, "text"))
    try:
        return name, read(value)
    except (KeyError, ValueError):
        raise typer.BadParameter(f"--tune {text}: {name} is {wanted}") from None
