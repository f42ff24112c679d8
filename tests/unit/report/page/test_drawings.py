"""Charts on the page: the specification, and the data as a table."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("jinja2", reason="the page needs the plots extra")

from flexbench.report.charts.chart import Axis, Bar, Chart, ChartKind, Point, Series
from flexbench.report.charts.vega import to_vega_lite
from flexbench.report.page.drawings import MOST_DATA_ROWS, drawings, vega_script
from flexbench.report.page.page import PageContent, to_page
from tests.unit.report.page.reading import Document


def curve(name="petals", count=3) -> Chart:
    points = [
        Point(x=float(n), y=10.0 * n, y_low=9.0 * n, y_high=11.0 * n) for n in range(1, count + 1)
    ]
    return Chart(
        name="c",
        kind=ChartKind.CURVE,
        title=f"Throughput of {name}",
        description="It grows.",
        x=Axis(title="clients"),
        y=Axis(title="Throughput", unit="tokens/s"),
        series=[Series(name=name, points=points)],
    )


def timeline() -> Chart:
    return Chart(
        name="t",
        kind=ChartKind.TIMELINE,
        title="Stages",
        description="One waits.",
        x=Axis(title="time", unit="s"),
        y=Axis(title="rank"),
        series=[Series(name="0", bars=[Bar(what="compute", start=0.0, end=1.5)])],
    )


def shown(chart: Chart) -> list[list[str]]:
    (drawing,) = drawings([chart])
    headings = [column.heading for column in drawing.data.columns]
    return [headings, *([cell.text for cell in row.cells] for row in drawing.data.rows)]


def test_points_are_rows():
    assert shown(curve(count=2)) == [
        ["clients", "Throughput (tokens/s)", "low", "high"],
        ["1", "10", "9", "11"],
        ["2", "20", "18", "22"],
    ]


def test_bars_are_rows():
    assert shown(timeline()) == [
        ["rank", "what", "start (s)", "end (s)"],
        ["0", "compute", "0", "1.5"],
    ]


def test_very_many_points_are_thinned_and_that_is_told():
    (drawing,) = drawings([curve(count=MOST_DATA_ROWS + 500)])
    assert len(drawing.data.rows) == MOST_DATA_ROWS
    assert drawing.data.table.notes == ["1000 of 1500 rows, evenly chosen."]
    assert drawing.data.rows[-1].cells[0].text == "1500"


@pytest.mark.parametrize("chart", [curve(), timeline()])
def test_the_dark_is_the_light_with_some_values_exchanged(chart):
    (drawing,) = drawings([chart])
    data = json.loads(drawing.json)
    light, dark = (
        json.loads(json.dumps(to_vega_lite(chart, is_dark=is_dark, is_interactive=True)))
        for is_dark in (False, True)
    )
    assert light.pop("$schema") == dark.pop("$schema")
    assert data["spec"] == light
    for path, value in data["dark"]:
        node = light
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    assert light == dark
    assert all(
        isinstance(value, str | int | float) for _, value in data["dark"]
    )  # colours, no data


def test_names_in_a_specification_are_data_that_end_no_script():
    name = "</script><script>alert(1)</script>\u202e"
    (drawing,) = drawings([curve(name)])
    assert not re.search("[<>&]", drawing.json)
    assert json.loads(drawing.json)["spec"]["data"]["values"][0]["series"] == name.replace(
        "\u202e", "�"
    )


def test_the_library_is_one_script_that_does_not_end_early():
    pytest.importorskip("vl_convert")
    script = vega_script()
    assert "vegaEmbed" in script
    assert 500_000 < len(script) < 3_000_000
    assert not re.search("</script|<!--", script, re.IGNORECASE)


def test_a_page_with_charts_has_the_library_once_and_every_chart_in_words():
    pytest.importorskip("vl_convert")
    content = PageContent(title="T", made_at="now", summary=["S."], charts=[curve(), timeline()])
    page = to_page(content)
    assert page.count(vega_script()) == 1
    document = Document(page)
    labels = [a["aria-label"] for _, a, _ in document.elements if a.get("role") == "img"]
    assert labels == ["Throughput of petals: It grows.", "Stages: One waits."]
    assert document.find("h3") == ["Throughput of petals", "Stages"]
