"""What can become of a network of the zoo, in a process of its own."""

from __future__ import annotations

import os
import time
from typing import Any

from exitcompiler.errors import UnsupportedModelError

__all__ = ["abort", "fill_memory", "find_figures", "hang", "raise_value_error", "refuse"]


def find_figures(model: Any, progress: Any) -> None:
    with progress.stage("a stage"):
        progress.figures["nodes"] = len(model.name)


def refuse(model: Any, progress: Any) -> None:
    raise UnsupportedModelError("it cannot be", where="node 'x'", remedy="change it")


def raise_value_error(model: Any, progress: Any) -> None:
    raise ValueError("something else")


def abort(model: Any, progress: Any) -> None:
    with progress.stage("a stage"):
        os.abort()


def hang(model: Any, progress: Any) -> None:
    with progress.stage("a stage"):
        time.sleep(1000)


def fill_memory(model: Any, progress: Any) -> None:
    bytearray(1 << 50)
