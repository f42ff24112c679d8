"""Which files a report reads, and what is in each: rows, lines of JSON, or one record."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from flexbench.core.errors import InputFileError
from flexbench.core.results import ResultsFile
from flexbench.report.reading.serving import ROWS_FILE

SUFFIXES = (".tsv", ".jsonl", ".json")
"""Of the files that are taken from a folder."""
_HEAD_BYTES = 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_Identity = tuple[int, int]


class Kind(StrEnum):
    """What a file has in it."""

    ROWS = "rows"
    """A results TSV, with or without a header."""
    LINES = "lines"
    """JSON lines: a record each."""
    RECORD = "record"
    """One record, on one line or many."""


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """A file to read."""

    path: Path
    kind: Kind
    is_named: bool
    """By the person; others were found in a folder, or beside a TSV."""
    rows_path: Path | None = None
    """Of records: the TSV among the files that has the same runs as rows."""
    num_bytes: int | None = None
    """How long it was when it was found. A run that ends later appends to its record and its row;
    of both or of the record alone a report can tell, of the row alone it cannot."""


class UnfinishedError(InputFileError):
    """The last line is one that somebody is writing, or was when the machine stopped."""


def find_files(paths: Sequence[Path]) -> tuple[list[ResultFile], list[InputFileError]]:
    """The files that `paths` name, and those in folders and below; each once, in a certain order.

    In a folder, files and folders with hidden names are left alone, and links to folders are not
    followed. To a TSV belong the records beside it. The errors are those of files that nobody has
    named. Raises InputFileError for a path of `paths` that cannot be read.
    """
    search = _Search()
    for path in paths:
        status = _status(path)
        if stat.S_ISDIR(status.st_mode):
            search.walk(path)
        else:
            search.add(path, status, is_named=True)
    search.add_records_beside_rows()
    search.pair()
    return list(search.found.values()), search.errors


class _Search:
    """What was found so far, by what makes a file the same one whatever it is called."""

    def __init__(self) -> None:
        self.found: dict[_Identity, ResultFile] = {}
        self.errors: list[InputFileError] = []

    def walk(self, folder: Path) -> None:
        """Add what is in a folder, and in those below it."""
        for path in _files_below(folder, self.errors):
            try:
                self.add(path, _status(path), is_named=False)
            except InputFileError as error:
                self.errors.append(error)

    def add(self, path: Path, status: os.stat_result, *, is_named: bool) -> None:
        """Add a file. Raises InputFileError when it is none, or cannot be read."""
        if not stat.S_ISREG(status.st_mode):
            raise InputFileError(path, "is a pipe or a device; reports read files and folders")
        identity = _identity_of(status)
        known = self.found.get(identity)
        if known is None:
            known = ResultFile(
                path=path, kind=_kind_of(path), is_named=is_named, num_bytes=status.st_size
            )
        elif is_named:
            known = replace(known, is_named=True)
        self.found[identity] = known

    def add_records_beside_rows(self) -> None:
        """Add X.jsonl for each X.tsv: it tells what the rows do not."""
        for file in [one for one in self.found.values() if one.kind is Kind.ROWS]:
            records = ResultsFile(file.path).records_path
            try:
                status = records.stat()
            except OSError:
                continue  # there is none
            if stat.S_ISREG(status.st_mode):
                try:
                    self.add(records, status, is_named=False)
                except InputFileError as error:
                    self.errors.append(error)

    def pair(self) -> None:
        """Tell files of records which of the other files has the same runs as rows."""
        for file in [one for one in self.found.values() if one.kind is Kind.ROWS]:
            self._pair(ResultsFile(file.path).records_path, file.path)
        for file in [one for one in self.found.values() if one.kind is Kind.RECORD]:
            rows = self._find(file.path.parent / ROWS_FILE)
            if rows is not None and rows.kind is Kind.ROWS:
                self._pair(file.path, rows.path)

    def _pair(self, records: Path, rows: Path) -> None:
        file = self._find(records)
        if file is not None and file.rows_path is None:
            self.found[_identity_of(file.path.stat())] = replace(file, rows_path=rows)

    def _find(self, path: Path) -> ResultFile | None:
        try:
            return self.found.get(_identity_of(path.stat()))
        except OSError:
            return None


def _files_below(folder: Path, errors: list[InputFileError]) -> Iterator[Path]:
    def note(error: OSError) -> None:
        path = error.filename or str(folder)
        errors.append(InputFileError(path, f"cannot be read: {error.strerror or error}"))

    for parent, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(parent) / name


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name that no file can have
        raise InputFileError(repr(str(path)), f"cannot be read: {error}") from error


def _identity_of(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _kind_of(path: Path) -> Kind:
    """By what it begins with; its name decides only between lines of JSON and one record."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror or error}") from error
    suffix = path.suffix.lower()
    first_line = head.partition(b"\n")[0].rstrip()
    if not head.startswith(b"{") and (suffix not in (".json", ".jsonl") or b"\t" in first_line):
        return Kind.ROWS
    is_spread = first_line == b"{" and suffix != ".jsonl"
    return Kind.RECORD if suffix == ".json" or is_spread else Kind.LINES
