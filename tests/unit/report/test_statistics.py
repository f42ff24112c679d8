"""Intervals from few repeats."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.report.statistics import (
    MOST_RESAMPLED,
    Sample,
    bootstrap_interval,
    bootstrap_intervals,
    chance_from_noise,
    chance_of_difference,
    chance_of_ratio,
    difference_interval,
    ratio_interval,
    ratio_interval_from_noise,
    t_value,
)

Z = 1.959964
LARGEST = sys.float_info.max


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [
        (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 4, 2.7764),
        (0.95, 9, 2.2622), (0.95, 10, 2.2281), (0.95, 29, 2.0452), (0.95, 30, 2.0423),
        (0.95, 40, 2.0211), (0.95, 120, 1.9799), (0.95, 10**9, 1.9600),
        (0.90, 5, 2.0150), (0.99, 1, 63.6567), (0.99, 30, 2.7500),
    ],
)  # fmt: skip
def test_students_t_is_that_of_the_tables(confidence, degrees, expected):
    assert t_value(confidence, degrees) == pytest.approx(expected, abs=6e-5)


# --- of a mean ---


@pytest.mark.parametrize("values", [[], [3.0]])
def test_nobody_knows_how_sure_a_single_run_is(values):
    assert bootstrap_interval(values) is None


def test_the_interval_of_two_runs_by_hand():
    # A quarter of the resampled means is 90 and a quarter 110: these are the 2.5th and the 97.5th
    # percentile, 10 from the mean; stretched by sqrt(2 / 1) and t / z.
    half = 10 * math.sqrt(2) * 12.7062 / Z
    low, high = bootstrap_interval([90.0, 110.0])
    assert low == pytest.approx(100 - half, abs=1e-3)
    assert high == pytest.approx(100 + half, abs=1e-3)


def test_what_is_never_negative_has_no_negative_end():
    assert bootstrap_interval([1.0, 9.0])[0] == 0.0
    assert bootstrap_interval([-1.0, 9.0])[0] < -1


def test_equal_runs_leave_no_doubt():
    assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)
    assert bootstrap_interval([0.0] * 3) == (0.0, 0.0)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_95_of_100_intervals_hold_the_mean(count):
    samples = np.random.default_rng(5).normal(50.0, 4.0, (3000, count))
    lows, highs = bootstrap_intervals(samples, num_resamples=1000)
    share = np.mean((lows <= 50.0) & (highs >= 50.0))
    assert 0.92 < share < 0.97


def test_of_many_runs_it_is_the_one_of_students_t():
    values = np.random.default_rng(5).exponential(3.0, MOST_RESAMPLED + 1)
    half = t_value(0.95, MOST_RESAMPLED) * values.std(ddof=1) / math.sqrt(MOST_RESAMPLED + 1)
    interval = bootstrap_interval(values)
    assert interval == pytest.approx((values.mean() - half, values.mean() + half))
    # And there is no jump from one method to the other.
    assert bootstrap_interval(values[:-1]) == pytest.approx(interval, rel=0.02)


def test_many_intervals_are_those_of_each():
    samples = np.random.default_rng(5).normal(50.0, 4.0, (1201, 4))
    lows, highs = bootstrap_intervals(samples)
    for place in (0, 600, 1200):
        assert (lows[place], highs[place]) == pytest.approx(bootstrap_interval(samples[place]))


def test_a_seed_repeats_an_interval():
    values = [1.0, 2.0, 4.0, 9.0, 9.5, 12.0]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


@given(
    st.lists(st.floats(min_value=-LARGEST, max_value=LARGEST), min_size=2, max_size=6),
    st.integers(0, 3),
)
def test_no_end_is_infinite_or_on_the_wrong_side(values, seed):
    low, high = bootstrap_interval(values, seed=seed)
    # Of halves: the sum of three of the largest overflows on its way.
    half_mean = math.fsum(value / 2 / len(values) for value in values)
    slack = max(map(abs, values)) * 1e-9
    assert low >= -LARGEST
    assert low / 2 <= half_mean + slack
    assert half_mean - slack <= high / 2
    assert high <= LARGEST


# --- of a difference ---


def test_the_interval_of_a_difference_by_hand():
    assert difference_interval(Sample.of([0.1, 0.1]), Sample.of([0.4, 0.4])) == pytest.approx(
        (0.3, 0.3)
    )
    # Two and two with one variance are two degrees: t is 4.3027.
    ends = difference_interval(Sample.of([0.0, 0.2]), Sample.of([0.5, 0.7]))
    half = 4.3027 * (0.02 / 2 + 0.02 / 2) ** 0.5
    assert ends == pytest.approx((0.5 - half, 0.5 + half), rel=1e-4)
    assert difference_interval(Sample.of([0.1]), Sample.of([0.4, 0.5])) is None


# --- of a ratio ---


def test_the_ratio_of_equal_runs_leaves_no_doubt():
    assert ratio_interval(Sample.of([100.0, 100.0]), Sample.of([70.0, 70.0])) == (0.7, 0.7)


@pytest.mark.parametrize(
    ("old", "new"),
    [([1.0], [2.0, 2.1]), ([1.0, 1.1], [2.0]), ([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0])],
)
def test_a_ratio_needs_repeats_above_0_on_both_sides(old, new):
    assert ratio_interval(Sample.of(old), Sample.of(new)) is None


def test_both_sides_are_resampled_independently():
    values = [95.0, 97.0, 100.0, 103.0, 105.0]
    low, high = ratio_interval(Sample.of(values), Sample.of(values))
    # Two means with a standard error of 1.84 each: 1 ± t(8) * 2.6 %.
    assert low == pytest.approx(1 - 0.060, abs=0.012)
    assert high == pytest.approx(1 + 0.060, abs=0.012)


@pytest.mark.parametrize("counts", [(2, 2), (3, 3), (5, 5), (2, 30), (30, 3), (4, 12)])
def test_95_of_100_intervals_hold_the_ratio(counts):
    random = np.random.default_rng(5)
    num_held, num = 0, 400
    for _ in range(num):
        old, new = (Sample.of(random.normal(100.0, 5.0, count)) for count in counts)
        low, high = ratio_interval(old, new)
        num_held += low <= 1 <= high
    assert num_held / num > 0.93


def test_the_chance_of_a_change_by_hand():
    # Student's t of 4 degrees is beyond 2.7764 in 5 of 100 cases, of 3 beyond 3.1824.
    for degrees, t in ((4, 2.7764), (3, 3.1824), (5000, 1.96)):
        chance = chance_from_noise(
            math.exp(-0.1 * t), relative_std=0.1, degrees=degrees, counts=(2, 2)
        )
        assert chance == pytest.approx(0.05, rel=1e-3)
    # Two and two of one variance: t(2) beyond 0.5 / sqrt(0.02) = 3.5355 is 1 - t / sqrt(2 + t²).
    old, new = Sample.of([0.0, 0.2]), Sample.of([0.5, 0.7])
    assert chance_of_difference(old, new) == pytest.approx(1 - (12.5 / 14.5) ** 0.5)
    assert chance_of_difference(Sample.of([0.1]), new) is None
    # exp(0.5) times as much, with shares of 10 % on both sides: the same t.
    old, new = (Sample(count=2, mean=mean, std=mean * 0.02**0.5) for mean in (1.0, math.exp(0.5)))
    assert chance_of_ratio(old, new) == pytest.approx(1 - (12.5 / 14.5) ** 0.5)
    assert chance_of_ratio(old, old) == 1.0


def test_no_spread_leaves_nothing_to_chance():
    assert chance_of_ratio(Sample.of([2.0, 2.0]), Sample.of([1.0, 1.0])) == 0.0
    assert chance_of_ratio(Sample.of([2.0]), Sample.of([1.0, 1.0])) is None


def test_the_ratio_of_many_runs_comes_from_their_spread():
    few = np.random.default_rng(5).normal(100.0, 5.0, MOST_RESAMPLED)
    many = np.append(few, few.mean())
    exact = ratio_interval(Sample.of(few), Sample.of(few))
    assert ratio_interval(Sample.of(few), Sample.of(many)) == pytest.approx(exact, abs=0.001)


def test_noise_of_others_makes_an_interval_by_hand():
    half = 2.7764 * 0.1 * math.sqrt(1 / 1 + 1 / 4)
    interval = ratio_interval_from_noise(0.8, relative_std=0.1, degrees=4, counts=(1, 4))
    assert interval == pytest.approx((0.8 * math.exp(-half), 0.8 * math.exp(half)), rel=1e-4)


@given(
    st.lists(st.floats(0, LARGEST), min_size=2, max_size=4),
    st.lists(st.floats(0, LARGEST), min_size=2, max_size=4),
)
def test_no_ratio_is_infinite(old, new):
    samples = []
    for values in (old, new):
        scale = max(values) or 1.0
        array = np.array(values) / scale
        samples.append(
            Sample(
                count=len(values),
                mean=float(array.mean() * scale),
                std=float(min(array.std(ddof=1) * scale, LARGEST)),
                values=np.array(values),
            )
        )
    interval = ratio_interval(*samples)
    if interval is not None:
        assert 0 <= interval[0] <= interval[1] <= LARGEST
