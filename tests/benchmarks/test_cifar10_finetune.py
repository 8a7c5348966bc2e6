"""The parts of the fine-tuning benchmark that need no data: training time, frontiers, verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROWS = 400


def using(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", [name], indirect=True)


def point(drop: float, time_us: float) -> tuple[np.ndarray, np.ndarray]:
    return (np.arange(ROWS) < drop * ROWS).astype(np.float64), np.full(ROWS, time_us)


def family(*points: tuple[np.ndarray, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [drops for drops, _ in points], [times for _, times in points]


def interval(value: float) -> dict[str, float]:
    return {"value": value, "lower": value, "upper": value}


@using("cascade_domination")
def test_two_points_may_share_the_rows_between_them(module: ModuleType) -> None:
    families = {"a": family(point(0.0, 1000.0), point(0.01, 800.0), point(0.02, 500.0))}
    drops = [0.0, 0.01, 0.015, 0.03]
    apart = module.resampled_least_us(families, drops, 1000.0, resamples=2)["a"][0]
    mixed = module.resampled_least_us(families, drops, 1000.0, resamples=2, mixed=True)["a"][0]
    np.testing.assert_allclose(apart, [1000.0, 800.0, 800.0, 500.0])
    np.testing.assert_allclose(mixed, [1000.0, 750.0, 625.0, 500.0])  # on the line from the first to the last


@using("cifar10_finetune_chart")
def test_the_line_of_a_frontier_leaves_out_what_a_mixture_beats(module: ModuleType) -> None:
    points = [(1.0, 90.0), (2.0, 91.0), (3.0, 93.0), (4.0, 93.2), (2.5, 89.0), (5.0, 92.0)]
    assert module.hull(points) == [(1.0, 90.0), (3.0, 93.0), (4.0, 93.2)]
    assert module.hull([(1.0, 90.0), (1.0, 91.0)]) == [(1.0, 91.0)]


@using("cifar10_finetune_clock")
def test_training_time_is_summed_over_calls_and_one_that_was_killed_is_not_forgotten(
    module: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "resnet" / "time.json"
    for _ in range(2):  # neither is told to stop
        clock = module.TrainingClock(path, {"threads": 1})
        batches = clock.over([1, 2, 3])
        assert len(batches) == 3
        assert list(batches) == [1, 2, 3]
        clock.write()
    found = json.loads(path.read_text())
    assert [call["threads"] for call in found["calls"]] == [1, 1]
    assert found["wall_s"] == sum(call["wall_s"] for call in found["calls"])


@using("cifar10_finetune_clock")
def test_a_call_that_found_its_training_complete_is_not_counted(module: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "time.json"
    first = module.TrainingClock(path, {"threads": 2})
    list(first.over([1]))
    first.stop(trained=True)
    again = module.TrainingClock(path, {"threads": 2})
    list(again.over([1]))
    again.write()
    assert len(json.loads(path.read_text())["calls"]) == 2
    again.stop(trained=False)
    (call,) = json.loads(path.read_text())["calls"]
    assert call["complete"]


@using("cifar10_finetune_targets")
@pytest.mark.parametrize(
    ("speedup", "drop_mean", "outcome"),
    [(2.6, 0.009, "aim"), (1.8, 0.01, "must"), (1.6, 0.009, "miss"), (2.6, 0.011, "miss")],
)
def test_a_speed_up_counts_where_the_limit_is_kept_over_re_splits(
    module: ModuleType, speedup: float, drop_mean: float, outcome: str
) -> None:
    figures = {
        "final": {"ResNet-56 tuned": _final(speedup, "ResNet-56")},
        "ResNet-56 tuned": {"resplits": {"limit": 0.01, "limits": {"asked": {"drop_mean": drop_mean}}}},
        "table": {"onnxruntime": []},
    }
    line = module.speedup_target(figures, "ResNet-56 tuned", "", (1.7, 2.5))
    assert line.outcome == outcome


@using("cifar10_finetune_targets")
def test_a_smaller_network_is_judged_against_itself(module: ModuleType) -> None:
    beside = {"name": "ResNet-20", "speedup": interval(1.5), "drop": interval(0.004)}
    row = {
        "name": "a point", "series": "ResNet-20 tuned", "speedup": interval(4.0), "drop": interval(0.022),
        "beside": beside,
    }  # fmt: skip
    figures = {
        "final": {"ResNet-20 tuned": _final(1.4, "ResNet-20")},
        "ResNet-20 tuned": {"resplits": {}},
        "table": {"onnxruntime": [row]},
    }
    line = module.speedup_target(figures, "ResNet-20 tuned", "", (1.4, 2.0))
    assert "a point: 1.50x (1.50 to 1.50) at 0.40" in line.measured
    assert line.outcome == "miss"  # nothing says that the drop is kept


@using("cifar10_finetune_targets")
def test_the_frontier_reaches_the_aim_only_where_it_is_ahead_everywhere(
    module: ModuleType, bench: Callable[[str], ModuleType]
) -> None:
    domination = bench("cascade_domination").domination
    latency = bench("cifar10_finetune_latency")
    reference = 0.94
    plain = point(0.0, 1000.0)
    networks = family(plain, point(0.02, 500.0))
    families = {latency.GIVEN: networks, latency.GIVEN_AND_TUNED: networks}

    def outcome(*ours: tuple[np.ndarray, np.ndarray]) -> Any:
        found = domination("o", {"o": family(plain, *ours), **families}, reference, 1000.0, mixed=True)
        return module.frontier_target(found)

    assert outcome(point(0.03, 100.0)).outcome == "aim"
    behind = outcome(point(0.0, 900.0))
    assert behind.outcome == "reported"
    assert "furthest behind at 91.7 %: -400" in behind.measured
    assert module.frontier_target(None).outcome == "reported"


def _final(speedup: float, reference: str) -> dict[str, Any]:
    return {"speedup": interval(speedup), "drop": interval(0.0), "reference": reference}
