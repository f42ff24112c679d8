"""Shares of latencies: steps that end at 1, of the configurations with most values."""

from __future__ import annotations

import math

import pytest

from flexbench.report.charts.chart import MOST_POINTS, ChartKind, PlotKind
from flexbench.report.charts.making import make_charts
from tests.unit.report.charts.runs import petals_run, serving_run, store_of


def charts_of(runs):
    with store_of(runs) as store:
        return make_charts(store, [], [], [PlotKind.LATENCY])


def with_latencies(latencies, **changes):
    return petals_run(details={"latencies_s": latencies}, **changes)


def test_steps_go_from_0_to_1_at_the_values():
    (chart,) = charts_of([with_latencies([3.0, 1.0, 2.0, 2.0, 5.0])])
    (series,) = chart.series
    assert chart.kind is ChartKind.DISTRIBUTION
    assert chart.name == "latency-distribution-petals"
    assert [(point.x, point.y) for point in series.points] == [
        (1.0, 0.0),
        (1.0, 0.2),
        (2.0, 0.6),
        (3.0, 0.8),
        (5.0, 1.0),
    ]
    assert series.points[2].label == "60 % took up to 2 s"
    assert chart.x.full_title == "Request latency (s)"
    assert not chart.x.is_log


def test_the_description_names_the_middle_and_the_tail():
    (chart,) = charts_of([with_latencies([float(n) for n in range(1, 101)])])
    assert chart.description == (
        "bigscience/bloom-560m: half of the requests took up to 50 s, 99 % up to 99 s."
    )


def test_repeats_are_one_distribution_and_configurations_are_not():
    runs = [
        with_latencies([1.0] * 3),
        with_latencies([2.0] * 2),
        with_latencies([5.0] * 5, num_processes=4),
    ]
    (chart,) = charts_of(runs)
    assert [(series.name, series.points[-1].x) for series in chart.series] == [
        ("1 client", 2.0),
        ("4 clients", 5.0),
    ]


def test_a_sample_stands_for_all_requests_of_its_run():
    runs = [
        petals_run(details={"latencies_s": [1.0] * 2000, "num_latencies": 36_000}),
        petals_run(details={"latencies_s": [5.0] * 2000, "num_latencies": 2000}),
        petals_run(details={"latencies_s": [5.0] * 2000}),
    ]
    (chart,) = charts_of(runs)
    (series,) = chart.series
    assert [(point.x, point.y) for point in series.points] == [(1.0, 0.0), (1.0, 0.9), (5.0, 1.0)]
    assert series.points[1].label == "90 % took up to 1 s"
    assert "half of the requests took up to 1 s, 99 % up to 5 s" in chart.description


@pytest.mark.parametrize("num", [None, "x", -3, 0, 4, [9], {"a": 1}, True])
def test_a_number_of_requests_that_cannot_be_is_that_of_the_sample(num):
    details = {"latencies_s": [1.0, 2.0, 3.0, 4.0, 5.0], "num_latencies": num}
    (chart,) = charts_of([petals_run(details=details)])
    shares = [point.y for point in chart.series[0].points]
    assert shares == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_uneven_weights_are_thinned_evenly_by_share():
    few = petals_run(details={"latencies_s": [9999.5] * 7, "num_latencies": 10**6})
    many = with_latencies([float(n) for n in range(1000)])
    (chart,) = charts_of([few, many])
    points = chart.series[0].points
    assert [point.x for point in points] == [0.0, 0.0, 9999.5]
    assert points[-1].y == 1.0


def test_series_stand_in_the_order_of_their_medians():
    runs = [
        with_latencies([5.0] * 6, num_processes=1),
        with_latencies([1.0] * 5, num_processes=4),
    ]
    (chart,) = charts_of(runs)
    assert [series.name for series in chart.series] == ["4 clients", "1 client"]


def test_systems_are_in_charts_of_their_own():
    runs = [with_latencies([1.0] * 5), serving_run(details={"latencies_s": [0.1] * 5})]
    assert [chart.name for chart in charts_of(runs)] == [
        "latency-distribution-petals",
        "latency-distribution-serving",
    ]


def test_a_range_over_30_times_is_logarithmic():
    (chart,) = charts_of([with_latencies([0.1] * 4 + [3.1])])
    assert chart.x.is_log
    (chart,) = charts_of([with_latencies([0.1] * 4 + [2.9])])
    assert not chart.x.is_log
    (chart,) = charts_of([with_latencies([0.0] * 4 + [2.9])])
    assert not chart.x.is_log


def test_many_values_are_thinned_and_the_ends_stay():
    (chart,) = charts_of([with_latencies([float(n) for n in range(5000)])])
    (series,) = chart.series
    assert 100 < len(series.points) <= MOST_POINTS // 8
    assert (series.points[0].x, series.points[-1].x) == (0.0, 4999.0)
    for point in series.points[1:]:
        assert point.y == pytest.approx((point.x + 1) / 5000)
    assert "Drawn in at most 124 steps each, evenly chosen." in chart.notes


def test_the_eight_configurations_with_most_runs_are_drawn_and_the_rest_is_named():
    runs = [with_latencies([1.0] * 5, num_processes=n) for n in range(1, 11) for _ in range(n)]
    (chart,) = charts_of(runs)
    assert [series.name for series in chart.series] == [f"{n} clients" for n in range(10, 2, -1)]
    assert chart.notes[-1] == (
        "Not drawn: 2 configurations with fewer runs or, of as many, less throughput: "
        "2 clients; 1 client."
    )


def test_values_that_are_no_latencies_are_passed_over():
    values = [1.0, None, "2", True, -3.0, [4.0], {"5": 5}, 6, 7, 8, 9]
    (chart,) = charts_of([with_latencies(values)])
    assert [point.x for point in chart.series[0].points] == [1.0, 1.0, 6.0, 7.0, 8.0, 9.0]
    assert charts_of([with_latencies([1.0] * 4 + ["x"] * 9)]) == []
    assert charts_of([with_latencies(["x"])]) == []
    assert charts_of([with_latencies([])]) == []
    assert charts_of([petals_run(details={"latencies_s": 7})]) == []
    assert charts_of([petals_run()]) == []


def test_a_limited_load_generator_is_told():
    run = serving_run(limited=True, details={"latencies_s": [0.1] * 5})
    (chart,) = charts_of([run])
    assert "The load generator was the limit, not the service: m." in chart.notes
    assert all(math.isfinite(point.x) for point in chart.series[0].points)
