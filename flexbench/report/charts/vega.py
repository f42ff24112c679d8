"""Charts as Vega-Lite specifications, for pictures and for pages.

Texts from results are values of data, of titles and of scales, where Vega takes them literally; the
names of fields, and the few expressions, are ours. Nothing in a specification is to be fetched.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from flexbench.report.charts.chart import (
    Axis,
    Chart,
    ChartKind,
    Point,
    PointMark,
)
from flexbench.report.charts.palette import BAR_COLORS, COLORS, DARK, DASHES, LIGHT, SHAPES, Theme
from flexbench.report.charts.ticks import log_ticks

INTERACTION_HINT = (
    "Ctrl + wheel zooms, Shift + drag moves, a double click resets; a click in the legend keeps "
    "one series, with Shift several."
)
"""What people can do with an interactive chart."""

WIDTH = 680
HEIGHT = 300
_LANE_HEIGHT = 34
_LEAST_LANES_HEIGHT = 48
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MOST_TAGS = 30
_MARGIN = 0.06  # of a linear axis, behind its outermost values
_LOG_MARGIN = 1.2  # behind the outermost values of a logarithmic axis
_LONGEST_IN_TWO_COLUMNS = 48
_LINE = 118  # characters of a note below the title
_MOST_LINES = 2  # of notes below the title
_ZOOM = "zoom"
_CHOSEN = "chosen"

Spec = dict[str, Any]


def to_vega_lite(chart: Chart, *, is_dark: bool = False, is_interactive: bool = False) -> Spec:
    """A Vega-Lite 5 specification with its data.

    Interactive ones fill the width of their place, and leave title and notes to the page; others
    are WIDTH wide and have both. The background is transparent.
    """
    drawing = _Drawing(chart, DARK if is_dark else LIGHT, is_interactive=is_interactive)
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "description": f"{chart.title}. {chart.description}",
        "width": "container" if is_interactive else WIDTH,
        "height": drawing.height,
        "autosize": {"type": "fit-x" if is_interactive else "pad", "contains": "padding"},
        "background": "transparent",
        "data": {"values": drawing.rows()},
        "layer": list(drawing.layers()),
        "config": _config(drawing.theme),
    }
    if not is_interactive:
        spec["title"] = _title(chart)
    return spec


def _title(chart: Chart) -> Spec:
    """The first notes are the most important ones; a page and a terminal have all."""
    lines = textwrap.wrap(" ".join(chart.notes), _LINE, max_lines=_MOST_LINES, placeholder=" …")
    return {"text": textwrap.wrap(chart.title, 80), "subtitle": lines}


def _config(theme: Theme) -> Spec:
    return {
        "font": _FONT,
        "view": {"stroke": None},
        "title": {
            "anchor": "start",
            "frame": "group",
            "color": theme.text,
            "fontSize": 15,
            "fontWeight": 600,
            "offset": 14,
            "subtitleColor": theme.text,
            "subtitleFontSize": 11,
            "subtitlePadding": 5,
            "subtitleLineHeight": 15,
        },
        "axis": {
            "labelColor": theme.text,
            "titleColor": theme.text,
            "domainColor": theme.line,
            "tickColor": theme.line,
            "gridColor": theme.grid,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": 400,
            "labelLimit": 120,
            "labelFlush": False,
        },
        "legend": {
            "labelColor": theme.text,
            "titleColor": theme.text,
            "labelFontSize": 12,
            "labelLimit": 0,
            "symbolLimit": 0,
            "symbolSize": 90,
            "orient": "bottom",
            "direction": "vertical",
            "rowPadding": 4,
        },
    }


class _Drawing:
    """A chart as data and layers."""

    def __init__(self, chart: Chart, theme: Theme, *, is_interactive: bool) -> None:
        self.theme = theme
        self._chart = chart
        self._is_interactive = is_interactive
        self._names = [series.name for series in chart.series]

    @property
    def height(self) -> int:
        """Of the part between the axes."""
        if self._chart.kind is ChartKind.TIMELINE:
            return max(_LEAST_LANES_HEIGHT, _LANE_HEIGHT * len(self._names))
        return HEIGHT

    @property
    def _has_tags(self) -> bool:
        """Whether there is room for words beside the points."""
        num_points = sum(len(series.points) for series in self._chart.series)
        return bool(self._chart.tag_title) and num_points <= _MOST_TAGS

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point or bar."""
        if self._chart.kind is ChartKind.TIMELINE:
            return [
                {"series": series.name, "what": bar.what, "start": bar.start, "end": bar.end}
                for series in self._chart.series
                for bar in series.bars
            ]
        return [
            _row(series.name, order, point)
            for series in self._chart.series
            for order, point in enumerate(series.points)
        ]

    def layers(self) -> Iterator[Spec]:
        """From the lowest to the uppermost."""
        match self._chart.kind:
            case ChartKind.CURVE:
                yield from self._curve()
            case ChartKind.SCATTER:
                yield from self._scatter()
            case ChartKind.DISTRIBUTION:
                yield from self._distribution()
            case ChartKind.TIMELINE:
                yield from self._timeline()

    # Kinds

    def _curve(self) -> Iterator[Spec]:
        points = [point for series in self._chart.series for point in series.points]
        yield self._line({"type": "line", "strokeWidth": 2}) | self._params()
        if any(point.y_low is not None for point in points):
            yield self._intervals()
        hollow = [PointMark.CLIENT_LIMITED.value, PointMark.PROJECTED.value]
        yield self._points({"not": {"field": "mark", "oneOf": hollow}}, is_filled=True)
        for mark in (PointMark.CLIENT_LIMITED, PointMark.PROJECTED):
            if any(point.mark is mark for point in points):
                condition = {"field": "mark", "equal": mark.value}
                is_broken = mark is PointMark.PROJECTED
                yield self._points(condition, is_filled=False, is_broken=is_broken)
        if any(point.mark is PointMark.SATURATION for point in points):
            yield self._rings()
        if self._has_tags:
            yield self._tags()

    def _scatter(self) -> Iterator[Spec]:
        low, high = self._diagonal()
        yield {
            "data": {"values": [{"x": low, "y": low}, {"x": high, "y": high}]},
            "mark": {
                "type": "line",
                "strokeDash": [4, 4],
                "color": self.theme.line,
                "tooltip": None,
            },
            "encoding": {"x": self._x(), "y": self._y()},
        }
        yield self._points({"field": "x", "valid": True}, is_filled=True) | self._params()

    def _distribution(self) -> Iterator[Spec]:
        mark = {"type": "line", "interpolate": "step-after", "strokeWidth": 2}
        yield self._line(mark) | self._params()
        if self._is_interactive:
            # Something to point at: of a line, only its first point has a tooltip.
            yield {
                "transform": [{"filter": {"field": "label", "valid": True}}],
                "mark": {"type": "point", "filled": True, "opacity": 0, "size": 120},
                "encoding": {"x": self._x(), "y": self._y(), "tooltip": self._tooltip()},
            }

    def _timeline(self) -> Iterator[Spec]:
        kinds = list(dict.fromkeys(bar.what for one in self._chart.series for bar in one.bars))
        kinds.sort(key=lambda what: list(BAR_COLORS).index(what) if what in BAR_COLORS else -1)
        colors = [BAR_COLORS.get(what, COLORS[-1]) for what in kinds]
        x = {"field": "start", "type": "quantitative", "title": self._chart.x.full_title}
        yield {
            "mark": {"type": "bar", "height": {"band": 0.8}},
            "encoding": {
                "x": x | {"scale": {"zero": True, "nice": False}, "axis": {"tickCount": 8}},
                "x2": {"field": "end"},
                "y": {
                    "field": "series",
                    "type": "nominal",
                    "sort": None,
                    "title": None,
                    "scale": {"domain": self._names},
                    "axis": {"ticks": False, "domain": False, "labelPadding": 8},
                },
                "color": {
                    "field": "what",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": kinds, "range": colors},
                    "legend": {"columns": 5},
                },
                "tooltip": [
                    {"field": "series", "type": "nominal", "title": "rank"},
                    {"field": "what", "type": "nominal", "title": "what"},
                    {"field": "start", "type": "quantitative", "title": "from (s)"},
                    {"field": "end", "type": "quantitative", "title": "to (s)"},
                ],
            },
        } | self._params(encodings=("x",), fields=("what",))

    # Layers

    def _line(self, mark: Spec) -> Spec:
        dashes = self._by_series([list(dash) for dash in DASHES[: len(self._names)]])
        if self._chart.kind is ChartKind.CURVE:
            # In the legend they would fray the shapes. With the same domain as colours and shapes
            # they would be there all the same; without one, it is the order of the data.
            dashes |= {"legend": None, "scale": {"range": dashes["scale"]["range"]}}
        return {
            "mark": mark,
            "encoding": {
                "x": self._x(),
                "y": self._y(),
                "color": self._color(),
                "strokeDash": dashes,
                "order": {"field": "order", "type": "quantitative"},
                **self._faded(),
            },
        }

    def _points(self, condition: Spec, *, is_filled: bool, is_broken: bool = False) -> Spec:
        mark: Spec = {"type": "point", "filled": is_filled, "size": 75, "opacity": 1}
        if not is_filled:
            mark["strokeWidth"] = 2
        if is_broken:
            mark |= {"strokeDash": [3, 2], "size": 110}
        return {
            "transform": [{"filter": condition}],
            "mark": mark,
            "encoding": {
                "x": self._x(),
                "y": self._y(),
                "color": self._color(),
                "shape": self._by_series(list(SHAPES[: len(self._names)])),
                "tooltip": self._tooltip(),
                **self._faded(),
            },
        }

    def _intervals(self) -> Spec:
        return {
            "transform": [{"filter": {"field": "low", "valid": True}}],
            "mark": {"type": "rule", "strokeWidth": 1.5},
            "encoding": {
                "x": self._x(),
                "y": self._y() | {"field": "low"},
                "y2": {"field": "high"},
                "color": self._color(),
                **self._faded(),
            },
        }

    def _rings(self) -> Spec:
        ring = {"type": "point", "shape": "circle", "filled": False, "size": 300, "opacity": 1}
        return {
            "transform": [{"filter": {"field": "mark", "equal": PointMark.SATURATION.value}}],
            "mark": ring | {"strokeWidth": 2, "color": self.theme.text},
            "encoding": {"x": self._x(), "y": self._y()},
        }

    def _tags(self) -> Spec:
        mark = {"type": "text", "align": "left", "baseline": "bottom", "dx": 6, "dy": -5}
        return {
            "mark": mark | {"fontSize": 11, "color": self.theme.text},
            "encoding": {
                "x": self._x(),
                "y": self._y(),
                "text": {"field": "tag", "type": "nominal"},
            },
        }

    # Encodings

    def _x(self) -> Spec:
        values = [point.x for series in self._chart.series for point in series.points]
        x = {"field": "x", "type": "quantitative", **self._axis(self._chart.x, values, most=8)}
        if self._has_tags:
            x["title"] = [x["title"], f"beside the points: {self._chart.tag_title}"]
        return x

    def _y(self) -> Spec:
        values = [
            value
            for series in self._chart.series
            for point in series.points
            for value in (point.y, point.y_low, point.y_high)
            if value is not None
        ]
        y = {"field": "y", "type": "quantitative", **self._axis(self._chart.y, values, most=6)}
        if self._chart.kind is ChartKind.DISTRIBUTION:
            y["axis"] = {"format": "%", "tickCount": 5}
            y["scale"] = {"domain": [0, 1]}
        return y

    def _axis(self, axis: Axis, values: Sequence[float], *, most: int) -> Spec:
        """Title, scale and ticks for `values`."""
        ticks: Spec = {"tickCount": most}
        if not axis.is_log or not values:
            scale = {"domain": list(self._linear_domain(values)), "nice": False}
            return {"title": axis.full_title, "scale": scale, "axis": ticks}
        low, high = _log_domain(values)
        if self._chart.kind is ChartKind.SCATTER:
            low, high = self._diagonal()
        ticks |= {"format": "~g", "labelOverlap": "greedy"}
        if not self._is_interactive:
            # Vega's own have a line at each of 1 to 9, but they follow when the axis is zoomed.
            ticks["values"] = log_ticks(low, high, most=most)
        scale = {"type": "log", "domain": [low, high], "nice": False}
        return {"title": axis.full_title, "scale": scale, "axis": ticks}

    def _linear_domain(self, values: Sequence[float]) -> tuple[float, float]:
        """From 0, but for distributions, to where there is room for the words beside points."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        if self._chart.kind is not ChartKind.DISTRIBUTION:
            low = min(0.0, low)
        margin = _MARGIN * (high - low) or 1.0
        return (low if low == 0 else low - margin), min(high + margin, sys.float_info.max)

    def _diagonal(self) -> tuple[float, float]:
        values = [
            value
            for series in self._chart.series
            for point in series.points
            for value in (point.x, point.y)
        ]
        return _log_domain(values)

    def _color(self) -> Spec:
        return self._by_series(list(COLORS[: len(self._names)]))

    def _by_series(self, values: Sequence[Any]) -> Spec:
        legend: Spec | None = None
        if len(self._names) > 1:
            is_short = max(map(len, self._names)) <= _LONGEST_IN_TWO_COLUMNS
            legend = {"columns": 2 if is_short and not self._is_interactive else 1}
            if self._is_interactive:
                legend["labelLimit"] = {"expr": "max(160, width - 40)"}  # of a phone, say
            if self._chart.kind is ChartKind.DISTRIBUTION:
                legend["symbolSize"] = 500  # a line long enough to have its dashes
        return {
            "field": "series",
            "type": "nominal",
            "title": None,
            "sort": None,
            "scale": {"domain": self._names, "range": list(values)},
            "legend": legend,
        }

    def _faded(self) -> Spec:
        """What is not chosen in the legend stands back."""
        if not self._is_interactive or len(self._names) < 2:
            return {}
        return {"opacity": {"condition": {"param": _CHOSEN, "value": 1}, "value": 0.12}}

    def _tooltip(self) -> list[Spec]:
        series = [{"field": "series", "type": "nominal", "title": "series"}]
        return [
            *(series if len(self._names) > 1 else []),
            {"field": "label", "type": "nominal", "title": "point"},
            {"field": "x", "type": "quantitative", "title": self._chart.x.full_title},
            {"field": "y", "type": "quantitative", "title": self._chart.y.full_title},
        ]

    def _params(
        self, *, encodings: Sequence[str] = ("x", "y"), fields: Sequence[str] = ("series",)
    ) -> Spec:
        """Zooming, and choosing in the legend.

        The wheel and dragging belong to the page, which has to scroll under a finger as well.
        """
        if not self._is_interactive:
            return {}
        zoom = {
            "name": _ZOOM,
            "bind": "scales",
            "select": {
                "type": "interval",
                "encodings": list(encodings),
                "translate": "[mousedown[event.shiftKey], window:mouseup] > window:mousemove!",
                "zoom": "wheel![event.ctrlKey]",
            },
        }
        chosen = {
            "name": _CHOSEN,
            "bind": "legend",
            "select": {"type": "point", "fields": list(fields)},
        }
        is_choice = len(self._names) > 1 and fields == ("series",)
        return {"params": [zoom, chosen] if is_choice else [zoom]}


def _log_domain(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values) / _LOG_MARGIN, max(values) * _LOG_MARGIN
    return max(low, sys.float_info.min), min(high, sys.float_info.max)


def _row(name: str, order: int, point: Point) -> dict[str, Any]:
    return {
        "series": name,
        "order": order,
        "x": point.x,
        "y": point.y,
        "low": point.y_low,
        "high": point.y_high,
        "label": point.label or None,
        "tag": point.tag,
        "mark": point.mark.value if point.mark is not None else None,
    }
