"""Curves and saturation as a terminal shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from flexbench.core.metrics import E2E, IN_FLIGHT, ITL, REQUESTS_PER_S, TPOT, TTFT, Metric
from flexbench.serving.config import Load
from flexbench.serving.figures import Distribution, PointFigures
from flexbench.serving.saturation import Saturation, StopReason

CLIENT_LIMITED_MARK = "!"
TIMING_MARK = "~"
_PLOT_HEIGHT = 10
_PLOT_WIDTH = 60


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """What a line of the table shows."""

    load: Load
    figures: PointFigures
    is_client_limited: bool = False
    is_timing_uncertain: bool = False
    client_busy: float | None = None
    """The busiest event loop: CPU time over wall time."""


def curve_table(points: Sequence[CurvePoint], *, title: str | None = None) -> Table:
    """The points, one line each, in 80 columns. Latencies are in ms."""
    is_streaming = any(point.figures.ttft is not None for point in points)
    table = Table(
        title=None if title is None else Text(title), box=box.SIMPLE_HEAD, padding=0, expand=False
    )
    table.add_column(_load_heading(points), justify="right", overflow="fold")
    latencies = ["TTFT\np50", "TTFT\np99", "ITL\np50", "TPOT\np50"] if is_streaming else []
    latencies += ["E2E\np50", "E2E\np99"]
    for heading in ("req\n/s", "tok\n/s", *latencies, "in\nflight", "CPU\n%", "err\n%", "\n"):
        table.add_column(heading, justify="right", overflow="fold")
    for point in points:
        cells = _cells(point, is_streaming=is_streaming)
        table.add_row(*map(Text, cells), style="yellow" if point.is_client_limited else None)
    return table


def legend(points: Sequence[CurvePoint]) -> str:
    """The formulas behind the headings, and the marks that occur."""
    is_streaming = any(point.figures.ttft is not None for point in points)
    metrics = [TTFT, ITL, TPOT, E2E] if is_streaming else [E2E]
    text = "; ".join(f"{_symbol(one)} = {one.formula}" for one in (*metrics, REQUESTS_PER_S))
    text = (
        f"Latencies in ms. {text}; {_symbol(IN_FLIGHT)}: mean over the window; CPU: the busiest "
        "event loop of the load generator."
    )
    if any(point.is_client_limited for point in points):
        text += f" {CLIENT_LIMITED_MARK}: client-limited, the load generator was the limit."
    if any(point.is_timing_uncertain for point in points):
        text += f" {TIMING_MARK}: the load generator was late at times, and latencies are too long."
    return text


def saturation_sentences(found: Saturation) -> list[str]:
    """Where the service saturates, why the search ended, and how sure that is."""
    if found.highest_requests_per_s is None or found.highest_level is None:
        return [f"No saturation point: {_ENDS[found.reason]}. {found.confidence.capitalize()}."]
    least = "at least " if found.is_lower_bound else ""
    sentences = [
        f"Highest throughput: {least}{found.highest_requests_per_s:.4g} requests/s "
        f"(95 %: {found.highest_low:.4g} to {found.highest_high:.4g}), "
        f"{found.highest_tokens_per_s:.4g} tokens/s, at {_level(found, found.highest_level)}."
    ]
    if found.knee_level is not None:
        interval = ""
        if found.knee_low != found.knee_high:
            interval = f" ({found.knee_low:.4g} to {found.knee_high:.4g})"
        sentences.append(f"It saturates at {_level(found, found.knee_level)}{interval}.")
    if found.slo_level is not None and found.slo_requests_per_s is not None:
        sentences.append(
            f"Within the conditions: {'at least' if found.is_slo_lower_bound else 'up to'} "
            f"{_level(found, found.slo_level)}, "
            f"{found.slo_requests_per_s:.4g} requests/s."
        )
    elif found.reason is StopReason.SLO:
        sentences.append("No load met the conditions.")
    points = f"{found.num_points} point{'' if found.num_points == 1 else 's'}"
    sentences.append(f"The search ended after {points}: {_ENDS[found.reason]}.")
    return [*sentences, f"{found.confidence[:1].upper()}{found.confidence[1:]}."]


def curve_plot(points: Sequence[CurvePoint]) -> str:
    """Median end-to-end latency against throughput, in 13 lines; empty with less than two points.

    Latency is on a logarithmic axis: it grows without end at the same throughput.
    """
    places = [
        (point.figures.requests_per_s, point.figures.e2e.p50)
        for point in points
        if point.figures.requests_per_s is not None and point.figures.e2e is not None
    ]
    places = [(rate, latency) for rate, latency in places if latency > 0]
    if len(places) < 2:
        return ""
    most = max(rate for rate, _ in places) or 1.0
    low = math.log(min(latency for _, latency in places))
    high = max(math.log(max(latency for _, latency in places)), low + 1e-9)
    grid = [[" "] * _PLOT_WIDTH for _ in range(_PLOT_HEIGHT)]
    for rate, latency in places:
        column = round(rate / most * (_PLOT_WIDTH - 1))
        line = round((math.log(latency) - low) / (high - low) * (_PLOT_HEIGHT - 1))
        grid[_PLOT_HEIGHT - 1 - line][column] = "●"
    labels = {0: _ms(math.exp(high)), _PLOT_HEIGHT - 1: _ms(math.exp(low))}
    lines = ["E2E p50, ms"]
    lines += [f"{labels.get(n, ''):>8} │{''.join(row)}".rstrip() for n, row in enumerate(grid)]
    lines.append(f"{'':>8} └{'─' * _PLOT_WIDTH}")
    lines.append(f"{'':>9} 0{f'{most:.4g} requests/s':>{_PLOT_WIDTH - 1}}")
    return "\n".join(lines)


_ENDS = {
    StopReason.PLATEAU: "more load brought no more throughput",
    StopReason.SLO: "more load violated the conditions",
    StopReason.ERRORS: "too many requests failed under more load",
    StopReason.CLIENT_LIMITED: "the load generator was the limit, not the service",
    StopReason.LIMIT: "the highest load that was allowed was reached",
    StopReason.UNFINISHED: "it was stopped before its end",
}


def _symbol(metric: Metric) -> str:
    return {E2E.name: "E2E", REQUESTS_PER_S.name: "req/s", IN_FLIGHT.name: "in flight"}.get(
        metric.name, metric.name.upper()
    )


def _level(found: Saturation, level: float) -> str:
    if found.is_open_loop:
        return f"{level:.4g} requests/s offered"
    return f"{level:g} client{'' if level == 1 else 's'}"


def _load_heading(points: Sequence[CurvePoint]) -> str:
    return "\nclients" if any(point.load.concurrency for point in points) else "offered\n/s"


def _cells(point: CurvePoint, *, is_streaming: bool) -> list[str]:
    load, figures = point.load, point.figures
    latencies: list[tuple[Distribution | None, str]] = [(figures.e2e, "p50"), (figures.e2e, "p99")]
    if is_streaming:
        streamed = [(figures.ttft, "p50"), (figures.ttft, "p99")]
        latencies = [*streamed, (figures.itl, "p50"), (figures.tpot, "p50"), *latencies]
    return [
        f"{load.rate_per_s:g}" if load.concurrency is None else str(load.concurrency),
        _figure(figures.requests_per_s),
        _figure(figures.output_tokens_per_s),
        *("-" if d is None else _ms(d.statistic(statistic)) for d, statistic in latencies),
        _figure(figures.in_flight),
        "-" if point.client_busy is None else f"{point.client_busy * 100:.0f}",
        "-" if figures.error_rate is None else f"{figures.error_rate * 100:.3g}",
        _mark(point),
    ]


def _mark(point: CurvePoint) -> str:
    if point.is_client_limited:
        return CLIENT_LIMITED_MARK
    return TIMING_MARK if point.is_timing_uncertain else ""


def _figure(value: float | None) -> str:
    """Three digits after which nobody looks; whole numbers from 100 on."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return _figure(seconds * 1e3)
