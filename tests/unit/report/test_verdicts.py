"""What is better, what is worse, and what nobody can tell."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flexbench.core.errors import ConfigError
from flexbench.report.noise import Noise
from flexbench.report.statistics import Sample, ratio_interval
from flexbench.report.verdicts import Judgement, allow_for_number, judge
from tests.unit.report.stores import (
    column,
    compared,
    known,
    point,
    repeats,
    verdicts,
)

# --- noise ---


def test_a_change_within_the_noise_is_no_regression():
    found = compared(repeats(100.0, 140.0, 60.0), repeats(80.0, 120.0, 70.0))
    assert verdicts(found) == ["not sure"]
    assert column(found.table, "reason") == ["within the noise of 3 + 3 runs"]
    assert not found.has_regression
    assert found.verdict == (
        "1 figure looks worse by more than 5%, but 3 + 3 runs cannot tell that from noise: repeat "
        "the runs."
    )
    (low,), (high,) = column(found.table, "ratio_ci_low"), column(found.table, "ratio_ci_high")
    assert low < 1 < high


def test_a_change_beyond_the_noise_is_one():
    found = compared(repeats(100.0, 101.0, 99.0), repeats(70.0, 71.0, 69.0))
    assert verdicts(found) == ["slower"]
    assert found.has_regression
    interval = ratio_interval(Sample.of([100.0, 101.0, 99.0]), Sample.of([70.0, 71.0, 69.0]))
    assert interval[1] < 0.75
    ends = column(found.table, "ratio_ci_low") + column(found.table, "ratio_ci_high")
    assert ends == pytest.approx(interval)


def test_a_small_change_beyond_the_noise_is_told_and_accepted():
    old, new = repeats(100.0, 100.1, 99.9), repeats(98.0, 98.1, 97.9)
    found = compared(old, new)
    assert verdicts(found) == ["slower, within 5%"]
    assert not found.has_regression
    assert verdicts(compared(new, old)) == ["faster, within 5%"]


def test_equal_means_with_much_noise_may_hide_a_change():
    found = compared(repeats(100.0, 160.0, 40.0), repeats(99.0, 150.0, 50.0))
    assert verdicts(found) == ["equal as far as can be told"]
    assert column(found.table, "reason") == ["noise of 3 + 3 runs could hide 5%"]


def test_single_runs_borrow_the_noise_of_repeats():
    noisy = repeats(100.0, 130.0, 70.0, batch_size=2)
    found = compared([*noisy, *repeats(100.0)], [*noisy, *repeats(85.0)])
    assert verdicts(found) == ["not sure", "equal"]
    assert column(found.table, "reason")[0] == "within the noise of repeated configurations"
    assert not found.has_regression
    # 15.5 % of a run, by the two configurations with three each: t(4) * 0.3 * sqrt(2) on either side.
    half = 2.7764 * 0.3 * math.sqrt(2)
    ends = [column(found.table, f"ratio_ci_{end}")[0] for end in ("low", "high")]
    assert ends == pytest.approx([0.85 * math.exp(-half), 0.85 * math.exp(half)], rel=1e-4)
    quiet = repeats(100.0, 100.5, 99.5, batch_size=2)
    found = compared([*quiet, *repeats(100.0)], [*quiet, *repeats(85.0)])
    assert verdicts(found)[0] == "slower"
    assert column(found.table, "reason")[0] == "noise of repeated configurations"
    assert found.has_regression


def test_the_noise_is_said_to_be_of_the_runs_that_told_it():
    old = repeats(100.0, 101.0, 99.0, 100.0)
    assert column(compared(old, repeats(80.0)).table, "reason") == [
        "noise of the baseline's 4 runs"
    ]
    assert column(compared(repeats(80.0), old).table, "reason") == ["noise of the 4 new runs"]
    other = repeats(100.0, 101.0, 99.0, 100.0, batch_size=2)
    found = compared([*other, *repeats(100.0)], [*repeats(100.0, batch_size=2), *repeats(80.0)])
    assert column(found.table, "reason") == ["noise of a repeated configuration", ""]


def test_few_repeats_are_no_estimate_of_the_noise():
    """With two runs Student's t would hide any change at all."""
    for old in (repeats(32.0, 30.0), repeats(32.0, 30.0, 31.0)):
        found = compared(old, repeats(22.0))
        assert verdicts(found) == ["slower"]
        assert column(found.table, "reason") == [f"{len(old)} + 1 runs: noise not known"]
        assert found.has_regression


def test_a_change_that_few_runs_cannot_tell_is_not_called_none():
    found = compared(repeats(20.0, 40.0), repeats(20.0, 21.0))
    assert verdicts(found) == ["not sure"]
    assert not found.has_regression
    assert found.verdict == (
        "1 figure looks worse by more than 5%, but 2 + 2 runs cannot tell that from noise: repeat "
        "the runs."
    )
    found = compared(
        [*repeats(20.0, 40.0), *repeats(10.0, batch_size=2)],
        [*repeats(20.0, 21.0), *repeats(5.0, batch_size=2)],
    )
    assert found.verdict.startswith("1 of 2 figures is worse than the baseline's by more than 5%")
    assert "1 more figure looks worse by more than 5%, but 2 + 2 runs" in found.verdict


def test_a_tail_of_a_single_run_is_no_regression_unless_it_was_asked_for():
    old, new = [point(2)], [point(2, figures={"ttft_p99": 0.4, "ttft_p50": 0.3})]
    found = compared(old, new)
    assert column(found.table, "reason")[2] == "one run: the noise of a tail is not known"
    assert verdicts(found)[2] == "not sure"
    assert not found.has_regression
    assert "1 figure looks worse by more than 5%, but one run each cannot" in found.verdict
    found = compared(old, new, figures=["ttft_p99", "ttft_p50"])
    assert verdicts(found) == ["slower", "slower"]
    assert found.has_regression


def test_noise_of_another_system_is_not_borrowed():
    noisy = [point(2, throughput=value) for value in (100.0, 150.0, 50.0)]
    found = compared([*noisy, *repeats(100.0)], [*noisy, *repeats(85.0)], figures=["throughput"])
    assert verdicts(found)[0] == "slower"


def test_a_run_among_the_others_is_no_change():
    found = compared(repeats(100.0, 120.0, 80.0), repeats(90.0))
    assert verdicts(found) == ["not sure"]
    assert column(found.table, "reason") == ["among the baseline's 3 runs"]
    assert column(found.table, "ratio_ci_low") == [None]
    assert verdicts(compared(repeats(100.0, 120.0, 80.0), repeats(79.0))) == ["slower"]


def test_one_noisy_configuration_hides_no_drop_of_the_others():
    quiet = [one for size in (2, 3, 4) for one in repeats(100.0, 102.0, 98.0, batch_size=size)]
    noisy = repeats(100.0, 190.0, 10.0, batch_size=5)
    found = compared([*quiet, *noisy, *repeats(100.0)], [*quiet, *noisy, *repeats(80.0)])
    assert (verdicts(found)[0], found.has_regression) == ("slower", True)
    # 2 % of a run, by six groups of three: t(12) = 2.1788.
    half = 2.1788 * 0.02 * math.sqrt(2)
    assert column(found.table, "ratio_ci_high")[0] == pytest.approx(0.8 * math.exp(half), rel=1e-4)
    # It counts for itself.
    found = compared([*quiet, *noisy], [*quiet, *repeats(70.0, batch_size=5)])
    assert (verdicts(found)[-1], found.has_regression) == ("not sure", False)
    assert column(found.table, "reason")[-1] == "within the noise of repeated configurations"
    noisy = repeats(100.0, 190.0, 10.0, 101.0, batch_size=5)
    found = compared([*quiet, *noisy], [*quiet, *repeats(30.0, batch_size=5)])
    assert column(found.table, "reason")[-1] == "within the noise of the baseline's 4 runs"


def test_noise_that_is_alike_is_pooled_whole():
    samples = [Sample(count=3, mean=1.0, std=std) for std in (0.01, 0.02, 0.03)]
    # (1 + 4 + 9) / 3 = 4.667.
    noise = Noise.pooled(samples)
    assert noise.relative_std == pytest.approx(0.01 * (14 / 3) ** 0.5)
    assert noise.degrees == 6
    assert Noise.pooled([*samples, Sample(count=3, mean=1.0, std=0.5)]) == noise


# --- many comparisons ---


def _many(random, num_all, *, noise, slower=()):
    """So many configurations with three runs before and three now."""
    sides = [
        [
            one
            for size in range(num_all)
            for one in repeats(
                *((70.0 if size in slow else 100.0) * (1 + random.normal(0, noise, 3))),
                batch_size=size + 1,
            )
        ]
        for slow in ((), slower)
    ]
    return compared(*sides)


def test_what_is_beyond_its_own_noise_may_be_chance_among_many():
    doubtful = (repeats(98.0, 100.0, 102.0), repeats(93.0, 90.0, 86.0))
    alone = compared(*doubtful)
    assert (verdicts(alone), alone.has_regression) == (["slower"], True)
    others = [one for size in range(2, 12) for one in repeats(99.0, 100.0, 101.0, batch_size=size)]
    found = compared([*doubtful[0], *others], [*doubtful[1], *others])
    assert verdicts(found) == ["slower", *["equal"] * 10]
    assert column(found.table, "reason")[0] == "may be chance among 11 comparisons"
    # What its own runs say of it stays as it is.
    assert column(found.table, "ratio_ci_high")[0] == column(alone.table, "ratio_ci_high")[0] < 1
    assert not found.has_regression
    assert found.verdict == (
        "1 figure is worse by more than 5% and by more than its own noise, but may be so by chance "
        "among 11 comparisons: repeat the runs."
    )


def test_of_ten_comparisons_the_one_that_is_much_slower_is_found():
    random = np.random.default_rng(3)
    num_found = sum(
        column(_many(random, 10, noise=0.03, slower=[4]).table, "is_regression")
        == [size == 4 for size in range(10)]
        for _ in range(5)
    )
    assert num_found >= 4


def test_holms_procedure_by_hand():
    def of(chance):
        return Judgement(
            ratio=0.5, low=None, high=None, verdict="slower", is_regression=True, chance=chance
        )

    # Of four: 0.05 / 4 and / 3 hold, 0.05 / 2 does not, and nothing after it counts.
    chances = [0.03, 0.012, None, 0.016, 0.04]
    found = allow_for_number([of(chance) for chance in chances])
    assert [one.is_regression for one in found] == [False, True, True, True, False]
    assert allow_for_number([of(0.06)]) == [of(0.06)]


def test_forty_configurations_of_noise_alone_are_no_regression():
    num_false, num = 0, 300
    random = np.random.default_rng(1)
    for _ in range(num):
        sides = random.normal(100.0, 5.0, (2, 40, 3))
        judgements = [
            judge(
                "throughput",
                *(Sample(count=3, mean=one.mean(), std=one.std(ddof=1)) for one in pair),
                max_regression=0.05,
                noise=None,
            )
            for pair in zip(*sides, strict=True)
        ]
        num_false += any(one.is_regression for one in allow_for_number(judgements))
    assert num_false / num <= 0.05


# --- figures ---


def test_figures_of_serving_are_judged_by_what_they_are_of():
    figures = {"goodput": 2.0, "error_rate": 0.0}
    found = compared([point(2, figures=figures)], [point(2, figures=figures | {"goodput": 1.5})])
    assert column(found.table, "figure") == [
        "throughput", "mean_latency", "ttft_p99", "goodput", "error_rate",
    ]  # fmt: skip
    assert verdicts(found) == ["equal", "equal", "equal", "slower", "equal"]
    assert column(found.table, "unit") == ["tokens/s", "s", "s", "requests/s", ""]
    # Only one had conditions to meet.
    assert len(compared([point(2)], [point(2, figures=figures)]).table.rows) == 3


@pytest.mark.parametrize(
    ("old", "new", "verdict", "is_regression"),
    [
        ([0.0], [0.5], "worse", True),
        ([0.0], [0.025], "worse, within 5%", False),
        ([0.02], [0.06], "worse, within 5%", False),
        ([0.1], [0.02], "better", False),
        ([0.0, 0.0], [0.1, 0.1], "worse", True),
        ([0.0, 0.0], [0.0, 0.2], "not sure", False),
        ([0.01, 0.02], [0.015, 0.015], "equal", False),
    ],
)
def test_errors_change_by_shares_of_all_requests(old, new, verdict, is_regression):
    found = compared(
        [point(2, figures={"error_rate": one}) for one in old],
        [point(2, figures={"error_rate": one}) for one in new],
    )
    assert verdicts(found)[-1] == verdict
    assert column(found.table, "ratio")[-1] is None
    assert found.has_regression == is_regression
    if is_regression:
        assert "error_rate is up by" in found.verdict
        assert "percentage points" in found.verdict


def test_a_share_that_was_0_may_rise_a_little():
    old = [known(figures={"bubble_fraction": 0.0})]
    for share, verdict in ((0.03, "worse, within 5%"), (0.3, "worse")):
        new = [known(figures={"bubble_fraction": share})]
        assert verdicts(compared(old, new, figures=["bubble_fraction"])) == [verdict]


def test_figures_that_were_asked_for():
    old = [known(figures={"bubble_fraction": 0.2, "num_new": 1.0})]
    new = [known(figures={"bubble_fraction": 0.3, "num_new": 2.0})]
    found = compared(old, new, figures=["bubble_fraction", "num_new"])
    assert verdicts(found) == ["worse", "higher"]
    assert column(found.table, "is_regression") == [True, False]
    with pytest.raises(ConfigError, match=r"^--figure: there is no figure 'speed'"):
        compared(old, new, figures=["speed"])


@pytest.mark.parametrize(
    ("figure", "old", "new", "verdict", "is_regression"),
    [
        ("throughput", 0.0, 0.0, "equal", False),
        ("throughput", 10.0, 0.0, "slower", True),
        ("throughput", 0.0, 10.0, "faster", False),
        ("mean_latency", 0.0, 1.0, "slower", True),
        ("mean_latency", 1.0, 0.0, "faster", False),
        ("throughput", None, 10.0, "not sure", False),
        ("throughput", 10.0, None, "not sure", False),
        ("throughput", -1.0, 10.0, "not sure", False),
        ("throughput", 1e-300, 1e300, "faster", False),
    ],
)
def test_what_has_no_ratio(figure, old, new, verdict, is_regression):
    found = compared([known(**{figure: old})], [known(**{figure: new})], figures=[figure])
    assert verdicts(found) == [verdict]
    assert found.has_regression == is_regression


def test_all_runs_at_zero_are_a_regression_with_repeats_too():
    found = compared(repeats(10.0, 11.0), repeats(0.0, 0.0))
    assert verdicts(found) == ["slower"]
    assert (column(found.table, "ratio"), found.has_regression) == ([0.0], True)
    back = compared(repeats(0.0, 0.0), repeats(0.0, 11.0))
    assert column(back.table, "reason") == ["from 0, and not in all runs"]


def test_what_neither_has_is_no_row():
    found = compared([known(mean_latency=None)], [known(mean_latency=None)])
    assert column(found.table, "figure") == ["throughput"]
