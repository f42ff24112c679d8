"""Which of the figures' definitions a page needs, and where the whole list is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata

from flexbench.core.metrics import METRICS, Metric
from flexbench.report.charts.chart import Chart
from flexbench.report.table import Table

# How a project names the place of its source, best first.
_LABELS = ("repository", "source", "homepage")
_FIGURE_COLUMN = "figure"


def metrics_used(tables: Sequence[Table], charts: Sequence[Chart]) -> list[Metric]:
    """The figures that stand in columns, rows or on axes; all if none can be told."""
    names = {name for text in _names(tables) if (name := _metric_name(text)) is not None}
    titles = {axis.title.casefold() for chart in charts for axis in (chart.x, chart.y)}
    used = [m for m in METRICS if m.name in names or m.label.casefold() in titles]
    return used or list(METRICS)


def _names(tables: Sequence[Table]) -> Iterator[str]:
    for table in tables:
        for column in table.columns:
            yield column.name
            if column.name == _FIGURE_COLUMN:
                yield from {str(row.values.get(column.name)) for row in table.rows}


def _metric_name(text: str) -> str | None:
    """Of "ttft_p99" "ttft"; of "ttft_scheduled_p99" the longer name."""
    found = [m.name for m in METRICS if text == m.name or text.startswith(f"{m.name}_")]
    return max(found, key=len, default=None)


def project_url() -> str | None:
    """Where the project lives, as its package says; None if it does not."""
    try:
        entries = metadata("flexbench").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    urls = {}
    for entry in entries:
        label, _, url = str(entry).partition(",")
        urls[label.strip().casefold()] = url.strip()
    found = (urls[label] for label in _LABELS if urls.get(label, "").startswith("https://"))
    return next(found, None)
