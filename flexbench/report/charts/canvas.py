"""Lines and points between axes, in text: the one place that knows plotext."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flexbench.core.errors import MissingDependencyError
from flexbench.report.charts.ticks import linear_ticks, log_ticks
from flexbench.report.formats.cells import format_figure

Place = tuple[float, float]
_COLUMNS_PER_TICK = 12
_LINES_PER_TICK = 4
_MARGIN = 0.04  # of an axis, behind the largest value
# The frame as plotext draws it, in characters that every terminal has.
_TO_ASCII = str.maketrans("─│┌┐└┘┬┴├┤┼", "-|+++++++++")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis from `low` to `high`."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def around(cls, values: Sequence[float], *, is_log: bool, from_zero: bool) -> Scale:
        """One with a margin around all of `values`; they are above 0 where it is logarithmic."""
        low, high = min(values), max(values)
        if is_log:
            factor = max(high**_MARGIN / low**_MARGIN, 1.1)
            low = max(low / factor, sys.float_info.min)
            return cls(low=low, high=min(high * factor, sys.float_info.max), is_log=True)
        low = min(0.0, low) if from_zero else low
        margin = (high - low) * _MARGIN or abs(high) * _MARGIN or 1.0
        high = min(high + margin, sys.float_info.max)
        return cls(low=low if from_zero else low - margin, high=high, is_log=False)

    def place(self, value: float) -> float:
        """Where on the axis, as a share of it: plotext ends the process over very large numbers."""
        if self.is_log:
            low, high = math.log10(self.low), math.log10(self.high)
            share = (math.log10(value) - low) / (high - low)
        else:
            share = (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return min(max(share, 0.0), 1.0)

    def ticks(self, *, most: int) -> tuple[list[float], list[str]]:
        """Places with round values, and these."""
        find = log_ticks if self.is_log else linear_ticks
        values = find(self.low, self.high, most=max(2, most))
        return [self.place(value) for value in values], [format_figure(value) for value in values]


class Canvas:
    """What is drawn is kept until `lines` is asked for. Coordinates are those of the scales."""

    def __init__(self, x: Scale, y: Scale, *, is_unicode: bool) -> None:
        self._x = x
        self._y = y
        self._is_unicode = is_unicode
        self._drawn: list[tuple[list[Place], str, str | None, bool]] = []

    def line(self, places: Sequence[Place], color: str | None) -> None:
        """A line through all places, which is left out of a plot in ASCII."""
        if self._is_unicode:
            self._drawn.append((self._scaled(places), "braille", color, True))

    def markers(self, places: Sequence[Place], glyph: str, color: str | None) -> None:
        """A character at every place."""
        self._drawn.append((self._scaled(places), glyph, color, False))

    def _scaled(self, places: Sequence[Place]) -> list[Place]:
        return [(self._x.place(x), self._y.place(y)) for x, y in places]

    def lines(self, *, width: int, height: int, has_color: bool) -> list[str]:
        """The plot with its axes. Raises MissingDependencyError without plotext."""
        with _figure() as (plotext, figure):
            figure.plot_size(width, height)
            self._set_axes(figure, width, height)
            for places, marker, color, is_joined in self._drawn:
                pixel = plotext.pixel(foreground=_rgb(color)) if color and has_color else None
                signal = figure.signal(
                    [x for x, _ in places],
                    [y for _, y in places],
                    marker=plotext.marker(marker, pixel),
                )
                figure.draw(signal.lines(is_joined))
            text: str = figure.build().string(colorless=not has_color)
        if not self._is_unicode:
            text = text.translate(_TO_ASCII)
        return text.splitlines()

    def _set_axes(self, figure: Any, width: int, height: int) -> None:
        figure.theme("colorless")
        figure.canvas("default")
        figure.axes(False, axis="x", side="upper")
        figure.axes(False, axis="y", side="right")
        for name, scale, most in (
            ("x", self._x, width // _COLUMNS_PER_TICK),
            ("y", self._y, height // _LINES_PER_TICK + 1),
        ):
            ruler = figure.ruler(name)
            ruler.lim(0.0, 1.0)
            ruler.ticks(*scale.ticks(most=most))


@contextmanager
def _figure() -> Iterator[tuple[Any, Any]]:
    """Plotext and its only figure, which is empty before and after."""
    try:
        import plotext
    except ImportError as error:
        raise MissingDependencyError(
            "Plots in the terminal need plotext, which is not installed: "
            "pip install 'flexbench[plots]'"
        ) from error
    # The size is that which is asked for, not that of the terminal.
    plotext.terminal.limit(False, False)
    plotext.figure.clear()
    try:
        yield plotext, plotext.figure
    finally:
        plotext.terminal.limit()
        plotext.figure.clear()


def _rgb(color: str) -> tuple[int, int, int]:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue
