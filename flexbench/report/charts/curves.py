"""Throughput and latency under growing load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexbench.core.printable import printable
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
from flexbench.report.charts.tasks import BY_RULE, Task, charts_of_tasks
from flexbench.report.charts.wording import (
    all_have,
    counted,
    interval_text,
    is_wide,
    left_out,
)
from flexbench.report.formats.cells import format_figure

_LATENCY_SWEEPS = (CLIENTS, BATCHES, CONCURRENCY, RATES, PROCESSES)
_LOAD_SWEEPS = (CLIENTS, BATCHES, RANKS, CONCURRENCY, RATES, PROCESSES)
_SYSTEMS: Mapping[str | None, str] = {None: "runs without a record"}
_LATENCIES: Mapping[str | None, str] = {"dist": "Total latency"}
_P99_TTFT = "ttft_p99"
_FEWEST_POINTS = 2

Curves = Sequence[Mapping[str, Any]]


def throughput_latency_charts(selected: SelectedRuns, curves: Curves) -> Iterator[Chart]:
    """Latency over throughput, a chart for each task of a system.

    Of serving two: of the mean latency, and of the 99th percentile of the time to first token.
    `curves` are the records of searches for saturation.
    """
    p99 = selected.figure(_P99_TTFT)
    for sweep in _LATENCY_SWEEPS:
        name = _LATENCIES.get(sweep.system, "Mean latency")
        axis = Axis(title=name, unit="s")
        yield from _charts(sweep, selected, curves, "throughput-latency", axis, "mean_latency")
        if sweep.system == "serving" and p99 is not None:
            axis = Axis(title="Time to first token, 99th percentile", unit="s")
            yield from _charts(sweep, selected, curves, "throughput-ttft", axis, p99)


def throughput_load_charts(selected: SelectedRuns, curves: Curves) -> Iterator[Chart]:
    """Throughput over the load, a chart for each task with runs under more than one load."""
    for sweep in _LOAD_SWEEPS:
        yield from _charts(sweep, selected, curves, "throughput-clients")


def _charts(
    sweep: Sweep,
    selected: SelectedRuns,
    curves: Curves,
    kind: str,
    latency_axis: Axis | None = None,
    latency: str = "coalesce(mean_latency, 0)",
) -> Iterator[Chart]:
    """A chart for each task that has more than one point; without an axis of a latency, over loads.

    `latency` is an SQL expression. Where it is not shown it may be missing.
    """
    condition = f"{sweep.runs_condition} AND isfinite({latency})"
    fewest = 2 if latency_axis is None else 1

    def to_chart(task: Task) -> Chart | None:
        runs = read_sweep(task.runs, sweep, latency=latency, curves=curves, fewest_loads=fewest)
        if sum(len(one.points) for one in runs.series) < _FEWEST_POINTS:
            return None
        name = "-".join(part for part in (kind, sweep.name, task.slug) if part)
        if latency_axis is None:
            return _load_chart(sweep, runs, name, task.words)
        return _latency_chart(sweep, runs, name, task.words, latency_axis)

    return charts_of_tasks(selected, condition, [sweep.system], to_chart)


def _latency_chart(sweep: Sweep, runs: SweptRuns, name: str, task: str, latency: Axis) -> Chart:
    def to_point(point: LoadPoint) -> Point:
        return _point(sweep, point, point.throughput.mean, point.latency)

    points = [point for one in runs.series for point in one.points]
    return Chart(
        name=name,
        kind=ChartKind.CURVE,
        title=f"Throughput and {latency.title[0].lower()}{latency.title[1:]}: "
        f"{_system(sweep)}, {task}",
        description=_describe(sweep, runs, lambda one: _latency_sentence(sweep, one)),
        x=_throughput_axis(points),
        y=replace(latency, is_log=_is_wide([point.latency for point in points])),
        series=_series(runs, to_point),
        notes=_notes(sweep, runs, interval_of="latency"),
        tag_title=sweep.what,
    )


def _load_chart(sweep: Sweep, runs: SweptRuns, name: str, task: str) -> Chart:
    def to_point(point: LoadPoint) -> Point:
        return _point(sweep, point, point.load, point.throughput)

    points = [point for one in runs.series for point in one.points]
    return Chart(
        name=name,
        kind=ChartKind.CURVE,
        title=f"Throughput by {sweep.what}: {_system(sweep)}, {task}",
        description=_describe(sweep, runs, lambda one: _throughput_sentence(sweep, one)),
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
            points=[_marked(to_point(point), point, one) for point in one.points],
        )
        for one in runs.series
    ]


def _marked(point: Point, load_point: LoadPoint, one: SweptSeries) -> Point:
    if point.mark is not None:
        return point
    if one.is_projected:
        return replace(point, label=f"{point.label}, projected", mark=PointMark.PROJECTED)
    if load_point.load == _knee(one):
        return replace(point, label=f"{point.label}, saturation", mark=PointMark.SATURATION)
    return point


def _knee(one: SweptSeries) -> float | None:
    """The load at which it saturates, as the search found it."""
    found = one.curve["saturation"] if one.curve is not None else {}
    level = found.get("knee_level")
    return float(level) if is_number(level) else None


# --- words ---


def _notes(sweep: Sweep, runs: SweptRuns, *, interval_of: str) -> list[str]:
    points = [point for one in runs.series for point in one.points]
    notes = []
    if any(one.is_projected for one in runs.series):
        notes.append("Broken hollow points: projected, not measured.")
    if any(point.is_client_limited for point in points):
        notes.append("Hollow points: the load generator was the limit, not the service.")
    notes += all_have(runs.names.common)
    if any(getattr(point, interval_of).is_wide for point in points):
        notes.append(
            "Points are means of repeated runs; lines reach from the lowest to the highest."
        )
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
    missing = left_out(runs.left_out, runs.num_left_out, because=BY_RULE)
    return [*notes, *runs.names.notes, *missing]


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


def _describe(sweep: Sweep, runs: SweptRuns, sentence: Callable[[SweptSeries], str]) -> str:
    """What a curve shows, or the best of several."""
    if len(runs.series) == 1:
        return sentence(runs.series[0])
    best, point = max(
        ((one, point) for one in runs.series for point in one.points),
        key=lambda found: found[1].throughput.mean,
    )
    projected = ", projected" if best.is_projected and "projected" not in best.name else ""
    return (
        f"{counted(len(runs.series), 'configuration')}; the highest throughput is "
        f"{format_figure(point.throughput.mean)} tokens/s: {best.name}{projected}, "
        f"{sweep.load_text(point.load)}."
    )


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
