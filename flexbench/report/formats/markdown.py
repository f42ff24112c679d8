"""Tables in GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flexbench.core.printable import printable
from flexbench.report.formats.cells import cell
from flexbench.report.table import Column, Kind, Row, Table

# What would end a cell, or be markup in it.
_MARKUP = re.compile(r"([\\|`*_\[\]<>~])")


def to_markdown(tables: Sequence[Table]) -> str:
    """Each table under a heading, what it has in common before it and its notes behind."""
    return "\n\n".join("\n".join(_lines(table)) for table in tables)


def _lines(table: Table) -> list[str]:
    columns = [column for column in table.columns if column.is_shown]
    head = [f"## {_escape(table.title)}", ""]
    caption = [_escape(table.caption), ""] if table.caption else []
    rule = "|".join(" --- " if column.kind is Kind.TEXT else " ---: " for column in columns)
    body = [
        _line(_escape(" ".join(column.heading.split())) for column in columns),
        f"|{rule}|",
        *(_line(_cell(column, row) for column in columns) for row in table.rows),
    ]
    notes = ["", *(f"- {_escape(note)}" for note in table.notes)] if table.notes else []
    return [*head, *caption, *(body if table.rows else []), *notes]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(column: Column, row: Row) -> str:
    text = _escape(cell(column, row))
    return f"**{text}**" if column.name in row.best else text


def _escape(text: str) -> str:
    return _MARKUP.sub(r"\\\1", printable(text))
