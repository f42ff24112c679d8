"""What runs were asked to do: charts compare those that did the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexbench.report.charts.chart import Chart
from flexbench.report.charts.selected import SelectedRuns
from flexbench.report.charts.wording import left_out, short_model, to_slug

MOST_TASKS = 4
"""Charts of one kind; more would hide each other."""
_MOST_TRIED = 24
BY_RULE = "with fewer runs or, of as many, less throughput"
"""How it is chosen what is drawn where that cannot be all."""
_COLUMNS = ("model", "sequence_length", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, the length of its prompts, and how many tokens it was to generate."""

    runs: SelectedRuns
    """Those of this task."""
    words: str
    slug: str
    """For the names of files; "" where there is one task alone. Others may have the same."""


def charts_of_tasks(
    runs: SelectedRuns,
    condition: str,
    parameters: Sequence[Any],
    to_chart: Callable[[Task], Chart | None],
) -> Iterator[Chart]:
    """A chart for each task of the runs for which an SQL condition holds, those with most first.

    `to_chart` gives None for a task of which there is too little to draw. The last chart says what
    is not drawn.
    """
    rows = runs.rows(
        f"SELECT {', '.join(_COLUMNS)}, count(*) OVER () AS num_tasks FROM selected"  # noqa: S608
        f" WHERE {condition} GROUP BY {', '.join(_COLUMNS)}"
        " ORDER BY count(*) DESC, max(throughput) DESC NULLS LAST, min(id) LIMIT ?",
        [*parameters, _MOST_TRIED],
    )
    charts: list[Chart] = []
    too_little: list[str] = []
    num_tried = 0
    for row in rows[:_MOST_TRIED]:
        if len(charts) == MOST_TASKS:
            break
        num_tried += 1
        chart = to_chart(_task(runs, row, has_others=len(rows) > 1))
        if chart is None:
            too_little.append(_words(row))
        else:
            charts.append(chart)
    if charts:
        rest = list(map(_words, rows[num_tried:]))
        notes = [
            *charts[-1].notes,
            *left_out(rest, rows[0]["num_tasks"] - num_tried, "task", BY_RULE),
            *left_out(too_little, len(too_little), "task", "with too little to draw"),
        ]
        charts[-1] = replace(charts[-1], notes=notes)
    yield from charts


def _task(runs: SelectedRuns, row: Mapping[str, Any], *, has_others: bool) -> Task:
    return Task(
        runs=runs.narrowed({name: row[name] for name in _COLUMNS}),
        words=_words(row),
        slug=_slug(row) if has_others else "",
    )


def _words(row: Mapping[str, Any]) -> str:
    """'opt-125m, prompt 512, 32 new'."""
    lengths = f"prompt {row['sequence_length']}, {row['max_tokens']} new"
    model = short_model(row["model"])
    return f"{model}, {lengths}" if model else lengths


def _slug(row: Mapping[str, Any]) -> str:
    lengths = f"{row['sequence_length']}-{row['max_tokens']}"
    model = to_slug(short_model(row["model"]))
    return f"{model}-{lengths}" if model else lengths
