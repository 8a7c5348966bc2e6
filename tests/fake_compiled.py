"""A stand-in for a compiled model: answers at once, by rules that a test can see through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FakeCompiled", "FakeResult"]


@dataclass(frozen=True)
class FakeResult:
    """As ``exitcompiler.runtime.compiled.Result``."""

    outputs: Any
    exit_index: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]


class FakeCompiled:
    """Classifies ``x [rows, 2]`` by which column is larger; rows with ``x[:, 0] > 0.5`` leave early."""

    exits = ("early", "backbone")

    def __init__(self) -> None:
        self.calls = 0

    @property
    def plain(self) -> FakeCompiled:
        return FakeCompiled()

    def __call__(self, x: Any) -> Any:
        return self.run(x).outputs

    def run(self, x: Any) -> FakeResult:
        self.calls += 1
        x = x["x"] if isinstance(x, dict) else x
        logits = np.asarray(x, np.float32)
        confidence = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
        exit_index = np.where(logits[:, 0] > 0.5, 0, 1).astype(np.int32)
        return FakeResult(logits, exit_index, confidence.astype(np.float32))
