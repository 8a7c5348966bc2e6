"""What the report says of how networks were quantised."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from exitcompiler.float_layers import Settled
from exitcompiler.targets import Target

__all__ = ["quantization_entry", "settled_entry", "settled_sentence"]


def settled_entry(settled: Settled) -> dict[str, Any]:
    """How a network was quantised, as plain data.

    Args:
        settled: What was tried.

    Returns:
        ``kept_float``: names of the products left in float32, besides the last; ``accuracy_drop`` of the
        whole network against float32, with its interval, on the learning rows; ``tried``: the same for
        every number of products left.
    """
    return {
        "kept_float": list(settled.trial.kept_float),
        "accuracy_drop": asdict(settled.trial.drop),
        "tried": [
            {"kept_float": len(trial.kept_float), "accuracy_drop": asdict(trial.drop)}
            for trial in settled.trials
        ],
    }


def settled_sentence(settled: Settled) -> str:
    """The same in words."""
    drop, kept = settled.trial.drop, settled.trial.kept_float
    return (
        f"the whole network drops {100 * drop.value:.2f} points "
        f"({100 * drop.lower:.2f} to {100 * drop.upper:.2f}) against float32, "
        + (f"with {', '.join(kept)} left in it" if kept else "no layer left in it but the last")
    )


def quantization_entry(target: Target) -> dict[str, Any]:
    """How the network, or the reference of a cascade, was quantised, and what that brings.

    Args:
        target: Of precision int8.

    Returns:
        As ``settled_entry``; ``plain``: in which precision the plain engine is; ``int8_ms``, ``float_ms``:
        the time of a row in the whole network.
    """
    assert target.settled is not None
    assert target.float_us is not None
    return {
        **settled_entry(target.settled),
        "plain": target.plain_precision,
        "int8_ms": target.times_us[target.engines.backend.name] / 1000.0,
        "float_ms": target.float_us / 1000.0,
    }
