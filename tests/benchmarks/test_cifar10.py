"""The parts of the CIFAR-10 benchmark that need no data: verdicts, pages, rows, prefix blocks."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import programs
import pytest
import torch


def using(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", [name], indirect=True)


@using("cifar10_targets")
@pytest.mark.parametrize(
    ("value", "must", "aim", "at_least", "expected"),
    [
        (1.8, 1.35, 1.7, True, "aim"),
        (1.35, 1.35, 1.7, True, "must"),
        (1.34, 1.35, 1.7, True, "miss"),
        (1.02, 1.10, 1.03, False, "aim"),
        (1.11, 1.10, 1.03, False, "miss"),
        (1e-5, 1e-4, None, False, "must"),
        (float("nan"), 1.35, 1.7, True, "miss"),
    ],
)
def test_a_verdict_names_the_highest_bar_that_is_cleared(
    module: ModuleType, value: float, must: float, aim: float | None, at_least: bool, expected: str
) -> None:
    assert module.verdict(value, must, aim, at_least=at_least) == expected


@using("cifar10_format")
def test_only_what_stands_between_the_markers_is_replaced(module: ModuleType) -> None:
    page = "# Page\n\n<!-- a -->\nold\n<!-- /a -->\n\nrest\n"
    assert module.with_section(page, "a", "new\n") == "# Page\n\n<!-- a -->\nnew\n<!-- /a -->\n\nrest\n"


@using("cifar10_format")
def test_a_page_without_markers_gets_them_at_its_end(module: ModuleType) -> None:
    page = module.with_section("# Page\n", "a", "new")
    assert page == "# Page\n\n<!-- a -->\nnew\n<!-- /a -->\n"
    assert module.with_section(page, "a", "newer").count("<!-- a -->") == 1


@using("cifar10_latency")
def test_a_row_is_dominated_by_what_is_faster_and_as_accurate(module: ModuleType) -> None:
    row = {"mean_ms": 1.0, "accuracy": 0.92}
    others = [
        {"name": "faster and better", "mean_ms": 0.9, "accuracy": 0.93},
        {"name": "faster and as good", "mean_ms": 0.9, "accuracy": 0.92},
        {"name": "faster, worse", "mean_ms": 0.5, "accuracy": 0.91},
        {"name": "better, slower", "mean_ms": 1.1, "accuracy": 0.95},
    ]
    assert module.dominating(row, others) == ["faster and better", "faster and as good"]


@using("cifar10_setup")
def test_figures_of_finished_stages_are_on_disk_when_a_later_one_fails(
    module: ModuleType, tmp_path: Path
) -> None:
    figures = module.Figures(tmp_path / "figures.json", {}, {})
    with figures.stage("first") as found:
        found["mean"] = np.float64(0.5)
        found["all"] = np.arange(2)
    with pytest.raises(RuntimeError), figures.stage("second"):
        raise RuntimeError("broken")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["first"] == {"mean": 0.5, "all": [0, 1]}
    assert "second" not in written


@using("prefixes")
def test_a_prefix_block_makes_all_that_heads_and_gates_made_on_the_way(module: ModuleType) -> None:
    chain = programs.exit_chain()
    rows = programs.rows(4, chain)
    early = module.prefix_block(chain, "first")
    whole = module.prefix_block(chain, "backbone")
    assert early.terminator.values == ("early", "h")
    assert whole.terminator.values == ("early", "h", "late")
    results = whole.run(rows)
    torch.testing.assert_close(results["early"], early.run(rows)["early"])
    torch.testing.assert_close(results["late"], torch.tanh(rows["x"]) ** 2)
