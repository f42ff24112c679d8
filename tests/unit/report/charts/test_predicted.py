"""Predictions over measurements: one chart for each unit."""

from __future__ import annotations

import pytest

from flexbench.report.charts.chart import MOST_POINTS, MOST_SERIES, ChartKind
from flexbench.report.charts.predicted import predicted_charts
from flexbench.report.predictions import Prediction
from tests.unit.report.charts.runs import HOSTILE


def prediction(figure="Network", unit="tokens/s", predicted=110.0, measured=100.0, **changes):
    error = predicted / measured - 1 if predicted is not None and measured else None
    values = {"model": "bigscience/bloom-560m", "num_blocks": 24, "error": error}
    return Prediction(
        figure=figure, unit=unit, predicted=predicted, measured=measured, **{**values, **changes}
    )


def test_points_are_servers_and_series_figures():
    (chart,) = predicted_charts(
        [prediction(), prediction(predicted=90.0, num_blocks=1), prediction("Forward, one block")]
    )
    assert chart.kind is ChartKind.SCATTER
    assert [series.name for series in chart.series] == ["Network", "Forward, one block"]
    first, second = chart.series[0].points
    assert (first.x, first.y) == (100.0, 110.0)
    assert first.label == (
        "bigscience/bloom-560m, 24 blocks: predicted 110 tokens/s, measured 100 tokens/s, +10.0%"
    )
    assert second.label.startswith("bigscience/bloom-560m, 1 block: ")
    assert (chart.x.is_log, chart.y.is_log) == (True, True)
    assert chart.x.full_title == "Measured (tokens/s)"
    assert chart.y.full_title == "Predicted (tokens/s)"


def test_each_unit_is_a_chart_and_bytes_are_in_gib():
    charts = list(
        predicted_charts([prediction(), prediction("Weights", "bytes", 3 * 2**30, 2 * 2**30)])
    )
    assert [chart.name for chart in charts] == ["predicted-measured-1", "predicted-measured-2"]
    point = charts[1].series[0].points[0]
    assert (point.x, point.y) == (2.0, 3.0)
    assert "predicted 3 GiB, measured 2 GiB" in point.label
    assert charts[1].x.unit == "GiB"


@pytest.mark.parametrize(
    ("predicted", "sentence"),
    [
        (110.0, "Network: 1 server, predicted 10.0 % too high."),
        (75.0, "Network: 1 server, predicted 25.0 % too low."),
        (100.0, "Network: 1 server, predicted right to 0.1 %."),
    ],
)
def test_the_description_says_how_far_off_it_was(predicted, sentence):
    (chart,) = predicted_charts([prediction(predicted=predicted)])
    assert chart.description == sentence


def test_the_median_of_several_servers_is_told():
    (chart,) = predicted_charts([prediction(predicted=value) for value in (101.0, 120.0, 300.0)])
    assert chart.description == "Network: 3 servers, predicted 20.0 % too high (median)."


def test_what_has_no_place_on_logarithmic_axes_is_counted():
    (chart,) = predicted_charts(
        [
            prediction(),
            prediction(predicted=None),
            prediction(measured=None),
            prediction(measured=0.0),
            prediction(predicted=-1.0),
        ]
    )
    assert len(chart.series[0].points) == 1
    assert "Left out, as not both are known and above 0: 4 figures." in chart.notes
    assert list(predicted_charts([prediction(measured=None)])) == []
    assert list(predicted_charts([])) == []


def test_points_and_series_are_bounded():
    many = [prediction(f"figure {n % 10}", measured=1.0 + n) for n in range(5000)]
    (chart,) = predicted_charts(many)
    assert len(chart.series) == MOST_SERIES
    assert sum(len(series.points) for series in chart.series) <= MOST_POINTS
    assert "Points drawn: 1,000 of 4,000, evenly chosen." in chart.notes
    assert chart.notes[-1] == "Not drawn: 2 figures: figure 8; figure 9."
    units = [prediction(unit=f"unit {n}") for n in range(20)]
    assert len(list(predicted_charts(units))) == 8


def test_hostile_names_are_printable():
    (chart,) = predicted_charts([prediction(HOSTILE, HOSTILE, model=HOSTILE)])
    texts = [chart.title, chart.description, chart.x.unit, chart.series[0].name]
    texts += [chart.series[0].points[0].label]
    assert all(text.isprintable() for text in texts)
    assert "<script>" in chart.series[0].name
