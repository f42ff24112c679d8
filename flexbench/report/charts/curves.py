"""Throughput and latency under growing load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flexbench.report.charts.chart import Axis, Chart, ChartKind, Point, PointMark, Series
from flexbench.report.charts.selected import SelectedRuns
from flexbench.report.charts.sweeps import (
    BATCHES,
    CLIENTS,
    CONCURRENCY,
    PROCESSES,
    RANKS,
    RATES,
    LoadPoint,
    Spread,
    Sweep,
    SweptRuns,
    SweptSeries,
    is_number,
    read_sweep,
)
from flexbench.report.charts.wording import (
    all_have,
    counted,
    interval_text,
    is_wide,
    left_out,
)
from flexbench.report.formats.cells import format_figure, printable

_LATENCY_SWEEPS = (CLIENTS, BATCHES, CONCURRENCY, RATES, PROCESSES)
_LOAD_SWEEPS = (CLIENTS, BATCHES, RANKS, CONCURRENCY, RATES, PROCESSES)
_SYSTEMS: Mapping[str | None, str] = {None: "runs without a record"}
_LATENCIES: Mapping[str | None, str] = {"dist": "Total latency"}
_P99_TTFT = "ttft_p99"
_DESCRIBED = 3

Curves = Sequence[Mapping[str, Any]]


def throughput_latency_charts(selected: SelectedRuns, curves: Curves) -> Iterator[Chart]:
    """Latency over throughput, a chart for each system.

    Of serving two: of the mean latency, and of the 99th percentile of the time to first token.
    `curves` are the records of searches for saturation.
    """
    p99 = selected.figure(_P99_TTFT)
    for sweep in _LATENCY_SWEEPS:
        runs = read_sweep(selected, sweep, curves=curves)
        if runs.series:
            latency = _LATENCIES.get(sweep.system, "Mean latency")
            yield _latency_chart(sweep, runs, "throughput-latency", latency)
        if sweep.system == "serving" and p99 is not None:
            runs = read_sweep(selected, sweep, latency=p99, curves=curves)
            if runs.series:
                yield _latency_chart(
                    sweep, runs, "throughput-ttft", "Time to first token, 99th percentile"
                )


def throughput_load_charts(selected: SelectedRuns, curves: Curves) -> Iterator[Chart]:
    """Throughput over the load, a chart for each system with runs under more than one load."""
    for sweep in _LOAD_SWEEPS:
        # The latency is not shown here, and may be missing.
        runs = read_sweep(
            selected, sweep, latency="coalesce(mean_latency, 0)", curves=curves, fewest_loads=2
        )
        if runs.series:
            yield _load_chart(sweep, runs)


def _latency_chart(sweep: Sweep, runs: SweptRuns, kind: str, latency: str) -> Chart:
    def to_point(point: LoadPoint) -> Point:
        return _point(sweep, point, point.throughput.mean, point.latency)

    points = [point for one in runs.series for point in one.points]
    return Chart(
        name=f"{kind}-{sweep.name}",
        kind=ChartKind.CURVE,
        title=f"Throughput and {latency[0].lower()}{latency[1:]}: {_system(sweep)}",
        description=_describe(runs, lambda one: _latency_sentence(sweep, one)),
        x=_throughput_axis(points),
        y=Axis(title=latency, unit="s", is_log=_is_wide([point.latency for point in points])),
        series=_series(runs, to_point),
        notes=_notes(sweep, runs, interval_of="latency"),
        tag_title=sweep.what,
    )


def _load_chart(sweep: Sweep, runs: SweptRuns) -> Chart:
    def to_point(point: LoadPoint) -> Point:
        return _point(sweep, point, point.load, point.throughput)

    points = [point for one in runs.series for point in one.points]
    return Chart(
        name=f"throughput-clients-{sweep.name}",
        kind=ChartKind.CURVE,
        title=f"Throughput by {sweep.what}: {_system(sweep)}",
        description=_describe(runs, lambda one: _throughput_sentence(sweep, one)),
        x=Axis(title=sweep.axis, is_log=is_wide([point.load for point in points])),
        y=_throughput_axis(points),
        series=_series(runs, to_point),
        notes=_notes(sweep, runs, interval_of="throughput"),
    )


def _throughput_axis(points: Sequence[LoadPoint]) -> Axis:
    is_log = _is_wide([point.throughput for point in points])
    return Axis(title="Throughput", unit="tokens/s", is_log=is_log)


def _is_wide(spreads: Sequence[Spread]) -> bool:
    return is_wide([value for one in spreads for value in (one.low, one.high)])


def _system(sweep: Sweep) -> str:
    return _SYSTEMS.get(sweep.system, f"{sweep.system}")


# --- points ---


def _point(sweep: Sweep, point: LoadPoint, x: float, y: Spread) -> Point:
    limited = ", client-limited" if point.is_client_limited else ""
    late = ", timestamps late" if point.is_late else ""
    load = sweep.load_text(point.load)
    return Point(
        x=x,
        y=y.mean,
        y_low=y.low if y.is_wide else None,
        y_high=y.high if y.is_wide else None,
        label=f"{load}, {counted(point.num_runs, 'run')}{limited}{late}",
        tag=format_figure(point.load),
        mark=PointMark.CLIENT_LIMITED if point.is_client_limited else None,
    )


def _series(runs: SweptRuns, to_point: Callable[[LoadPoint], Point]) -> list[Series]:
    return [
        Series(
            name=one.name,
            points=[_marked(to_point(point), point, _knee(one)) for point in one.points],
        )
        for one in runs.series
    ]


def _marked(point: Point, load_point: LoadPoint, knee: float | None) -> Point:
    if knee is None or load_point.load != knee or point.mark is not None:
        return point
    return Point(
        x=point.x,
        y=point.y,
        y_low=point.y_low,
        y_high=point.y_high,
        label=f"{point.label}, saturation",
        tag=point.tag,
        mark=PointMark.SATURATION,
    )


def _knee(one: SweptSeries) -> float | None:
    """The load at which it saturates, as the search found it."""
    found = one.curve["saturation"] if one.curve is not None else {}
    level = found.get("knee_level")
    return float(level) if is_number(level) else None


# --- words ---


def _notes(sweep: Sweep, runs: SweptRuns, *, interval_of: str) -> list[str]:
    points = [point for one in runs.series for point in one.points]
    notes = all_have(runs.names.common)
    if any(getattr(point, interval_of).is_wide for point in points):
        notes.append(
            "Points are means of repeated runs; lines reach from the lowest to the highest."
        )
    if any(point.is_client_limited for point in points):
        notes.append("Hollow points: the load generator was the limit, not the service.")
    if sweep is RANKS:
        notes.append("The number of stages, and of threads of each, follow from that of ranks.")
    if interval_of == "latency" and any(point.is_late for point in points):
        notes.append("Where timestamps were late, latencies may be too long, never too short.")
    for one in runs.series:
        sentence = saturation_sentence(sweep, one)
        if sentence:
            notes.append(sentence if len(runs.series) == 1 else f"{one.name}: {sentence}")
    if runs.num_thinned:
        notes.append(f"Loads between those drawn: {runs.num_thinned:,} more.")
    if runs.num_with_few_loads:
        few = counted(runs.num_with_few_loads, "configuration")
        notes.append(f"Not drawn, as there is one load alone: {few}.")
    return [*notes, *runs.names.notes, *left_out(runs.left_out, runs.num_left_out)]


def saturation_sentence(sweep: Sweep, one: SweptSeries) -> str:
    """What the search for saturation found, "" without one."""
    if one.curve is None:
        return ""
    found = one.curve["saturation"]
    highest, knee = found.get("highest_requests_per_s"), _knee(one)
    confidence = printable(str(found.get("confidence") or "")).strip(" .")
    how_sure = f" ({confidence})" if confidence else ""
    most = ""
    if is_number(highest):
        least = "at least " if found.get("is_lower_bound") else ""
        most = f"the highest throughput is {least}{format_figure(highest)} requests/s"
    if knee is None:
        return f"No saturation point was found{how_sure}{': ' if most else ''}{most}."
    is_drawn = any(point.load == knee for point in one.points)
    ring = ", where the ring is" if is_drawn else ""
    return f"It saturates at {sweep.load_text(knee)}{ring}{how_sure}{'; ' if most else ''}{most}."


def _describe(runs: SweptRuns, sentence: Callable[[SweptSeries], str]) -> str:
    """A sentence on each of the first curves."""
    sentences = []
    for one in runs.series[:_DESCRIBED]:
        text = sentence(one)
        sentences.append(text if len(runs.series) == 1 else f"{one.name}: {text}")
    others = len(runs.series) - _DESCRIBED
    if others > 0:
        sentences.append(f"{counted(others, 'more curve')} beside these.")
    return " ".join(sentences)


def _throughput_sentence(sweep: Sweep, one: SweptSeries) -> str:
    """'Throughput rises from 12 to 48 tokens/s between 1 client and 8 clients.'"""
    first, last = one.points[0], one.points[-1]
    best = max(one.points, key=lambda point: point.throughput.mean)
    highest = format_figure(best.throughput.mean)
    if first is last:
        return f"Throughput is {highest} tokens/s with {sweep.load_text(first.load)}."
    if best is first:
        return (
            f"Throughput is highest with {sweep.load_text(first.load)}, {highest} tokens/s, and "
            f"{format_figure(last.throughput.mean)} with {sweep.load_text(last.load)}."
        )
    rise = (
        f"Throughput rises from {format_figure(first.throughput.mean)} to {highest} tokens/s "
        f"between {sweep.load_text(first.load)} and {sweep.load_text(best.load)}"
    )
    if best is last:
        return f"{rise}."
    return (
        f"{rise}, and is {format_figure(last.throughput.mean)} with {sweep.load_text(last.load)}."
    )


def _latency_sentence(sweep: Sweep, one: SweptSeries) -> str:
    """The throughput's sentence, and where the latency has doubled."""
    first, last = one.points[0], one.points[-1]
    sentence = _throughput_sentence(sweep, one)
    if first is last:
        return f"{sentence} Latency is {interval_text(first.latency.low, first.latency.high, 's')}."
    doubled = next(
        (point for point in one.points if point.latency.mean >= 2 * first.latency.mean > 0), None
    )
    ends = f"from {format_figure(first.latency.mean)} to {format_figure(last.latency.mean)} s"
    if doubled is None:
        return f"{sentence} Latency goes {ends}."
    return f"{sentence} Latency goes {ends}, and has doubled at {sweep.load_text(doubled.load)}."
