"""The GPU check: its programs, and its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from exitcompiler.interpreter import interpret

# Programs


def test_the_chosen_share_of_rows_leaves_at_each_exit(
    bench: Callable[[str], ModuleType], workload: Any
) -> None:
    assert np.bincount(workload.exit_index).tolist() == [16, 8, 8]
    assert len(workload.program.blocks) == len(workload.program.exits) == 3
    found = interpret(workload.program, {"x": torch.from_numpy(workload.x)})
    np.testing.assert_array_equal(found.exit_index, workload.exit_index)


def test_the_program_goes_on_to_the_answer_of_the_whole_network(
    bench: Callable[[str], ModuleType], workload: Any
) -> None:
    x = torch.from_numpy(workload.x[workload.exit_index == 2])
    (answer,) = interpret(workload.program, {"x": x}).outputs.values()
    with torch.no_grad():
        torch.testing.assert_close(answer, workload.network(x), rtol=1e-4, atol=1e-4)
    assert answer.std() > 0.01  # values neither vanish nor explode


def test_the_ideal_of_an_exit_computes_its_answer_and_nothing_else(
    bench: Callable[[str], ModuleType], workload: Any
) -> None:
    prefixes = bench("prefixes")
    x = torch.from_numpy(workload.x)
    for exit_index, name in enumerate(workload.program.exits):
        block, with_scores = (
            make(workload.program, name) for make in (prefixes.answer_block, prefixes.prefix_block)
        )
        (answer,) = block.results
        assert len(with_scores.results) > 1
        assert len(block.body.graph.nodes) < len(with_scores.body.graph.nodes)
        rows = x[workload.exit_index == exit_index]
        (wanted,) = interpret(workload.program, {"x": rows}).outputs.values()
        with torch.no_grad():
            torch.testing.assert_close(block.run({"x": rows})[answer], wanted, rtol=1e-4, atol=1e-4)
        called = [str(node.target) for node in block.body.graph.nodes if node.op == "call_function"]
        assert not [target for target in called if "softmax" in target or "topk" in target]


def test_limits_lie_between_the_scores_of_two_rows(bench: Callable[[str], ModuleType]) -> None:
    scores = np.array([[0.9, 0.1, 0.8, 0.3], [0.2, 0.6, 0.9, 0.4]])
    limits, exit_index = bench("gpu_programs").thresholds(scores, (0.5, 0.25))
    assert limits == pytest.approx([0.55, 0.5])
    assert exit_index.tolist() == [0, 1, 0, 2]


def test_every_place_gets_a_cut_of_its_own(bench: Callable[[str], ModuleType]) -> None:
    cuts = [
        SimpleNamespace(name=name, flops_share=share) for name, share in (("a", 0.1), ("b", 0.34), ("c", 0.9))
    ]
    chosen = bench("gpu_programs").choose_cuts(cuts, (1 / 3, 0.35))
    assert [cut.name for cut in chosen] == ["a", "b"]


def test_the_larger_network_is_the_one_of_fifty_layers(bench: Callable[[str], ModuleType]) -> None:
    with torch.device("meta"):
        network = bench("gpu_programs").MODELS["resnet50"].network()
    assert sum(p.numel() for p in network.parameters()) == 25_557_032  # as torchvision's
    assert network(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


# Arithmetic


def test_a_nodes_cost_is_the_slope_above_as_many_kernels(bench: Callable[[str], ModuleType]) -> None:
    matched = {n: 4.0 + 1.5 * n for n in range(200)}
    chain = {n: matched[2 * n] + 0.7 * n + 0.1 for n in (0, 1, 8, 64)}
    found = bench("gpu_nodes").node_costs(chain, matched, {n: 2 * n for n in chain})
    assert found["us_per_node"] == pytest.approx(0.7)
    assert found["above_us"]["8"] == pytest.approx(5.7)


def test_ideals(bench: Callable[[str], ModuleType]) -> None:
    figures = bench("gpu_latency")
    prefix_us = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    assert figures.ideal_of_rows(np.array([0, 1, 0]), prefix_us).tolist() == [1.0, 20.0, 3.0]
    assert figures.ideal_of_shares((24, 8), prefix_us).tolist() == [3.25, 6.5, 9.75]


@pytest.mark.parametrize("exits", [2, 3, 4])
def test_mixes_go_from_all_leave_to_none_leave(bench: Callable[[str], ModuleType], exits: int) -> None:
    found = bench("gpu_latency").mixes(32, exits)
    assert found[0] == (32, *[0] * (exits - 1))
    assert found[-1] == (*[0] * (exits - 1), 32)
    assert all(sum(mix) == 32 and len(mix) == exits and min(mix) >= 0 for mix in found)
    assert len(set(found)) == len(found) >= 5
    if exits == 3:
        assert (16, 8, 8) in found


def test_ratios_and_differences_have_intervals(bench: Callable[[str], ModuleType]) -> None:
    a, b = np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])
    figures = bench("gpu_latency")
    assert figures.ratio(a, b) == {"value": 2.0, "lower": 2.0, "upper": 2.0, "median": 2.0}
    found = figures.difference(a, b)
    assert found["value"] == found["median"] == 2.0
    assert 1.0 <= found["lower"] <= found["value"] <= found["upper"] <= 3.0


def test_answers_are_compared_where_rows_left_alike(bench: Callable[[str], ModuleType]) -> None:
    wanted = np.array([[4.0, 0.0], [0.0, 2.0]], np.float32)
    compare = bench("gpu_checks").compare_rows
    found = compare(wanted + np.array([[0.1, 0.0], [9.0, 0.0]]), np.array([0, 1]), wanted, np.array([0, 0]))
    assert found["same_exit"] == 0.5
    assert found["same_class"] == 0.5
    assert found["max_abs"] == pytest.approx(0.1)
    assert found["relative"] == pytest.approx(0.025)
    broken = compare(np.full_like(wanted, np.nan), np.array([0, 0]), wanted, np.array([0, 0]))
    assert broken["relative"] is broken["max_abs"] is None  # JSON has no infinity
