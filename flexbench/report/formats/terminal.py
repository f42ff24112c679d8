"""Tables in a terminal, as wide as that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from flexbench.core.printable import printable
from flexbench.report.formats.cells import BEST, cell
from flexbench.report.formats.fitting import columns_that_fit
from flexbench.report.table import Column, Kind, Row, Table

_MIXED_HEADING = "mixed"
_GAP = 1
# Nobody reads more, and laying them out would take minutes.
MOST_ROWS = 1000


def show(tables: Sequence[Table], console: Console) -> None:
    """Print all tables, each with its title, what it has in common, and its notes."""
    for number, table in enumerate(tables):
        if number > 0:
            console.print()
        for part in _parts(table, console.width):
            console.print(part)


def _parts(table: Table, width: int) -> Iterator[RenderableType]:
    yield Text(printable(table.title), style="bold")
    if table.caption:
        yield Text(printable(table.caption), style="dim")
    if not table.rows:
        yield from (Text(printable(note)) for note in table.notes)
        return
    rows = table.rows[:MOST_ROWS]
    marked = frozenset().union(*(row.best for row in rows))
    widths = {column.name: _width(column, rows) + _GAP for column in table.columns}
    mixed = len(_MIXED_HEADING) if any(row.is_mixed for row in rows) else -_GAP
    columns, left_out = columns_that_fit(table, rows, widths, width - mixed)
    yield _rich_table(rows, columns)
    if marked & {column.name for column in columns}:
        yield Text(f"{BEST} the best of those that can be compared")
    yield from (Text(printable(note)) for note in table.notes)
    yield from (Text(note) for note in _what_is_missing(table, left_out))


def _what_is_missing(table: Table, left_out: Sequence[Column]) -> Iterator[str]:
    num_missing = len(table.rows) - MOST_ROWS
    if num_missing > 0:
        yield f"{num_missing} more rows: --filter and --group-by make fewer, --format csv has all"
    if left_out:
        names = ", ".join(column.name for column in left_out)
        yield f"Hidden, as the terminal is too narrow: {names} (--format csv has all)"


def _width(column: Column, rows: Sequence[Row]) -> int:
    texts = [*column.heading.split("\n"), *(_marked(column, row) for row in rows)]
    return max(len(text) for text in texts)


def _marked(column: Column, row: Row) -> str:
    """With its mark in front: digits stand below each other all the same."""
    mark = BEST if column.name in row.best else ""
    return mark + cell(column, row)


def _rich_table(rows: Sequence[Row], columns: Sequence[Column]) -> RichTable:
    # Between columns the box itself has one space.
    shown = RichTable(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    num_lines = max((column.heading.count("\n") + 1 for column in columns), default=1)
    for column in columns:
        missing = num_lines - 1 - column.heading.count("\n")
        # A figure that is too long for its column is folded, never cut.
        shown.add_column(
            "\n" * missing + column.heading,
            justify="left" if column.kind is Kind.TEXT else "right",
            overflow="fold",
        )
    has_mixed = any(row.is_mixed for row in rows)
    if has_mixed:
        shown.add_column("\n" * (num_lines - 1) + _MIXED_HEADING)
    for row in rows:
        cells = [
            Text(
                _marked(column, row),
                style="bold green" if column.name in row.best else "",
            )
            for column in columns
        ]
        shown.add_row(*cells, *([Text("!" if row.is_mixed else "")] if has_mixed else []))
    return shown
