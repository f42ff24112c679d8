"""New runs beside those of a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from flexbench.core.errors import ConfigError
from flexbench.report.comparison import Comparison, compare
from flexbench.report.runs import Run
from flexbench.report.selection import make_selection
from flexbench.report.statistics import Sample, ratio_interval
from tests.unit.report.stores import column, known, point, run, shown, store_of


def compared(
    old: Sequence[Run], new: Sequence[Run], *, max_regression: float = 0.05, **options
) -> Comparison:
    with store_of(*old) as before, store_of(*new) as now:
        return compare(before, now, make_selection(**options), max_regression=max_regression)


def repeats(*throughputs: float, **changes) -> list[Run]:
    return [known(throughput=one, mean_latency=None, **changes) for one in throughputs]


def verdicts(comparison: Comparison) -> list[str]:
    return column(comparison.table, "verdict")


# --- two runs of the same configuration, and a slowed one ---


def test_two_runs_of_the_same_configuration_are_equal():
    found = compared(
        [known(throughput=20.0, mean_latency=5.0)], [known(throughput=19.5, mean_latency=5.1)]
    )
    assert verdicts(found) == ["equal", "equal"]
    assert not found.has_regression
    assert found.verdict == "No figure is worse than the baseline's by more than 5%: 2 equal."
    assert column(found.table, "ratio") == [0.975, pytest.approx(1.02)]
    assert column(found.table, "ratio_ci_low") == [None, None]
    assert "reason" not in shown(found.table)


def test_a_slowed_run_is_slower():
    found = compared(
        [known(throughput=20.0, mean_latency=5.0)], [known(throughput=14.0, mean_latency=6.5)]
    )
    assert verdicts(found) == ["slower", "slower"]
    assert found.has_regression
    assert column(found.table, "figure") == ["throughput", "mean_latency"]
    assert column(found.table, "is_regression") == [True, True]
    assert column(found.table, "reason") == ["one run each: noise not known"] * 2
    assert "reason" in shown(found.table)
    assert found.verdict == (
        "2 of 2 figures are worse than the baseline's by more than 5%; the worst: throughput is 0.7 "
        "times the baseline's."
    )


def test_a_faster_run_is_faster():
    found = compared(
        [known(throughput=20.0, mean_latency=5.0)], [known(throughput=30.0, mean_latency=4.0)]
    )
    assert verdicts(found) == ["faster", "faster"]
    assert not found.has_regression


@pytest.mark.parametrize(
    ("now", "max_regression", "expected"),
    [(19.0, 0.05, "equal"), (18.9, 0.05, "slower"), (18.9, 0.10, "equal"), (19.9, 0.0, "slower"),
     (20.0, 0.0, "equal"), (21.0, 0.05, "equal"), (21.1, 0.05, "faster")],
)  # fmt: skip
def test_what_is_accepted_is_a_share_of_the_baselines(now, max_regression, expected):
    found = compared(repeats(20.0), repeats(now), max_regression=max_regression)
    assert verdicts(found) == [expected]
    assert found.has_regression == (expected == "slower")


# --- noise ---


def test_a_change_within_the_noise_is_no_regression():
    found = compared(repeats(100.0, 140.0, 60.0), repeats(80.0, 120.0, 70.0))
    assert verdicts(found) == ["not sure"]
    assert column(found.table, "reason") == ["within the noise"]
    assert not found.has_regression
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
    assert verdicts(found) == ["equal"]
    assert column(found.table, "reason") == ["noise may hide more than 5%"]


def test_single_runs_borrow_the_noise_of_repeats():
    noisy = repeats(100.0, 130.0, 70.0, batch_size=2)
    found = compared([*noisy, *repeats(100.0)], [*noisy, *repeats(85.0)])
    assert verdicts(found) == ["not sure", "equal"]
    assert column(found.table, "reason")[0] == "within the noise, as of others' repeats"
    assert not found.has_regression
    quiet = repeats(100.0, 100.5, 99.5, batch_size=2)
    found = compared([*quiet, *repeats(100.0)], [*quiet, *repeats(85.0)])
    assert verdicts(found)[0] == "slower"
    assert column(found.table, "reason")[0] == "noise from repeats of others"
    assert found.has_regression


def test_noise_of_another_system_is_not_borrowed():
    noisy = [point(2, throughput=value) for value in (100.0, 150.0, 50.0)]
    found = compared([*noisy, *repeats(100.0)], [*noisy, *repeats(85.0)], figures=["throughput"])
    assert verdicts(found)[0] == "slower"


def test_repeats_on_one_side_tell_the_noise_of_both():
    found = compared(repeats(100.0, 120.0, 80.0), repeats(90.0))
    assert verdicts(found) == ["not sure"]
    assert column(found.table, "ratio_ci_low") == [None]


# --- figures ---


def test_figures_of_serving_are_judged_by_what_they_are_of():
    found = compared([point(2)], [point(2, figures={"ttft_p99": 0.4})])
    assert column(found.table, "figure") == ["throughput", "mean_latency", "ttft_p99"]
    assert verdicts(found) == ["equal", "equal", "slower"]
    assert column(found.table, "unit") == ["tokens/s", "s", "s"]


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


# --- matching ---


def test_runs_are_matched_by_their_whole_configuration():
    old = [
        *repeats(10.0, batch_size=1),
        *repeats(20.0, batch_size=1, setup={"overlap": True, "percent": "100 0"}),
        *repeats(30.0, batch_size=2),
    ]
    new = [
        *repeats(33.0, batch_size=2),
        *repeats(22.0, batch_size=1, setup={"percent": "100 0", "overlap": True}),
        *repeats(11.0, batch_size=1),
    ]
    found = compared(old, new)
    assert column(found.table, "ratio") == pytest.approx([1.1, 1.1, 1.1])
    assert shown(found.table)[:2] == ["batch_size", "overlap"]


def test_what_only_one_has_is_told():
    old = [*repeats(10.0), *repeats(10.0, batch_size=3), *repeats(10.0, batch_size=5)]
    new = [*repeats(10.0), *repeats(10.0, batch_size=7)]
    notes = compared(old, new).table.notes
    assert "Configurations only in the baseline: 2 (batch_size 3; batch_size 5)." in notes
    assert "Configurations not in the baseline: 1 (batch_size 7)." in notes


def test_nothing_in_common_is_an_error_that_tells_the_nearest():
    with pytest.raises(ConfigError) as error:
        compared(
            [known(batch_size=2, max_tokens=8), known(batch_size=4, setup={"overlap": True})],
            [known(batch_size=8, setup={"overlap": True})],
        )
    assert error.value.message == (
        "--baseline: it has no configuration in common with the new runs; those most alike differ in "
        "batch_size was 4, now 8"
    )


def test_nothing_selected_is_an_error():
    for old, new in (([], [run()]), ([run()], [])):
        with pytest.raises(ConfigError, match=r"^--baseline: "):
            compared(old, new)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "real"), ("basis", "projected"), ("model", "facebook/opt-30b"),
     ("topology", "2 stages"), ("dtype", "float16"), ("machine", "M2"), ("machine", None)],
)  # fmt: skip
def test_different_things_are_not_compared(name, value):
    with pytest.raises(ConfigError) as error:
        compared([known(), known(batch_size=2)], [known(**{name: value}), known(batch_size=2)])
    assert error.value.message.startswith(
        f"--baseline: runs that differ in {name} cannot be compared: {name} was "
    )
    assert "--allow-mixed" in error.value.message


def test_different_things_are_compared_with_a_mark_where_that_is_allowed():
    found = compared(
        [known(), known(batch_size=2)],
        [known(weights="real", throughput=10.0), known(batch_size=2)],
        allow_mixed=True,
        figures=["throughput"],
    )
    assert [row.is_mixed for row in found.table.rows] == [False, True]
    assert column(found.table, "weights") == ["dummy", "dummy -> real"]
    assert "weights" in shown(found.table)
    assert "Marked rows compare runs that differ in weights." in found.table.notes
    assert found.has_regression


def test_a_counterpart_that_is_alike_is_preferred():
    found = compared(
        [known(throughput=10.0), known(throughput=40.0, weights="real")],
        [known(throughput=20.0), known(throughput=80.0, machine="M2", weights="real")],
        allow_mixed=True,
        figures=["throughput"],
    )
    assert column(found.table, "ratio") == [2.0, 2.0]
    assert [row.is_mixed for row in found.table.rows] == [False, True]


def test_rows_without_a_record_are_compared_with_such_only():
    assert verdicts(compared([run()], [run()])) == ["equal", "equal"]
    with pytest.raises(ConfigError, match=r"runs that differ in system, .* not known"):
        compared([run()], [known(setup={"overlap": True})])
    found = compared([run()], [known(setup={"overlap": True})], allow_mixed=True)
    assert [row.is_mixed for row in found.table.rows] == [True, True]


def test_groups_that_were_asked_for_are_matched():
    found = compared(
        [*repeats(10.0, batch_size=1), *repeats(20.0, batch_size=2)],
        [*repeats(30.0, batch_size=3), *repeats(15.0, batch_size=3, max_tokens=8)],
        group_by=["max_tokens"],
    )
    assert column(found.table, "max_tokens") == [32]
    assert column(found.table, "ratio") == [2.0]
    with pytest.raises(ConfigError, match="differ in weights cannot be compared"):
        compared([known()], [known(weights="real")], group_by=["max_tokens"])


def test_the_run_ids_are_those_of_the_new_runs():
    found = compared([known(), known()], [known(batch_size=2), known()])
    assert {row.run_ids for row in found.table.rows} == {(2,)}


def test_the_table_may_be_sorted_by_its_columns():
    old = [*repeats(10.0, batch_size=1), *repeats(10.0, batch_size=2)]
    new = [*repeats(10.0, batch_size=1), *repeats(9.9, batch_size=2)]
    assert column(compared(old, new, sort=["ratio"]).table, "batch_size") == [2, 1]
    # Figures order other tables.
    assert column(compared(old, new, sort=["throughput"]).table, "batch_size") == [1, 2]
    with pytest.raises(ConfigError, match=r"^--sort: there is no column 'colour'"):
        compared(old, new, sort=["colour"])


def test_the_verdict_names_the_worst():
    found = compared(
        [*repeats(10.0, batch_size=1), *repeats(10.0, batch_size=2)],
        [*repeats(9.0, batch_size=1), *repeats(5.0, batch_size=2)],
    )
    assert found.verdict == (
        "2 of 2 figures are worse than the baseline's by more than 5%; the worst: throughput with "
        "batch_size 2 is 0.5 times the baseline's."
    )
