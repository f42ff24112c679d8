"""Rows that are the best of those that can be compared."""

from __future__ import annotations

import pytest

from tests.unit.report.stores import known, marked, point, tables_of


def test_the_best_of_each_figure_is_marked():
    (table,) = tables_of(
        known(batch_size=1, throughput=10.0, mean_latency=1.0),
        known(batch_size=2, throughput=30.0, mean_latency=4.0),
        known(batch_size=4, throughput=30.0, mean_latency=9.0),
    )
    throughput = ["throughput_mean", "throughput_median"]
    assert marked(table.rows) == [
        ["mean_latency_mean", "mean_latency_median"],
        throughput,
        throughput,
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"sequence_length": 64},
        {"max_tokens": 8},
        {"weights": "real"},
        {"basis": "projected"},
        {"machine": "M2"},
        {"throughput": None, "mean_latency": None},
    ],
)
def test_rows_that_cannot_be_compared_have_no_best(other):
    (table,) = tables_of(known(), known(batch_size=2, **other))
    assert marked(table.rows) == [[], []]


def test_what_is_the_same_everywhere_is_nowhere_best():
    (table,) = tables_of(known(mean_latency=1.0), known(batch_size=2, mean_latency=2.0))
    assert marked(table.rows) == [["mean_latency_mean", "mean_latency_median"], []]


def test_projections_are_never_best():
    (table,) = tables_of(
        known(throughput=1.0, basis="projected"),
        known(throughput=2.0, basis="projected", batch_size=2),
        known(throughput=1.0),
        known(throughput=2.0, batch_size=2),
    )
    bests = {
        (row.values["basis"], row.values["batch_size"]): "throughput_mean" in row.best
        for row in table.rows
    }
    assert [key for key, is_best in bests.items() if is_best] == [("measured", 2)]


def test_client_limited_points_and_mixtures_are_never_best():
    (table,) = tables_of(
        point(1, throughput=10.0),
        point(2, throughput=20.0),
        point(4, throughput=40.0, figures={"client_limited": 1.0}),
    )
    assert "throughput_mean" in marked(table.rows)[1]
    assert marked(table.rows)[2] == []
    (table,) = tables_of(
        known(throughput=10.0),
        known(throughput=10.0, weights="real"),
        known(batch_size=2, throughput=5.0),
        known(batch_size=3, throughput=4.0),
        group_by=["batch_size"],
        allow_mixed=True,
    )
    assert marked(table.rows)[0] == []
    assert "throughput_mean" in marked(table.rows)[1]


def test_figures_that_are_neither_better_nor_worse_have_no_best():
    (table,) = tables_of(
        point(1, figures={"in_flight": 1.0, "num_new": 1.0}),
        point(2, figures={"in_flight": 2.0, "num_new": 2.0}),
        figures=["in_flight", "num_new"],
    )
    assert marked(table.rows) == [[], []]


def test_averages_over_other_lengths_are_never_best():
    runs = [known(), known(num_processes=2, throughput=40.0)]
    (table,) = tables_of(*runs, group_by=["num_processes"], figures=["throughput"])
    assert sum(bool(marks) for marks in marked(table.rows)) == 1
    runs.append(known(max_tokens=8))
    (table,) = tables_of(*runs, group_by=["num_processes"], figures=["throughput"])
    assert marked(table.rows) == [[], []]
    (table,) = tables_of(
        *runs, group_by=["num_processes", "sequence_length", "max_tokens"], figures=["throughput"]
    )
    assert sum(bool(marks) for marks in marked(table.rows)) == 1
