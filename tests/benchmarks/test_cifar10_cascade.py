"""The parts of the cascade benchmark that need no data: who is faster where, routes, parts, verdicts."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from score_tables import cascade_costs, every_edge, make_cascade

from exitcompiler.baselines import ThresholdPolicy
from exitcompiler.cascade_baselines import parts
from exitcompiler.naming import OWN
from exitcompiler.policies import GoOn, Policy, leave_above

ROWS = 400
PLAIN_US = 1000.0


def using(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", [name], indirect=True)


def family(drop: float, time_us: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One point that loses the first share of the rows."""
    return [(np.arange(ROWS) < drop * ROWS).astype(np.float64)], [np.full(ROWS, time_us)]


@using("cascade_domination")
def test_who_is_faster_at_the_same_accuracy_is_told_apart_from_who_is_as_fast(module: ModuleType) -> None:
    families = {
        "ours": family(0.0, 500.0),
        "twice as fast": family(0.0, 250.0),
        "the same": family(0.0, 500.0),
        "fast but never accurate enough": family(0.5, 10.0),
    }
    found = module.domination("ours", families, 0.95, PLAIN_US)["families"]
    count = len(module.ACCURACIES)
    assert [found[name]["faster"] for name in found] == [count, 0, 0]
    assert [found[name]["surely_faster"] for name in found] == [count, 0, 0]
    assert [found[name]["as_fast"] for name in found] == [0, count, 0]
    assert found["twice as fast"]["gain_us"] == {"value": 250.0, "lower": 250.0, "upper": 250.0}


@using("cascade_domination")
def test_where_no_point_is_accurate_enough_the_reference_network_is_left(module: ModuleType) -> None:
    least = module.resampled_least_us({"a": family(0.02, 100.0)}, [0.01, 0.02], PLAIN_US, resamples=50)["a"]
    np.testing.assert_allclose(least[0], [PLAIN_US, 100.0])
    assert set(np.round(least[1:, 1])) == {100.0, PLAIN_US}  # some resamples hold more of the lost rows


@using("cascade_domination")
def test_the_distance_to_the_oracle_is_told_as_a_share_of_that_of_thresholds(module: ModuleType) -> None:
    families = {"learned": family(0, 300.0), "myopic": family(0, 500.0), "soft oracle": family(0, 200.0)}
    found = module.oracle_distance(families, 0.01, PLAIN_US)
    assert found["learned_us"]["value"] == pytest.approx(100.0)
    assert found["ratio"]["value"] == pytest.approx(1 / 3)


@using("cascade_targets")
@pytest.mark.parametrize(
    ("faster", "surely", "as_fast", "outcome"),
    [(0, 0, 0, "aim"), (0, 0, 2, "must"), (3, 0, 0, "must"), (3, 1, 0, "miss")],
)
def test_domination_beyond_chance_misses(
    module: ModuleType, faster: int, surely: int, as_fast: int, outcome: str
) -> None:
    gain = {"value": 1.0, "lower": -1.0, "upper": 2.0}
    other = {"faster": faster, "surely_faster": surely, "as_fast": as_fast, "at": 0.92, "gain_us": gain}
    found = {"accuracies": (0.917, 0.934), "families": {"int8": other}}
    assert module.domination_target(found).outcome == outcome


@using("cascade_targets")
def test_a_speed_up_counts_only_where_the_final_rows_keep_the_limit(module: ModuleType) -> None:
    def measured(speedup: float, drop: float) -> dict[str, Any]:
        interval = {"value": speedup, "lower": speedup, "upper": speedup}
        return {"kind": "program", "name": f"a, {drop}", "speedup": interval, "drop": {"value": drop}}

    figures = {
        "final": {module.ASKED: {"programs": {"a": measured(3.5, 0.012)}}},
        "resplits a": {"limits": {"asked": {"drop_mean": 0.009}}},
        "table": {"onnxruntime": [measured(3.5, 0.012), measured(2.5, 0.009), measured(2.0, 0.001)]},
    }
    line = module._speedup(figures, "", module.ASKED, "asked", 0.01, (2.3, 3.0))
    assert line.outcome == "must"
    assert "a, 0.009: 2.5" in line.measured


@using("cascade_latency")
def test_a_network_that_is_only_passed_over_is_not_run(module: ModuleType) -> None:
    table = make_cascade(every_edge(("a",), ("b",), ("c",)), rows=ROWS)
    rule = leave_above(OWN, (("a", OWN),), (1.0, 0.0, 0.0), -0.7, GoOn("b"))
    policy = Policy(table.topology, (rule, GoOn("c"), Policy.plain(table.topology).decisions[-1]))
    run = module.networks_run(policy, table, cascade_costs(table))
    left = table.heads["a", OWN].confidence[:, 0] >= 0.7
    assert 0 < left.sum() < ROWS
    np.testing.assert_array_equal(run, np.stack([np.ones(ROWS, bool), np.zeros(ROWS, bool), ~left], axis=1))


@using("cascade_families")
def test_sub_topologies_are_called_by_their_networks_and_whether_any_may_be_jumped_over(
    module: ModuleType,
) -> None:
    topology = every_edge(("a",), ("b",), ("c",))
    jumping = [module.part_title(part) for part in parts(topology, chains=False, inner=True)]
    straight = [module.part_title(part) for part in parts(topology, chains=True, inner=True)]
    assert jumping == ["a > b", "a > c", "b > c", "a > b > c, with jumps"]
    assert straight == ["a > b", "a > c", "b > c", "a > b > c"]


@using("cascade_families")
def test_a_rule_of_a_part_is_judged_at_the_whole_cascades_times(module: ModuleType) -> None:
    table = make_cascade(every_edge(("a",), ("b",), ("c",)), rows=ROWS)
    costs = cascade_costs(table)
    part = next(part for part in parts(table.topology, chains=True, inner=False) if part.names == ("a", "c"))
    always_on = ThresholdPolicy(Policy.plain(part.topology))
    result = module._OnPart(part, always_on).evaluate(table, costs)
    assert result.accuracy_drop == 0.0
    assert result.mean_us == pytest.approx(costs.whole_us, abs=costs.head_us["c", OWN])
