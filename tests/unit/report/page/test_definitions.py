"""Which definitions a page has."""

from __future__ import annotations

import importlib.metadata

import pytest

from flexbench.core.metrics import METRICS
from flexbench.report.charts.chart import Axis, Chart, ChartKind
from flexbench.report.page import definitions
from flexbench.report.page.definitions import metrics_used, project_url
from flexbench.report.table import Column, Row, Table


def table(*names: str, rows=()) -> Table:
    columns = [Column(name=name, heading=name) for name in names]
    return Table(name="runs", title="T", columns=columns, rows=rows)


def names(metrics) -> list[str]:
    return [metric.name for metric in metrics]


def test_columns_name_their_figures_with_a_statistic_behind():
    assert names(metrics_used([table("system", "ttft_scheduled_p99", "throughput_mean")], [])) == [
        "throughput",
        "ttft_scheduled",
    ]


def test_rows_may_name_their_figures():
    rows = [Row(values={"figure": "forward_rps"}), Row(values={"figure": "block_bytes"})]
    assert names(metrics_used([table("figure", rows=rows)], [])) == ["forward_rps"]


def test_axes_name_them_by_their_labels():
    chart = Chart(
        name="c",
        kind=ChartKind.CURVE,
        title="T",
        description="D",
        x=Axis(title="clients"),
        y=Axis(title="time to first token", unit="s"),
        series=[],
    )
    assert names(metrics_used([], [chart])) == ["ttft"]


def test_all_are_told_where_none_is_named():
    assert metrics_used([table("system")], []) == list(METRICS)


@pytest.mark.parametrize(
    ("entries", "url"),
    [
        (None, None),
        (
            ["Homepage, https://example.org", "Repository, https://example.org/git"],
            "https://example.org/git",
        ),
        (["Homepage, https://example.org"], "https://example.org"),
        (["Homepage, javascript:alert(1)", "Chat, https://example.org/chat"], None),
    ],
)
def test_the_project_is_where_its_package_says(monkeypatch, entries, url):
    class Metadata:
        def get_all(self, _name):
            return entries

    monkeypatch.setattr(definitions, "metadata", lambda _name: Metadata())
    assert project_url() == url


def test_a_project_that_is_not_installed_is_nowhere(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(definitions, "metadata", missing)
    assert project_url() is None
