"""Charts for the page: specifications that Vega draws in the browser, and their data as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from markupsafe import Markup

from flexbench.report.charts.chart import Chart, ChartKind
from flexbench.report.charts.thinning import thin
from flexbench.report.charts.vega import to_vega_lite
from flexbench.report.page.embedding import differences, printable_values, to_json
from flexbench.report.page.grids import Grid, to_grid
from flexbench.report.table import Column, Kind, Row, Table

MOST_DATA_ROWS = 1000
"""Of the table beside a chart."""
# A script element would end, or begin a comment, where these stand. In JavaScript they are parts of
# texts and regular expressions, where the backslash means nothing.
_END_OF_SCRIPT = re.compile(r"<(?=/script|!--)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart as the page has it."""

    name: str
    """Unique in the document."""
    chart: Chart
    json: Markup
    """{"spec": light, "dark": [[path, value], ...]}: what is other in the dark."""
    data: Grid


def drawings(charts: Sequence[Chart]) -> list[Drawing]:
    """What the page needs of every chart."""
    return [_drawing(f"chart-{number}", chart) for number, chart in enumerate(charts, start=1)]


def _drawing(name: str, chart: Chart) -> Drawing:
    light, dark = (_specification(chart, is_dark=is_dark) for is_dark in (False, True))
    return Drawing(
        name=name,
        chart=chart,
        json=to_json({"spec": light, "dark": list(differences(light, dark))}),
        data=to_grid(_data(chart), name=f"{name}-data"),
    )


def _specification(chart: Chart, *, is_dark: bool) -> dict[str, Any]:
    spec = to_vega_lite(chart, is_dark=is_dark, is_interactive=True)
    # With an address there, the browser's console would be told which versions do not match.
    spec.pop("$schema")
    return dict(printable_values(spec))


@cache
def vega_script() -> str:
    """Vega, Vega-Lite and vega-embed, which puts `vegaEmbed` into `window`; about 0.9 MB."""
    import vl_convert

    # The newest Vega-Lite it has, which goes with its Vega, and takes what is written for 5, too.
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # In a function: its many short names are not to be the window's.
    return "(() => {" + _END_OF_SCRIPT.sub(r"<\\", bundle) + "})();"


def _data(chart: Chart) -> Table:
    """What is drawn, for people who want the figures or cannot see the picture."""
    if chart.kind is ChartKind.TIMELINE:
        columns, rows = _bar_columns(chart), list(_bar_rows(chart))
    else:
        columns, rows = _point_columns(chart), list(_point_rows(chart))
    shown = thin(rows, MOST_DATA_ROWS)
    is_thinned = len(shown) < len(rows)
    return Table(
        name=chart.name,
        title=f"Data of: {chart.title}",
        columns=columns,
        rows=[Row(values=values) for values in shown],
        notes=[f"{len(shown)} of {len(rows)} rows, evenly chosen."] if is_thinned else [],
    )


def _bar_columns(chart: Chart) -> list[Column]:
    unit = f" ({chart.x.unit})" if chart.x.unit else ""
    return [
        Column(name="lane", heading=chart.y.title or "lane", kind=Kind.TEXT),
        Column(name="what", heading="what", kind=Kind.TEXT),
        Column(name="start", heading=f"start{unit}"),
        Column(name="end", heading=f"end{unit}"),
    ]


def _bar_rows(chart: Chart) -> Iterator[dict[str, Any]]:
    for series in chart.series:
        for bar in series.bars:
            yield {"lane": series.name, "what": bar.what, "start": bar.start, "end": bar.end}


def _point_columns(chart: Chart) -> list[Column]:
    points = [point for series in chart.series for point in series.points]
    has_interval = any(point.y_low is not None for point in points)
    has_label = any(point.label for point in points)
    has_mark = any(point.mark is not None for point in points)
    return [
        Column(name="series", heading="series", kind=Kind.TEXT, is_shown=len(chart.series) > 1),
        Column(name="label", heading="point", kind=Kind.TEXT, is_shown=has_label),
        Column(name="x", heading=chart.x.full_title),
        Column(name="y", heading=chart.y.full_title),
        Column(name="y_low", heading="low", is_shown=has_interval),
        Column(name="y_high", heading="high", is_shown=has_interval),
        Column(name="mark", heading="mark", kind=Kind.TEXT, is_shown=has_mark),
    ]


def _point_rows(chart: Chart) -> Iterator[dict[str, Any]]:
    for series in chart.series:
        for point in series.points:
            yield {
                "series": series.name,
                "label": point.label,
                "x": point.x,
                "y": point.y,
                "y_low": point.y_low,
                "y_high": point.y_high,
                "mark": point.mark.value if point.mark is not None else None,
            }
