"""What comes before anything is measured: the model captured, the data read, checked and divided."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from exitcompiler.calibration import peek, require_apart, require_fit, require_rows, require_unseen
from exitcompiler.capture import capture
from exitcompiler.controlflow import OutputStructure
from exitcompiler.data import Rows, RowSplit, TrainingData, read_rows, read_training_data, split_rows
from exitcompiler.errors import InputError
from exitcompiler.finetuning.checkpoints import require_writable_folder
from exitcompiler.finetuning.devices import training_device
from exitcompiler.finetuning.mixing import require_mixable
from exitcompiler.finetuning.options import FineTune
from exitcompiler.program import Program
from exitcompiler.progress import Reporter
from exitcompiler.settings import Settings

__all__ = [
    "Prepared",
    "model_name",
    "prepare",
    "read_and_split",
    "require_training_device",
    "training_data",
    "training_source",
]

FEWEST_ROWS: Final = 300
"""Fewer calibration rows cannot be split into parts that say anything."""

FIT_SHARE: Final = 0.4
CERTIFY_SHARE: Final = 0.2


@dataclass(frozen=True)
class Prepared:
    """A captured model and its data.

    Args:
        name: Of the model.
        program: The captured network, one block.
        structure: How the model hands over its logits.
        rows: The calibration data.
        split: Row numbers, by use.
        data: What heads, or the network with them, are trained on.
    """

    name: str
    program: Program
    structure: OutputStructure
    rows: Rows
    split: RowSplit
    data: TrainingData

    @property
    def learn(self) -> Rows:
        """The rows that gates are learned on."""
        return self.rows.take(self.split.learn)

    @property
    def fresh(self) -> Rows:
        """The rows that nothing is chosen on."""
        return self.rows.take(self.split.certify)


def prepare(
    model: Any,
    calib_data: Any,
    train_data: Any,
    settings: Settings,
    logits: str | int | None,
    reporter: Reporter,
) -> Prepared:
    """Capture a model and read its data; arguments and errors are those of ``compile``."""
    train_data = training_source(train_data, settings.finetune)
    require_training_device(settings.finetune)
    if settings.finetune is not None:
        require_apart(calib_data, train_data)
    calib_data, example = peek(calib_data)
    with reporter.step("capturing the model"):
        captured = capture(model, example, logits=logits)
    program = captured.program
    rows, split = read_and_split(calib_data, program, settings, with_training=train_data is not None)
    data = training_data(train_data, rows, split, program, settings.finetune)
    return Prepared(model_name(model), program, captured.structure, rows, split, data)


def read_and_split(
    calib_data: Any, program: Program, settings: Settings, *, with_training: bool
) -> tuple[Rows, RowSplit]:
    """Calibration data as rows, checked against a program, and what each of them is for.

    Args:
        calib_data: As a user gives it.
        program: Its inputs and classes.
        settings: Seed and batch size.
        with_training: Whether heads are fitted on training data given apart.

    Raises:
        CalibrationError: The data cannot be used.
    """
    rows = read_rows(calib_data, list(program.inputs), minimum=FEWEST_ROWS)
    require_fit(rows, program)
    split = split_rows(
        len(rows), fit=0.0 if with_training else FIT_SHARE, certify=CERTIFY_SHARE, seed=settings.seed
    )
    require_rows(split, with_training=with_training, batch_size=settings.batch_size)
    return rows, split


def training_data(
    train_data: Any, rows: Rows, split: RowSplit, program: Program, finetune: FineTune | None
) -> TrainingData:
    """What heads, or the network with them, are trained on: the data given, or calibration rows set aside.

    Raises:
        CalibrationError: The data cannot be used; or a network would be tuned on its calibration rows.
        InputError: Inputs cannot be mixed.
        TrainingError: Checkpoints cannot be written.
    """
    if finetune is not None:  # what can be told now need not wait for hours
        if finetune.mixup:
            require_mixable({name: spec.dtype for name, spec in program.inputs.items()})
        if finetune.folder is not None:
            require_writable_folder(finetune.folder)
    if train_data is None:
        data = TrainingData(rows.take(split.fit), tuple(program.inputs))
    else:
        data = read_training_data(train_data, list(program.inputs), minimum=100)
    data = data.for_model(program)
    if finetune is not None:
        require_unseen(rows, data)
    return data


def training_source(train_data: Any, finetune: FineTune | None) -> Any:
    """What is trained on: the call's training data, or fine-tuning's own.

    Args:
        train_data: As given to the call; None: nothing.
        finetune: Perhaps with data of its own; None: heads alone are trained.

    Returns:
        The data as a user gives it; None: there is none, and none is needed.

    Raises:
        InputError: There are both; or there is neither, and calibration rows are too few, and too
            precious, to fine-tune on.
    """
    own = None if finetune is None else finetune.train_data
    if own is not None and train_data is not None:
        raise InputError(
            "training data are given twice, by train_data= and by FineTune(train_data=...)",
            where="finetune",
            remedy="give one of them: heads and network are trained on the same rows",
        )
    if finetune is not None and own is None and train_data is None:
        raise InputError(
            "fine-tuning needs training data, and none is given",
            where="finetune",
            remedy="give train_data=..., the rows that the network was trained on",
        )
    return train_data if own is None else own


def require_training_device(finetune: FineTune | None) -> None:
    """See that there is what a network is to be trained on, before anything slow.

    Raises:
        TrainingError: The device cannot be used.
    """
    if finetune is not None:
        training_device(finetune.device)


def model_name(model: Any) -> str:
    """What to call a model: its class, or the name of its file."""
    return Path(model).stem if isinstance(model, str | PathLike) else type(model).__name__
