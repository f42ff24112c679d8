"""Runs that stand in several files, and are one run.

A run of petals or dist is a row of X.tsv and a line of X.jsonl; a serving point has a file of its
own besides. And people keep copies of their results, with the records or without, under the old
name or another. What tells most of a run is kept.

Equal rows of one file are repeats. Equal rows of two files are copies if their figures have all the
digits that a measurement has; short ones, written by hand, may be equal by chance.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from flexbench.core.results import COLUMNS
from flexbench.report.store import RunStore

_FIGURES = ("throughput", "mean_latency")
_SEVEN = ", ".join(COLUMNS)
_MOST_AT_ONCE = 200_000  # of the runs, so that it takes little memory
# Six digits at least: written with five it is another number. None at all: larger than any number.
_HAS_ALL_DIGITS = "({})".format(
    " OR ".join(
        f"TRY_CAST(format('{{:.4e}}', {name}) AS DOUBLE) IS DISTINCT FROM {name}"
        for name in _FIGURES
    )
)


def _same(one: str, other: str, names: Iterable[str] = COLUMNS) -> str:
    return " AND ".join(f"{one}.{name} = {other}.{name}" for name in names)


# Rows and records that may be of one run. `file` is that of the row, or of the record's row.
_CANDIDATES = f"""
CREATE TEMP TABLE candidates AS
WITH several AS (
    SELECT throughput, mean_latency FROM runs GROUP BY ALL HAVING count(*) > 1
), found AS (
    SELECT id, record_id, if(record_id IS NULL, source, row_file) AS name, {_SEVEN},
        {_HAS_ALL_DIGITS} AS has_all_digits
    FROM runs SEMI JOIN several USING (throughput, mean_latency)
), files AS (
    SELECT name, row_number() OVER () AS file, bool_or(record_id IS NOT NULL) AS has_records
    FROM found WHERE name IS NOT NULL GROUP BY name
)
SELECT found.* EXCLUDE name, file, hash(throughput, mean_latency) AS part
FROM found LEFT JOIN files USING (name) WHERE has_all_digits OR has_records
"""  # noqa: S608 - our own names
# Of a file's rows that are equal, the first are those of records: as many as there are. The rest
# is in each copy of the file, so that the nth of one is the nth of the other.
_COPIED_ROWS = f"""
INSERT INTO copies
WITH chosen AS (
    SELECT * FROM candidates WHERE part % $num_parts = $part
), beside AS (
    SELECT file, {_SEVEN}, count(DISTINCT record_id) AS number
    FROM chosen WHERE record_id IS NOT NULL AND file IS NOT NULL GROUP BY ALL
), anywhere AS (
    SELECT {_SEVEN}, count(DISTINCT record_id) AS number
    FROM chosen WHERE record_id IS NOT NULL GROUP BY ALL
), numbered AS (
    SELECT id, file, {_SEVEN}, has_all_digits,
        row_number() OVER (PARTITION BY file, {_SEVEN} ORDER BY id) AS nth
    FROM chosen WHERE record_id IS NULL
), first AS (
    SELECT *, id = min(id) OVER (PARTITION BY {_SEVEN}, nth) AS is_first FROM numbered
)
SELECT first.id, first.nth <= coalesce(beside.number, 0) AS has_record_beside
FROM first
LEFT JOIN beside ON first.file = beside.file AND {_same("first", "beside")}
LEFT JOIN anywhere ON {_same("first", "anywhere")}
WHERE first.nth <= coalesce(beside.number, 0)
    OR (has_all_digits AND (NOT is_first OR first.nth <= coalesce(anywhere.number, 0)))
"""  # noqa: S608 - our own names
# A point's own file, which has no line, also had its requests.
_LESSER_COPIES = """
DELETE FROM runs WHERE id IN (
    SELECT id FROM (
        SELECT id, row_number() OVER (PARTITION BY record_id ORDER BY line IS NOT NULL, id) AS nth
        FROM runs WHERE record_id IS NOT NULL
    ) WHERE nth > 1
)
"""


def drop_copies(store: RunStore) -> int:
    """Leave one of each run: of a row and its record the record, of equal records the fullest.

    How many rows went because they are copies of those of another file; rows that have their
    record beside them are none.
    """
    store.execute("CREATE TEMP TABLE copies (id BIGINT, has_record_beside BOOLEAN)")
    store.execute(_CANDIDATES)
    (found,) = store.rows("SELECT count(*) AS number FROM candidates")
    num_parts = found["number"] // _MOST_AT_ONCE + 1
    for part in range(num_parts):
        store.execute(_COPIED_ROWS, {"num_parts": num_parts, "part": part})
    (found,) = store.rows("SELECT count(*) AS number FROM copies WHERE NOT has_record_beside")
    store.execute("DELETE FROM runs WHERE id IN (SELECT id FROM copies)")
    store.execute("DROP TABLE copies; DROP TABLE candidates")
    store.execute(_LESSER_COPIES)
    return int(found["number"])


# --- copies in two stores ---

_OTHER_RUNS = f"SELECT id, source, line, record_id, {_SEVEN} FROM runs"  # noqa: S608
_SAME_RECORD = "SELECT runs.id, others.id AS other FROM runs JOIN others USING (record_id)"
_SAME_LINE = """
SELECT runs.id, others.id AS other
FROM runs JOIN files ON runs.source = files.source
JOIN others USING (line) JOIN files AS other_files
    ON others.source = other_files.source AND files.identity = other_files.identity
WHERE runs.record_id IS NULL AND others.record_id IS NULL
"""


def _same_row(is_row: str, is_other_row: str) -> str:
    """Equal figures with all digits: the nth of one side is the nth of the other."""
    nth = f"row_number() OVER (PARTITION BY {_SEVEN} ORDER BY id) AS nth"
    # Most have nothing like them on the other side, and need not be put in order.
    return f"""
        WITH mine AS (
            SELECT id, {_SEVEN}, {nth} FROM runs SEMI JOIN others USING (throughput, mean_latency)
            WHERE {is_row} AND {_HAS_ALL_DIGITS}
        ), theirs AS (
            SELECT id, {_SEVEN}, {nth} FROM others SEMI JOIN runs USING (throughput, mean_latency)
            WHERE {is_other_row}
        )
        SELECT mine.id, theirs.id AS other FROM mine JOIN theirs USING (nth, {_SEVEN})
    """  # noqa: S608 - our own names


_STEPS = (
    _SAME_RECORD,
    _SAME_LINE,
    # Two records that are not one record are two runs; of a row nobody knows.
    _same_row("record_id IS NULL", "TRUE"),
    _same_row("TRUE", "record_id IS NULL"),
)


def drop_runs_of(store: RunStore, other: RunStore) -> int:
    """Remove from `store` the runs that `other` has as well; how many these were.

    The same are equal records, the same line of the same file, and rows without a record that are
    equal in all digits of their figures. Copies are to be dropped from both stores before.
    """
    before = len(store)
    store.take(other, _OTHER_RUNS, table="others")
    _add_files(store)
    for step in _STEPS:
        store.execute(f"CREATE OR REPLACE TEMP TABLE pairs AS {step}")
        store.execute("DELETE FROM runs WHERE id IN (SELECT id FROM pairs)")
        store.execute("DELETE FROM others WHERE id IN (SELECT other FROM pairs)")
    for table in ("pairs", "files", "others"):
        store.execute(f"DROP TABLE {table}")
    return before - len(store)


def _add_files(store: RunStore) -> None:
    """A table of files by their names, which may be several of one file."""
    found = store.rows("SELECT DISTINCT source FROM runs UNION SELECT source FROM others")
    sources = [row["source"] for row in found]
    store.execute(
        "CREATE TEMP TABLE files AS SELECT unnest($sources) AS source, "
        "unnest($identities) AS identity",
        {"sources": sources, "identities": [_identity(source) for source in sources]},
    )


def _identity(source: str) -> str:
    """The same for two names of one file."""
    try:
        status = os.stat(source)
    except (OSError, ValueError):  # gone, or of a name that is no text
        return source
    return f"{status.st_dev}:{status.st_ino}"
