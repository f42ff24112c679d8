"""From files to runs: whatever flexbench has written, in one table.

`files` finds them and says what is in each; `rows` and `records` read them, the latter with a
module for each system; `copies` leaves one of runs that stand in several files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flexbench.core.errors import InputFileError
from flexbench.report.predictions import Prediction
from flexbench.report.reading.copies import drop_copies
from flexbench.report.reading.files import Kind, ResultFile, UnfinishedError, find_files
from flexbench.report.reading.records import (
    FAILED,
    INTERRUPTED,
    Curve,
    Failure,
    Foreign,
    Server,
    read_records,
)
from flexbench.report.reading.rows import read_row_lines
from flexbench.report.runs import Run
from flexbench.report.store import RowLines, RunStore

NUM_FIRST_SKIPPED = 5
_LONGEST_REASON = 300
_TELL_TIMES = 200  # at most, of thousands of files

Tell = Callable[[str, int, int], None]
Entry = TypeVar("Entry")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What reading came to, beside the runs that are in the store."""

    num_files: int
    """That had results in them, or should have had."""
    num_skipped: int
    """Malformed lines, records and files, if they were to be skipped."""
    first_skipped: tuple[str, ...]
    """The first few, as file:line: reason."""
    num_failed: int
    """Records of runs that failed,"""
    num_interrupted: int
    """or were interrupted."""
    predictions: Sequence[Prediction]
    curves: Sequence[Mapping[str, Any]]
    """Records of serving curves, as they were written."""
    num_foreign: int = 0
    """Files in folders that are JSON and have nothing to do with flexbench."""
    num_unfinished: int = 0
    """Last lines that are half written, and in no figure."""
    first_unfinished: tuple[str, ...] = ()
    """The first few, as file:line: reason."""
    num_copies: int = 0
    """Rows left out as copies of those of another file; not those of a record beside them."""


def read_all(
    paths: Sequence[Path], store: RunStore, *, skip_invalid: bool, tell: Tell | None = None
) -> Reading:
    """Read files and folders into `store`. A run that stands in several of them is there once.

    It may be read while others append to it: half a line at the end is counted, and no error.
    `tell` hears what is done, how much of it, and of how much. Raises InputFileError for a path
    that cannot be read, and, unless they are to be skipped, for a malformed line or record, or a
    file in a folder that cannot be read. That nothing was found is no error here.
    """
    reader = _Reader(store, skip_invalid=skip_invalid, tell=tell or _tell_nobody)
    return reader.read(paths)


def _tell_nobody(_what: str, _done: int, _total: int) -> None:
    pass


class _Reader:
    """Reads everything, and counts what is no run."""

    def __init__(self, store: RunStore, *, skip_invalid: bool, tell: Tell) -> None:
        self._store = store
        self._skip_invalid = skip_invalid
        self._tell = tell
        self._num_skipped = self._num_foreign = self._num_done = self._num_files = 0
        self._num_unfinished = 0
        self._first_skipped: list[str] = []
        self._first_unfinished: list[str] = []
        self._ended: dict[str, set[str | None]] = {FAILED: set(), INTERRUPTED: set()}
        self._servers: dict[str | None, list[Prediction]] = {}
        self._curves: dict[str | None, Mapping[str, Any]] = {}

    def read(self, paths: Sequence[Path]) -> Reading:
        files, errors = find_files(paths)
        for error in errors:
            self._skip(error)
        self._num_files = len(files)
        self._store.add(self._runs([file for file in files if file.kind is not Kind.ROWS]))
        self._store.add_rows(self._rows([file for file in files if file.kind is Kind.ROWS]))
        num_copies = drop_copies(self._store)
        return Reading(
            num_files=len(files) - self._num_foreign,
            num_skipped=self._num_skipped,
            first_skipped=tuple(self._first_skipped),
            num_failed=len(self._ended[FAILED]),
            num_interrupted=len(self._ended[INTERRUPTED]),
            predictions=[one for server in self._servers.values() for one in server],
            curves=list(self._curves.values()),
            num_foreign=self._num_foreign,
            num_unfinished=self._num_unfinished,
            first_unfinished=tuple(self._first_unfinished),
            num_copies=num_copies,
        )

    def _rows(self, files: Sequence[ResultFile]) -> Iterator[RowLines]:
        for file in files:
            yield from self._entries(file, read_row_lines(file.path, num_bytes=file.num_bytes))

    def _runs(self, files: Sequence[ResultFile]) -> Iterator[Run]:
        for file in files:
            for found in self._entries(file, read_records(file)):
                if isinstance(found, Run):
                    yield found
                elif isinstance(found, Failure):
                    self._ended[found.status].add(found.record_id)
                elif isinstance(found, Curve):
                    self._curves.setdefault(found.record_id, found.record)
                elif isinstance(found, Server):
                    self._servers.setdefault(found.record_id, found.predictions)
                elif isinstance(found, Foreign):
                    self._num_foreign += 1

    def _entries(
        self, file: ResultFile, entries: Iterable[Entry | InputFileError]
    ) -> Iterator[Entry]:
        """What is in a file; what is malformed is raised, or counted where it is to be skipped."""
        try:
            for entry in entries:
                if isinstance(entry, UnfinishedError):
                    self._num_unfinished += 1
                    _note(self._first_unfinished, entry)
                elif isinstance(entry, InputFileError):
                    self._skip(entry)
                else:
                    yield entry
        except InputFileError as error:
            if file.is_named or not self._skip_invalid:
                raise
            self._skip(error)
        self._tell_done()

    def _skip(self, error: InputFileError) -> None:
        if not self._skip_invalid:
            raise error
        self._num_skipped += 1
        _note(self._first_skipped, error)

    def _tell_done(self) -> None:
        self._num_done += 1
        step = max(1, self._num_files // _TELL_TIMES)
        if self._num_done % step == 0 or self._num_done == self._num_files:
            self._tell("files", self._num_done, self._num_files)


def _note(first: list[str], error: InputFileError) -> None:
    """Keep what the first few errors say."""
    if len(first) < NUM_FIRST_SKIPPED:
        text = error.message
        is_long = len(text) > _LONGEST_REASON
        first.append(f"{text[:_LONGEST_REASON]}..." if is_long else text)
