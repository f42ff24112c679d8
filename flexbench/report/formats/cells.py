"""One value as people read it."""

from __future__ import annotations

from typing import Any

from flexbench.core.printable import printable
from flexbench.core.units import format_bytes
from flexbench.report.table import Column, Kind, Row

NOT_KNOWN = "-"
BEST = "*"


def cell(column: Column, row: Row) -> str:
    """The text of a row's value in a column, on one line and without anything unprintable."""
    value = row.values.get(column.name)
    if value is None:
        return NOT_KNOWN
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    match column.kind:
        case Kind.RATIO:
            return f"{value:.3f}" if abs(value) < 1e6 else format_figure(value)
        case Kind.CHANGE:
            return f"{value:+.1%}"
        case Kind.QUANTITY:
            return format_quantity(value, row.values.get("unit"))
        case Kind.FIGURE:
            return format_figure(value)
        case Kind.TEXT | Kind.COUNT:
            return str(value)


def format_figure(value: float) -> str:
    """At least four significant digits, no exponent below a million: 22.53, 0.0457, 12345."""
    if value == 0:
        return "0"
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e6 else text


def format_quantity(value: float, unit: Any) -> str:
    """A figure with its unit."""
    if unit == "bytes":
        return format_bytes(value)
    return f"{format_figure(value)} {printable(str(unit))}" if unit else format_figure(value)
