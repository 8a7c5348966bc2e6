"""The error tree: every error a user can meet says what, where, and what to do about it."""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BackendUnavailableError",
    "BudgetError",
    "CalibrationError",
    "DeviceError",
    "ExitCompilerError",
    "InputError",
    "LoweringError",
    "MeasurementError",
    "PassError",
    "TrainingError",
    "UnsupportedModelError",
    "VerifyError",
]


class ExitCompilerError(Exception):
    """Base of all errors raised on purpose by exitcompiler.

    Args:
        what: What is wrong, in one sentence.
        where: The place (pass, block, node, file, argument), if there is one.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        message = what if where is None else f"{where}: {what}"
        super().__init__(message if remedy is None else f"{message}\n  -> {remedy}")


class UnsupportedModelError(ExitCompilerError):
    """The model cannot be captured, or capturing it would change what it computes."""


class CalibrationError(ExitCompilerError):
    """The calibration or training data cannot be used."""


class InputError(ExitCompilerError, ValueError):
    """An argument or a batch given at run time does not fit the program."""


class VerifyError(ExitCompilerError):
    """A program is not well-formed; raised by ``verify`` and always a bug of the pass before it."""


class PassError(ExitCompilerError):
    """A pass was given a program it cannot work on."""


class LoweringError(ExitCompilerError):
    """A block could not be lowered to a backend, or its outputs do not match the reference."""


class ArtifactError(ExitCompilerError):
    """A saved program is damaged, unsafe, or of a schema this version cannot read."""


class BackendUnavailableError(ExitCompilerError):
    """A backend was asked for by name and is not installed, or cannot run here."""


class DeviceError(ExitCompilerError):
    """A device refused or failed: its memory is full, or a kernel went wrong."""


class BudgetError(ExitCompilerError):
    """A budget or a baseline cannot be read, contradicts itself, or does not fit the program or the data."""


class MeasurementError(ExitCompilerError):
    """A process that measures a program crashed, was killed, hung, or answered nothing."""


class TrainingError(ExitCompilerError):
    """Fine-tuning diverged, or its checkpoint cannot be written, read or gone on from."""
