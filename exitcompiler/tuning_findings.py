"""What the report says of fine-tuning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from exitcompiler.fitting import Fitted
from exitcompiler.scores import BoolArray
from exitcompiler.statistics import mean_difference_interval

__all__ = ["tuning_entry"]


def tuning_entry(fitted: Fitted, after: BoolArray, before: BoolArray) -> dict[str, Any]:
    """How a network was tuned, and how far its own answers moved by that.

    Args:
        fitted: With what fine-tuning came to.
        after: Where the tuned network's own answer is right, ``bool[n]``, on rows it was not trained on.
        before: Where the original network's is.
    """
    tuned = fitted.tuned
    assert tuned is not None
    moved = mean_difference_interval(after.astype(np.float64), before.astype(np.float64))
    return {
        "epochs": len(tuned.history),
        "rows": fitted.rows,
        "seconds": tuned.seconds,
        "resumed_at": tuned.resumed_at,
        "device": tuned.device,
        "precision": tuned.precision,
        "history": [list(losses) for losses in tuned.history],
        "search": tuned.notes.get("search", {}),
        "options": dict(tuned.options.as_dict()),
        "tuned_accuracy": float(after.mean()),
        "original_accuracy": float(before.mean()),
        "moved": asdict(moved),
        "judged_on": len(after),
    }
