"""Runs that stand in several files, and are one run.

A run of petals or dist is a row of X.tsv and a line of X.jsonl; a serving point has a file of its
own besides. And people keep copies of their results. What tells most of a run is kept.
"""

from __future__ import annotations

from flexbench.core.results import COLUMNS
from flexbench.report.store import RunStore

_SEVEN = ", ".join(COLUMNS)
# Those of a file's rows that are equal are numbered; so many of them go as there are records.
_ROWS_WITH_RECORD = f"""
WITH records AS (
    SELECT row_file, {_SEVEN}, count(DISTINCT record_id) AS number
    FROM runs WHERE row_file IS NOT NULL GROUP BY ALL
), candidates AS (
    SELECT runs.id, records.number,
        row_number() OVER (
            PARTITION BY {", ".join(f"runs.{name}" for name in ("source", *COLUMNS))}
            ORDER BY runs.id
        ) AS nth
    FROM runs JOIN records
        ON runs.source = records.row_file
        AND {" AND ".join(f"runs.{name} = records.{name}" for name in COLUMNS)}
    WHERE runs.record_id IS NULL
)
SELECT id FROM candidates WHERE nth <= number
"""  # noqa: S608 - our own names
# A point's own file, which has no line, also had its requests.
_LESSER_COPIES = """
SELECT id FROM (
    SELECT id, row_number() OVER (PARTITION BY record_id ORDER BY line IS NOT NULL, id) AS nth
    FROM runs WHERE record_id IS NOT NULL
) WHERE nth > 1
"""


def drop_copies(store: RunStore) -> None:
    """Leave one of each run: of a row and its record the record, of equal records the fullest."""
    for copies in (_ROWS_WITH_RECORD, _LESSER_COPIES):
        store.execute(f"DELETE FROM runs WHERE id IN ({copies})")  # noqa: S608 - our own words
