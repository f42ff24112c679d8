"""The runs that charts are made of: those that a person selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexbench.report.runs import IDENTITY_COLUMNS
from flexbench.report.store import RunStore

NO_SETUP = "'{}'"
_IDENTITY = ", ".join(f"'{name}', {name}" for name in IDENTITY_COLUMNS)
KEY = f"json_object({_IDENTITY}, 'setup', coalesce(setup, {NO_SETUP})::JSON)::VARCHAR"
"""An SQL expression: the whole configuration of a run, as JSON for `name_configurations`."""
IS_LIMITED = "coalesce(TRY_CAST(json_extract(figures, '$.client_limited') AS DOUBLE) > 0, FALSE)"
"""An SQL expression: whether the load generator was the limit."""
IS_LATE = "coalesce(TRY_CAST(json_extract(figures, '$.timing_uncertain') AS DOUBLE) > 0, FALSE)"
"""An SQL expression: whether timestamps may be late."""


class SelectedRuns:
    """The table `selected` of a store, which has the columns of `runs`."""

    def __init__(self, store: RunStore, values: Sequence[tuple[str, Any]] = ()) -> None:
        """Of a store those with these values in columns of `runs`; all, if none are given."""
        self._store = store
        self._values = tuple(values)

    def narrowed(self, values: Mapping[str, Any]) -> SelectedRuns:
        """Those of them with these values in these columns of `runs`; None is one, too."""
        return SelectedRuns(self._store, (*self._values, *values.items()))

    def rows(
        self, query: str, parameters: Sequence[Any] = (), *, tables: str = ""
    ) -> list[dict[str, Any]]:
        """What a query gives; `tables` are further ones of its WITH clause: "a AS (SELECT 1)".

        The parameters are those of `tables` and of the query.
        """
        return self._store.rows(*self._prepared(query, parameters, tables))

    def keep(
        self, name: str, query: str, parameters: Sequence[Any] = (), *, tables: str = ""
    ) -> None:
        """Make what a query gives a table of its own, until `drop`."""
        text, values = self._prepared(query, parameters, tables)
        self._store.connection.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {text}", values)

    def drop(self, name: str) -> None:
        """End a table that was kept."""
        self._store.connection.execute(f"DROP TABLE IF EXISTS {name}")

    def setup_names(self) -> list[str]:
        """All names in `setup`, of runs that are not selected as well."""
        return self._store.keys("setup")

    def figure(self, name: str) -> str | None:
        """The SQL expression of a figure; None where no run has it."""
        if name not in self._store.keys("figures"):
            return None
        return self._store.figure(name, option="--plot")

    def _prepared(
        self, query: str, parameters: Sequence[Any], tables: str
    ) -> tuple[str, list[Any]]:
        further = f", {tables}" if tables else ""
        conditions = [f"{name} IS NOT DISTINCT FROM ?" for name, _ in self._values]
        condition = " AND ".join(conditions) or "TRUE"
        text = f"WITH selected AS (SELECT * FROM runs WHERE {condition}){further} {query}"  # noqa: S608
        return text, [*(value for _, value in self._values), *parameters]
