"""The parts of the int8 benchmark that need no data: verdicts, and what the section says."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest

PROGRAMS = ("cascade, int8", "cascade on OpenVINO, int8", "ResNet-56 tuned, int8")


def using(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", [name], indirect=True)


def interval(value: float) -> dict[str, float]:
    return {"value": value, "lower": value - 0.01, "upper": value + 0.01}


def final(speedup: float, drop: float) -> dict[str, Any]:
    return {
        "point": "drop+0.80",
        "speedup": interval(speedup),
        "drop": interval(drop),
        "accuracy": 0.93,
        "exit_rates": {"resnet20": 0.8, "resnet56": 0.2},
        "program_ms": {"mean": 0.3},
        "plain_ms": {"mean": 0.3 * speedup},
    }


def row(name: str, kind: str, chosen: bool = False) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "engine": "ONNX Runtime int8", "accuracy": 0.93, "drop": interval(0.008),
        "mean_ms": 0.3, "median_ms": 0.2, "p99_ms": 1.1, "speedup": interval(4.0), "median_speedup": 6.0,
        "exits": ["a", "b"], "execution": "blocks", "chosen": chosen, "series": "", "dominated_by": [],
    }  # fmt: skip


def figures() -> dict[str, Any]:
    quantization = {"kept_float": ["conv2d_3"], "accuracy_drop": interval(0.001), "tried": []}
    spread = {
        "drop_mean": 0.0073, "drop_sd": 0.003, "drop_range": [0.001, 0.012],
        "speedup_mean": 2.1, "speedup_sd": 0.1, "speedup_range": [1.9, 2.3],
    }  # fmt: skip
    program = {
        "against_int8": final(2.1, 0.009),
        "against_fp32": final(4.4, 0.008),
        "ideal": {"latency_ratio": interval(1.08)},
        "resplits": {"resplits": 20, "rows": 5000, "limits": {"asked": spread, "not_lower": spread}},
        "steps_seconds": {"learning gates": 3.0},
        "seconds": 61.0,
        "quantization": quantization,
        "quantized_networks": {"resnet20": quantization},
    }
    decisions = {
        "rows": 5000, "same_exit": 0.987, "leave_earlier": 0.006, "leave_later": 0.007,
        "heads": {"layer1.1 deep": [0.88, 0.879]}, "end": [0.93, 0.931],
    }  # fmt: skip
    rows = [
        {"name": "fp32", "accuracy_drop": 0.0, "mean_latency_ms": 1.4, "kept": True, "chosen": False},
        {"name": "int8", "accuracy_drop": 0.02, "mean_latency_ms": 0.6, "kept": False, "chosen": False},
        {
            "name": "exits in int8",
            "accuracy_drop": 0.008,
            "mean_latency_ms": 0.3,
            "kept": True,
            "chosen": True,
        },
        {"name": "bf16", "refused": "not on this processor", "kept": False, "chosen": False},
    ]
    table = [
        row("ResNet-56", "plain"),
        row("ResNet-56 int8", "int8"),
        row("cascade, int8, drop+0.80", "program"),
    ]
    env = {"date": "2026-01-01", "processor": "P", "cpus": 2, "system": "Linux", "python": "3.11"}
    found: dict[str, Any] = {name: copy.deepcopy(program) for name in PROGRAMS}
    found["ResNet-56 tuned, int8"]["decisions"] = decisions
    found["ResNet-56 tuned, fp32"] = {
        key: program[key] for key in ("against_fp32", "steps_seconds", "seconds")
    }
    pair = {"against_int8": final(2.05, 0.001), "against_fp32": final(4.05, -0.001)}
    return found | {
        "points": {"cascade, int8": {"drop-0.20": pair}},
        "ResNet-56 tuned, auto": program | {"precisions": rows},
        "table": {"onnxruntime": table, "openvino": table},
        "environment": env,
        "effort": {"calibration_rows": 5000, "train_images": 50_000, "final_rows": 5000, "timed_rows": 2000},
    }


@using("cifar10_int8_text")
def test_targets_are_judged_by_their_bars(module: ModuleType) -> None:
    found = module.int8_targets(figures())
    assert [target.outcome for target in found] == [
        "must", "must", "must", "must", "must", "must", "must", "reported",
    ]  # fmt: skip
    worse = figures()
    worse["cascade, int8"]["against_int8"]["speedup"] = interval(1.69)
    worse["cascade, int8"]["against_fp32"]["speedup"] = interval(6.0)
    worse["ResNet-56 tuned, int8"]["ideal"]["latency_ratio"] = interval(1.13)
    outcomes = [target.outcome for target in module.int8_targets(worse)]
    assert outcomes == ["miss", "aim", "must", "must", "must", "miss", "must", "reported"]


@using("cifar10_int8_text")
def test_the_section_has_every_figure(module: ModuleType) -> None:
    text = module.int8_section(figures())
    for part in (
        "2.10x (2.09 to 2.11)", "4.40x", "98.70 % leave at the same exit",
        "| layer1.1 deep | 88.00 | 87.90 |",
        "conv2d_3", "over the limit", "not on this processor", "20 random re-splits", "0.73 ± 0.30",
        "| ResNet-56 tuned | 4.40x (4.39 to 4.41) | 0.80 (-0.20 to 1.80) | 2.10x (2.09 to 2.11) | 4.40x",
        "| cascade, int8, drop-0.20 | 93.00 | -0.10 (-1.10 to 0.90) | 2.05x",
    ):  # fmt: skip
        assert part in text, part
    assert text.startswith("## int8 on CIFAR-10: a cascade, and a tuned network with exits\n")


@using("cifar10_int8_text")
def test_a_program_that_was_refused_has_no_figures_of_dispatch(module: ModuleType) -> None:
    refused = figures()
    for key in ("ideal", "resplits", "decisions"):
        refused["ResNet-56 tuned, int8"].pop(key)
    assert "thresholds on scores" not in module.int8_section(refused)
    assert len(module.int8_targets(refused)) == 6
