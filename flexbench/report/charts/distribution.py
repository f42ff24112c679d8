"""How latencies are distributed: the share of requests that took no longer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from flexbench.report.charts.chart import (
    MOST_POINTS,
    MOST_SERIES,
    Axis,
    Chart,
    ChartKind,
    Point,
    Series,
)
from flexbench.report.charts.selected import IS_LIMITED, KEY, SelectedRuns
from flexbench.report.charts.tasks import BY_RULE, Task, charts_of_tasks
from flexbench.report.charts.wording import (
    all_have,
    is_wide,
    left_out,
    name_configurations,
)
from flexbench.report.formats.cells import format_figure

_LATENCIES = {"petals": "Request latency", "serving": "End-to-end latency"}
_NAMED = 5
_MOST_STEPS = MOST_POINTS // MOST_SERIES - 2  # the foot of the first one is a point, too
_DESCRIBED = 2
# Steps of fewer values show chance alone.
_FEWEST_VALUES = 5
# A run keeps a sample of its latencies: each one stands for as many more. No run has more requests
# than this, whatever its record says.
_MOST_REQUESTS = 1e15
_FOUND = (
    f"found AS (SELECT id, {IS_LIMITED} AS is_limited, {KEY} AS key, throughput,"  # noqa: S608
    " json_extract(details, '$.latencies_s[*]') AS latencies,"
    " TRY_CAST(json_extract(details, '$.num_latencies') AS DOUBLE) AS num_requests"
    " FROM selected WHERE system = ?)"
)

# Shares of the whole are added up in an order of their own, so that they may be a little off.
_RANKED = (
    ", latencies AS (SELECT TRY_CAST(one AS DOUBLE) AS value, weight FROM"  # noqa: S608
    " (SELECT unnest(latencies) AS one, greatest(1, coalesce(CASE WHEN isfinite(num_requests)"
    f" THEN least(num_requests, {_MOST_REQUESTS}) END / len(latencies), 1)) AS weight"
    " FROM found WHERE key = ?)"
    " WHERE json_type(one) IN ('DOUBLE', 'UBIGINT') AND isfinite(value) AND value >= 0),"
    " steps AS (SELECT value, sum(weight) AS weight, count(*) AS num_values FROM latencies"
    " GROUP BY value),"
    " added AS (SELECT value, row_number() OVER (ORDER BY value) AS rank, count(*) OVER () AS num,"
    " sum(num_values) OVER () AS num_values, sum(weight) OVER () AS whole,"
    " sum(weight) OVER (ORDER BY value ROWS UNBOUNDED PRECEDING) AS upto FROM steps),"
    " shares AS (SELECT value, rank, num, num_values,"
    " CASE WHEN rank = num THEN 1.0 ELSE upto / whole END AS share FROM added),"
    " ranked AS (SELECT *, lag(share, 1, 0.0) OVER (ORDER BY rank) AS share_before,"
    " min(value) FILTER (share > 0.5 - 1e-12) OVER () AS median,"
    " min(value) FILTER (share > 0.99 - 1e-12) OVER () AS p99 FROM shares)"
)


@dataclass(frozen=True, kw_only=True)
class _Distribution:
    """The latencies of one configuration, in s."""

    name: str
    steps: tuple[tuple[float, float], ...]
    """Some of (share of requests, value), the first and the last among them."""
    num: int
    """How many different values there are."""
    median: float
    p99: float

    def sentence(self) -> str:
        """Where half of them lie, and almost all."""
        return (
            f"{self.name}: half of the requests took up to {format_figure(self.median)} s, 99 % up "
            f"to {format_figure(self.p99)} s."
        )

    def series(self) -> Series:
        """Steps that begin at 0."""
        points = [Point(x=self.steps[0][1], y=0.0)]
        for share, value in self.steps:
            label = f"{100 * share:.4g} % took up to {format_figure(value)} s"
            points.append(Point(x=value, y=share, label=label))
        return Series(name=self.name, points=points)


def latency_charts(runs: SelectedRuns) -> Iterator[Chart]:
    """A chart for each task of a system that keeps the latency of every request."""
    for system in _LATENCIES:
        condition = "system = ? AND json_array_length(details, '$.latencies_s') > 0"
        yield from charts_of_tasks(runs, condition, [system], partial(_chart, system=system))


def _chart(task: Task, *, system: str) -> Chart | None:
    runs = task.runs
    rows = runs.rows(
        "SELECT key, bool_or(is_limited) AS is_limited, count(*) OVER () AS num_keys FROM found"
        " WHERE len(latencies) > 0 GROUP BY key HAVING sum(len(latencies)) >= ?"
        " ORDER BY count(*) DESC, max(throughput) DESC NULLS LAST, min(id) LIMIT ?",
        [system, _FEWEST_VALUES, MOST_SERIES + _NAMED],
        tables=_FOUND,
    )
    names = name_configurations([json.loads(row["key"]) for row in rows])
    drawn = []
    limited = []
    for name, row in zip(names.names, rows[:MOST_SERIES], strict=False):
        distribution = _read(runs, system, row["key"], name)
        if distribution is not None:
            drawn.append(distribution)
            limited += [name] if row["is_limited"] else []
    if not drawn:
        return None
    # In the order in which the curves stand beside each other.
    drawn.sort(key=lambda one: one.median)
    values = [value for one in drawn for _, value in one.steps]
    return Chart(
        name="-".join(part for part in ("latency-distribution", system, task.slug) if part),
        kind=ChartKind.DISTRIBUTION,
        title=f"Distribution of latency: {system}, {task.words}",
        description=_describe(drawn),
        x=Axis(title=_LATENCIES[system], unit="s", is_log=is_wide(values)),
        y=Axis(title="Share of requests"),
        series=[one.series() for one in drawn],
        notes=[
            *all_have(names.common),
            *_limited_note(limited),
            *_thinned_note(drawn),
            *names.notes,
            *left_out(
                names.names[MOST_SERIES:], rows[0]["num_keys"] - MOST_SERIES, because=BY_RULE
            ),
        ],
    )


def _read(runs: SelectedRuns, system: str, key: str, name: str) -> _Distribution | None:
    """None: there are too few numbers among them."""
    rows = runs.rows(
        "SELECT * FROM ranked WHERE rank IN (1, num) OR num <= ?"
        " OR floor(share * ?) > floor(share_before * ?) ORDER BY rank",
        [system, key, *[_MOST_STEPS] * 3],
        tables=_FOUND + _RANKED,
    )
    if not rows or rows[0]["num_values"] < _FEWEST_VALUES:
        return None
    return _Distribution(
        name=name,
        steps=tuple((row["share"], row["value"]) for row in rows),
        num=rows[0]["num"],
        median=rows[0]["median"],
        p99=rows[0]["p99"],
    )


def _describe(drawn: Sequence[_Distribution]) -> str:
    sentences = [one.sentence() for one in drawn[:_DESCRIBED]]
    others = len(drawn) - _DESCRIBED
    if others > 0:
        sentences.append(f"{others} more beside these.")
    return " ".join(sentences)


def _limited_note(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"The load generator was the limit, not the service: {'; '.join(names)}."]


def _thinned_note(drawn: Sequence[_Distribution]) -> list[str]:
    thinned = [one for one in drawn if len(one.steps) < one.num]
    if not thinned:
        return []
    return [f"Drawn in at most {_MOST_STEPS + 1} steps each, evenly chosen."]
