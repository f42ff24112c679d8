"""Tables for other programs: every column, every digit."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from flexbench.report.table import Row, Table

_TABLE = "table"
_MIXED = "mixed"
_FORMULA_BEGINS = ("=", "+", "-", "@", "\t", "\r")


def to_json(tables: Sequence[Table]) -> str:
    """One JSON list with an object for each row of all tables; "table" says of which."""
    return json.dumps(_records(tables), indent=2, allow_nan=False)


def to_csv(tables: Sequence[Table]) -> str:
    """One header with the columns of all tables; what a table does not have is empty."""
    records = _records(tables)
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _harmless(value) for name, value in one.items()} for one in records)
    return text.getvalue().rstrip("\n")


def _harmless(value: Any) -> Any:
    """Spreadsheets take a text that begins like this for a formula, and carry it out."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_BEGINS) else value


def _records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    has_mixed = any(row.is_mixed for table in tables for row in table.rows)
    return [_record(table, row, has_mixed) for table in tables for row in table.rows]


def _record(table: Table, row: Row, has_mixed: bool) -> dict[str, Any]:
    values = {column.name: row.values.get(column.name) for column in table.columns}
    return {_TABLE: table.name, **values, **({_MIXED: row.is_mixed} if has_mixed else {})}
