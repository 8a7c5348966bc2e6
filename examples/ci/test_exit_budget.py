"""The same budget, held by pytest: copy to your tests. The plugin comes with exitcompiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.mark.exit_budget("models/model.exit", budget="ci/budget.toml", data="ci/rows.npz", max_seconds=120)
def test_the_model_keeps_its_budget(exit_budget_report: Any) -> None:
    """The marker alone fails the test when a limit is broken; the fixture is for what no limit can say."""
    exits = exit_budget_report.measurement.answered.exits
    assert all(exits.values()), f"an exit that no row takes: {exits}"


def test_the_model_keeps_its_budget_in_the_dark(check_exit_budget: Callable[..., Any]) -> None:
    """For rows that are made in the test, the check is called in it, as often as you like."""
    with np.load("ci/rows.npz") as rows:
        check_exit_budget("models/model.exit", budget="ci/dark.toml", data=(0.5 * rows["x"], rows["y"]))
