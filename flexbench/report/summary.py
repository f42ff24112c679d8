"""The runs of each system in a table: a row for each configuration, or for each group asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

from flexbench.core.errors import ConfigError
from flexbench.report.best import best_columns
from flexbench.report.columns import (
    LENGTHS,
    MARKS,
    NUM_CLIENT_LIMITED,
    NUM_LATE,
    NUM_RUNS,
    configuration_columns,
    figure_columns,
    mark_columns,
    statistics_of,
)
from flexbench.report.figures import MAIN_FIGURES, figures_of_all
from flexbench.report.gate import in_words
from flexbench.report.grouping import read_groups
from flexbench.report.groups import Group, order_of
from flexbench.report.names import HEADINGS, unknown_name
from flexbench.report.runs import IDENTITY_COLUMNS
from flexbench.report.selection import Selection, SortKey, named, where
from flexbench.report.statistics import Spread
from flexbench.report.store import RunStore
from flexbench.report.table import Column, Row, Table

CLIENT_LIMITED_MARK = "!"
LATE_MARK = "~"
_SYSTEMS = ("petals", "dist", "serving")
_RESERVED = (*IDENTITY_COLUMNS, NUM_RUNS, MARKS, NUM_CLIENT_LIMITED, NUM_LATE)
_LONGEST_NOTE = 300


def summarize(store: RunStore, selection: Selection) -> list[Table]:
    """A table for each system that has selected runs.

    Raises ConfigError for columns and figures that there are not, and for groups that would average
    runs of different things, unless the selection allows that.
    """
    selection = named(selection, store)
    figures = selected_figures(store, selection)
    is_asked = selection.figures is not None
    groups = read_groups(store, selection, figures, only_with_figures=is_asked)
    if is_asked and not groups and _has_selected(store, selection):
        raise ConfigError("--figure", f"none of the selected runs has {' or '.join(figures)}")
    systems: dict[str | None, list[Group]] = {}
    for group in groups:
        systems.setdefault(group.gate["system"], []).append(group)
    ordered = sorted(systems, key=_place)
    alike = _with_same_lengths(store, selection)
    tables = [
        _Summary.of(one, systems[one], figures, selection, are_lengths_alike=one in alike)
        for one in ordered
    ]
    _check_sort(tables, selection.sort)
    return [one.table(selection.sort) for one in tables]


def _has_selected(store: RunStore, selection: Selection) -> bool:
    condition, parameters = where(store, selection.filters)
    return bool(store.rows(f"SELECT id FROM runs WHERE {condition} LIMIT 1", parameters))  # noqa: S608


def _with_same_lengths(store: RunStore, selection: Selection) -> set[str | None]:
    """The systems whose selected runs all have the same lengths."""
    condition, parameters = where(store, selection.filters)
    query = f"SELECT DISTINCT system, {', '.join(LENGTHS)} FROM runs WHERE {condition}"  # noqa: S608
    counts = Counter(row["system"] for row in store.rows(query, parameters))
    return {system for system, count in counts.items() if count == 1}


def selected_figures(store: RunStore, selection: Selection) -> tuple[str, ...]:
    """The figures that were asked for, or those of the systems that have selected runs."""
    if selection.figures is not None:
        return tuple(selection.figures)
    condition, parameters = where(store, selection.filters)
    systems = store.rows(f"SELECT DISTINCT system FROM runs WHERE {condition}", parameters)  # noqa: S608
    return figures_of_all([row["system"] for row in systems], store.keys("figures"))


def _measured(
    groups: Sequence[Group], figures: Sequence[str], selection: Selection
) -> tuple[str, ...]:
    """Without those of other systems. What every results file has is always there."""
    measured = {name for group in groups for name in group.spreads}
    always = () if selection.figures is not None else MAIN_FIGURES
    return tuple(name for name in figures if name in measured or name in always)


def describe(group: Group) -> Mapping[str, Any]:
    """What a group is of, by column: what it was grouped by, the gate, and the other options."""
    if not group.setup and group.gate is group.keys:
        return group.keys
    options = {
        f"setup.{name}" if name in _RESERVED else name: _plain(value)
        for name, value in group.setup.items()
    }
    gate = {name: value for name, value in group.gate.items() if name not in group.keys}
    return {**group.keys, **gate, **options}


def subject_in_words(values: Mapping[str, Any]) -> str:
    """'facebook/opt-125m, float32, dummy weights, measured, AMD EPYC (2 CPUs)': what is known."""
    words = dict(values)
    if words.get("weights") is not None:
        words["weights"] = f"{words['weights']} weights"
    order = ("model", "dtype", "weights", "basis", "topology", "machine")
    return ", ".join(in_words(words[name]) for name in order if words.get(name) is not None)


class _Values(Mapping[str, Any]):
    """The values of a row, taken from its group when they are asked for: there may be very many."""

    __slots__ = ("_described", "_getters", "_group")

    def __init__(
        self,
        described: Mapping[str, Any],
        group: Group,
        getters: Mapping[str, Callable[[Group], Any]],
    ) -> None:
        self._described = described
        self._group = group
        self._getters = getters

    def __getitem__(self, name: str) -> Any:
        get = self._getters.get(name)
        return self._described[name] if get is None else get(self._group)

    def __iter__(self) -> Iterator[str]:
        return chain(self._described, self._getters)

    def __len__(self) -> int:
        return len(self._described) + len(self._getters)


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """The groups of one system, and what is shown of them."""

    system: str | None
    groups: Sequence[Group]
    figures: Sequence[str]
    selection: Selection
    describing: Sequence[Mapping[str, Any]]
    columns: Sequence[Column]

    are_lengths_alike: bool
    """Whether all runs have the same lengths of prompts and answers."""

    @classmethod
    def of(
        cls,
        system: str | None,
        groups: Sequence[Group],
        figures: Sequence[str],
        selection: Selection,
        *,
        are_lengths_alike: bool,
    ) -> _Summary:
        describing = [describe(group) for group in groups]
        figures = _measured(groups, figures, selection)
        columns = [
            *configuration_columns(describing, system=system, group_by=selection.group_by),
            *figure_columns(groups, figures, selection, system=system),
            *mark_columns(groups, system=system),
        ]
        return cls(
            system=system,
            groups=groups,
            figures=figures,
            selection=selection,
            describing=describing,
            columns=columns,
            are_lengths_alike=are_lengths_alike,
        )

    def table(self, sort: Sequence[SortKey]) -> Table:
        marks = best_columns(self.groups, self.figures, are_lengths_alike=self.are_lengths_alike)
        getters = self._getters()
        rows = [
            Row(
                values=_Values(described, group, getters),
                best=best,
                is_mixed=bool(group.mixed),
                run_ids=group.run_ids,
            )
            for group, described, best in zip(self.groups, self.describing, marks, strict=True)
        ]
        known = {column.name for column in self.columns}
        return Table(
            name="runs",
            title=_title(self.system),
            columns=self.columns,
            rows=sort_rows(rows, [(column_of(key, known), key) for key in sort]),
            caption=self._caption(),
            notes=tuple(self._notes()),
        )

    def _getters(self) -> dict[str, Callable[[Group], Any]]:
        """How the columns that do not describe a group are taken from it."""
        getters: dict[str, Callable[[Group], Any]] = {
            f"{figure}_{name}": _getter(figure, value_of)
            for figure in self.figures
            for name, value_of in statistics_of(self.selection).items()
        }
        getters[NUM_RUNS] = attrgetter("num_runs")
        if any(column.name == MARKS for column in self.columns):
            getters[MARKS] = _marks
            getters[NUM_CLIENT_LIMITED] = attrgetter("num_client_limited")
            getters[NUM_LATE] = attrgetter("num_late")
        return getters

    def _common(self) -> dict[str, Any]:
        """What all rows have in common and is in no column that is shown."""
        shown = {column.name for column in self.columns if column.is_shown}
        first = self.describing[0]
        return {
            name: value
            for name, value in first.items()
            if name not in shown
            and value is not None
            and all(other.get(name) == value for other in self.describing)
        }

    def _caption(self) -> str:
        common = self._common()
        lengths = [f"{common[name]} {what}" for name, what in _LENGTHS_IN_WORDS if name in common]
        parts = [subject_in_words(common), " and ".join(lengths)]
        return ", ".join(part for part in parts if part)

    def _notes(self) -> Iterator[str]:
        options = [
            f"{in_words(name)} {in_words(value)}"
            for name, value in self._common().items()
            if name not in IDENTITY_COLUMNS
        ]
        if options:
            yield _cut(f"Same for all rows: {', '.join(options)}", len(options))
        if any(group.num_client_limited for group in self.groups):
            yield f"{CLIENT_LIMITED_MARK} client-limited: the load generator was the limit."
        if any(group.num_late for group in self.groups):
            yield f"{LATE_MARK} the load generator was late at times; latencies may be too long."
        mixed = dict.fromkeys(name for group in self.groups for name in group.mixed)
        if mixed:
            yield f"Marked rows average runs that differ in {', '.join(mixed)}."


_LENGTHS_IN_WORDS = tuple(zip(LENGTHS, ("prompt tokens", "new tokens"), strict=True))


def sort_rows(rows: Sequence[Row], keys: Sequence[tuple[str, SortKey]]) -> list[Row]:
    """Rows by the columns of these names; equal ones stay as they are, unknown values come last."""
    ordered = list(rows)
    for name, key in reversed(keys):
        known = [row for row in ordered if row.values.get(name) is not None]
        unknown = [row for row in ordered if row.values.get(name) is None]
        known.sort(key=lambda row: order_of(row.values[name]), reverse=key.is_descending)
        ordered = known + unknown
    return ordered


def column_of(key: SortKey, known: Collection[str]) -> str:
    """The column that is meant by name or heading; a figure alone stands for its mean."""
    for name in (key.column, HEADINGS.get(key.column, "")):
        for one in (name, f"{name}_mean"):
            if one in known:
                return one
    return key.column


def _check_sort(tables: Sequence[_Summary], sort: Sequence[SortKey]) -> None:
    names = dict.fromkeys(column.name for table in tables for column in table.columns)
    for key in sort:
        if tables and column_of(key, names) not in names:
            raise unknown_name("--sort", "column", key.column, names)


def _getter(
    figure: str, value_of: Callable[[Spread], float | None]
) -> Callable[[Group], float | None]:
    def get(group: Group) -> float | None:
        spread = group.spreads.get(figure)
        return None if spread is None else value_of(spread)

    return get


def _marks(group: Group) -> str:
    limited = CLIENT_LIMITED_MARK if group.num_client_limited else ""
    return limited + (LATE_MARK if group.num_late else "")


def _plain(value: Any) -> Any:
    """A value that a cell can hold."""
    is_simple = value is None or isinstance(value, bool | int | float | str)
    return value if is_simple else json.dumps(value)


def _cut(text: str, num_options: int) -> str:
    if len(text) <= _LONGEST_NOTE:
        return f"{text}."
    shown = text[:_LONGEST_NOTE].rpartition(", ")[0]
    return f"{shown}, ... ({num_options} options; --format json has all)."


def _place(system: str | None) -> tuple[int, str]:
    """Known systems first, then others, then runs without a record."""
    if system in _SYSTEMS:
        return _SYSTEMS.index(system), ""
    return len(_SYSTEMS) + (1 if system is None else 0), system or ""


def _title(system: str | None) -> str:
    return "Runs without a record" if system is None else f"flexbench {in_words(system)}"
