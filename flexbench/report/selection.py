"""What a person selects of the runs: filters, groups, order, figures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexbench.core.errors import ConfigError
from flexbench.core.results import CONFIGURATION_COLUMNS
from flexbench.report.names import name_of, unknown_name
from flexbench.report.store import COLUMNS, RunStore

NOT_KNOWN = "not known"
"""What people read, and write in a filter, where a run does not tell."""

MEAN, MEDIAN, STD, MIN, MAX, CI = "mean", "median", "std", "min", "max", "ci"
STATS = (MEAN, MEDIAN, STD, MIN, MAX, CI)
USUAL_PERCENTILES = (5.0, 95.0)

_OPERATORS = {
    "=": "=",
    "==": "=",
    # What is not known is not what it is compared with either.
    "!=": "IS DISTINCT FROM",
    "<": "<",
    "<=": "<=",
    ">": ">",
    ">=": ">=",
}
_FILTER = re.compile(
    r"\s*(?P<column>[^=!<>]*[^=!<>\s])\s*(?P<operator><=|>=|!=|==|=|<|>)\s*(?P<value>.*?)\s*",
    re.DOTALL,
)
_PERCENTILE = re.compile(r"p(\d{1,2}(?:[._]\d{1,6})?)", re.ASCII)
_YES_AND_NO = {"yes": "true", "no": "false"}
_NUMBERS = (*CONFIGURATION_COLUMNS, "line", "num_gpus", "throughput", "mean_latency")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Runs of which `column` `operator` `value` holds."""

    column: str
    operator: str
    value: str

    def holds_for_text(self, text: str | None) -> bool:
        """Whether it holds for a text that is not in a store. None: there is no such column."""
        if text is None or self.operator not in ("=", "==", "!="):
            return False
        return (text == self.value) is (self.operator != "!=")


@dataclass(frozen=True, kw_only=True)
class SortKey:
    """A column of a table by which its rows are ordered; what is not known comes last."""

    column: str
    is_descending: bool = False


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which runs are in a report, how they are grouped, and what is shown of them."""

    filters: Sequence[Filter] = ()
    group_by: Sequence[str] | None = None
    """None: by their whole configuration."""
    sort: Sequence[SortKey] = ()
    figures: Sequence[str] | None = None
    """None: those of each system."""
    stats: Sequence[str] = ()
    """None of them: the mean, and its interval where there are repeats."""
    allow_mixed: bool = False
    seed: int = 0
    """Of the bootstrap."""

    @property
    def percentiles(self) -> tuple[float, ...]:
        """Those that are computed, in order, the median among them."""
        asked = (percentile_of(name) for name in self.stats)
        return tuple(sorted({*USUAL_PERCENTILES, 50.0, *(one for one in asked if one)}))


def make_selection(
    *,
    group_by: Sequence[str] = (),
    filters: Sequence[str] = (),
    sort: Sequence[str] = (),
    figures: Sequence[str] = (),
    stats: Sequence[str] = (),
    allow_mixed: bool = False,
    seed: int = 0,
) -> Selection:
    """From what was typed. Raises ConfigError, which names the option, for what has no meaning."""
    if seed < 0:
        raise ConfigError("--seed", f"must be at least 0, not {seed}")
    return Selection(
        filters=tuple(parse_filter(text) for text in filters),
        group_by=_names("--group-by", group_by) or None,
        sort=tuple(key for text in sort for key in parse_sort(text)),
        figures=_names("--figure", figures) or None,
        stats=tuple(dict.fromkeys(map(parse_stat, _names("--stat", stats)))),
        allow_mixed=allow_mixed,
        seed=seed,
    )


def parse_filter(text: str) -> Filter:
    """'num_processes >= 4'. Raises ConfigError; whether there is such a column, a store knows."""
    match = _FILTER.fullmatch(text)
    if match is None:
        raise ConfigError(
            "--filter",
            "must be COLUMN OPERATOR VALUE, such as 'num_processes >= 4', with one of "
            f"=, !=, <, <=, >, >=, not {text!r}",
        )
    value = match["value"]
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    elif not value:
        raise ConfigError("--filter", f"has no value to compare with: {text!r}")
    return Filter(column=match["column"], operator=match["operator"], value=value)


def parse_sort(text: str) -> tuple[SortKey, ...]:
    """'model,-throughput'. Raises ConfigError; whether there is such a column, a table knows."""
    keys = []
    for name in _names("--sort", [text]):
        column = name.removeprefix("-").strip()
        if not column:
            raise ConfigError("--sort", f"has no column behind the -: {text!r}")
        keys.append(SortKey(column=column, is_descending=name.startswith("-")))
    return tuple(keys)


def parse_stat(text: str) -> str:
    """'p99.9' -> 'p99_9', as columns are named. Raises ConfigError for what is none."""
    name = text.strip().lower()
    if name in STATS:
        return name
    match = _PERCENTILE.fullmatch(name)
    number = float(match[1].replace("_", ".")) if match else 0.0
    if not 0 < number < 100:
        accepted = ", ".join(STATS)
        raise ConfigError("--stat", f"must be {accepted}, or p1 to p99.9, not {text!r}")
    return MEDIAN if number == 50 else percentile_name(number)


def percentile_name(number: float) -> str:
    """99.9 -> 'p99_9'."""
    return f"p{number:.10g}".replace(".", "_")


def percentile_of(stat: str) -> float | None:
    """'p99_9' -> 99.9; None for what is no percentile."""
    match = _PERCENTILE.fullmatch(stat)
    return float(match[1].replace("_", ".")) if match else None


def named(selection: Selection, *stores: RunStore) -> Selection:
    """With the names of columns in --group-by where a person typed headings of a table."""
    if selection.group_by is None:
        return selection
    known = {*COLUMNS, *(key for store in stores for key in store.keys("setup"))}
    names = (name_of(name, known) for name in selection.group_by)
    return replace(selection, group_by=tuple(dict.fromkeys(names)))


def where(store: RunStore, filters: Sequence[Filter]) -> tuple[str, list[Any]]:
    """The SQL condition that is true of the selected runs, and its parameters.

    Raises ConfigError for a column or figure that there is not, and for a number that is none.
    """
    conditions, parameters = [], []
    for one in filters:
        condition, values = _condition(store, one)
        conditions.append(f"({condition})")
        parameters += values
    return " AND ".join(conditions) or "TRUE", parameters


def _condition(store: RunStore, one: Filter) -> tuple[str, list[Any]]:
    expression, is_number = _expression(store, one.column)
    operator = _OPERATORS[one.operator]
    if one.value == NOT_KNOWN:
        if operator not in ("=", "IS DISTINCT FROM"):
            raise ConfigError("--filter", f"{NOT_KNOWN!r} goes with = and != only")
        return f"{expression} IS {'' if operator == '=' else 'NOT '}NULL", []
    number = _number(one.value)
    if number is None and is_number:
        raise ConfigError(
            "--filter", f"{one.column} is compared with numbers, and {one.value!r} is none"
        )
    if is_number:
        return f"{expression} {operator} ?", [number]
    if number is not None and one.column not in COLUMNS:
        # 4, 4.0 and 4e0 are one number, however a file writes it.
        return f"TRY_CAST({expression} AS DOUBLE) {operator} ?", [number]
    if one.value in _YES_AND_NO and one.column not in COLUMNS:
        # As tables write them, and as files do.
        cases = " ".join(f"WHEN '{flag}' THEN '{word}'" for word, flag in _YES_AND_NO.items())
        return f"(CASE {expression} {cases} ELSE {expression} END) {operator} ?", [one.value]
    return f"{expression} {operator} ?", [one.value]


def _expression(store: RunStore, name: str) -> tuple[str, bool]:
    """The SQL expression of what can be filtered, and whether its values are numbers only."""
    if name in COLUMNS:
        return store.column(name, option="--filter"), name in _NUMBERS
    setup, figures = store.keys("setup"), store.keys("figures")
    meant = name_of(name, (*COLUMNS, *setup, *figures))
    if meant != name:
        return _expression(store, meant)
    if name in setup:
        return store.column(name, option="--filter"), False
    if name in figures:
        return store.figure(name, option="--filter"), True
    raise unknown_name("--filter", "column", name, [*COLUMNS, *setup, *figures])


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    # "nan" and "inf" are words here, and 1_000 is no number elsewhere either.
    return number if math.isfinite(number) and "_" not in text else None


def _names(option: str, texts: Sequence[str]) -> tuple[str, ...]:
    """'A,B' and 'C' -> A, B, C: each once."""
    names = [name.strip() for text in texts for name in text.split(",")]
    if not all(names):
        raise ConfigError(option, f"has an empty name: {', '.join(texts)!r}")
    return tuple(dict.fromkeys(names))
