"""All charts that a report's runs make."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexbench.report.charts.chart import Chart, PlotKind
from flexbench.report.charts.curves import throughput_latency_charts, throughput_load_charts
from flexbench.report.charts.distribution import latency_charts
from flexbench.report.charts.predicted import predicted_charts
from flexbench.report.charts.selected import SelectedRuns
from flexbench.report.charts.timeline import timeline_charts
from flexbench.report.predictions import Prediction
from flexbench.report.store import RunStore

__all__ = ["PlotKind", "make_charts"]


def make_charts(
    store: RunStore,
    predictions: Sequence[Prediction],
    curves: Sequence[Mapping[str, Any]],
    kinds: Collection[PlotKind],
) -> list[Chart]:
    """The charts of each of `kinds`, in the order of PlotKind, each with a name of its own.

    None for what there is nothing to show of. `curves` are records of serving curves; what they say
    of saturation is marked on the curve of their points.
    """
    runs = SelectedRuns(store)
    charts = [
        chart
        for kind in PlotKind
        if kind in kinds
        for chart in _charts(kind, runs, predictions, curves)
    ]
    return _with_names_of_their_own(charts)


def _with_names_of_their_own(charts: Sequence[Chart]) -> list[Chart]:
    """With a number where several have the same: each is a file."""
    taken: set[str] = set()
    named = []
    for chart in charts:
        name, number = chart.name, 1
        while name in taken:
            number += 1
            name = f"{chart.name}-{number}"
        taken.add(name)
        named.append(replace(chart, name=name))
    return named


def _charts(
    kind: PlotKind,
    runs: SelectedRuns,
    predictions: Sequence[Prediction],
    curves: Sequence[Mapping[str, Any]],
) -> Iterator[Chart]:
    match kind:
        case PlotKind.THROUGHPUT_LATENCY:
            return throughput_latency_charts(runs, curves)
        case PlotKind.THROUGHPUT_CLIENTS:
            return throughput_load_charts(runs, curves)
        case PlotKind.LATENCY:
            return latency_charts(runs)
        case PlotKind.TIMELINE:
            return timeline_charts(runs)
        case PlotKind.PREDICTED:
            return predicted_charts(predictions)
