"""What was predicted of servers over what was measured: on the line y = x it was right."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from flexbench.core.printable import printable
from flexbench.report.charts.chart import (
    MOST_POINTS,
    MOST_SERIES,
    Axis,
    Chart,
    ChartKind,
    Point,
    Series,
)
from flexbench.report.charts.thinning import thin
from flexbench.report.charts.wording import counted, left_out
from flexbench.report.formats.cells import format_quantity
from flexbench.report.predictions import Prediction

_BYTES_PER_GIB = 2**30
_MOST_UNITS = 8
_DESCRIBED = 4


def predicted_charts(predictions: Sequence[Prediction]) -> Iterator[Chart]:
    """A chart for each unit, a series for each figure, a point for each server.

    Both axes are logarithmic: figures that are not above 0 are left out, and a note says so.
    """
    by_unit: dict[str, list[Prediction]] = {}
    for one in predictions:
        by_unit.setdefault(one.unit, []).append(one)
    drawn = 0
    for unit, members in by_unit.items():
        chart = _chart(unit, members, number=drawn + 1) if drawn < _MOST_UNITS else None
        if chart is not None:
            drawn += 1
            yield chart


def _chart(unit: str, members: Sequence[Prediction], *, number: int) -> Chart | None:
    figures: dict[str, list[Prediction]] = {}
    for one in members:
        if (one.predicted or 0) > 0 and (one.measured or 0) > 0:
            figures.setdefault(printable(one.figure), []).append(one)
    if not figures:
        return None
    names = list(figures)
    num_points = sum(map(len, figures.values()))
    most = MOST_POINTS // min(len(names), MOST_SERIES)
    series = [
        Series(name=name, points=[_point(one) for one in thin(figures[name], most)])
        for name in names[:MOST_SERIES]
    ]
    shown = "GiB" if unit == "bytes" else printable(unit)
    return Chart(
        name=f"predicted-measured-{number}",
        kind=ChartKind.SCATTER,
        title=f"Predicted and measured: {_subject(shown, names)}",
        description=_describe(figures),
        x=Axis(title="Measured", unit=shown, is_log=True),
        y=Axis(title="Predicted", unit=shown, is_log=True),
        series=series,
        notes=[
            "On the line a prediction is right; above it, it is too high.",
            *_missing_note(len(members) - num_points),
            *_thinned_note(series, {name: len(figures[name]) for name in names[:MOST_SERIES]}),
            *left_out(names[MOST_SERIES:], len(names) - MOST_SERIES, "figure"),
        ],
    )


def _subject(unit: str, names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"figures in {unit}"


def _point(one: Prediction) -> Point:
    assert one.predicted is not None
    assert one.measured is not None
    scale = _BYTES_PER_GIB if one.unit == "bytes" else 1
    error = "" if one.error is None else f", {one.error:+.1%}"
    predicted = format_quantity(one.predicted, one.unit)
    measured = format_quantity(one.measured, one.unit)
    return Point(
        x=one.measured / scale,
        y=one.predicted / scale,
        label=(
            f"{printable(one.model)}, {counted(one.num_blocks, 'block')}: predicted {predicted}, "
            f"measured {measured}{error}"
        ),
    )


def _describe(figures: dict[str, list[Prediction]]) -> str:
    """The median error of each of the first figures."""
    sentences = []
    for name, members in list(figures.items())[:_DESCRIBED]:
        errors = [one.error for one in members if one.error is not None]
        servers = counted(len(members), "server")
        if errors:
            error = f", predicted {_off(statistics.median(errors))}"
            sentences.append(f"{name}: {servers}{error}{' (median)' if len(errors) > 1 else ''}.")
        else:
            sentences.append(f"{name}: {servers}.")
    if len(figures) > _DESCRIBED:
        sentences.append(f"{counted(len(figures) - _DESCRIBED, 'more figure')}.")
    return " ".join(sentences)


def _off(error: float) -> str:
    """'5.0 % too high'."""
    if f"{abs(error):.1%}" == "0.0%":
        return "right to 0.1 %"
    return f"{100 * abs(error):.1f} % too {'high' if error > 0 else 'low'}"


def _missing_note(num_missing: int) -> list[str]:
    if not num_missing:
        return []
    return [f"Left out, as not both are known and above 0: {counted(num_missing, 'figure')}."]


def _thinned_note(series: Sequence[Series], counts: dict[str, int]) -> list[str]:
    num_drawn, num_all = sum(len(one.points) for one in series), sum(counts.values())
    if num_drawn == num_all:
        return []
    return [f"Points drawn: {num_drawn:,} of {num_all:,}, evenly chosen."]
