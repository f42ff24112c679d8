"""Which columns of a table a terminal has room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from flexbench.report.formats.cells import cell
from flexbench.report.table import Column, Kind, Row, Table


def columns_that_fit(
    table: Table, rows: Sequence[Row], widths: Mapping[str, int], room: int
) -> tuple[list[Column], list[Column]]:
    """What is shown of a table, and what is left out, both in the table's order.

    `widths` are those of columns with their gaps. First to go are those with the highest priority
    numbers. Where rows then look as if they were of the same thing, a column that tells them apart
    takes the place of figures.
    """
    columns = [column for column in table.columns if column.is_shown]
    describing = list(takewhile(lambda column: column.kind in (Kind.TEXT, Kind.COUNT), columns))
    kept = _drop(columns, set(), widths, room)
    needed: set[str] = set()
    while telling := _most_telling([one for one in describing if one not in kept], kept, rows):
        needed.add(telling.name)
        fewer = _drop(columns, needed, widths, room)
        if _width(fewer, widths) > room:
            break
        kept = fewer
    return kept, [column for column in columns if column not in kept]


def _drop(
    columns: Sequence[Column], needed: set[str], widths: Mapping[str, int], room: int
) -> list[Column]:
    kept = list(columns)
    while _width(kept, widths) > room:
        optional = [one for one in kept if one.priority > 0 and one.name not in needed]
        if not optional:
            break  # the rest is folded
        kept.remove(max(optional, key=lambda column: (column.priority, kept.index(column))))
    return kept


def _width(columns: Sequence[Column], widths: Mapping[str, int]) -> int:
    return sum(widths[column.name] for column in columns)


def _most_telling(
    missing: Sequence[Column], kept: Sequence[Column], rows: Sequence[Row]
) -> Column | None:
    """The one of `missing` with which most rows look different; None: none makes a difference."""
    describing = [column for column in kept if column.kind in (Kind.TEXT, Kind.COUNT)]
    alike = [tuple(cell(column, row) for column in describing) for row in rows]
    num_different = len(set(alike))
    if num_different == len(rows) or not missing:
        return None

    def gain(column: Column) -> int:
        return len({(known, cell(column, row)) for known, row in zip(alike, rows, strict=True)})

    best = max(missing, key=gain)
    return best if gain(best) > num_different else None
