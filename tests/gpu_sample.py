"""What the GPU check found on a machine that does not exist: for its tables and verdicts."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["sample_run"]


def sample_run() -> dict[str, Any]:
    """A run in which everything worked and every target is reached; the caller's own."""
    steps: dict[str, Any] = {
        "environment": _step(_ENVIRONMENT),
        "tests": _step(
            {"tests": 12, "passed": 11, "skipped": [{"name": "t", "why": "no TensorRT"}], "bad": []}
        ),
        "nodes": _step({"flat": _NODES, "nested": _NESTED}),
        "tensorrt resnet56": _step({"absent": "TensorRT is not installed"}),
        "cond resnet56": _step({"max_abs": 1e-6, "cond": _turns("program, torch.cond in a CUDA graph")}),
    }
    for model in ("resnet56", "resnet50"):
        steps[f"rows {model} fp32"] = _step({"rows": _rows()})
        steps[f"parity {model}"] = _step({"fp32": {"1": _PARITY, "32": _PARITY}, "fp16": {"1": _PARITY}})
        steps[f"batches {model}"] = _step({"batches": _BATCHES})
        steps[f"calls {model}"] = _step(
            {"memory": {"1": _MEMORY}, "launches": {"1": _QUIET}, "calls": {"1": _CALL}}
        )
        steps[f"torch {model}"] = _step({"eager": _turns("whole network, eager"), "compile_seconds": 30.0})
    found: dict[str, Any] = json.loads(json.dumps({"steps": steps, "seconds": 321.0}))
    return found


def _step(figures: dict[str, Any]) -> dict[str, Any]:
    return {"ok": True, "seconds": 12.0, "code": 0, "reason": None, "figures": figures}


def _figure(value: float) -> dict[str, float]:
    return {"value": value, "lower": value - 0.01, "upper": value + 0.01, "median": value}


def _times(mean_us: float) -> dict[str, float]:
    return {"mean_us": mean_us, "median_us": mean_us - 1.0, "p99_us": mean_us + 9.0}


def _rows() -> dict[str, Any]:
    found: dict[str, Any] = {
        "exits": ["a", "backbone"],
        "exit_rates": {"a": 0.5, "backbone": 0.5},
    }
    for clock in ("wall", "device"):
        found[clock] = {
            "turns": 400,
            "contenders": {
                "program, one launch": _times(103.0),
                "just the answer of a": _times(70.0),
                "whole network, one CUDA graph": _times(140.0),
                **({"a graph per block, host branches": _times(150.0)} if clock == "wall" else {}),
            },
            "ideal": _times(100.0),
            "over_ideal": _figure(1.03),
            "over_ideal_with_scores": _figure(1.01),
            "against": {"whole network, one CUDA graph": _figure(1.36)},
            "leaving_first": {
                "rows": 200,
                "program": _times(72.0),
                "suffix_us": _figure(1.9),
                "suffix_and_decision_us": _figure(9.5),
            },
            "late_over_whole": _figure(1.1),
        }
    return found


def _turns(name: str) -> dict[str, Any]:
    contenders = {"program, one launch": _times(103.0), name: _times(206.0)}
    return {"turns": 400, "contenders": contenders, "against": {name: _figure(2.0)}}


_ENVIRONMENT: Any = {
    "device": "Imaginary 9000",
    "compute_capability": "9.0",
    "memory_bytes": 80 * 2**30,
    "driver_cuda": "13.0",
    "torch_cuda": "13.0",
    "cudnn": 91900,
    "tf32": {"convolutions": True, "products of matrices": False},
    "versions": {"torch": "2.11.0+cu130", "numpy": "2.4.6", "cuda-bindings": "13.0.3"},
    "python": "3.12.3",
    "system": "Linux 6",
    "cpus": 16,
    "date": "2026-11-20",
    "as_found": {"driver_version": "580.1", "clocks.sm": "345 MHz"},
}

_NODES: Any = {
    "counts": [0, 1, 8],
    "refused": {},
    "us_per_kernel": 1.5,
    "us_of_a_launch": 4.0,
    "kinds": {
        "IF, not taken": {
            "us_per_node": 1.25,
            "chain_us": {"0": 5.5, "1": 8.25, "8": 27.5},
            "matched_us": {"0": 5.5, "1": 7.0, "8": 17.5},
            "above_us": {"0": 0.0, "1": 1.25, "8": 10.0},
        },
    },
}

_NESTED: Any = {
    **_NODES,
    "refused": {"IF in IF, all taken 64": "too deep"},
    "kinds": {
        "IF in IF, inside one that is not taken": {"us_per_node": 0.01, "chain_us": {"1": 8.0, "8": 8.1}}
    },
}

_PARITY: Any = {"rows": 96, "same_exit": 1.0, "same_class": 1.0, "max_abs": 1e-5, "relative": 2e-6}

_BATCHES: Any = {
    "batch": 32,
    "buckets": [1, 2, 4, 8, 16, 32],
    "mixes": [
        {"rows_by_exit": [32, 0, 0], "missing": "no such rows among those that were made"},
        {
            "rows_by_exit": [16, 8, 8],
            "turns": 200,
            "program": _times(500.0),
            "rows_per_second": 64000.0,
            "ideal_by_shares": _times(460.0),
            "ideal_by_rows": _times(480.0),
            "throughput_by_shares": _figure(0.92),
            "throughput_by_rows": _figure(0.96),
        },
    ],
}

_QUIET: Any = {"launches": 50, "calls": {"launch": 50}, "allocate": 0, "wait": 0, "taken_bytes": 0}

_CALL: Any = {
    **_QUIET,
    **_PARITY,
    "came_back_before_the_device": True,
    "device_allocations": 0,
    "segments": 0,
    "torch_waited": None,
}

_MEMORY: Any = {
    "seconds": 1.5,
    "values_bytes": 2**20,
    "tables_bytes": 2048,
    "torch_bytes": 5 * 2**20,
    "device_bytes": 9 * 2**20,
    "nodes": {"route": 3, "if": 2, "block": 3, "in blocks": 240},
}
