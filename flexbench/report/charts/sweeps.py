"""Runs that differ in their load alone: the points of one curve, from the database."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from flexbench.report.charts.chart import MOST_POINTS, MOST_SERIES
from flexbench.report.charts.selected import IS_LATE, IS_LIMITED, NO_SETUP, SelectedRuns
from flexbench.report.charts.wording import Names, counted, name_configurations
from flexbench.report.formats.cells import format_figure
from flexbench.report.runs import IDENTITY_COLUMNS, PROJECTED

_MOST_LOADS = MOST_POINTS // MOST_SERIES
_NAMED = 5  # configurations without a curve of their own that a note names
_RATE = "TRY_CAST(json_extract(setup, '$.rate_per_s') AS DOUBLE)"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is varied along a curve, and what follows from it."""

    name: str
    """Of the chart's file, behind the kind."""
    system: str | None
    load: str
    """An SQL expression."""
    axis: str
    """What the load is, as the title of an axis."""
    word: str
    """What it is counted in."""
    condition: str = "true"
    """On the runs, as an SQL expression."""
    swept_columns: tuple[str, ...] = ()
    """Those that follow from the load: runs on one curve differ in them."""
    swept_setup: tuple[str, ...] = ()
    """The same for names in `setup`."""

    @property
    def runs_condition(self) -> str:
        """The runs that it is about, in SQL; its parameter is `system`."""
        return (
            f"system IS NOT DISTINCT FROM ? AND {self.condition} AND isfinite(throughput)"
            f" AND {self.load} IS NOT NULL"
        )

    @property
    def what(self) -> str:
        """The load within a sentence."""
        return self.axis if self.axis[:2].isupper() else self.axis[:1].lower() + self.axis[1:]

    def load_text(self, load: float) -> str:
        """'8 clients', 'batch 4', '20 requests/s'."""
        if self.word == "batch":
            return f"batch {format_figure(load)}"
        if "/" in self.word:
            return f"{format_figure(load)} {self.word}"
        return counted(load, self.word)


_LOAD_SETUP = ("concurrency", "rate_per_s")

CLIENTS = Sweep(
    name="petals",
    system="petals",
    load="num_processes",
    axis="Clients",
    word="client",
    swept_columns=("num_processes",),
)
PROCESSES = Sweep(
    name="rows",
    system=None,
    load="num_processes",
    axis="Processes",
    word="process",
    swept_columns=("num_processes",),
)
CONCURRENCY = Sweep(
    name="serving",
    system="serving",
    load="num_processes",
    axis="Clients",
    word="client",
    condition=f"{_RATE} IS NULL",
    swept_columns=("num_processes", "num_micro_batches"),
    swept_setup=_LOAD_SETUP,
)
RATES = Sweep(
    name="serving-rates",
    system="serving",
    load=_RATE,
    axis="Requests offered per second",
    word="requests/s",
    condition=f"{_RATE} IS NOT NULL",
    swept_columns=("num_processes", "num_micro_batches"),
    swept_setup=_LOAD_SETUP,
)
BATCHES = Sweep(
    name="dist",
    system="dist",
    load="batch_size",
    axis="GPU batch size",
    word="batch",
    swept_columns=("batch_size",),
)
RANKS = Sweep(
    name="dist-ranks",
    system="dist",
    load="num_processes",
    axis="Ranks",
    word="rank",
    # How many stages there are is what is varied.
    swept_columns=("num_processes", "topology"),
    swept_setup=("num_threads",),
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The mean, the smallest and the largest of the repeats."""

    mean: float
    low: float
    high: float

    @property
    def is_wide(self) -> bool:
        """Whether there is an interval to draw."""
        return self.low < self.high


@dataclass(frozen=True, kw_only=True)
class LoadPoint:
    """All runs of a configuration under one load."""

    load: float
    num_runs: int
    throughput: Spread
    latency: Spread
    is_client_limited: bool
    is_late: bool
    """Its timestamps may be late, and latencies too long."""


@dataclass(frozen=True, kw_only=True)
class SweptSeries:
    """A configuration under all its loads, in the order of the load."""

    name: str
    points: tuple[LoadPoint, ...]
    curve: Mapping[str, Any] | None = None
    """The record of the search for saturation that these points are of."""
    is_projected: bool = False


@dataclass(frozen=True, kw_only=True)
class SweptRuns:
    """What a chart of a sweep shows."""

    series: tuple[SweptSeries, ...]
    names: Names
    left_out: tuple[str, ...]
    """The names of configurations that are not among `series`; the first of them."""
    num_left_out: int
    num_with_few_loads: int
    """Configurations that are neither."""
    num_thinned: int
    """Loads that are not among the points."""


def read_sweep(
    runs: SelectedRuns,
    sweep: Sweep,
    *,
    latency: str = "mean_latency",
    curves: Sequence[Mapping[str, Any]] = (),
    fewest_loads: int = 1,
) -> SweptRuns:
    """The configurations with most runs, and what each load gave.

    `latency` is an SQL expression. Runs that lack it or their throughput are passed over, and
    configurations under less than `fewest_loads`.
    """
    with _Query(runs, sweep, latency) as query:
        keys = query.keys(MOST_SERIES + _NAMED, fewest_loads)
        num_keys = query.num_keys(fewest_loads)
        num_all = query.num_keys(1)
        drawn = keys[:MOST_SERIES]
        found = query.points(drawn)
        curve_of = _match_curves(query, curves, drawn)
    names = name_configurations([json.loads(key) for key in keys])
    series = [
        SweptSeries(
            name=name,
            points=tuple(found[key]),
            curve=curve_of.get(key),
            is_projected=json.loads(key).get("basis") == PROJECTED,
        )
        for name, key in zip(names.names, drawn, strict=False)
        if found[key]
    ]
    return SweptRuns(
        series=tuple(series),
        names=names,
        left_out=names.names[MOST_SERIES:],
        num_left_out=num_keys - len(drawn),
        num_with_few_loads=num_all - num_keys,
        num_thinned=query.num_thinned,
    )


class _Query:
    """The table chart_points while it is open: a row for each configuration and load.

    A configuration's key is JSON of all that identifies it but what follows from the load.
    """

    def __init__(self, runs: SelectedRuns, sweep: Sweep, latency: str) -> None:
        self._runs = runs
        self._sweep = sweep
        self._columns = [name for name in IDENTITY_COLUMNS if name not in sweep.swept_columns]
        swept = (name for name in runs.setup_names() if name in sweep.swept_setup)
        # A merge with null takes the name out.
        self._without_swept = json.dumps(dict.fromkeys(swept))
        fields = ", ".join(f"'{name}', {name}" for name in self._columns)
        setup = f"json_merge_patch(coalesce(setup, {NO_SETUP})::JSON, ?::JSON)"
        self._key = f"json_object({fields}, 'setup', {setup})::VARCHAR"
        self._latency = latency
        self.num_thinned = 0

    def __enter__(self) -> _Query:
        self._runs.keep(
            "chart_points",
            f"SELECT {self._key} AS key, load, min(id) AS id, sum(num)::BIGINT AS num_runs,"  # noqa: S608
            " bool_or(is_limited) AS is_limited, bool_or(is_late) AS is_late,"
            f" {_merged('throughput')}, {_merged('latency')} FROM found GROUP BY ALL",
            [self._sweep.system, self._without_swept],
            tables=f"found AS ({self._found()})",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._runs.drop("chart_points")

    def _found(self) -> str:
        """Many runs are few configurations: JSON is made of these alone."""
        return (
            f"SELECT {', '.join(self._columns)}, setup, {self._sweep.load} AS load,"  # noqa: S608
            f" min(id) AS id, count(*) AS num, bool_or({IS_LIMITED}) AS is_limited,"
            f" bool_or({IS_LATE}) AS is_late, {_spread('throughput', 'throughput')},"
            f" {_spread(self._latency, 'latency')} FROM selected WHERE {self._sweep.runs_condition}"
            f" AND isfinite({self._latency}) GROUP BY ALL"
        )

    def keys(self, most: int, fewest_loads: int) -> list[str]:
        """Those with most runs first, among equals the one with the highest throughput."""
        rows = self._runs.rows(
            "SELECT key FROM chart_points GROUP BY key HAVING count(*) >= ?"
            " ORDER BY sum(num_runs) DESC, max(throughput) DESC, min(id) LIMIT ?",
            [fewest_loads, most],
        )
        return [row["key"] for row in rows]

    def num_keys(self, fewest_loads: int) -> int:
        """How many there are with so many loads."""
        (row,) = self._runs.rows(
            "SELECT count(*) AS num FROM"
            " (SELECT key FROM chart_points GROUP BY key HAVING count(*) >= ?)",
            [fewest_loads],
        )
        return int(row["num"])

    def points(self, keys: Sequence[str]) -> dict[str, list[LoadPoint]]:
        """All loads of each, or as many as can be drawn, evenly chosen."""
        rows = self._runs.rows(
            "SELECT *, count(*) OVER of_key AS num_loads,"
            " row_number() OVER (of_key ORDER BY load) AS number FROM chart_points"
            " WHERE list_contains(?, key) WINDOW of_key AS (PARTITION BY key)"
            " QUALIFY number = num_loads OR (number - 1) % ceil(num_loads / ?) = 0"
            " ORDER BY key, load",
            [list(keys), float(_MOST_LOADS - 1)],
        )
        points: dict[str, list[LoadPoint]] = {key: [] for key in keys}
        num_loads = {row["key"]: row["num_loads"] for row in rows}
        for row in rows:
            point = _load_point(row)
            if point is not None:
                points[row["key"]].append(point)
        self.num_thinned = sum(num_loads.values()) - len(rows)
        return points

    def key_of(self, measured: Sequence[tuple[float, float]], keys: Sequence[str]) -> str | None:
        """Which of `keys` most of the points (load, throughput) belong to; None: no clear one."""
        rows = self._runs.rows(
            "SELECT key, count(DISTINCT load) AS num FROM same WHERE list_contains(?, key)"
            " GROUP BY key ORDER BY num DESC, key LIMIT 1",
            [
                self._without_swept,
                self._sweep.system,
                [{"l": load, "t": throughput} for load, throughput in measured],
                list(keys),
            ],
            tables=(
                f"same AS (SELECT {self._key} AS key, {self._sweep.load} AS load FROM selected"  # noqa: S608
                f" WHERE {self._sweep.runs_condition}"
                f" AND list_contains(?, {{'l': {self._sweep.load}::DOUBLE, 't': throughput}}))"
            ),
        )
        num_loads = len({load for load, _ in measured})
        if not rows or 2 * rows[0]["num"] <= num_loads:
            return None
        return str(rows[0]["key"])


def _spread(value: str, name: str) -> str:
    return f"avg({value}) AS {name}, min({value}) AS {name}_low, max({value}) AS {name}_high"


def _merged(name: str) -> str:
    """The spread of all of several: their means weighted, but that of one as it is."""
    mean = f"if(count(*) = 1, any_value({name}), sum({name} * num) / sum(num)) AS {name}"
    return f"{mean}, min({name}_low) AS {name}_low, max({name}_high) AS {name}_high"


def _load_point(row: Mapping[str, Any]) -> LoadPoint | None:
    spreads = {
        name: Spread(mean=row[name], low=row[f"{name}_low"], high=row[f"{name}_high"])
        for name in ("throughput", "latency")
    }
    # A mean of huge values can overflow.
    if not all(math.isfinite(spread.mean) for spread in spreads.values()):
        return None
    return LoadPoint(
        load=float(row["load"]),
        num_runs=row["num_runs"],
        is_client_limited=bool(row["is_limited"]),
        is_late=bool(row["is_late"]),
        **spreads,
    )


# --- curves ---


def _match_curves(
    query: _Query, curves: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, Mapping[str, Any]]:
    """The curve with a saturation point of each key: the one with most of the same points.

    A curve's record has the load and throughput of its points, which the runs have as well.
    """
    matched: dict[str, Mapping[str, Any]] = {}
    for curve in curves:
        if not isinstance(curve.get("saturation"), Mapping) or not keys:
            continue
        measured = _measured(curve)
        key = query.key_of(measured, keys) if measured else None
        if key is not None:
            # Of several searches, the last one that was read.
            matched[key] = curve
    return matched


def _measured(curve: Mapping[str, Any]) -> list[tuple[float, float]]:
    points = curve.get("points")
    measured = []
    for point in points if isinstance(points, list) else ():
        load = point.get("load") if isinstance(point, Mapping) else None
        if not isinstance(load, Mapping):
            continue
        level = load.get("concurrency")
        if level is None:
            level = load.get("rate_per_s")
        throughput = point.get("output_tokens_per_s")
        if is_number(level) and is_number(throughput):
            measured.append((float(level), float(throughput)))
    return measured


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number that fits into a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
