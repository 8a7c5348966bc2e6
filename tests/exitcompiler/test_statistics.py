"""Tests of bounds, intervals and areas."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from exitcompiler.errors import CalibrationError, InputError
from exitcompiler.statistics import (
    area_difference_interval,
    clopper_pearson_upper,
    expected_calibration_error,
    mean_difference_interval,
    mean_time_over_drops,
    ratio_interval,
    reliability_bins,
    rows_for_bound,
)


@given(rows=st.integers(1, 3000), share=st.floats(0.0, 0.999), confidence=st.floats(0.5, 0.999))
@settings(max_examples=100, deadline=None)
def test_the_bound_is_where_the_binomial_tail_equals_the_risk(
    rows: int, share: float, confidence: float
) -> None:
    errors = int(share * rows)
    bound = clopper_pearson_upper(errors, rows, confidence)
    assert binom.cdf(errors, rows, bound) == pytest.approx(1 - confidence, rel=1e-6)


def test_known_bounds() -> None:
    assert clopper_pearson_upper(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300))  # the rule of three
    assert clopper_pearson_upper(7, 7) == 1.0


def test_rows_for_bound_are_enough_and_hardly_more() -> None:
    for rate, bound in ((0.0, 0.01), (0.01, 0.015), (0.02, 0.03)):
        rows = rows_for_bound(rate, bound)
        assert clopper_pearson_upper(int(np.ceil(rate * rows)), rows) <= bound
        fewer = int(0.9 * rows)
        assert clopper_pearson_upper(int(np.ceil(rate * fewer)), fewer) > bound
    assert rows_for_bound(0.0, 0.01) == 299


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(InputError, match="never"):
        rows_for_bound(0.02, 0.01)
    with pytest.raises(InputError, match="5 errors of 3 rows"):
        clopper_pearson_upper(5, 3)
    with pytest.raises(InputError, match="between 0 and 1"):
        clopper_pearson_upper(1, 3, 1.0)


def test_difference_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        program = generator.random(200) < 0.85
        backbone = np.where(generator.random(200) < 0.1, ~program, program)
        interval = mean_difference_interval(backbone, program, 0.9, resamples=300, seed=trial)
        hits += interval.lower <= 0.1 * (0.15 - 0.85) <= interval.upper
    assert 80 <= hits <= 98


def test_pairing_makes_the_interval_narrow() -> None:
    generator = np.random.default_rng(1)
    common = generator.normal(10.0, 3.0, 300)
    paired = mean_difference_interval(common + 0.1, common)
    assert paired.value == pytest.approx(0.1)
    assert paired.upper - paired.lower < 1e-9


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_ratio_interval_holds_the_speed_up(statistic: str) -> None:
    generator = np.random.default_rng(2)
    slow, fast = generator.normal(3.0, 0.1, 400), generator.normal(2.0, 0.1, 400)
    interval = ratio_interval(slow, fast, statistic=statistic, resamples=300)  # type: ignore[arg-type]
    assert 1.45 < interval.lower < interval.value < interval.upper < 1.55


def test_resamples_of_many_rows_take_little_memory() -> None:
    rows = np.arange(20_000) % 2
    tracemalloc.start()
    interval = mean_difference_interval(rows, np.zeros(20_000), resamples=400)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4e6  # a matrix of all resamples would be 64 MB
    spread = 1.96 * 0.5 / np.sqrt(20_000)  # the binomial's, by the central limit theorem
    assert interval.upper - interval.value == pytest.approx(spread, rel=0.25)
    assert interval.value - interval.lower == pytest.approx(spread, rel=0.25)


def test_ratio_needs_positive_paired_numbers() -> None:
    with pytest.raises(InputError, match="positive"):
        ratio_interval([1.0, 0.0], [1.0, 1.0])
    with pytest.raises(InputError, match="do not pair"):
        ratio_interval([1.0], [1.0, 1.0])
    with pytest.raises(InputError, match="finite"):
        mean_difference_interval([np.nan], [1.0])


def test_area_is_that_of_the_steps() -> None:
    # 0..0.01: 80 us; 0.01..0.02: 50 us; the beaten point does not count.
    area = mean_time_over_drops([0.02, 0.0, 0.01, 0.015], [40.0, 80.0, 50.0, 70.0], 0.0, 0.02, plain_us=100.0)
    assert area == pytest.approx((80 + 50) / 2)
    assert mean_time_over_drops([0.5], [1.0], 0.0, 0.1, plain_us=100.0) == 100.0
    assert mean_time_over_drops([-0.1], [60.0], 0.0, 0.1, plain_us=100.0) == 60.0
    with pytest.raises(InputError, match="no drops"):
        mean_time_over_drops([0.1], [1.0], 0.2, 0.2, plain_us=1.0)


@given(
    points=st.lists(st.tuples(st.floats(-0.01, 0.05), st.floats(1.0, 120.0)), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_area_agrees_with_a_fine_sum(points: list[tuple[float, float]]) -> None:
    drops, times = zip(*points, strict=True)
    area = mean_time_over_drops(drops, times, 0.0, 0.03, plain_us=100.0)
    grid = (np.arange(3000) + 0.5) * 1e-5
    naive = [min([100.0, *(t for d, t in points if d <= allowed)]) for allowed in grid]
    assert area == pytest.approx(np.mean(naive), abs=0.5)


def test_area_difference_tells_a_better_frontier() -> None:
    generator = np.random.default_rng(3)
    drop = (generator.random(500) < 0.01).astype(float)
    ours, theirs = generator.normal(60.0, 5.0, 500), generator.normal(70.0, 5.0, 500)
    interval = area_difference_interval(
        ([drop], [ours]), ([drop], [theirs]), 0.0, 0.05, plain_us=100.0, resamples=300
    )
    assert interval.lower <= interval.value <= interval.upper < 0
    with pytest.raises(InputError, match="same rows"):
        area_difference_interval(([drop], [ours]), ([drop[:9]], [theirs[:9]]), 0.0, 0.05, plain_us=100.0)


def test_reliability_bins_hold_equal_mass() -> None:
    confidence = np.linspace(0.5, 1.0, 100)
    correct = np.arange(100) % 4 != 0
    bins = reliability_bins(confidence, correct, 10)
    assert [part.count for part in bins] == [10] * 10
    assert [part.confidence for part in bins] == sorted(part.confidence for part in bins)
    assert sum(part.accuracy * part.count for part in bins) == pytest.approx(75.0)


def test_calibration_error_is_the_mean_gap() -> None:
    perfect = reliability_bins(np.full(4, 0.75), np.array([True, True, True, False]), 1)
    assert expected_calibration_error(perfect) == pytest.approx(0.0)
    sure = reliability_bins(np.ones(4), np.array([True, False, True, False]), 1)
    assert expected_calibration_error(sure) == pytest.approx(0.5)
    with pytest.raises(CalibrationError):
        reliability_bins(np.ones(0), np.ones(0, np.bool_))
