"""A report and a control flow as ``compile`` makes them, for the tests of whatever shows them."""

from __future__ import annotations

from typing import Any

from exitcompiler.controlflow import (
    BATCH,
    BlockInterface,
    Branch,
    ControlFlow,
    Edge,
    LinearGate,
    Return,
    ValueSpec,
)
from exitcompiler.runtime.manifest import Estimate, OperatingPoint

__all__ = ["other_point", "sample_control_flow", "sample_report"]


def sample_report() -> dict[str, Any]:
    """Two exits kept of three, one pruned; every key of the schema is there."""
    rates = {"layer1.8": 0.31, "layer2.6": 0.42, "backbone": 0.27}
    return {
        "model": {"name": "resnet56", "parameters": 855770, "flops": 127_000_000},
        "environment": {"python": "3.11.7", "torch": "2.13.0", "cpu": "two cores"},
        "settings": {
            "max_accuracy_drop": 0.01,
            "backend": "auto",
            "precision": "fp32",
            "batch_size": 1,
            "seed": 0,
        },
        "rows": {"fit": 30000, "learn": 3500, "certify": 1500},
        "refused": None,
        "exits": [
            {
                "name": "layer1.8",
                "depth": 0.33,
                "kept": True,
                "head": "deep",
                "reason": "saves 0.21 ms a row",
                "probe_accuracy": 0.54,
                "head_accuracy": 0.75,
                "head_flops": 2_100_000,
                "prefix_ms": 0.41,
                "head_ms": 0.04,
                "exit_rate": 0.31,
                "exit_accuracy": 0.984,
                "gate": "linear on 3 features",
            },
            {
                "name": "layer2.2",
                "depth": 0.44,
                "kept": False,
                "head": "linear",
                "probe_accuracy": 0.61,
                "reason": "its gate was constant: always go on",
                "exit_rate": 0.0,
            },
            {
                "name": "layer2.6",
                "depth": 0.61,
                "kept": True,
                "head": "deep",
                "reason": "saves 0.12 ms a row",
                "probe_accuracy": 0.7,
                "head_accuracy": 0.85,
                "head_flops": 1_900_000,
                "prefix_ms": 0.71,
                "head_ms": 0.03,
                "exit_rate": 0.42,
                "exit_accuracy": 0.961,
                "gate": "linear on 6 features",
            },
        ],
        "frontier": [
            {
                "name": "plain",
                "accuracy": 0.938,
                "accuracy_drop": 0.0,
                "excess_error": 0.0,
                "mean_latency_ms": 1.15,
                "speedup": 1.0,
                "exit_rates": {"backbone": 1.0},
                "shipped": True,
                "chosen": False,
            },
            {
                "name": "point-1",
                "accuracy": 0.93,
                "accuracy_drop": 0.008,
                "excess_error": 0.012,
                "mean_latency_ms": 0.75,
                "speedup": 1.53,
                "exit_rates": rates,
                "shipped": True,
                "chosen": True,
            },
            {
                "name": "point-2",
                "accuracy": 0.9,
                "accuracy_drop": 0.038,
                "excess_error": 0.045,
                "mean_latency_ms": 0.55,
                "speedup": 2.09,
                "exit_rates": {"layer1.8": 0.7, "backbone": 0.3},
                "shipped": False,
                "chosen": False,
            },
        ],
        "baselines": {
            "max_probability": [
                {"accuracy_drop": 0.004, "mean_latency_ms": 0.9},
                {"accuracy_drop": 0.0099, "mean_latency_ms": 0.79},
                {"accuracy_drop": 0.03, "mean_latency_ms": 0.6},
            ],
            "oracle": [{"accuracy_drop": -0.02, "mean_latency_ms": 0.5}],
        },
        "certificate": {
            "point": "point-1",
            "confidence": 0.95,
            "bound": 0.0178,
            "errors": 18,
            "rows": 1500,
            "target": 0.01,
            "rows_needed": None,
        },
        "latency": {
            "point": "point-1",
            "program": {"mean_ms": 0.752, "p50_ms": 0.7, "p99_ms": 1.31},
            "plain": {"mean_ms": 1.151, "p50_ms": 1.14, "p99_ms": 1.28},
            "speedup": {"value": 1.53, "lower": 1.5, "upper": 1.56},
            "execution": "single",
            "backend": "onnxruntime",
            "threads": 1,
        },
        "reliability": {
            "layer1.8": {
                "confidence": [0.35, 0.55, 0.75, 0.95],
                "accuracy": [0.3, 0.5, 0.72, 0.97],
                "count": [40, 200, 400, 860],
            },
            "backbone": {"confidence": [0.55, 0.95], "accuracy": [0.5, 0.94], "count": [100, 1400]},
        },
        "rounds": [
            {"exits": ["layer1.8", "layer2.2", "layer2.6"], "mean_latency_ms": 0.79},
            {"exits": ["layer1.8", "layer2.6"], "mean_latency_ms": 0.752},
        ],
        "notes": ["OpenVINO was slower here (1.21 ms)."],
    }


def sample_control_flow() -> ControlFlow:
    """A chain of three blocks with two exits, as in ``sample_report``."""
    image = ValueSpec((BATCH, 3, 32, 32), "float32")
    features = ValueSpec((BATCH, 16, 32, 32), "float32")
    logits = ValueSpec((BATCH, 10), "float32")
    confidence = ValueSpec((BATCH, 3), "float32")

    def gate(*reads: str) -> LinearGate:
        return LinearGate(reads, ((1.0,) * 3 * len(reads), (0.0,) * 3 * len(reads)), (-0.9, 0.0))

    return ControlFlow(
        inputs={"x": image},
        outputs={"logits": logits},
        blocks=(
            BlockInterface(
                "b0",
                {"x": image},
                {"h0": features, "l0": logits, "c0": confidence},
                Branch(gate("c0"), (Return(("l0",), "layer1.8"), Edge("b1", ("h0", "c0")))),
            ),
            BlockInterface(
                "b1",
                {"h": features, "c0": confidence},
                {"h1": features, "l1": logits, "c1": confidence},
                Branch(gate("c0", "c1"), (Return(("l1",), "layer2.6"), Edge("b2", ("h1",)))),
            ),
            BlockInterface("b2", {"h": features}, {"l2": logits}, Return(("l2",), "backbone")),
        ),
    )


def other_point(name: str = "point-2") -> OperatingPoint:
    """An operating point of ``sample_report`` that is not the one that was measured."""
    rates = {"layer1.8": 0.7, "layer2.6": 0.0, "backbone": 0.3}
    return OperatingPoint(name, sample_control_flow(), {}, Estimate(0.9, 0.038, 0.045, 0.55, rates))
