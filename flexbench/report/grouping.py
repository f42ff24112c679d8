"""Runs in groups, with the spread of each figure: computed in SQL, but for the bootstrap.

All that is needed of the selected runs is laid into a table of its own first, so that JSON is read
once; the database keeps on disk what is too much for its share of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt

from flexbench.core.errors import FlexbenchError
from flexbench.report.gate import Mixture, averaging_error
from flexbench.report.groups import COLUMNS, SETUP, Group, GroupMaker, keys_of, order_of_group
from flexbench.report.runs import GATE_COLUMNS, IDENTITY_COLUMNS
from flexbench.report.selection import NOT_KNOWN, Selection, where
from flexbench.report.spreads import (
    RunsOfFigure,
    aggregates,
    columns_of_spread,
    fill_intervals,
    spreads_of,
)
from flexbench.report.statistics import MOST_RESAMPLED, Array, Spread, is_affordable
from flexbench.report.store import COLUMNS as STORED
from flexbench.report.store import RunStore

SYSTEM = "system"
_FIRST_RUNS = 10
_BATCH_OF_GROUPS = 10_000
_BATCH_OF_VALUES = 200_000
_FLAG = (
    "coalesce(CASE WHEN system = 'serving' THEN"
    " TRY_CAST(json_extract_string(figures, '$.{name}') AS DOUBLE) END > 0, FALSE)"
)


_WHOLE_KEYS = {
    SETUP: "CAST(setup AS VARCHAR)",
    # Of an open loop it is not what was asked for, but what came of it.
    "num_processes": (
        "CASE WHEN system = 'serving' AND json_extract(setup, '$.rate_per_s') IS NOT NULL THEN NULL"
        " ELSE num_processes END"
    ),
}


def read_groups(
    store: RunStore,
    selection: Selection,
    figures: Sequence[str],
    *,
    keep_samples: bool = False,
    only_with_figures: bool = False,
) -> list[Group]:
    """The selected runs in groups, ordered by what they were grouped by.

    With `only_with_figures`, runs that have none of the figures are as if they were not there.

    Raises ConfigError for columns and figures that there are not, and for groups that would average
    runs of different things, unless the selection allows that; FlexbenchError where memory and disk
    together are too small.
    """
    try:
        grouping = _Grouping(store, selection, figures, only_with_figures=only_with_figures)
        return grouping.groups(keep_samples=keep_samples)
    except duckdb.Error as error:
        reason = str(error).partition("\n")[0]
        raise FlexbenchError(f"the runs could not be grouped: {reason}") from error


class _Grouping:
    """The SQL of one grouping. Columns are named by place: k0 a key, g0 a gate, f0 a figure."""

    def __init__(
        self,
        store: RunStore,
        selection: Selection,
        figures: Sequence[str],
        *,
        only_with_figures: bool,
    ) -> None:
        self._store = store
        self._connection = store.connection
        self._selection = selection
        self._figures = tuple(figures)
        self._only_with_figures = only_with_figures
        self._is_whole = selection.group_by is None
        # Systems are never averaged: each has a table of its own.
        names = dict.fromkeys((SYSTEM, *(selection.group_by or ())))
        self._names = (*IDENTITY_COLUMNS, SETUP) if self._is_whole else tuple(names)
        self._options = frozenset(self._names) - {*STORED, SETUP}
        self._keys = [f"k{number}" for number in range(len(self._names))]
        self._samples: dict[int, dict[str, Array]] = {}

    def groups(self, *, keep_samples: bool) -> list[Group]:
        self._choose()
        self._aggregate()
        mixed = {} if self._is_whole else self._mixed_values()
        bounds = self._bounds(keep_samples=keep_samples)
        maker = GroupMaker(
            names=self._names, options=self._options, mixed=mixed, samples=self._samples
        )
        groups = list(self._read(maker, bounds))
        for table in ("chosen", "grouped", "samples"):
            self._connection.execute(f"DROP TABLE IF EXISTS {table}")
        if self._options or any(group.setup for group in groups):
            groups.sort(key=order_of_group)
        return groups

    def _choose(self) -> None:
        """The selected runs, with all that is needed of them."""
        condition, parameters = where(self._store, self._selection.filters)
        keys = [self._key(name) for name in self._names]
        columns = [
            "id",
            "num_gpus",
            f"{_FLAG.format(name='client_limited')} AS is_limited",
            f"{_FLAG.format(name='timing_uncertain')} AS is_late",
            *(f"{key} AS k{number}" for number, key in enumerate(keys)),
            *(
                f"CASE WHEN isfinite({figure}) THEN {figure} END AS f{number}"
                for number, figure in enumerate(self._expressions())
            ),
        ]
        if not self._is_whole:
            columns += [f"{name} AS g{number}" for number, name in enumerate(GATE_COLUMNS)]
        self._connection.execute(
            f"CREATE OR REPLACE TEMP TABLE chosen AS SELECT {', '.join(columns)} FROM runs "  # noqa: S608
            f"WHERE {condition}",
            parameters,
        )
        if self._only_with_figures:
            nothing = " AND ".join(f"f{number} IS NULL" for number in range(len(self._figures)))
            self._connection.execute(f"DELETE FROM chosen WHERE {nothing}")  # noqa: S608

    def _key(self, name: str) -> str:
        if self._is_whole:
            return _WHOLE_KEYS.get(name, name)
        return self._store.column_as_json(name, option="--group-by")

    def _expressions(self) -> list[str]:
        return [self._store.figure(name, option="--figure") for name in self._figures]

    def _aggregate(self) -> None:
        """A row a group: `gid` counts from 1."""
        order = ", ".join(f"{key} NULLS LAST" for key in self._keys)
        columns = [
            f"row_number() OVER (ORDER BY {order}) AS gid",
            *self._keys,
            "count(*) AS num_runs",
            "max(num_gpus) AS num_gpus",
            "count(*) FILTER (WHERE is_limited) AS num_limited",
            "count(*) FILTER (WHERE is_late) AS num_late",
            f"min(id, {_FIRST_RUNS}) AS ids",
            *(
                part
                for number in range(len(self._figures))
                for part in aggregates(f"f{number}", self._selection.percentiles)
            ),
        ]
        if not self._is_whole:
            columns += [
                f"{bound}(coalesce(g{number}, '{NOT_KNOWN}')) AS g{number}_{bound}"
                for number in range(len(GATE_COLUMNS))
                for bound in ("min", "max")
            ]
        self._connection.execute(
            f"CREATE OR REPLACE TEMP TABLE grouped AS SELECT {', '.join(columns)} FROM chosen "  # noqa: S608
            f"GROUP BY {', '.join(self._keys)}"
        )

    # --- the gate ---

    def _mixed_values(self) -> dict[int, dict[str, list[tuple[str, int]]]]:
        """Of each group that is mixed: its gate columns with more than one value, and these."""
        found: dict[int, dict[str, list[tuple[str, int]]]] = {}
        for number, name in enumerate(GATE_COLUMNS):
            counts = self._connection.execute(
                f"SELECT gid, coalesce(g{number}, '{NOT_KNOWN}') AS value, count(*) "  # noqa: S608
                f"FROM chosen JOIN (SELECT * FROM grouped WHERE g{number}_min <> g{number}_max) "
                f"AS mixed ON {self._same_keys('mixed')} "
                "GROUP BY gid, value ORDER BY gid, value"
            )
            for gid, value, count in counts.fetchall():
                found.setdefault(gid, {}).setdefault(name, []).append((value, count))
        if found and not self._selection.allow_mixed:
            first = min(found)
            raise averaging_error(
                self._keys_of(first),
                [Mixture(column=name, counts=values) for name, values in found[first].items()],
            )
        return found

    def _keys_of(self, gid: int) -> dict[str, Any]:
        row = self._connection.execute(
            f"SELECT {', '.join(self._keys)} FROM grouped WHERE gid = ?",  # noqa: S608
            [gid],
        ).fetchone()
        return keys_of(self._names, self._options, row or ())

    def _same_keys(self, other: str) -> str:
        return " AND ".join(
            f"chosen.{key} IS NOT DISTINCT FROM {other}.{key}" for key in self._keys
        )

    # --- intervals ---

    def _bounds(self, *, keep_samples: bool) -> list[tuple[Array, Array]]:
        """Of each figure, the lower and upper ends of its intervals, by gid; NaN for none."""
        ((num_groups,),) = self._connection.execute("SELECT count(*) FROM grouped").fetchall()
        bounds = [
            (np.full(num_groups + 1, np.nan), np.full(num_groups + 1, np.nan))
            for _ in self._figures
        ]
        found = self._connection.execute(
            "SELECT gid, num_runs FROM grouped WHERE num_runs BETWEEN 2 AND ? ORDER BY gid",
            [MOST_RESAMPLED],
        ).fetchnumpy()
        gids, counts = found["gid"], found["num_runs"]
        if len(gids) and is_affordable(len(gids), int(counts.sum()), len(self._figures)):
            for batch in self._batches(gids, counts):
                for number, ends in enumerate(bounds):
                    runs = RunsOfFigure.of(batch, f"f{number}")
                    fill_intervals(ends, runs, seed=self._selection.seed)
                    if keep_samples:
                        self._keep(runs, self._figures[number])
        return bounds

    def _batches(
        self, gids: npt.NDArray[Any], counts: npt.NDArray[Any]
    ) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        """The runs of these groups, many groups at once but never too many runs."""
        names = ", ".join(f"f{number}" for number in range(len(self._figures)))
        self._connection.execute(
            f"CREATE OR REPLACE TEMP TABLE samples AS SELECT gid, id, {names} FROM chosen "  # noqa: S608
            f"JOIN (SELECT * FROM grouped WHERE num_runs BETWEEN 2 AND {MOST_RESAMPLED}) "
            f"AS repeated ON {self._same_keys('repeated')} ORDER BY gid, id"
        )
        batches = np.cumsum(counts) // _BATCH_OF_VALUES
        firsts = np.flatnonzero(np.diff(batches, prepend=-1))
        lasts = np.append(firsts[1:], len(gids)) - 1
        for first, last in zip(firsts, lasts, strict=True):
            yield self._connection.execute(
                f"SELECT gid, {names} FROM samples WHERE gid BETWEEN ? AND ? ORDER BY gid, id",  # noqa: S608
                [int(gids[first]), int(gids[last])],
            ).fetchnumpy()

    def _keep(self, runs: RunsOfFigure, figure: str) -> None:
        for start, count in zip(runs.starts.tolist(), runs.counts.tolist(), strict=True):
            if count > 1:
                samples = self._samples.setdefault(int(runs.gids[start]), {})
                samples[figure] = runs.values[start : start + count]

    # --- what comes out ---

    def _read(self, maker: GroupMaker, bounds: Sequence[tuple[Array, Array]]) -> Iterator[Group]:
        names = [*COLUMNS, *self._keys]
        if not self._is_whole:
            names += [f"g{number}_min" for number in range(len(GATE_COLUMNS))]
        for first in range(1, len(bounds[0][0]) if bounds else 1, _BATCH_OF_GROUPS):
            last = first + _BATCH_OF_GROUPS - 1
            rows = self._of_groups(names, first, last).fetchall()
            for row, spreads in zip(rows, self._spreads(first, last, bounds), strict=True):
                yield maker.group(row, spreads)

    def _spreads(
        self, first: int, last: int, bounds: Sequence[tuple[Array, Array]]
    ) -> Iterator[dict[str, Spread]]:
        """Of each of these groups, the figures that any run has."""
        percentiles = self._selection.percentiles
        figures = [f"f{number}" for number in range(len(self._figures))]
        names = [name for figure in figures for name in columns_of_spread(figure, percentiles)]
        columns = self._of_groups(names, first, last).fetchnumpy()
        spreads = (
            spreads_of(
                columns, figure, percentiles, (low[first : last + 1], high[first : last + 1])
            )
            for figure, (low, high) in zip(figures, bounds, strict=True)
        )
        for of_group in zip(*spreads, strict=True):
            yield {
                figure: spread
                for figure, spread in zip(self._figures, of_group, strict=True)
                if spread is not None
            }

    def _of_groups(self, names: Sequence[str], first: int, last: int) -> Any:
        return self._connection.execute(
            f"SELECT {', '.join(names)} FROM grouped WHERE gid BETWEEN ? AND ? ORDER BY gid",  # noqa: S608
            [first, last],
        )
