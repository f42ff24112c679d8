"""Tables as the page shows them: cells with what they are sorted by, aligned at the point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flexbench.report.formats.cells import cell
from flexbench.report.table import Column, Kind, Row, Table

# More zeros to the right of a figure would push it out of sight.
_MOST_PADDING = 6
_LABEL_CELLS = 3


class Cell(NamedTuple):
    """One cell. There may be very many."""

    text: str
    sort_value: str | None
    """The number it is sorted by; None: it is sorted by its text."""
    padding: str
    """Unseen digits that align its point with those of its column."""
    is_known: bool
    is_best: bool


class GridRow(NamedTuple):
    """One row."""

    cells: Sequence[Cell]
    run_ids: str
    """Of the runs it stands for, separated by spaces."""
    linked_ids: Sequence[int]
    """Those of them whose details are on the page, a few."""
    runs_label: str
    """What the button that shows its runs is called."""
    is_mixed: bool


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table with all that its columns need to know about each other."""

    name: str
    """Unique in the document."""
    table: Table
    columns: Sequence[Column]
    """Those that are shown."""
    rows: Sequence[GridRow]
    has_runs: bool
    has_best: bool

    def is_number(self, column: Column) -> bool:
        """Whether a column stands on the right."""
        return column.kind is not Kind.TEXT


def to_grid(table: Table, *, name: str, ids_with_details: frozenset[int] = frozenset()) -> Grid:
    """What the page shows of a table; its rows lead to the runs with `ids_with_details`."""
    columns = [column for column in table.columns if column.is_shown]
    texts = [[cell(column, row) for column in columns] for row in table.rows]
    decimals = [
        _most_decimals(column, [line[index] for line in texts])
        for index, column in enumerate(columns)
    ]
    rows = [
        _grid_row(row, columns, line, decimals, ids_with_details)
        for row, line in zip(table.rows, texts, strict=True)
    ]
    return Grid(
        name=name,
        table=table,
        columns=columns,
        rows=rows,
        has_runs=any(row.run_ids for row in table.rows),
        has_best=any(row.best for row in table.rows),
    )


def _grid_row(
    row: Row,
    columns: Sequence[Column],
    texts: Sequence[str],
    decimals: Sequence[int | None],
    ids_with_details: frozenset[int],
) -> GridRow:
    cells = [
        Cell(
            text=text,
            sort_value=_sort_value(row.values.get(column.name)),
            padding=_padding(text, most),
            is_known=row.values.get(column.name) is not None,
            is_best=column.name in row.best,
        )
        for column, text, most in zip(columns, texts, decimals, strict=True)
    ]
    linked = [run_id for run_id in row.run_ids if run_id in ids_with_details]
    return GridRow(
        cells=cells,
        run_ids=" ".join(map(str, row.run_ids)),
        linked_ids=linked[:_LABEL_CELLS],
        runs_label=_runs_label(row, cells),
        is_mixed=row.is_mixed,
    )


def _runs_label(row: Row, cells: Sequence[Cell]) -> str:
    num_runs = row.values.get("num_runs")
    if not isinstance(num_runs, int) or num_runs < len(row.run_ids):
        num_runs = len(row.run_ids)
    words = ", ".join([cell.text for cell in cells if cell.is_known][:_LABEL_CELLS])
    return f"{num_runs} {'run' if num_runs == 1 else 'runs'} of {words}"


def _sort_value(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return repr(value) if math.isfinite(value) else None


def _most_decimals(column: Column, texts: Sequence[str]) -> int | None:
    """Of a column whose points can be aligned; None of others."""
    if column.kind is not Kind.FIGURE:
        return None
    found = [count for count in map(_decimals, texts) if count is not None]
    return min(max(found, default=0), _MOST_PADDING)


def _decimals(text: str) -> int | None:
    """Digits behind the point; None where there is no plain number."""
    whole, _, fraction = text.removeprefix("-").partition(".")
    is_plain = whole.isdecimal() and (fraction.isdecimal() or not fraction)
    return len(fraction) if is_plain else None


def _padding(text: str, most: int | None) -> str:
    own = _decimals(text)
    if not most or own is None or own >= most:
        return ""
    return ("." if own == 0 else "") + "0" * (most - own)
