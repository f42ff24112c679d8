"""What a report shows, before it is text in any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """How the values of a column are written."""

    TEXT = "text"
    COUNT = "count"
    FIGURE = "figure"
    """At least four significant digits."""
    RATIO = "ratio"
    """1.05: with three decimals."""
    CHANGE = "change"
    """A share, written as +5.0 %."""
    QUANTITY = "quantity"
    """A figure in the unit that the row names under "unit"."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str
    """Its key in the rows, in CSV and in JSON."""
    heading: str
    """What people read, unit included; a line break where it may be broken."""
    kind: Kind = Kind.FIGURE
    is_shown: bool = True
    """To people (table, markdown, page). CSV and JSON have all."""
    priority: int = 0
    """Where a terminal is too narrow, those with the highest number go first; 0: never."""
    help: str = ""
    """The formula, or what it means: a tooltip on the page."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Values by column name; None: not known."""

    values: Mapping[str, Any]
    best: frozenset[str] = frozenset()
    """Columns in which it is the best of those that it can be compared with."""
    is_mixed: bool = False
    """It stands for runs that differ in what should not be mixed."""
    run_ids: tuple[int, ...] = ()
    """The runs it stands for, as RunStore numbers them; the first ones of very many."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its title."""

    name: str
    """runs, predictions, systems or comparison: the value of "table" in CSV and JSON."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""
    """What all rows have in common, which is therefore in no column."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What a reader has to know to take the figures for what they are."""
