"""What a report calls a figure: its definition, its heading, and which figures a system shows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flexbench.core.metrics import (
    E2E,
    ERROR_RATE,
    IN_FLIGHT,
    METRICS,
    OUTPUT_TOKENS_PER_S,
    TOKENS_PER_CHUNK,
    TOTAL_LATENCY,
    TOTAL_THROUGHPUT,
    Metric,
)

THROUGHPUT = "throughput"
MEAN_LATENCY = "mean_latency"
MAIN_FIGURES = (THROUGHPUT, MEAN_LATENCY)

_METRICS = {metric.name: metric for metric in METRICS}
# The two columns of the results file hold other figures with other systems.
_METRICS_OF_SYSTEMS = {
    ("dist", THROUGHPUT): TOTAL_THROUGHPUT,
    ("dist", MEAN_LATENCY): TOTAL_LATENCY,
    ("serving", THROUGHPUT): OUTPUT_TOKENS_PER_S,
    ("serving", MEAN_LATENCY): E2E,
}
_STATISTIC = re.compile(r"_(?P<name>mean|min|max|p\d+(?:_\d+)?)$", re.ASCII)
# They describe a load or a stream: more is not better.
_WITHOUT_BEST = (IN_FLIGHT.name, TOKENS_PER_CHUNK.name)
_SPEED_UNITS = ("tokens/s", "requests/s", "steps/s", "s")
_UNITS = {"tokens/s": "tok/s", "requests/s": "req/s"}
_HEADINGS = {
    THROUGHPUT: "tok/s",
    MEAN_LATENCY: "lat s",
    "prefill_throughput": "prefill\ntok/s",
    "decode_throughput": "decode\ntok/s",
    "bubble_fraction": "bubble",
    "prefill_roofline": "prefill of\nroofline",
    "decode_roofline": "decode of\nroofline",
    "weight_load_roofline": "weight load\nof roofline",
    "requests_per_s": "req/s",
    "in_flight": "in\nflight",
    "ttft": "TTFT s",
    "itl": "ITL s",
    "tpot": "TPOT s",
    "e2e": "E2E s",
    "error_rate": "errors",
}
_HEADINGS_OF_SYSTEMS = {
    ("dist", THROUGHPUT): "total\ntok/s",
    ("dist", MEAN_LATENCY): "total\nlat s",
}


@dataclass(frozen=True, kw_only=True)
class FiguresOfSystem:
    """What a report has of a system unless it is asked for other figures."""

    shown: tuple[str, ...]
    others: tuple[str, ...]
    """In CSV and JSON only."""


_DEFAULT = FiguresOfSystem(shown=MAIN_FIGURES, others=())
_OF_SYSTEMS = {
    "dist": FiguresOfSystem(
        shown=(*MAIN_FIGURES, "prefill_throughput", "decode_throughput", "bubble_fraction"),
        others=(
            "prefill_latency",
            "decode_latency",
            "prefill_roofline",
            "decode_roofline",
            "weight_load_roofline",
        ),
    ),
    "serving": FiguresOfSystem(
        shown=(
            "requests_per_s",
            THROUGHPUT,
            "ttft_p50",
            "ttft_p99",
            "itl_p50",
            "e2e_p99",
            "in_flight",
        ),
        others=(MEAN_LATENCY, "tpot_p50", "e2e_p50", "goodput", "error_rate"),
    ),
}


def figures_of(system: str | None) -> FiguresOfSystem:
    """Those of a system; of one that is not known, what every results file has."""
    return _OF_SYSTEMS.get(system or "", _DEFAULT)


def figures_of_all(systems: Collection[str | None], known: Collection[str]) -> tuple[str, ...]:
    """All that these systems have, of those `known` in the results; the two main ones always."""
    names = [name for one in systems for name in (*figures_of(one).shown, *figures_of(one).others)]
    found = (name for name in names if name in known)
    return tuple(dict.fromkeys([*MAIN_FIGURES, *found]))


def metric_of(figure: str, system: str | None = None) -> Metric | None:
    """Its definition: 'ttft_p99' is a percentile of ttft. None of a figure without one."""
    special = _METRICS_OF_SYSTEMS.get((system or "", figure))
    return special or _METRICS.get(figure) or _METRICS.get(_STATISTIC.sub("", figure))


def is_higher_better(figure: str) -> bool | None:
    """None where more is neither better nor worse, or nobody knows."""
    metric = metric_of(figure)
    if metric is None or metric.name in _WITHOUT_BEST:
        return None
    return metric.higher_is_better


def is_speed(figure: str) -> bool:
    """Whether better means faster."""
    return unit_of(figure) in _SPEED_UNITS


def is_share(figure: str) -> bool:
    """Whether it is a share of something, from 0 to 1."""
    metric = metric_of(figure)
    return metric is not None and metric.unit == "1"


def is_difference(figure: str) -> bool:
    """Whether it changes by a difference of shares, not by a ratio: errors are mostly 0."""
    metric = metric_of(figure)
    return metric is not None and metric.name == ERROR_RATE.name


def percentile_of_figure(figure: str) -> float | None:
    """'ttft_p99' -> 99.0; None of what is no percentile."""
    match = _STATISTIC.search(figure)
    if match is None or not match["name"].startswith("p"):
        return None
    return float(match["name"][1:].replace("_", "."))


def unit_of(figure: str) -> str:
    """Such as tokens/s; "" where nobody knows, or it has none."""
    metric = metric_of(figure)
    return metric.unit if metric is not None and metric.unit != "1" else ""


def help_of(figure: str, system: str | None = None) -> str:
    """Its formula."""
    metric = metric_of(figure, system)
    if metric is None:
        return ""
    match = _STATISTIC.search(figure)
    if match is None or figure == metric.name or figure in MAIN_FIGURES:
        return f"{metric.label} = {metric.formula}"
    statistic = match["name"].replace("_", ".")
    return f"{statistic} of {metric.label.lower()} = {metric.formula}"


def heading_of(figure: str, statistic: Sequence[str], system: str | None = None) -> str:
    """What stands above its column; `statistic` are the lines that say what of it.

    A mean needs no line where there are two already.
    """
    lines = [*_heading(figure, system).split("\n")]
    if len(lines) > 1 and list(statistic) == ["mean"]:
        return "\n".join(lines)
    return "\n".join([*lines, *statistic])


def _heading(figure: str, system: str | None) -> str:
    known = _HEADINGS_OF_SYSTEMS.get((system or "", figure)) or _HEADINGS.get(figure)
    if known is not None:
        return known
    match = _STATISTIC.search(figure)
    base = figure[: match.start()] if match else figure
    if match and base in _HEADINGS:
        return f"{_HEADINGS[base]}\n{match['name'].replace('_', '.')}"
    unit = unit_of(figure)
    words = figure.replace("_", " ")
    return f"{words}\n{_UNITS.get(unit, unit)}" if unit else words
