"""What a table's cells are sorted by, and how their points are aligned."""

from __future__ import annotations

import math

import pytest

from flexbench.report.page.grids import to_grid
from flexbench.report.table import Column, Kind, Row, Table


def grid(values, kind=Kind.FIGURE, **row):
    column = Column(name="x", heading="x", kind=kind)
    rows = [Row(values={"x": value, **row}) for value in values]
    return to_grid(Table(name="runs", title="T", columns=[column], rows=rows), name="t")


def cells(values, kind=Kind.FIGURE):
    return [row.cells[0] for row in grid(values, kind).rows]


def test_points_stand_below_each_other():
    found = cells([22.53, 0.0457, 12345, None, 3.5])
    assert [(cell.text, cell.padding) for cell in found] == [
        ("22.53", "00"),
        ("0.0457", ""),
        ("12345", ".0000"),
        ("-", ""),
        ("3.5", "000"),
    ]


def test_a_tiny_figure_does_not_push_the_others_out_of_sight():
    found = cells([0.00012345678, 7.0])  # 0.0001235: seven digits
    assert [cell.padding for cell in found] == ["", ".000000"]


@pytest.mark.parametrize("kind", [Kind.COUNT, Kind.RATIO, Kind.CHANGE, Kind.QUANTITY, Kind.TEXT])
def test_only_figures_are_padded(kind):
    assert [cell.padding for cell in cells([1, 2], kind)] == ["", ""]


def test_exponents_are_not_padded():
    assert [cell.padding for cell in cells([1.5e9, 2.25])] == ["", ""]


@pytest.mark.parametrize(
    ("value", "sorted_by"),
    [
        (22.53, "22.53"),
        (7, "7"),
        (-1e-7, "-1e-07"),
        ("a", None),
        (None, None),
        (True, None),
        (math.nan, None),
    ],
)
def test_numbers_are_sorted_by_all_their_digits(value, sorted_by):
    kind = Kind.TEXT if isinstance(value, str | bool) else Kind.FIGURE
    (found,) = cells([value], kind)
    assert found.sort_value == sorted_by
    assert found.is_known is (value is not None)


def test_columns_that_are_not_shown_are_left_out():
    table = Table(
        name="runs",
        title="T",
        columns=[Column(name="a", heading="a", is_shown=False), Column(name="b", heading="b")],
        rows=[Row(values={"a": 1.0, "b": 2.0})],
    )
    found = to_grid(table, name="t")
    assert [column.name for column in found.columns] == ["b"]
    assert [cell.text for cell in found.rows[0].cells] == ["2"]


def test_what_tells_rows_apart_goes_last_and_what_is_essential_never():
    table = Table(
        name="runs",
        title="T",
        columns=[
            Column(name="a", heading="a", kind=Kind.COUNT),
            Column(name="b", heading="b", kind=Kind.TEXT, priority=6),
            Column(name="c", heading="c", kind=Kind.TEXT, priority=2),
            Column(name="x", heading="x"),
            Column(name="y", heading="y", priority=3),
        ],
        rows=[Row(values={"a": 1, "b": b, "c": "same", "x": 1.0, "y": 1.0}) for b in "pq"],
    )
    assert to_grid(table, name="t").drops == {"y": 1, "c": 2, "b": 3}


def comparison(**values):
    columns = [
        Column(name="num_processes", heading="procs", kind=Kind.COUNT),
        Column(name="figure", heading="figure", kind=Kind.TEXT),
        Column(name="old_mean", heading="before"),
        Column(name="ratio", heading="ratio", kind=Kind.RATIO),
        Column(name="verdict", heading="verdict", kind=Kind.TEXT),
    ]
    table = Table(name="comparison", title="T", columns=columns, rows=[Row(values=values)])
    return to_grid(table, name="t")


def test_verdicts_of_a_comparison_come_first():
    names = [column.name for column in comparison(verdict="equal").columns]
    assert names == ["figure", "verdict", "ratio", "num_processes", "old_mean"]


@pytest.mark.parametrize(
    ("verdict", "is_regression", "tone", "sign"),
    [
        ("faster", False, "good", "✓"),
        ("slower", True, "bad", "✗"),
        ("worse", True, "bad", "✗"),
        ("slower, within 5%", False, "open", "?"),
        ("not sure", False, "open", "?"),
        ("equal", False, "", ""),
        ("equal as far as can be told", False, "", ""),
        ("higher", False, "", ""),
    ],
)
def test_a_verdict_has_a_colour_and_a_sign(verdict, is_regression, tone, sign):
    (row,) = comparison(verdict=verdict, is_regression=is_regression).rows
    assert (row.cells[1].text, row.cells[1].tone, row.cells[1].sign) == (verdict, tone, sign)


def test_a_row_leads_to_its_runs():
    table = Table(
        name="runs",
        title="T",
        columns=[Column(name="a", heading="a", kind=Kind.TEXT)],
        rows=[
            Row(values={"a": "petals", "num_runs": 700}, run_ids=(4, 5, 6, 7, 8)),
            Row(values={"a": "dist"}, run_ids=(9,)),
            Row(values={"a": "published"}),
        ],
    )
    found = to_grid(table, name="t", ids_with_details=frozenset({5, 6, 7, 8, 9}))
    first, second, third = found.rows
    assert found.has_runs
    assert first.run_ids == "4 5 6 7 8"
    assert first.linked_ids == [5, 6, 7]
    assert first.runs_label == "700 runs of petals"
    assert second.runs_label == "1 run of dist"
    assert third.run_ids == ""
