"""Charts as text, for a terminal of any width.

Title, axes' titles, legend and notes are laid out here; plotext draws what is between the axes.
The lanes of a timeline, which are rows of letters, need no library.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

from flexbench.core.printable import printable
from flexbench.core.timeline import What
from flexbench.report.charts.canvas import Canvas, Place, Scale
from flexbench.report.charts.chart import Axis, Bar, Chart, ChartKind, PointMark, Series
from flexbench.report.charts.palette import BAR_COLORS, COLORS
from flexbench.report.charts.ticks import linear_ticks
from flexbench.report.charts.timeline import REST
from flexbench.report.formats.cells import format_figure

_LEAST_WIDTH = 30
_LEAST_HEIGHT = 6
_LONGEST_LANE_NAME = 12
_MARKERS = 5  # along a line of a distribution, to tell it from the others without colours
_RESET = "\x1b[0m"

_FULL = {True: "●■▲◆✚▼▶◀", False: "o#^*+vx%"}
_HOLLOW = {True: "○□△◇✛▽▷◁", False: "!!!!!!!!"}
_PROJECTED = {True: "◌", False: "~"}
_RING = {True: "◉", False: "@"}
_DIAGONAL = {True: "·", False: "."}
_LANES: Mapping[bool, Mapping[str, str]] = {
    True: {What.COMPUTING: "█", What.LOADING: "▒", What.WAITING: "·", What.SENDING: "▚", REST: "_"},
    False: {
        What.COMPUTING: "#",
        What.LOADING: "l",
        What.WAITING: ".",
        What.SENDING: ">",
        REST: "_",
    },
}
_OTHER = "?"
_Entry = tuple[str, str | None, str]
"""Of a legend: a glyph, its colour and its meaning."""


def to_text(
    chart: Chart, *, width: int, height: int, has_color: bool, is_unicode: bool = True
) -> str:
    """The chart in lines of at most `width` columns: title, plot, legend and notes.

    `height` is that of the plot with its axes; a timeline is as high as it has lanes. With
    `has_color` there are ANSI escapes. Without `is_unicode` there is nothing but ASCII: what is not
    becomes a question mark, and points are not joined by lines.
    """
    drawing = _Text(chart, max(width, _LEAST_WIDTH), has_color=has_color, is_unicode=is_unicode)
    lines = [
        *drawing.wrapped(chart.title),
        *drawing.body(max(height, _LEAST_HEIGHT)),
        *(line for note in chart.notes for line in drawing.wrapped(note)),
    ]
    text = "\n".join(line.rstrip() for line in lines)
    return text if is_unicode else text.encode("ascii", errors="replace").decode()


class _Text:
    """One chart on its way to lines of text."""

    def __init__(self, chart: Chart, width: int, *, has_color: bool, is_unicode: bool) -> None:
        self._chart = chart
        self._width = width
        self._has_color = has_color
        self._is_unicode = is_unicode

    def wrapped(self, text: str) -> list[str]:
        """In as many lines as it needs."""
        return textwrap.wrap(printable(text), self._width)

    def body(self, height: int) -> list[str]:
        """All but title and notes."""
        if not any(series.points or series.bars for series in self._chart.series):
            return ["(nothing to draw)"]
        if self._chart.kind is ChartKind.TIMELINE:
            return self._lanes()
        return [
            *self.wrapped(self._chart.y.full_title),
            *self._plot().lines(width=self._width, height=height, has_color=self._has_color),
            *(f"{line:>{self._width}}" for line in self.wrapped(self._chart.x.full_title)),
            *self._points_legend(),
        ]

    # Points

    def _plot(self) -> Canvas:
        canvas = Canvas(*self._scales(), is_unicode=self._is_unicode)
        if self._chart.kind is ChartKind.SCATTER:
            canvas.markers(self._diagonal(), _DIAGONAL[self._is_unicode], None)
        for number, series in enumerate(self._chart.series):
            if self._chart.kind is ChartKind.DISTRIBUTION:
                self._draw_steps(canvas, number, series)
            else:
                self._draw_points(canvas, number, series)
        return canvas

    def _scales(self) -> tuple[Scale, Scale]:
        points = [point for series in self._chart.series for point in series.points]
        xs = [point.x for point in points]
        ys = [
            value
            for point in points
            for value in (point.y, point.y_low, point.y_high)
            if value is not None
        ]
        kind, x, y = self._chart.kind, self._chart.x, self._chart.y
        if kind is ChartKind.SCATTER:
            scale = Scale.around([*xs, *ys], is_log=x.is_log, from_zero=False)
            return scale, scale
        if kind is ChartKind.DISTRIBUTION:
            across = Scale.around(xs, is_log=x.is_log, from_zero=False)
            return across, Scale(low=0.0, high=1.0, is_log=False)
        return _from_zero(x, xs), _from_zero(y, ys)

    def _diagonal(self) -> list[Place]:
        scale, _ = self._scales()
        ratio = scale.high / scale.low
        steps = range(1, self._width)
        return [(scale.low * ratio ** (n / self._width),) * 2 for n in steps]

    def _draw_steps(self, canvas: Canvas, number: int, series: Series) -> None:
        places = [(point.x, point.y) for point in series.points]
        canvas.line(_steps(places), COLORS[number])
        distance = max(1, len(places) // _MARKERS)
        # Each begins elsewhere, so that those of equal lines do not cover each other.
        first = min(1 + number * distance // len(COLORS), len(places) - 1)
        canvas.markers(places[first::distance], _FULL[self._is_unicode][number], COLORS[number])

    def _draw_points(self, canvas: Canvas, number: int, series: Series) -> None:
        color = COLORS[number]
        if self._chart.kind is ChartKind.CURVE:
            canvas.line([(point.x, point.y) for point in series.points], color)
        for point in series.points:
            if point.y_low is not None and point.y_high is not None:
                canvas.line([(point.x, point.y_low), (point.x, point.y_high)], color)
        for point in series.points:
            canvas.markers([(point.x, point.y)], self._glyph(number, point.mark), color)

    def _glyph(self, number: int, mark: PointMark | None) -> str:
        match mark:
            case None:
                return _FULL[self._is_unicode][number]
            case PointMark.CLIENT_LIMITED:
                return _HOLLOW[self._is_unicode][number]
            case PointMark.PROJECTED:
                return _PROJECTED[self._is_unicode]
            case PointMark.SATURATION:
                return _RING[self._is_unicode]

    def _points_legend(self) -> list[str]:
        entries: list[_Entry] = [
            (self._glyph(number, None), COLORS[number], series.name)
            for number, series in enumerate(self._chart.series)
        ]
        points = [point for series in self._chart.series for point in series.points]
        marks = {point.mark for point in points}
        if PointMark.CLIENT_LIMITED in marks:
            entries.append((_HOLLOW[self._is_unicode][0], None, "client-limited"))
        if PointMark.PROJECTED in marks:
            entries.append((_PROJECTED[self._is_unicode], None, "projected"))
        if PointMark.SATURATION in marks:
            entries.append((_RING[self._is_unicode], None, "saturation"))
        if self._chart.kind is ChartKind.SCATTER:
            entries.append((_DIAGONAL[self._is_unicode], None, "as measured"))
        return self._legend(entries) if len(entries) > 1 else []

    # Lanes

    def _lanes(self) -> list[str]:
        names = [printable(series.name)[:_LONGEST_LANE_NAME] for series in self._chart.series]
        margin = max(map(len, names)) + 1
        columns = self._width - margin
        end = max(bar.end for series in self._chart.series for bar in series.bars)
        lines = []
        for name, series in zip(names, self._chart.series, strict=True):
            lines.append(f"{name:<{margin}}{self._lane(series.bars, end / columns, columns)}")
        lines += [" " * margin + line for line in _time_axis(end, columns, self._chart.x.unit)]
        kinds = list(dict.fromkeys(bar.what for one in self._chart.series for bar in one.bars))
        entries = [(self._letter(what), BAR_COLORS.get(what), what) for what in kinds]
        return [*lines, *self._legend(entries)]

    def _lane(self, bars: Sequence[Bar], step: float, columns: int) -> str:
        """A letter for what took most of each column."""
        times: list[dict[str, float]] = [{} for _ in range(columns)]
        for bar in bars:
            first, last = int(bar.start / step), min(int(bar.end / step), columns - 1)
            for column in range(first, last + 1):
                begin, end = max(bar.start, column * step), min(bar.end, (column + 1) * step)
                times[column][bar.what] = times[column].get(bar.what, 0.0) + end - begin
        return "".join(self._letters(shares) for shares in times)

    def _letters(self, shares: Mapping[str, float]) -> str:
        if not shares:
            return " "
        what = max(shares, key=lambda name: shares[name])
        return self._colored(self._letter(what), BAR_COLORS.get(what))

    def _letter(self, what: str) -> str:
        return _LANES[self._is_unicode].get(what, _OTHER)

    # Legend

    def _legend(self, entries: Sequence[_Entry]) -> list[str]:
        """Entries beside each other, in as many lines as they need."""
        lines: list[str] = []
        used = self._width
        for glyph, color, name in entries:
            text = printable(name)[: self._width - 2]
            length = len(text) + 2
            if used + 3 + length > self._width:
                lines.append("")
                used = 0
            else:
                lines[-1] += "   "
                used += 3
            lines[-1] += f"{self._colored(glyph, color)} {text}"
            used += length
        return lines

    def _colored(self, text: str, color: str | None) -> str:
        if not self._has_color or color is None:
            return text
        red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
        return f"\x1b[38;2;{red};{green};{blue}m{text}{_RESET}"


def _from_zero(axis: Axis, values: Sequence[float]) -> Scale:
    return Scale.around(values, is_log=axis.is_log, from_zero=True)


def _steps(places: Sequence[Place]) -> list[Place]:
    """The corners of the steps through `places`, each of which holds until the next one."""
    corners: list[Place] = []
    for before, after in pairwise(places):
        corners += [before, (after[0], before[1])]
    return [*corners, *places[-1:]]


def _time_axis(end: float, columns: int, unit: str) -> list[str]:
    """A line with marks, and one with the times below them."""
    marks, labels = ["-"] * columns, [" "] * columns
    for tick in linear_ticks(0.0, end, most=max(2, columns // 12)):
        column = min(round(tick / end * columns), columns - 1)
        marks[column] = "+"
        text = f"{format_figure(tick)} {unit}"
        first = max(0, min(column - len(text) // 2, columns - len(text)))
        labels[first : first + len(text)] = text
    return ["".join(marks), "".join(labels)]
