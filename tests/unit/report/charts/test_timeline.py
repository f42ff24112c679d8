"""Lanes of ranks: moments where a record has them, else totals that say so."""

from __future__ import annotations

import pytest

from flexbench.report.charts.chart import MOST_POINTS, ChartKind, PlotKind
from flexbench.report.charts.making import make_charts
from tests.unit.report.charts.runs import dist_run, moments, petals_run, stage, store_of


def charts_of(runs):
    with store_of(runs) as store:
        return make_charts(store, [], [], [PlotKind.TIMELINE])


def run_of(*stages, figures=None, **changes):
    return dist_run(details={"stages": list(stages), "figures": figures}, **changes)


def bars(series):
    return [(bar.what, bar.start, bar.end) for bar in series.bars]


def test_rows_of_a_timeline_are_bars_in_lanes():
    first = moments(("computing", 0.0, 4.0), ("sending", 4.0, 5.0))
    second = moments(("waiting", 0.0, 4.0), ("computing", 4.0, 5.0))
    (chart,) = charts_of(
        [run_of(stage(0, timeline=first, wall_s=5.0), stage(1, timeline=second, wall_s=5.0))]
    )
    assert chart.kind is ChartKind.TIMELINE
    assert chart.name == "timeline-opt-125m-2-stages"
    assert [series.name for series in chart.series] == ["rank 0", "rank 1"]
    assert bars(chart.series[0]) == [("computing", 0.0, 4.0), ("sending", 4.0, 5.0)]
    assert bars(chart.series[1]) == [("waiting", 0.0, 4.0), ("computing", 4.0, 5.0)]
    assert chart.title == "Stages of opt-125m, 2 stages: what each rank did when"
    assert chart.description == (
        "2 ranks in 5 s. Rank 0: computing 80 %, sending 20 %. "
        "Rank 1: waiting 80 %, computing 20 %."
    )
    assert not any("not when" in note for note in chart.notes)


def test_older_records_have_totals_one_after_the_other_and_say_so():
    (chart,) = charts_of([run_of(stage(0), stage(1, compute_s=2.0, receive_s=3.0, send_s=1.5))])
    assert bars(chart.series[0]) == [
        ("loading", 0.0, 2.0),
        ("computing", 2.0, 7.0),
        ("waiting", 7.0, 9.0),
        ("rest", 9.0, 10.0),
    ]
    assert bars(chart.series[1]) == [
        ("loading", 0.0, 2.0),
        ("computing", 2.0, 4.0),
        ("waiting", 4.0, 7.0),
        ("sending", 7.0, 8.5),
        ("rest", 8.5, 10.0),
    ]
    assert chart.title.endswith("total time per rank")
    assert any("not when it did so" in note for note in chart.notes)


def test_one_stage_without_moments_makes_all_totals():
    timeline = moments(("computing", 0.0, 4.0))
    (chart,) = charts_of([run_of(stage(0, timeline=timeline), stage(1))])
    assert chart.title.endswith("total time per rank")
    assert bars(chart.series[0])[0] == ("loading", 0.0, 2.0)


def test_the_bubble_is_told_as_measured_in_theory_and_of_the_schedule():
    figures = {"bubble_fraction": 0.25, "bubble_theory": 0.2, "bubble_of_schedule": 0.123}
    (chart,) = charts_of([run_of(stage(0), stage(1), figures=figures)])
    assert (
        "Bubble: 25.0 % measured, 20.0 % in theory, 12.3 % of the schedule that was run."
        in chart.notes
    )
    (alone,) = charts_of([run_of(stage(0), figures=figures)])
    assert not any(note.startswith("Bubble") for note in alone.notes)


def test_the_newest_run_of_each_configuration_and_not_more_than_four():
    runs = [
        run_of(stage(0, wall_s=10.0), max_tokens=n, started_at=f"2026-11-0{n}T00:00:00+00:00")
        for n in range(1, 7)
    ]
    runs.append(run_of(stage(0, wall_s=99.0), max_tokens=6, started_at="2026-11-01T00:00:00+00:00"))
    runs.append(run_of(stage(0, wall_s=77.0), max_tokens=6))
    charts = charts_of(runs)
    assert [chart.name for chart in charts] == [
        f"timeline-opt-125m-2-stages-{n}-new" for n in (6, 5, 4, 3)
    ]
    assert charts[0].title == "Stages of opt-125m, 2 stages, 6 new: total time per rank"
    assert bars(charts[0].series[0])[-1] == ("rest", 9.0, 10.0)
    assert charts[-1].notes[-1] == "Not drawn: 2 configurations: 2 new; 1 new."
    assert not any(note.startswith("Not drawn") for note in charts[0].notes)


def test_pipelines_with_moments_come_first_and_others_only_without_them():
    timeline = moments(("computing", 0.0, 4.0))
    alone = run_of(stage(0, timeline=timeline), max_tokens=1, started_at="2026-11-09T00:00:00")
    totals = run_of(stage(0), stage(1), max_tokens=2)
    pipeline = run_of(stage(0, timeline=timeline), stage(1, timeline=timeline), max_tokens=3)
    (chart,) = charts_of([alone, totals, pipeline])
    assert chart.title.endswith("3 new: what each rank did when")
    assert chart.notes[-1] == "Not drawn: 2 configurations: 2 new; 1 new."
    (chart,) = charts_of([alone, totals])
    assert chart.title.endswith("2 new: total time per rank")
    (chart,) = charts_of([alone])
    assert [series.name for series in chart.series] == ["rank 0"]


def test_long_timelines_are_drawn_in_steps_of_what_took_most():
    rows = []
    for n in range(5000):
        rows += [("computing", n, n + 0.7), ("waiting", n + 0.7, n + 1)]
    rows.append(("loading", 5000.0, 10000.0))
    (chart,) = charts_of([run_of(stage(0, timeline=moments(*rows), wall_s=10000.0))])
    assert sum(len(series.bars) for series in chart.series) <= MOST_POINTS
    assert bars(chart.series[0]) == [
        ("computing", 0.0, pytest.approx(5000.0)),
        ("loading", pytest.approx(5000.0), pytest.approx(10000.0)),
    ]
    assert "Drawn in steps of 10 s: what took most of each." in chart.notes


def test_gaps_of_a_long_timeline_stay_gaps():
    rows = [("computing", n * 10.0, n * 10.0 + 5.0) for n in range(1500)]
    rows.append(("computing", 40000.0, 50000.0))
    (chart,) = charts_of([run_of(stage(0, timeline=moments(*rows)))])
    (first, second) = bars(chart.series[0])
    assert first == ("computing", 0.0, pytest.approx(15000.0, abs=50.0))
    assert second == ("computing", pytest.approx(40000.0), pytest.approx(50000.0))


def test_a_timeline_that_ends_before_its_run_says_so():
    timeline = moments(("computing", 0.0, 4.0))
    (chart,) = charts_of([run_of(stage(0, timeline=timeline, wall_s=10.0))])
    assert "Only the beginning was recorded; the run took 10 s." in chart.notes


@pytest.mark.parametrize(
    "details",
    [
        {},
        {"stages": 7},
        {"stages": []},
        {"stages": [None, 7, "x"]},
        {"stages": [{"rank": "0", "compute_s": 1.0}]},
        {"stages": [{"rank": 0, "compute_s": "1"}]},
        {"stages": [{"rank": True, "compute_s": 1.0}]},
        {"stages": [{"rank": 0, "timeline": {"columns": ["x"], "rows": [[1]]}}]},
    ],
)
def test_stages_that_say_nothing_are_no_chart(details):
    assert charts_of([dist_run(details=details)]) == []


def test_rows_that_make_no_sense_are_passed_over():
    timeline = moments(
        ("computing", 0.0, 4.0),
        ("computing", 5.0, 5.0),
        ("computing", 7.0, 6.0),
        ("computing", -1.0, 1.0),
        ("<script>", 0.0, 1.0),
        ("computing", None, 1.0),
    )
    timeline["rows"] += [[], None, ["computing", 0.0], [["computing"], 0.0, 1.0]]
    (chart,) = charts_of([run_of(stage(0, timeline=timeline, wall_s=4.0))])
    assert bars(chart.series[0]) == [("computing", 0.0, 4.0)]


def test_runs_of_other_systems_have_no_stages():
    assert charts_of([petals_run(details={"stages": [stage(0)]})]) == []
