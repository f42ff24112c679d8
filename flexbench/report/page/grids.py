"""Tables as the page shows them: how cells are sorted, which columns go where room is short."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from flexbench.report.formats.cells import cell
from flexbench.report.table import Column, Kind, Row, Table

# More zeros to the right of a figure would push it out of sight.
_MOST_PADDING = 6
_LABEL_CELLS = 3
# So many rows tell which columns they differ in.
_ROWS_TO_TELL = 500
_VERDICT = "verdict"
# Of a comparison, what people look for first.
_FIRST = ("figure", _VERDICT, "ratio")
_GOOD, _BAD, _OPEN = "good", "bad", "open"
_TONES = {
    "faster": _GOOD,
    "better": _GOOD,
    "slower": _BAD,
    "worse": _BAD,
    "not sure": _OPEN,
}
_SIGNS = {_GOOD: "✓", _BAD: "✗", _OPEN: "?"}


class Cell(NamedTuple):
    """One cell. There may be very many."""

    text: str
    sort_value: str | None
    """The number it is sorted by; None: it is sorted by its text."""
    padding: str
    """Unseen digits that align its point with those of its column."""
    is_known: bool
    is_best: bool
    tone: str = ""
    """Of a verdict: good, bad or open."""

    @property
    def sign(self) -> str:
        """What says the same as the colour of a verdict."""
        return _SIGNS.get(self.tone, "")


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
    drops: Mapping[str, int]
    """By name of a column that may be left out, when it goes where room is short: 1 is first."""
    rows: Sequence[GridRow]
    has_runs: bool
    has_best: bool

    def is_number(self, column: Column) -> bool:
        """Whether a column stands on the right."""
        return column.kind is not Kind.TEXT


def to_grid(table: Table, *, name: str, ids_with_details: frozenset[int] = frozenset()) -> Grid:
    """What the page shows of a table; its rows lead to the runs with `ids_with_details`."""
    columns = _in_order(table)
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
        drops=_drops(table),
        rows=rows,
        has_runs=any(row.run_ids for row in table.rows),
        has_best=any(row.best for row in table.rows),
    )


def _in_order(table: Table) -> list[Column]:
    """The columns that are shown; of a comparison its verdicts come before configurations."""
    columns = [column for column in table.columns if column.is_shown]
    if not any(column.name == _VERDICT for column in columns):
        return columns
    first = [column for name in _FIRST for column in columns if column.name == name]
    return [*first, *(column for column in columns if column not in first)]


def _drops(table: Table) -> dict[str, int]:
    """Those of the highest priority numbers go first, and what tells rows apart goes last."""
    columns = [column for column in table.columns if column.is_shown]
    places = {column.name: place for place, column in enumerate(columns)}
    optional = [column for column in columns if column.priority > 0]
    needed = _telling(table, columns)
    optional.sort(key=lambda one: (one.name in needed, -one.priority, -places[one.name]))
    return {column.name: number for number, column in enumerate(optional, start=1)}


def _telling(table: Table, columns: Sequence[Column]) -> set[str]:
    """The names of optional columns without which rows would look as if they were the same."""
    describing = list(takewhile(lambda column: column.kind in (Kind.TEXT, Kind.COUNT), columns))
    rows = table.rows[:_ROWS_TO_TELL]
    values = {column.name: [cell(column, row) for row in rows] for column in describing}
    kept = [values[column.name] for column in describing if column.priority == 0]
    optional = [column.name for column in describing if column.priority > 0]
    needed: set[str] = set()

    def num_told(name: str) -> int:
        return len(set(zip(*kept, values[name], strict=True)))

    most = len(set(zip(*values.values(), strict=True)))
    while len(needed) < len(optional) and len(set(zip(*kept, strict=True))) < most:
        best = max((name for name in optional if name not in needed), key=num_told)
        needed.add(best)
        kept.append(values[best])
    return needed


def _tone(verdict: str, row: Row) -> str:
    """What is worse, but no more than is accepted, is neither good nor bad."""
    word, comma, _ = verdict.partition(",")
    tone = _TONES.get(word, "")
    is_accepted = tone == _BAD and bool(comma) and not row.values.get("is_regression")
    return _OPEN if is_accepted else tone


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
            tone=_tone(text, row) if column.name == _VERDICT else "",
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
