"""What fine-tuning runs on: a device, its precision, and the end of its memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

from exitcompiler.errors import TrainingError
from exitcompiler.finetuning.options import FineTune
from exitcompiler.training import supports_bfloat16

__all__ = ["device_name", "memory_errors", "training_device", "training_dtype"]

_ON_A_CPU: Final = re.compile("can't allocate memory|not enough memory")
"""What torch says there, in an error without a type of its own."""


def training_device(name: str) -> torch.device:
    """What to train on: a device by its name, or with ``"auto"`` a GPU where there is one.

    Raises:
        TrainingError: It is not there, or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(
            f"the device {name!r} cannot be used: {error}", where="FineTune", remedy="device='cpu' or 'auto'"
        ) from None
    return device


def device_name(device: torch.device) -> str:
    """For the report: ``cpu``, or ``cuda`` with the name of the GPU."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def training_dtype(device: torch.device, options: FineTune) -> torch.dtype:
    """What is multiplied in: bfloat16 where that is allowed, and the device does it faster."""
    if device.type == "cuda":
        fast = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    else:
        fast = device.type == "cpu" and supports_bfloat16()
    return torch.bfloat16 if fast and options.mixed_precision else torch.float32


@contextmanager
def memory_errors(options: FineTune, where: Callable[[], str]) -> Iterator[None]:
    """Say what to do where memory ends.

    Args:
        options: How it is trained.
        where: Asked when it ends.

    Raises:
        TrainingError: It ended.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or _ON_A_CPU.search(str(error))):
            raise
        (said, *_) = str(error).splitlines() or [type(error).__name__]
        raise TrainingError(f"memory is full: {said}", where=where(), remedy=_smaller(options)) from error


def _smaller(options: FineTune) -> str:
    if options.batch_size < 4:
        return "a device with more memory, or smaller inputs"
    kept = options.batch_size // 2
    said = f"batch_size={kept} and accumulate={2 * options.accumulate}: steps of as many rows in less memory"
    if options.folder is not None:
        said += f"; and another checkpoint folder, as the one in {options.folder} is of the present options"
    return said
