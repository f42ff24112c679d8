"""Throughput, latency and load: what is one curve, and what its points say."""

from __future__ import annotations

import pytest

from flexbench.report.charts.chart import MOST_POINTS, MOST_SERIES, ChartKind, PlotKind, PointMark
from flexbench.report.charts.making import make_charts
from tests.unit.report.charts.runs import (
    HOSTILE,
    dist_run,
    petals_run,
    serving_run,
    stage,
    store_of,
)


def charts_of(runs, *kinds, curves=()):
    with store_of(runs) as store:
        return make_charts(store, [], curves, kinds or tuple(PlotKind))


def lone(**changes):
    """Another configuration under one load; a chart of one point alone would show nothing."""
    return serving_run(dtype="float16", throughput=1.0, **changes)


def latency_chart(runs, curves=()):
    (chart,) = charts_of(runs, PlotKind.THROUGHPUT_LATENCY, curves=curves)
    return chart


def places(series):
    return [(point.x, point.y) for point in series.points]


def test_points_stand_in_the_order_of_the_load_and_have_the_runs_figures():
    runs = [
        petals_run(num_processes=8, throughput=48.0, mean_latency=3.5),
        petals_run(num_processes=1, throughput=12.0, mean_latency=1.5),
        petals_run(num_processes=2, throughput=24.0, mean_latency=2.0),
    ]
    chart = latency_chart(runs)
    (series,) = chart.series
    assert chart.kind is ChartKind.CURVE
    assert chart.name == "throughput-latency-petals"
    assert places(series) == [(12.0, 1.5), (24.0, 2.0), (48.0, 3.5)]
    assert [point.label for point in series.points] == [
        "1 client, 1 run",
        "2 clients, 1 run",
        "8 clients, 1 run",
    ]
    assert [point.tag for point in series.points] == ["1", "2", "8"]
    assert chart.x.full_title == "Throughput (tokens/s)"
    assert chart.y.full_title == "Mean latency (s)"


def test_the_description_says_what_is_to_be_seen():
    runs = [
        petals_run(num_processes=1, throughput=12.0, mean_latency=1.5),
        petals_run(num_processes=8, throughput=48.0, mean_latency=2.0),
        petals_run(num_processes=16, throughput=40.0, mean_latency=3.0),
    ]
    assert latency_chart(runs).description == (
        "Throughput rises from 12 to 48 tokens/s between 1 client and 8 clients, and is 40 with 16 "
        "clients. Latency goes from 1.5 to 3 s, and has doubled at 16 clients."
    )


def test_repeats_are_one_point_with_the_interval_of_the_repeats():
    runs = [
        petals_run(throughput=10.0, mean_latency=1.0),
        petals_run(throughput=20.0, mean_latency=3.0),
        petals_run(num_processes=2, throughput=30.0, mean_latency=4.0),
    ]
    chart = latency_chart(runs)
    first, second = chart.series[0].points
    assert (first.x, first.y, first.y_low, first.y_high) == (15.0, 2.0, 1.0, 3.0)
    assert first.label == "1 client, 2 runs"
    assert (second.y_low, second.y_high) == (None, None)
    assert any("from the lowest to the highest" in note for note in chart.notes)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"weights": "dummy"}, "dummy weights"),
        ({"basis": "projected"}, "projected"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"topology": "4 servers"}, "4 servers"),
        ({"machine": "other"}, "other"),
        ({"batch_size": 2}, "batch 2"),
        ({"setup": {"device": "cpu"}}, "device cpu"),
        ({"weights": None}, "weights not known"),
    ],
)
def test_what_cannot_be_compared_is_never_on_one_curve(change, name):
    chart = latency_chart([petals_run(), petals_run(**change)])
    assert len(chart.series) == 2
    assert [len(series.points) for series in chart.series] == [1, 1]
    assert chart.series[1].name == name


def test_what_all_have_in_common_is_a_note_and_no_part_of_names():
    chart = latency_chart([petals_run(), petals_run(dtype="float16")])
    assert [series.name for series in chart.series] == ["float32", "float16"]
    assert chart.notes[0] == (
        "Same for all: petals, bigscience/bloom-560m, real weights, measured, 2 servers, AMD EPYC, 2 CPUs, "
        "batch 1, 2 micro-batches, prompt 32, 8 new."
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "bigscience/bloom-3b"}, "bloom-3b, prompt 32, 8 new"),
        ({"sequence_length": 64}, "bloom-560m, prompt 64, 8 new"),
        ({"max_tokens": 16}, "bloom-560m, prompt 32, 16 new"),
    ],
)
def test_each_task_has_a_chart_of_its_own(change, words):
    runs = [petals_run(num_processes=n) for n in (1, 2, 4)]
    runs += [petals_run(num_processes=n, **change) for n in (1, 2)]
    first, second = charts_of(runs, PlotKind.THROUGHPUT_LATENCY)
    assert first.title == "Throughput and mean latency: petals, bloom-560m, prompt 32, 8 new"
    assert second.title == f"Throughput and mean latency: petals, {words}"
    assert first.name == "throughput-latency-petals-bloom-560m-32-8"
    assert [len(chart.series[0].points) for chart in (first, second)] == [3, 2]


def test_the_tasks_with_most_runs_are_drawn_and_the_others_named():
    runs = [
        petals_run(num_processes=n, max_tokens=tokens)
        for tokens in range(1, 7)
        for n in range(1, tokens + 1)
    ]
    charts = charts_of(runs, PlotKind.THROUGHPUT_LATENCY)
    assert [chart.name.rpartition("-")[2] for chart in charts] == ["6", "5", "4", "3"]
    assert charts[-1].notes[-1] == (
        "Not drawn: 2 tasks with fewer runs or, of as many, less throughput: "
        "bloom-560m, prompt 32, 2 new; bloom-560m, prompt 32, 1 new."
    )


def test_a_single_point_is_no_chart():
    assert charts_of([petals_run(), petals_run()], PlotKind.THROUGHPUT_LATENCY) == []
    runs = [petals_run(), petals_run(num_processes=2), petals_run(max_tokens=9)]
    chart = latency_chart(runs)
    assert chart.notes[-1] == (
        "Not drawn: 1 task with too little to draw: bloom-560m, prompt 32, 9 new."
    )


def test_charts_of_the_same_words_have_names_of_their_own():
    runs = [petals_run(num_processes=n, model=m) for n in (1, 2) for m in ("a/x_1", "b/x-1")]
    charts = charts_of(runs, PlotKind.THROUGHPUT_LATENCY)
    assert [chart.name for chart in charts] == [
        "throughput-latency-petals-x-1-32-8",
        "throughput-latency-petals-x-1-32-8-2",
    ]


def test_projected_points_are_marked():
    chart = latency_chart([dist_run(), dist_run(basis="projected", throughput=9.0)])
    assert [series.name for series in chart.series] == ["measured", "projected"]
    (measured,), (projected,) = (series.points for series in chart.series)
    assert measured.mark is None
    assert projected.mark is PointMark.PROJECTED
    assert projected.label == "batch 4, 1 run, projected"
    assert chart.notes[0] == "Broken hollow points: projected, not measured."
    assert chart.description == (
        "2 configurations; the highest throughput is 12 tokens/s: measured, batch 4."
    )


def test_each_system_has_a_chart_of_its_own():
    runs = [
        run(dtype=dtype, **changes)
        for run, changes in (
            (petals_run, {}),
            (dist_run, {}),
            (serving_run, {}),
            (petals_run, {"system": None}),
        )
        for dtype in ("float16", "float32")
    ]
    names = [chart.name for chart in charts_of(runs, PlotKind.THROUGHPUT_LATENCY)]
    assert names == [
        "throughput-latency-petals",
        "throughput-latency-dist",
        "throughput-latency-serving",
        "throughput-latency-rows",
    ]


def test_the_load_of_dist_is_the_batch_and_its_latency_that_of_all_prompts():
    runs = [
        dist_run(batch_size=4, setup={"percent": "100 0"}),
        dist_run(batch_size=8, throughput=20.0, setup={"percent": "100 0"}),
    ]
    chart = latency_chart(runs)
    (series,) = chart.series
    assert [point.label for point in series.points] == ["batch 4, 1 run", "batch 8, 1 run"]
    assert chart.y.title == "Total latency"


def test_throughput_by_ranks_compares_topologies_on_purpose():
    runs = [
        dist_run(num_processes=n, topology=f"{n} stages", throughput=10.0 * n) for n in (1, 2, 4)
    ]
    (chart,) = charts_of(runs, PlotKind.THROUGHPUT_CLIENTS)
    (series,) = chart.series
    assert chart.name == "throughput-clients-dist-ranks"
    assert chart.x.title == "Ranks"
    assert places(series) == [(1.0, 10.0), (2.0, 20.0), (4.0, 40.0)]


def test_throughput_by_clients_needs_more_than_one_load():
    assert charts_of([petals_run(), petals_run()], PlotKind.THROUGHPUT_CLIENTS) == []
    runs = [petals_run(num_processes=n, throughput=12.0 * n) for n in (1, 2)]
    runs.append(petals_run(num_processes=2, throughput=26.0, mean_latency=None))
    (chart,) = charts_of(runs, PlotKind.THROUGHPUT_CLIENTS)
    (series,) = chart.series
    assert places(series) == [(1.0, 12.0), (2.0, 25.0)]
    assert (series.points[1].y_low, series.points[1].y_high) == (24.0, 26.0)


def test_serving_has_a_second_chart_of_the_time_to_first_token():
    runs = [
        serving_run(num_processes=n, throughput=10.0 * n, figures={"ttft_p99": 0.1 * n})
        for n in (1, 2)
    ]
    mean, ttft = charts_of(runs, PlotKind.THROUGHPUT_LATENCY)
    assert mean.name == "throughput-latency-serving"
    assert ttft.name == "throughput-ttft-serving"
    assert places(ttft.series[0]) == [(10.0, pytest.approx(0.1)), (20.0, pytest.approx(0.2))]
    assert ttft.y.full_title == "Time to first token, 99th percentile (s)"


def test_what_a_serving_point_was_asked_for_follows_from_its_load():
    runs = [
        serving_run(
            num_processes=n,
            num_micro_batches=16 // n,
            setup={"concurrency": n, "api": "x"},
        )
        for n in (1, 2, 4)
    ]
    (series,) = latency_chart(runs).series
    assert len(series.points) == 3


def test_an_open_loop_is_a_sweep_of_rates():
    runs = [serving_run(rate_per_s=rate, num_processes=3) for rate in (2.5, 5.0)]
    chart = latency_chart(runs)
    assert chart.name == "throughput-latency-serving-rates"
    assert [point.label for point in chart.series[0].points] == [
        "2.5 requests/s, 1 run",
        "5 requests/s, 1 run",
    ]


def test_client_limited_points_are_marked():
    chart = latency_chart([serving_run(), serving_run(num_processes=2, limited=True)])
    free, limited = chart.series[0].points
    assert free.mark is None
    assert limited.mark is PointMark.CLIENT_LIMITED
    assert limited.label.endswith("client-limited")
    assert any(note.startswith("Hollow points") for note in chart.notes)


def test_late_timestamps_are_told_where_latencies_are_shown():
    runs = [serving_run(late=True), serving_run(num_processes=2)]
    latency, throughput = charts_of(runs, PlotKind.THROUGHPUT_LATENCY, PlotKind.THROUGHPUT_CLIENTS)
    assert latency.series[0].points[0].label == "1 client, 1 run, timestamps late"
    assert any("too long, never too short" in note for note in latency.notes)
    assert not any("too long" in note for note in throughput.notes)


def test_configurations_under_one_load_are_not_drawn_over_it_and_counted():
    runs = [petals_run(num_processes=n) for n in (1, 2)] + [petals_run(dtype="other")]
    (chart,) = charts_of(runs, PlotKind.THROUGHPUT_CLIENTS)
    assert [series.name for series in chart.series] == ["bigscience/bloom-560m"]
    assert "Not drawn, as there is one load alone: 1 configuration." in chart.notes


def test_hostile_names_are_printable_in_every_chart():
    details = {"stages": [stage(0)], "latencies_s": [1.0] * 5}
    common = {"model": HOSTILE, "details": details, "setup": {HOSTILE: HOSTILE}}
    runs = [run(num_processes=n, **common) for run in (petals_run, dist_run) for n in (1, 2)]
    charts = charts_of(runs)
    assert {chart.kind for chart in charts} == set(ChartKind) - {ChartKind.SCATTER}
    for chart in charts:
        texts = [chart.name, chart.title, chart.description, *chart.notes]
        texts += [series.name for series in chart.series]
        texts += [point.label for series in chart.series for point in series.points]
        assert all(text.isprintable() for text in texts)
    assert any("<script>" in note for chart in charts for note in chart.notes)


def curve(points, **saturation):
    found = {"knee_level": 4, "highest_requests_per_s": 40.0, "confidence": "sure", **saturation}
    return {
        "system": "serving curve",
        "points": [
            {"load": {"concurrency": load, "rate_per_s": None}, "output_tokens_per_s": throughput}
            for load, throughput in points
        ],
        "saturation": found,
    }


def test_the_saturation_point_is_marked_on_the_curve_of_its_points():
    loads = [(1, 10.0), (2, 20.0), (4, 40.0), (8, 41.0)]
    runs = [serving_run(num_processes=load, throughput=value) for load, value in loads]
    runs += [
        serving_run(num_processes=n, throughput=3.0 * n, dtype="other") for n in (1, 4, 5, 6, 7)
    ]
    chart = latency_chart(runs, curves=[curve(loads)])
    marked = [
        (series.name, point.label)
        for series in chart.series
        for point in series.points
        if point.mark is PointMark.SATURATION
    ]
    assert marked == [("float32", "4 clients, 1 run, saturation")]
    assert (
        "float32: It saturates at 4 clients, where the ring is (sure); the highest throughput is 40 "
        "requests/s." in chart.notes
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"knee_level": None},
            "No saturation point was found (sure): the highest throughput is 40",
        ),
        ({"is_lower_bound": True}, "the highest throughput is at least 40 requests/s."),
        ({"knee_level": 3}, "It saturates at 3 clients (sure);"),
        ({"highest_requests_per_s": "x", "confidence": 7}, "It saturates at 4 clients, where the"),
    ],
)
def test_the_sentence_of_a_search_says_no_more_than_it_found(changes, sentence):
    loads = [(1, 10.0), (4, 40.0)]
    runs = [serving_run(num_processes=load, throughput=value) for load, value in loads]
    chart = latency_chart(runs, curves=[curve(loads, **changes)])
    assert any(sentence in note for note in chart.notes)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"saturation": None},
        {"saturation": {"knee_level": 1}},
        {"saturation": {"knee_level": 1}, "points": 7},
        {"saturation": {"knee_level": 1}, "points": [None, {"load": 3}, {"load": {}}]},
        {
            "saturation": {"knee_level": 1},
            "points": [{"load": {"concurrency": 10**400}, "output_tokens_per_s": 1}],
        },
        curve([(1, 11.0), (2, 20.0)]),
    ],
)
def test_a_curve_that_belongs_to_none_is_passed_over(record):
    chart = latency_chart([serving_run(throughput=10.0), lone()], curves=[record])
    assert chart.series[0].points[0].mark is None
    assert not any("saturat" in note for note in chart.notes)


def test_not_more_series_than_can_be_told_apart_and_the_rest_is_named():
    runs = [petals_run(dtype=f"type-{n}", throughput=99.0 - n) for n in range(15)]
    runs += [petals_run(dtype="type-14", num_processes=2)]
    chart = latency_chart(runs)
    assert len(chart.series) == MOST_SERIES
    # It has two runs; of the others those with the highest throughput.
    assert [series.name for series in chart.series] == ["type-14", *(f"type-{n}" for n in range(7))]
    assert chart.notes[-1] == (
        "Not drawn: 7 configurations with fewer runs or, of as many, less throughput: "
        "type-7; type-8; type-9; type-10; type-11; 2 more."
    )


def test_many_loads_are_thinned_and_the_ends_stay():
    runs = [petals_run(num_processes=n, throughput=float(n)) for n in range(1, 3001)]
    chart = latency_chart(runs)
    (series,) = chart.series
    assert 2 < len(series.points) <= MOST_POINTS // MOST_SERIES
    assert (series.points[0].x, series.points[-1].x) == (1.0, 3000.0)
    assert f"Loads between those drawn: {3000 - len(series.points):,} more." in chart.notes


def test_a_wide_range_of_latencies_has_a_logarithmic_axis():
    near = [petals_run(mean_latency=1.0), petals_run(num_processes=2, mean_latency=29.0)]
    wide = [petals_run(mean_latency=1.0), petals_run(num_processes=2, mean_latency=31.0)]
    assert not latency_chart(near).y.is_log
    assert latency_chart(wide).y.is_log
    # The interval has to be on the axis as well.
    assert not latency_chart([*wide, petals_run(mean_latency=0.0)]).y.is_log


def test_a_wide_range_of_throughput_has_a_logarithmic_axis():
    runs = [
        petals_run(throughput=1.0),
        petals_run(num_processes=2, throughput=31.0),
    ]
    latency, load = charts_of(runs, PlotKind.THROUGHPUT_LATENCY, PlotKind.THROUGHPUT_CLIENTS)
    assert (latency.x.is_log, load.y.is_log, load.x.is_log) == (True, True, False)


def test_runs_without_figures_are_no_points():
    runs = [petals_run(throughput=None), petals_run(mean_latency=None)]
    assert charts_of(runs, PlotKind.THROUGHPUT_LATENCY) == []
    huge = [petals_run(throughput=1.7e308), petals_run(throughput=1.7e308)]
    assert charts_of(huge, PlotKind.THROUGHPUT_LATENCY) == []
