"""The columns of a table of runs: which there are, and which of them people see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any

from flexbench.core.results import CONFIGURATION_COLUMNS
from flexbench.report.figures import MAIN_FIGURES, figures_of, heading_of, help_of
from flexbench.report.gate import in_words
from flexbench.report.groups import LOADS, Group
from flexbench.report.runs import GATE_COLUMNS, IDENTITY_COLUMNS
from flexbench.report.selection import CI, MEAN, Selection, percentile_name
from flexbench.report.statistics import Spread
from flexbench.report.table import Column, Kind

NUM_RUNS = "num_runs"
MARKS = "marks"
NUM_CLIENT_LIMITED = "num_client_limited"
NUM_LATE = "num_late"

_HEADINGS = {
    "batch_size": "batch",
    "num_micro_batches": "micro",
    "num_processes": "procs",
    "sequence_length": "prompt",
    "max_tokens": "new",
    "num_gpus": "GPUs",
    "concurrency": "clients",
    "rate_per_s": "offered\nreq/s",
}
_HELP = {
    "batch_size": "prompts in a request",
    "num_micro_batches": "requests of each client, or batches of a round",
    "num_processes": "clients or ranks at once",
    "sequence_length": "tokens of a prompt",
    "max_tokens": "new tokens of a prompt",
    "weights": "dummy: of random numbers, which take as long and say nothing",
    "basis": "projected: computed from a part that was measured",
}
_SYSTEMS_WITH_ALL_COLUMNS = (None, "petals", "dist")
LENGTHS = ("sequence_length", "max_tokens")
_LONGEST_LINE = 10

# The first ones go last where a terminal is too narrow.
_OF_GATE, _OF_RUNS, _OF_CONSTANTS, _OF_FIGURES, _OF_SETUP, _OF_ENDS = range(1, 7)
# Without them a projection looks like a measurement, and dummy weights like a model.
_NEVER_LEFT_OUT = ("model", "basis", "weights")
_LEAST_SHARE_OF_LOAD = 0.25

Describing = Sequence[Mapping[str, Any]]
"""Of each row of a table: what it is grouped by, and what is known of it besides."""


def configuration_columns(
    rows: Describing, *, system: str | None, group_by: Sequence[str] | None
) -> list[Column]:
    """Of what describes a row. What all rows have in common is told in another place."""
    columns: list[Column] = []
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    has_load = any(is_load(name) for name in names)
    shown: list[str] = []
    for name in names:
        values = {row.get(name) for row in rows}
        num_known = sum(row.get(name) is not None for row in rows)
        is_shown, priority = _visibility(
            name,
            values,
            system=system,
            group_by=group_by,
            has_load=has_load,
            share_known=num_known / len(rows),
        )
        # Some options repeat a column of the results file.
        if is_shown and group_by is None and name not in IDENTITY_COLUMNS:
            is_shown = not any(_are_same(rows, name, other) for other in shown)
        if is_shown:
            shown.append(name)
        columns.append(
            Column(
                name=name,
                heading=_HEADINGS.get(name) or _broken(name),
                kind=kind_of(values),
                is_shown=is_shown,
                priority=priority,
                help=_HELP.get(name, ""),
            )
        )
    return columns


def figure_columns(
    groups: Sequence[Group], figures: Sequence[str], selection: Selection, *, system: str | None
) -> list[Column]:
    """Of the statistics of figures, and of the number of runs."""
    shown = shown_figures(groups, figures, selection, system)
    ordered = [*shown, *(figure for figure in figures if figure not in shown)]
    columns = [
        _figure_column(
            figure,
            statistic,
            system=system,
            is_shown=figure in shown and _is_shown(statistic, figure, groups, selection),
            is_asked=statistic in selection.stats or CI in selection.stats,
            place=ordered.index(figure),
        )
        for figure in ordered
        for statistic in statistics_of(selection)
    ]
    has_repeats = any(group.num_runs > 1 for group in groups)
    return [
        *columns,
        Column(
            name=NUM_RUNS,
            heading="runs",
            kind=Kind.COUNT,
            priority=_OF_RUNS if has_repeats else _OF_CONSTANTS,
            help="how many runs the row stands for",
        ),
    ]


def mark_columns(groups: Sequence[Group], *, system: str | None) -> list[Column]:
    """Of what makes a figure of serving doubtful."""
    if system != "serving":
        return []
    is_marked = any(group.num_client_limited or group.num_late for group in groups)
    return [
        Column(name=MARKS, heading="", kind=Kind.TEXT, is_shown=is_marked),
        Column(name=NUM_CLIENT_LIMITED, heading="limited", kind=Kind.COUNT, is_shown=False),
        Column(name=NUM_LATE, heading="late", kind=Kind.COUNT, is_shown=False),
    ]


def shown_figures(
    groups: Sequence[Group], figures: Sequence[str], selection: Selection, system: str | None
) -> tuple[str, ...]:
    """Those that people see, of which there is any: those asked for, or the system's main ones."""
    known = [name for name in figures if any(name in group.spreads for group in groups)]
    if selection.figures is not None:
        return tuple(known)
    names = list(figures_of(system).shown)
    if "itl_p50" in names and "itl_p50" not in known:
        names[names.index("itl_p50")] = "tpot_p50"
    if not any(group.mean("bubble_fraction") for group in groups):
        names = [name for name in names if name != "bubble_fraction"]
    return tuple(name for name in names if name in known)


def statistics_of(selection: Selection) -> dict[str, Callable[[Spread], float | None]]:
    """By the end of a column's name, how each is taken from a spread."""
    percentiles = [
        (place, number) for place, number in enumerate(selection.percentiles) if number != 50
    ]
    return {
        "mean": lambda spread: spread.mean,
        "min": lambda spread: spread.min,
        "max": lambda spread: spread.max,
        "median": lambda spread: spread.median,
        "std": lambda spread: spread.std,
        "ci_low": lambda spread: spread.ci_low,
        "ci_high": lambda spread: spread.ci_high,
        **{percentile_name(number): _percentile(place) for place, number in percentiles},
    }


def kind_of(values: Collection[Any]) -> Kind:
    """How the values of a column are written."""
    known = [value for value in values if value is not None]
    if not known or any(isinstance(value, bool | str) for value in known):
        return Kind.TEXT
    return Kind.COUNT if all(isinstance(value, int) for value in known) else Kind.FIGURE


def is_load(name: str) -> bool:
    """Whether an option of serving is the load itself: 'load.concurrency'."""
    return name.rpartition(".")[2] in LOADS


def _visibility(
    name: str,
    values: Collection[Any],
    *,
    system: str | None,
    group_by: Sequence[str] | None,
    has_load: bool,
    share_known: float,
) -> tuple[bool, int]:
    """Whether people see a column, and how early it goes where a terminal is narrow."""
    varies = len(values) > 1
    if group_by is not None:
        return (True, 0) if name in group_by else (varies, _priority_of_gate(name))
    if name == "topology" and system == "dist":
        return False, _OF_GATE  # as many stages as processes
    if name in GATE_COLUMNS:
        return varies, _priority_of_gate(name)
    if name in CONFIGURATION_COLUMNS:
        if system in _SYSTEMS_WITH_ALL_COLUMNS:
            return True, 0 if varies else _OF_CONSTANTS
        # Of serving they follow from the load.
        if system == "serving" and name == "num_processes":
            return not has_load, 0
        return varies and (system != "serving" or name in LENGTHS), 0
    if system == "serving" and is_load(name):
        is_of_many = share_known >= _LEAST_SHARE_OF_LOAD
        return share_known > 0, 0 if is_of_many else _OF_SETUP
    return varies, _OF_SETUP


def _priority_of_gate(name: str) -> int:
    return 0 if name in _NEVER_LEFT_OUT else _OF_GATE


def _are_same(rows: Describing, name: str, other: str) -> bool:
    return all(row.get(name) == row.get(other) for row in rows)


def _is_shown(statistic: str, figure: str, groups: Sequence[Group], selection: Selection) -> bool:
    if statistic.startswith("ci_"):
        is_asked = CI in selection.stats if selection.stats else figure in MAIN_FIGURES
        return is_asked and any(
            figure in group.spreads and group.spreads[figure].ci_low is not None for group in groups
        )
    return statistic in (selection.stats or (MEAN,))


def _figure_column(
    figure: str,
    statistic: str,
    *,
    system: str | None,
    is_shown: bool,
    is_asked: bool,
    place: int,
) -> Column:
    lines = {"ci_low": ("95 %", "low"), "ci_high": ("95 %", "high")}.get(
        statistic, (statistic.replace("_", "."),)
    )
    about = {
        "ci_low": "lower end of the 95 % interval of the mean, by bootstrap over the runs; ",
        "ci_high": "upper end of the 95 % interval of the mean, by bootstrap over the runs; ",
    }.get(statistic, "" if statistic == MEAN else f"{lines[-1]} over the runs; ")
    # The first two of a system are never left out.
    priority = 0 if place < 2 else _OF_FIGURES
    return Column(
        name=f"{figure}_{statistic}",
        heading=heading_of(figure, lines, system),
        is_shown=is_shown,
        priority=priority if is_asked or statistic == MEAN else _OF_ENDS,
        help=f"{about}{help_of(figure, system)}".rstrip("; "),
    )


def _percentile(place: int) -> Callable[[Spread], float | None]:
    return lambda spread: spread.percentiles[place]


def _broken(name: str) -> str:
    """A name as a heading of short lines: 'load.rate_per_s' -> 'rate per s'."""
    lines: list[str] = []
    for word in in_words(name).rpartition(".")[2].split("_"):
        if lines and len(lines[-1]) + len(word) < _LONGEST_LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines) or name
