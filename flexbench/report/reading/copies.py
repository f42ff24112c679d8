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


# --- files on both sides of a comparison ---


def drop_files_of(store: RunStore, other: RunStore) -> int:
    """Remove from `store` the runs of files that `other` has read as well; how many these were.

    If that were all of them, none is: who compares results with themselves wants to see that.
    """
    known = {_identity(source) for source in _sources(other)}
    shared = [source for source in _sources(store) if _identity(source) in known]
    if not shared or len(shared) == len(_sources(store)):
        return 0
    before = len(store)
    store.execute("DELETE FROM runs WHERE source IN (SELECT unnest($sources))", {"sources": shared})
    return before - len(store)


def _sources(store: RunStore) -> list[str]:
    return [row["source"] for row in store.rows("SELECT DISTINCT source FROM runs")]


def _identity(source: str) -> str:
    """The same for two names of one file."""
    try:
        status = os.stat(source)
    except (OSError, ValueError):  # gone, or of a name that is no text
        return source
    return f"{status.st_dev}:{status.st_ino}"
