"""All runs of a report, in one table of an SQL database that may hold more than fits into memory.

DuckDB: it groups a million rows in well under a second, and writes to disk what is too much for its
share of memory. It takes rows in from files in large batches, thousands of times faster than one by
one; the files lie in the store's own temporary folder and were written by the store.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import duckdb

from flexbench.core.errors import FlexbenchError
from flexbench.core.results import COLUMNS as ROW_COLUMNS
from flexbench.core.results import CONFIGURATION_COLUMNS
from flexbench.report.names import unknown_name
from flexbench.report.runs import GATE_COLUMNS, Run

MEMORY_LIMIT = "512MB"
_BATCH_BYTES = 64 * 2**20
_LEAST_OBJECT_BYTES = 2**20  # of memory for a line of JSON; twice as much is taken for each thread
_TEXT_COLUMNS = ("source", *GATE_COLUMNS, "started_at", "row_file", "record_id")
_COUNT_COLUMNS = ("line", "num_gpus", *CONFIGURATION_COLUMNS)
_FIGURE_COLUMNS = ("throughput", "mean_latency")
_OBJECT_COLUMNS = ("setup", "figures", "details")
_COLUMNS = {
    **dict.fromkeys(_TEXT_COLUMNS, "VARCHAR"),
    **dict.fromkeys(_COUNT_COLUMNS, "BIGINT"),
    **dict.fromkeys(_FIGURE_COLUMNS, "DOUBLE"),
    **dict.fromkeys(_OBJECT_COLUMNS, "JSON"),
}
_ROW_KINDS = {"file": "BIGINT", "line": "BIGINT", **{name: _COLUMNS[name] for name in ROW_COLUMNS}}
_FILE_KINDS = {"file": "BIGINT", "source": "VARCHAR", "first_id": "BIGINT"}
# What people may group by and filter by its own name; the rest are keys of `setup` and `figures`.
COLUMNS: tuple[str, ...] = tuple(name for name in _COLUMNS if name not in _OBJECT_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class RowLines:
    """Well-formed lines of a results TSV, in the order of the file."""

    source: Path
    lines: Sequence[int]
    """Their numbers in the file, counted from 1."""
    rows: Sequence[bytes]
    """What stands there, without line ends."""


class RunStore:
    """The table `runs`: `id`, numbered in the order of adding, and the fields of Run.

    `setup`, `figures` and `details` are JSON objects. A context manager: the database goes with it.
    """

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="flexbench-report-")
        self._next_id = 1
        try:
            self.connection = self._connect()
            columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
            self.execute(f"CREATE TABLE runs (id BIGINT, {columns})")
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> RunStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.connection.close()
        self._folder.cleanup()

    def _connect(self) -> duckdb.DuckDBPyConnection:
        return duckdb.connect(
            str(self._file("runs.duckdb")),
            config={
                "memory_limit": MEMORY_LIMIT,
                "temp_directory": self._folder.name,
                # With several, sums come out another way each time, if only in the last digit.
                "threads": 1,
                # Nothing is fetched from anywhere, whatever a query says.
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )

    # --- adding ---

    def add(self, runs: Iterable[Run]) -> None:
        """Add runs, in constant memory. Raises FlexbenchError when there is no room for them.

        Numbers in them are finite.
        """
        remaining = iter(runs)
        batch = self._file("runs.jsonl")
        while (longest := self._write_runs(batch, remaining)) > 0:
            names = ", ".join(("id", *_COLUMNS))
            kinds = {"id": "BIGINT", **_COLUMNS}
            self.execute(
                f"INSERT INTO runs ({names}) SELECT {names} FROM "  # noqa: S608 - our own names
                f"{_read_json(batch, kinds, longest=longest)}"
            )

    def add_rows(self, rows: Iterable[RowLines]) -> None:
        """Add runs of which only the columns of their rows are known, in constant memory.

        Raises FlexbenchError when there is no room for them.
        """
        remaining = iter(rows)
        batch, files = self._file("rows.tsv"), self._file("files.jsonl")
        while self._write_rows(batch, files, remaining):
            names = ", ".join(ROW_COLUMNS)
            self.execute(
                f"INSERT INTO runs (id, source, line, {names}, {', '.join(_OBJECT_COLUMNS)}) "  # noqa: S608 - our own names
                f"SELECT first_id + line, source, line, {names}, '{{}}', '{{}}', '{{}}' "
                f"FROM {_read_tsv(batch, _ROW_KINDS)} JOIN {_read_json(files, _FILE_KINDS)} "
                "USING (file)"
            )

    def execute(self, statement: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Change the database. Raises FlexbenchError when it cannot be done, as on a full disk."""
        try:
            # Fetched: a statement may be carried out no sooner than its result is asked for.
            self.connection.execute(statement, parameters).fetchall()
        except duckdb.Error as error:
            reason = str(error).partition("\n")[0]
            raise FlexbenchError(
                f"the runs could not be kept in {self._folder.name}: {reason}"
            ) from error

    def _write_runs(self, path: Path, runs: Iterator[Run]) -> int:
        """Write the next runs as lines of JSON; the length of the longest, 0 if there were none."""
        longest = size = 0
        with path.open("wb") as file:
            for run in runs:
                line = _json_line({"id": self._next_id, **_values(run)})
                self._next_id += 1
                file.write(line)
                longest, size = max(longest, len(line)), size + len(line)
                if size >= _BATCH_BYTES:
                    break
        return longest

    def _write_rows(self, path: Path, files_path: Path, rows: Iterator[RowLines]) -> bool:
        """Write the next rows, each behind the numbers of its file and line; whether there are any.

        The id of a row is that of its file's beginning and its line together.
        """
        source: Path | None = None
        number = size = first_id = 0
        with path.open("wb") as file, files_path.open("wb") as files:
            for part in rows:
                if part.source != source:
                    source, number = part.source, number + 1
                    first_id = self._next_id - part.lines[0]
                    about = {"file": number, "source": _text(source), "first_id": first_id}
                    files.write(_json_line(about))
                separator = b"\n%d\t" % number
                pairs = zip(part.lines, part.rows, strict=True)
                text = separator.join([b"%d\t%b" % pair for pair in pairs])
                file.write(separator[1:] + text + b"\n")
                self._next_id = first_id + part.lines[-1] + 1
                size += len(text)
                if size >= _BATCH_BYTES:
                    break
        return size > 0

    def _file(self, name: str) -> Path:
        return Path(self._folder.name) / name

    # --- asking ---

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """What a query gives, as one dict a row."""
        cursor = self.connection.execute(query, list(parameters))
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]

    def __len__(self) -> int:
        ((count,),) = self.connection.execute("SELECT count(*) FROM runs").fetchall()
        return int(count)

    def keys(self, column: str) -> list[str]:
        """The names in one of the JSON columns, of all runs, in alphabetical order."""
        name = _quoted(column)
        # Rows without a record have none; and many runs have the same.
        found = self.rows(
            f"SELECT DISTINCT unnest(json_keys(value)) AS name FROM (SELECT DISTINCT {name} "  # noqa: S608 - our own names
            f"AS value FROM runs WHERE CAST({name} AS VARCHAR) <> '{{}}') ORDER BY name"
        )
        return [row["name"] for row in found]

    def column(self, name: str, *, option: str) -> str:
        """The SQL expression of what a person calls `name`: a column, or a key of `setup`.

        Values of `setup` are texts. Raises ConfigError, which names `option`, for anything else.
        """
        if name in COLUMNS:
            return _quoted(name)
        return f"json_extract_string(setup, {self._option(name, option)})"

    def column_as_json(self, name: str, *, option: str) -> str:
        """As `column`; values of `setup` are JSON, so that true and 'true' are two things."""
        if name in COLUMNS:
            return _quoted(name)
        # Null is not known, as where there is none.
        return f"nullif(CAST(json_extract(setup, {self._option(name, option)}) AS VARCHAR), 'null')"

    def _option(self, name: str, option: str) -> str:
        """The JSON pointer to a key of `setup`."""
        known = self.keys("setup")
        if name not in known:
            raise unknown_name(option, "column", name, [*COLUMNS, *known])
        return _pointer(name)

    def figure(self, name: str, *, option: str) -> str:
        """The SQL expression of a figure, a DOUBLE: a column, or a key of `figures`.

        Raises ConfigError, which names `option`, for anything else.
        """
        if name in _FIGURE_COLUMNS:
            return _quoted(name)
        known = self.keys("figures")
        if name in known:
            return f"CAST(json_extract(figures, {_pointer(name)}) AS DOUBLE)"
        raise unknown_name(option, "figure", name, [*_FIGURE_COLUMNS, *known])


# --- in the words of the database ---


def _read_json(path: Path, kinds: Mapping[str, str], *, longest: int = 0) -> str:
    return (
        f"read_json({_file_literal(path)}, format = 'newline_delimited', records = 'true', "
        f"auto_detect = false, columns = {_kinds_literal(kinds)}, "
        f"maximum_object_size = {max(2 * longest, _LEAST_OBJECT_BYTES)})"
    )


def _read_tsv(path: Path, kinds: Mapping[str, str]) -> str:
    return (
        f"read_csv({_file_literal(path)}, auto_detect = false, header = false, delim = '\\t', "
        f"quote = '', escape = '', new_line = '\\n', columns = {_kinds_literal(kinds)})"
    )


def _file_literal(path: Path) -> str:
    """A file's name as an SQL text, with nothing in it that stands for other names."""
    return _literal(re.sub(r"([*?\[])", r"[\1]", str(path)))


def _kinds_literal(kinds: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"'{name}': '{kind}'" for name, kind in kinds.items()) + "}"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _pointer(key: str) -> str:
    """A JSON pointer to a key, as an SQL text: in a path, '*' would stand for all keys."""
    return _literal("/" + key.replace("~", "~0").replace("/", "~1"))


def _values(run: Run) -> dict[str, Any]:
    values = {name: getattr(run, name) for name in _COLUMNS}
    values["source"] = _text(run.source)
    values["row_file"] = None if run.row_file is None else _text(run.row_file)
    for name in _OBJECT_COLUMNS:
        # In one order, so that what is equal is equal as a text.
        values[name] = dict(sorted(values[name].items()))
    return values


def _text(path: Path) -> str:
    """A file's name as people read it; bytes that are no text are shown as such."""
    return os.fsencode(path).decode(errors="replace")


def _json_line(values: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair cannot be stored; nor can it be printed.
    text = json.dumps(values, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace") + b"\n"
