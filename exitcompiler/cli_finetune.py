"""What ``compile`` and ``cascade`` take for fine-tuning: options as declared, and how they are read."""

from __future__ import annotations

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
        help="What to train on: cpu, cuda, or auto: a GPU where there is one.",
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


def read_finetune(
    wanted: bool, train: str | None, *, has_exits: bool = True, **given: Any
) -> FineTune | None:
    """How the network is to be trained together with its exits; None: not at all.

    Args:
        wanted: Whether ``--finetune`` was given.
        train: DATA of ``--train``; None: none.
        has_exits: Whether networks get exits.
        given: Field of ``FineTune`` -> as given on the command line; None: the default.

    Raises:
        BadParameter: Options contradict each other, or one makes no sense.
    """
    from exitcompiler.finetuning.options import FineTune

    said = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        if said:
            raise typer.BadParameter(f"{_OPTIONS[next(iter(said))]} goes with --finetune")
        return None
    if train is None:
        raise typer.BadParameter("--finetune needs --train: the rows that the network was trained on")
    if not has_exits:
        raise typer.BadParameter("--finetune goes with --early-exits: without, there is nothing to tune for")
    try:
        return FineTune(**said)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
