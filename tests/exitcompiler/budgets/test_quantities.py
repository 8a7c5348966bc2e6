"""Values with units: what is read, what is refused and how it is told, and figures written back."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitcompiler.budgets.limits import LimitKind, Metric
from exitcompiler.budgets.quantities import describe_value, format_figure, format_now, read_quantity, unit_of
from exitcompiler.errors import BudgetError

MEAN = Metric("latency", "mean")
THROUGHPUT = Metric("throughput", "32")
DROP = Metric("accuracy", "drop")
DISAGREEMENT = Metric("accuracy", "disagreement")
EXIT = Metric("exit_rates", "layer1.0")
EXITS = Metric("exit_rates", "")
SIZE = Metric("artifact", "size")
PEAK = Metric("memory", "peak")
LOAD = Metric("load", "time")

LIMITS: list[tuple[Metric, LimitKind]] = [
    (MEAN, "max"), (MEAN, "max_ratio"), (MEAN, "max_increase"), (MEAN, "max_slowdown"), (THROUGHPUT, "min"),
    (THROUGHPUT, "min_ratio"), (THROUGHPUT, "max_decrease"), (DROP, "max"), (DROP, "max_increase"),
    (DISAGREEMENT, "max"), (EXITS, "tolerance"), (EXIT, "min"), (EXIT, "max"), (EXIT, "tolerance"),
    (SIZE, "max"), (SIZE, "max_increase"), (PEAK, "max"), (PEAK, "max_ratio"), (PEAK, "max_increase"),
    (LOAD, "max"),
]  # fmt: skip


def read(metric: Metric, kind: LimitKind, value: object) -> float:
    return read_quantity(value, unit_of(metric, kind), "budget.toml, key")


@pytest.mark.parametrize(("metric", "kind", "written", "value"), [
    (MEAN, "max", "2 ms", 2.0), (MEAN, "max", "2ms", 2.0), (MEAN, "max", " 1.5e3  us ", 1.5),
    (MEAN, "max", "250 µs", 0.25), (MEAN, "max", "250 \u03bcs", 0.25), (LOAD, "max", ".5 s", 500.0),
    (MEAN, "max_ratio", 0.7, 0.7), (MEAN, "max_ratio", 1, 1.0), (MEAN, "max_increase", "10 %", 0.1),
    (MEAN, "max_slowdown", "130%", 1.3), (THROUGHPUT, "min", "2500 rows/s", 2500.0),
    (THROUGHPUT, "max_decrease", "0 %", 0.0), (DROP, "max", "1 point", 0.01),
    (DROP, "max_increase", "0.5 points", 0.005), (DROP, "max", "0 points", 0.0), (EXIT, "max", "70 %", 0.7),
    (EXITS, "tolerance", "+3 points", 0.03), (SIZE, "max", "4 MB", 4e6), (SIZE, "max", "4 MiB", 4 * 2.0**20),
    (SIZE, "max", "3 kB", 3e3), (SIZE, "max", "3 KiB", 3072.0), (PEAK, "max", "1 GB", 1e9),
    (PEAK, "max", "1 GiB", 2.0**30), (PEAK, "max", "17 B", 17.0),
])  # fmt: skip
def test_what_is_read(metric: Metric, kind: LimitKind, written: object, value: float) -> None:
    assert read(metric, kind, written) == value


@pytest.mark.parametrize(("metric", "kind", "written", "wrong", "example"), [
    (MEAN, "max", 2, "2 has no unit", "2 ms"),
    (MEAN, "max", "2", '"2" has no unit', "us, ms or s"),
    (MEAN, "max", "2 MB", '"2 MB" is not a time', "2 ms"),
    (MEAN, "max", "2 MS", "is not a time", "2 ms"),
    (MEAN, "max", "-2 ms", "is below 0", "2 ms"),
    (MEAN, "max", "0 ms", "is not above 0", "2 ms"),
    (MEAN, "max", "nan ms", "is not a time with a unit", "2 ms"),
    (MEAN, "max", "1e999 ms", "is not finite", "2 ms"),
    (MEAN, "max", "2,5 ms", "is not a time", "2 ms"),
    (MEAN, "max", "", "is not a time with a unit", "2 ms"),
    (MEAN, "max", True, "true is not a time with a unit", "2 ms"),
    (MEAN, "max", ["2 ms"], "a list is not a time", "2 ms"),
    (MEAN, "max", {"max": "2 ms"}, "a table is not a time", "2 ms"),
    (MEAN, "max_ratio", "0.7", "is not a number", "without quotes: 0.7"),
    (MEAN, "max_ratio", False, "false is not a number", "0.7"),
    (MEAN, "max_ratio", math.nan, "nan is not finite", "0.7"),
    (MEAN, "max_ratio", math.inf, "inf is not finite", "0.7"),
    (MEAN, "max_ratio", 10**400, "is not finite", "0.7"),
    (MEAN, "max_ratio", 0, "is not above 0", "0.7"),
    (MEAN, "max_ratio", -0.5, "is below 0", "0.7"),
    (MEAN, "max_increase", 0.1, "has no unit", "10 %"),
    (MEAN, "max_increase", "1 point", "is not an increase", "10 %"),
    (THROUGHPUT, "min", "2500 1/s", "is not a throughput", "2500 rows/s"),
    (THROUGHPUT, "max_decrease", "101 %", "is more than 100.0 %", "10 %"),
    (DROP, "max", "1 %", "is not a drop", "1 point"),
    (DROP, "max", "101 points", "is more than 100.00 points", "1 point"),
    (DROP, "max_increase", "5 %", "is not an increase", "0.5 points"),
    (EXIT, "min", "3 points", "is not a share", "40 %"),
    (EXIT, "min", "100.1 %", "is more than 100.0 %", "40 %"),
    (EXITS, "tolerance", "3 %", "is not a tolerance", "3 points"),
    (SIZE, "max", "3 ms", "is not a size", "4 MB"),
    (SIZE, "max", "3 KB", "is not a size", "B, kB, MB"),
])  # fmt: skip
def test_what_is_refused(metric: Metric, kind: LimitKind, written: Any, wrong: str, example: str) -> None:
    with pytest.raises(BudgetError) as raised:
        read(metric, kind, written)
    assert wrong in raised.value.what
    assert raised.value.where == "budget.toml, key"
    assert raised.value.remedy is not None
    assert example in raised.value.remedy


@pytest.mark.parametrize(("metric", "kind"), LIMITS)
def test_every_example_can_be_read(metric: Metric, kind: LimitKind) -> None:
    unit = unit_of(metric, kind)
    example = unit.example.strip('"') if unit.scales else float(unit.example)
    assert read(metric, kind, example) > 0.0
    assert unit.example in unit.accepted


@pytest.mark.parametrize(("metric", "kind", "value", "text"), [
    (MEAN, "max", 1.4, "1.40 ms"), (MEAN, "max", 0.05, "50.0 us"), (MEAN, "max_ratio", 0.5834, "0.583"),
    (MEAN, "max_ratio", 12.0, "12.0"), (MEAN, "max_ratio", 0.0, "0.00"),
    (MEAN, "max_increase", 0.123, "+12.3 %"),
    (MEAN, "max_increase", -0.0312, "-3.12 %"), (MEAN, "max_slowdown", 0.099961, "+10.0 %"),
    (MEAN, "max_increase", -1e-9, "+0.00 %"), (THROUGHPUT, "min", 2512.3, "2512 rows/s"),
    (THROUGHPUT, "min", 12.34, "12.3 rows/s"), (THROUGHPUT, "max_decrease", 0.1, "10.0 %"),
    (THROUGHPUT, "max_decrease", -1e-9, "0.00 %"), (DROP, "max", 0.021, "2.10 points"),
    (DROP, "max", -0.002, "-0.20 points"), (DROP, "max_increase", 0.005, "+0.50 points"),
    (DISAGREEMENT, "max", 0.03, "3.00 %"), (EXIT, "min", 0.4117, "41.2 %"),
    (EXITS, "tolerance", 0.03, "3.00 points"),
    (SIZE, "max", 3_204_000.0, "3.20 MB"), (SIZE, "max", 999_999.0, "1.00 MB"), (SIZE, "max", 999.0, "999 B"),
    (SIZE, "max", 0.0, "0.00 B"), (PEAK, "max", 2.5e9, "2.50 GB"), (PEAK, "max", 123_456.0, "123 kB"),
    (PEAK, "max_ratio", math.inf, "inf"),
])  # fmt: skip
def test_how_figures_are_written(metric: Metric, kind: LimitKind, value: float, text: str) -> None:
    assert format_figure(metric, kind, value) == text


def test_what_stands_beside_a_figure_is_the_metric_itself_or_the_ratio_that_is_compared() -> None:
    assert format_now(MEAN, "max", 1.4) == format_now(MEAN, "max_slowdown", 1.4) == "1.40 ms"
    assert format_now(MEAN, "max_ratio", 0.7) == format_now(MEAN, "max_increase", 0.7) == "0.700"
    assert format_now(THROUGHPUT, "max_decrease", 1.4) == "1.40"
    assert format_now(DROP, "max_increase", 0.01) == "1.00 points"
    assert format_now(EXITS, "tolerance", 0.4) == "40.0 %"
    assert format_now(SIZE, "max_increase", 4e6) == "4.00 MB"
    assert format_now(PEAK, "max_increase", 1.2) == "1.20"


@pytest.mark.parametrize(("metric", "kind"), LIMITS)
@given(exponent=st.floats(-3.0, 4.0))
def test_what_is_written_can_be_read(metric: Metric, kind: LimitKind, exponent: float) -> None:
    unit = unit_of(metric, kind)
    value = min(10.0**exponent, unit.most)
    text = unit.show(value)
    found = read(metric, kind, text if unit.scales else float(text))
    # Three digits; of shares two after the point.
    assert found == pytest.approx(
        value, rel=0.006, abs=0.5001e-4 if unit.scales.keys() & {"%", "points"} else 0.0
    )


@given(number=st.floats(0.001, 1e6), unit=st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_units_are_factors(number: float, unit: str) -> None:
    power = "BkMG".index(unit[0].replace("K", "k"))
    factor = (1024.0 if unit.endswith("iB") else 1000.0) ** power
    assert read(SIZE, "max", f"{number!r} {unit}") == pytest.approx(number * factor, rel=1e-12)


def test_values_in_messages_stay_short() -> None:
    assert describe_value("x" * 100) == '"' + "x" * 59 + "..."
    assert [describe_value(value) for value in (True, 3, "a", [], {})] == [
        "true", "3", '"a"', "a list", "a table",
    ]  # fmt: skip
