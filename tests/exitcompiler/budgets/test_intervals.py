"""Intervals hold what they promise, also over few and skew samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitcompiler.budgets.intervals import (
    contrast_interval,
    level_of_look,
    paired_rate_difference_interval,
    rate_interval,
)
from exitcompiler.errors import InputError
from exitcompiler.statistics import Interval


@pytest.mark.parametrize("shape", ["normal", "skew"])
@pytest.mark.parametrize("samples", [6, 9])
def test_few_samples_are_covered_as_often_as_promised(shape: str, samples: int) -> None:
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        draw = generator.standard_normal if shape == "normal" else generator.standard_exponential
        mean = 0.0 if shape == "normal" else 1.0
        found = contrast_interval([draw(samples)], confidence=0.95, seed=trial)
        held += found.lower <= mean <= found.upper
    assert held >= 360  # 0.95 promised; 0.90 is three standard errors below


def test_a_contrast_of_four_groups_adds_and_subtracts() -> None:
    generator = np.random.default_rng(1)
    groups = [mean + 0.01 * generator.standard_normal(8) for mean in (5.0, 3.0, 2.0, 1.0)]
    found = contrast_interval(groups[:2], groups[2:], confidence=0.95)
    assert found.value == pytest.approx(5.0, abs=0.05)
    assert found.lower < found.value < found.upper
    assert found.upper - found.lower == pytest.approx(4 * 0.01 * math.sqrt(4 / 8), rel=0.6)


def test_a_single_sample_says_nothing_and_equal_ones_everything() -> None:
    single = contrast_interval([[1.0]], [[1.0, 2.0]], confidence=0.95)
    assert (single.value, single.lower, single.upper) == (-0.5, -math.inf, math.inf)
    assert contrast_interval([[3.0] * 5], [[1.0] * 4], confidence=0.95) == Interval(2.0, 2.0, 2.0)


def test_two_samples_leave_everything_open_at_any_useful_confidence() -> None:
    found = contrast_interval([[1.0, 1.1]], confidence=0.95)
    assert (found.lower, found.upper) == (-math.inf, math.inf)


@pytest.mark.parametrize("plus", [[], [[]], [[1.0, math.nan]], [[1.0, math.inf]]])
def test_samples_that_are_none_are_refused(plus: list[list[float]]) -> None:
    with pytest.raises(InputError, match="contrast interval"):
        contrast_interval(plus, confidence=0.95)


@given(st.integers(1, 60), st.floats(0.5, 0.999))
def test_all_looks_together_keep_the_confidence(looks: int, confidence: float) -> None:
    errors = [1.0 - level_of_look(confidence, look) for look in range(1, looks + 1)]
    assert sum(errors) <= 1.0 - confidence + 1e-12
    assert errors == sorted(errors, reverse=True)
    assert sum(errors) == pytest.approx((1.0 - confidence) * looks / (looks + 1))


def test_wilson_as_in_the_textbook() -> None:
    # Newcombe 1998, Stat. Med. 17:857-872, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 up to 0.1611.
    found = rate_interval(81, 263, 0.95)
    assert (found.lower, found.upper) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert rate_interval(0, 20, 0.95).upper == pytest.approx(0.1611, abs=5e-5)


def test_a_paired_difference_has_a_width_where_nothing_differed() -> None:
    found = paired_rate_difference_interval(both=18, first=0, second=0, rows=20, confidence=0.95)
    assert found.value == 0.0
    assert found.lower < 0.0 < found.upper


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.floats(0.5, 0.999))
def test_a_paired_difference_lies_in_its_interval_and_turns_with_the_rates(
    both: int, first: int, second: int, neither: int, confidence: float
) -> None:
    rows = both + first + second + neither
    found = paired_rate_difference_interval(both, first, second, rows, confidence)
    turned = paired_rate_difference_interval(both, second, first, rows, confidence)
    assert -1.0 <= found.lower <= found.value <= found.upper <= 1.0
    assert found.value == pytest.approx((first - second) / rows)
    assert (turned.lower, turned.upper) == (pytest.approx(-found.upper), pytest.approx(-found.lower))


@pytest.mark.parametrize("rates", [(0.9, 0.02, 0.01), (0.95, 0.01, 0.0), (0.5, 0.1, 0.05)])
def test_paired_differences_are_covered_as_often_as_promised(rates: tuple[float, float, float]) -> None:
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(400, [*rates, 1.0 - sum(rates)], size=1000)
    held = 0
    for both, first, second, _ in drawn.tolist():
        found = paired_rate_difference_interval(both, first, second, 400, 0.95)
        held += found.lower <= rates[1] - rates[2] <= found.upper
    assert held >= 930


def test_whether_an_end_is_known_is_no_matter_of_the_seed() -> None:
    samples = np.random.default_rng(0).standard_normal(4)
    for seed in range(5):
        assert contrast_interval([samples], confidence=0.98, seed=seed).upper == math.inf
        assert contrast_interval([samples], confidence=0.95, seed=seed).upper < math.inf
