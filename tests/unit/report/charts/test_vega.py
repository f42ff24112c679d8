"""Specifications for Vega-Lite: all of the data, and nothing but data."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from flexbench.report.charts.chart import MOST_SERIES, Chart, PointMark
from flexbench.report.charts.palette import (
    BAR_COLORS,
    COLORS,
    DARK,
    DARK_BACKGROUND,
    DASHES,
    LIGHT,
    LIGHT_BACKGROUND,
    SHAPES,
)
from flexbench.report.charts.vega import to_vega_lite
from tests.unit.report.charts import samples
from tests.unit.report.charts.runs import HOSTILE

BOTH = [{"is_dark": False}, {"is_dark": True}, {"is_interactive": True}]


def parts(value, key=None):
    """Every (key, value) in a specification, at any depth."""
    yield key, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from parts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from parts(item, key)


@pytest.mark.parametrize("options", BOTH)
@pytest.mark.parametrize("chart", samples.ALL, ids=lambda chart: chart.kind)
def test_every_value_is_in_the_data(chart: Chart, options):
    rows = to_vega_lite(chart, **options)["data"]["values"]
    drawn = [
        (row["series"], row.get("x"), row.get("y"), row.get("start"), row.get("end"))
        for row in rows
    ]
    assert drawn == [
        (series.name, point.x, point.y, None, None)
        for series in chart.series
        for point in series.points
    ] + [
        (series.name, None, None, bar.start, bar.end)
        for series in chart.series
        for bar in series.bars
    ]


def test_intervals_and_marks_are_in_the_data():
    rows = to_vega_lite(samples.curve(names=("one",)))["data"]["values"]
    assert [(row["low"], row["high"]) for row in rows] == [
        (None, None),
        (1.3, 1.8),
        (None, None),
        (None, None),
    ]
    assert [row["mark"] for row in rows] == [None, None, "saturation", "client-limited"]
    assert [row["order"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("options", BOTH)
@pytest.mark.parametrize("chart", samples.ALL, ids=lambda chart: chart.kind)
def test_nothing_is_fetched_and_everything_is_described(chart: Chart, options):
    spec = to_vega_lite(chart, **options)
    found = list(parts(spec))
    assert not {key for key, _ in found} & {"url", "href", "usermeta"}
    assert all(value != "image" for key, value in found if key in ("type", "mark"))
    addresses = [value for _, value in found if isinstance(value, str) and "://" in value]
    assert addresses == [spec["$schema"]]
    assert chart.description in spec["description"]
    assert spec["background"] == "transparent"
    json.dumps(spec, allow_nan=False)


@pytest.mark.parametrize("options", BOTH)
def test_hostile_names_are_values_and_never_code(options):
    spec = to_vega_lite(samples.hostile(), **options)
    holders = {
        key
        for key, value in parts(spec)
        if isinstance(value, str) and ("script" in value or "datum" in value)
    }
    # Rows, and domains of scales, which Vega takes as they are.
    assert holders == {"series", "domain"}
    names = {row["series"] for row in spec["data"]["values"]}
    assert HOSTILE in names
    keys = {key for key, _ in parts(spec)}
    assert not keys & {"signal", "calculate", "labelExpr", "test"}
    expressions = {value for key, value in parts(spec) if key == "expr"}
    assert expressions <= {"max(160, width - 40)"}


def test_an_interactive_chart_fits_its_place_and_zooms_without_hindering_the_page():
    spec = to_vega_lite(samples.curve(), is_interactive=True)
    assert spec["width"] == "container"
    assert spec["height"] == 300
    assert "title" not in spec
    (zoom, chosen) = [one for layer in spec["layer"] for one in layer.get("params", [])]
    assert zoom["bind"] == "scales"
    assert "ctrlKey" in zoom["select"]["zoom"]
    assert "shiftKey" in zoom["select"]["translate"]
    assert chosen["bind"] == "legend"


def test_a_picture_has_title_and_notes_and_no_interaction():
    spec = to_vega_lite(samples.curve())
    assert spec["title"]["text"] == ["Throughput and mean latency: petals"]
    assert spec["title"]["subtitle"] == [" ".join(samples.curve().notes)]
    many = replace(samples.curve(), notes=["A note that is rather long."] * 20)
    lines = to_vega_lite(many)["title"]["subtitle"]
    assert len(lines) == 2
    assert lines[1].endswith(" …")
    assert not {key for key, _ in parts(spec)} & {"params", "param"}


def test_what_is_projected_has_a_broken_outline():
    chart = samples.curve(names=("one",))
    points = [replace(point, mark=PointMark.PROJECTED) for point in chart.series[0].points]
    layers = to_vega_lite(replace(chart, series=[replace(chart.series[0], points=points)]))["layer"]
    (broken,) = [layer["mark"] for layer in layers if "strokeDash" in layer["mark"]]
    assert (broken["type"], broken["filled"]) == ("point", False)


def test_a_single_series_needs_no_legend():
    def legends(chart):
        return [value for key, value in parts(to_vega_lite(chart)["layer"]) if key == "legend"]

    assert set(map(str, legends(samples.curve(names=("one",))))) == {"None"}
    assert {"columns": 2} in legends(samples.curve())


def test_what_the_words_beside_points_are_stands_at_the_axis():
    chart = replace(samples.curve(), tag_title="clients")
    layers = to_vega_lite(chart)["layer"]
    assert layers[-1]["encoding"]["text"]["field"] == "tag"
    assert layers[0]["encoding"]["x"]["title"] == [
        "Throughput (tokens/s)",
        "beside the points: clients",
    ]
    crowded = replace(chart, series=[*chart.series] * 4)
    assert all(layer["mark"]["type"] != "text" for layer in to_vega_lite(crowded)["layer"])
    assert to_vega_lite(crowded)["layer"][0]["encoding"]["x"]["title"] == "Throughput (tokens/s)"


def test_axes_begin_at_zero_unless_they_are_logarithmic():
    linear = to_vega_lite(samples.curve(names=("one",)))["layer"][0]["encoding"]
    assert linear["x"]["scale"]["domain"] == [0.0, pytest.approx(96 * 1.06)]
    # Intervals are within, too: 1 + 8 / 4 is the highest.
    assert linear["y"]["scale"]["domain"] == [0.0, pytest.approx(3 * 1.06)]
    log = to_vega_lite(samples.curve(names=("one",), is_log=True))["layer"][0]["encoding"]["y"]
    assert log["scale"]["type"] == "log"
    assert log["scale"]["domain"] == pytest.approx([1.25 / 1.2, 3 * 1.2])
    assert log["axis"]["values"] == [2.0]


def test_predictions_have_one_scale_on_both_axes():
    encoding = to_vega_lite(samples.scatter())["layer"][0]["encoding"]
    assert encoding["x"]["scale"] == encoding["y"]["scale"]
    assert encoding["x"]["scale"]["domain"] == pytest.approx([9 / 1.2, 4000 * 1.2])


def test_light_and_dark_differ_in_colours_of_texts_and_lines_alone():
    light, dark = (dict(parts_of(samples.curve(), is_dark)) for is_dark in (False, True))
    assert light.keys() == dark.keys()
    assert {light[path] for path in light if light[path] != dark[path]} <= {
        LIGHT.text,
        LIGHT.line,
        LIGHT.grid,
    }
    assert light != dark


def parts_of(chart, is_dark):
    def walk(value, path):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, (*path, key))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from walk(item, (*path, index))
        else:
            yield path, value

    return walk(to_vega_lite(chart, is_dark=is_dark), ())


def linear_channels(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def luminance(color):
    linear = linear_channels(color)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_what_the_formula_says():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)


@pytest.mark.parametrize("color", [*COLORS, *BAR_COLORS.values()])
def test_data_can_be_seen_in_the_light_and_in_the_dark(color):
    assert contrast(color, LIGHT_BACKGROUND) >= 3
    assert contrast(color, DARK_BACKGROUND) >= 3


# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision
# Deficiency (2009), at full severity, on linear RGB.
SIGHT = {
    "usual": np.eye(3),
    "no red": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "no green": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "no blue": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color, sight):
    linear = np.clip(sight @ np.array(linear_channels(color)), 0, 1)
    x, y, z = np.cbrt(TO_XYZ @ linear / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(("colors", "least"), [(COLORS, 13), (tuple(BAR_COLORS.values()), 14)])
def test_colours_can_be_told_apart_by_everybody(colors, least, sight):
    places = [lab(color, SIGHT[sight]) for color in colors]
    distances = {
        (one, other): np.linalg.norm(places[one] - places[other])
        for one, other in combinations(range(len(colors)), 2)
    }
    assert min(distances.values()) >= least, min(distances, key=distances.get)


def test_texts_can_be_read_and_lines_seen():
    for theme, background in ((LIGHT, LIGHT_BACKGROUND), (DARK, DARK_BACKGROUND)):
        assert contrast(theme.text, background) >= 7
        assert contrast(theme.line, background) >= 3


def test_series_differ_in_colour_shape_and_dashes():
    for one in (COLORS, SHAPES, DASHES):
        assert len(set(one)) == len(one) == MOST_SERIES
    assert len(set(BAR_COLORS.values())) == len(BAR_COLORS)
