"""Results on disk: a TSV with one row a run, and beside it one JSON line a run with everything.

The TSV has the seven columns of the original benchmark script in its order. That script wrote no
header; files with and without one are read alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from flexbench.core.errors import ConfigError, FlexbenchError, InputFileError, Interrupted

RECORD_SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 5.0
_PROBE_BYTES = 64 * 1024
_LONGEST_RECORD_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One run as the TSV holds it; the fields are the columns, in order.

    `throughput` is in tokens/s, `mean_latency` in seconds.
    """

    batch_size: int
    num_micro_batches: int
    num_processes: int
    sequence_length: int
    max_tokens: int
    throughput: float
    mean_latency: float


COLUMNS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(ResultRow))
CONFIGURATION_COLUMNS: tuple[str, ...] = COLUMNS[:5]
_HEADER = "\t".join(COLUMNS)
_MINIMUM = {"max_tokens": 0}  # every other count is at least 1


def format_row(row: ResultRow) -> str:
    """The row as a line of the TSV, without the line end. Floats keep every digit they have."""
    return "\t".join(repr(value) for value in dataclasses.astuple(row))


def parse_row(line: str) -> ResultRow:
    """Read one line of the TSV. Raises ValueError that says which column is wrong, and how."""
    values = line.split("\t")
    if len(values) != len(COLUMNS):
        raise ValueError(f"expected {len(COLUMNS)} tab-separated columns, found {len(values)}")
    counts = {
        name: _parse_count(name, value)
        for name, value in zip(CONFIGURATION_COLUMNS, values, strict=False)
    }
    return ResultRow(
        **counts,
        throughput=_parse_measurement("throughput", values[5]),
        mean_latency=_parse_measurement("mean_latency", values[6]),
    )


def _parse_count(name: str, text: str) -> int:
    minimum = _MINIMUM.get(name, 1)
    # int() alone would also take "1_000" and other scripts' digits.
    if not (text.isascii() and text.isdigit()) or int(text) < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, not {text!r}")
    return int(text)


def _parse_measurement(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or "_" in text:
        raise ValueError(f"{name} must be a finite number of at least 0, not {text!r}")
    return value


def read_rows(path: Path) -> Iterator[ResultRow | InputFileError]:
    """Read a results TSV line by line, with or without its header.

    A malformed line comes as the InputFileError that describes it, so that the caller decides
    whether to stop there. Raises InputFileError when the file itself cannot be read.
    """
    try:
        # Bytes that are no text get through to the line that has them, which is then malformed.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            for number, raw_line in enumerate(lines, start=1):
                line = raw_line.rstrip("\r\n")
                # A header may also stand further down, where somebody has joined files.
                if not line or line == _HEADER:
                    continue
                try:
                    yield parse_row(line)
                except ValueError as error:
                    yield InputFileError(path, str(error), line=number)
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error


class ResultsFile:
    """The TSV at `path` and the JSON lines beside it; many processes may append at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Only .tsv is taken off: opt-6.7b and opt-6.9b are not to share their records.
        self.records_path = path.parent / f"{path.name.removesuffix('.tsv')}.jsonl"

    def check(self, *, option: str = "--output", create_folder: bool = True) -> None:
        """Find out now what would make an append fail later. Raises ConfigError naming `option`.

        With `create_folder`, the folder is made if it is missing.
        """
        if not self.path.name:
            raise ConfigError(option, f"{str(self.path)!r} is not the name of a file")
        if self.path.suffix == ".jsonl":
            raise ConfigError(
                option,
                f"{self.path} is where the JSON records go; choose another suffix: .tsv",
            )
        try:
            _check_folder(self.path.parent, create=create_folder)
            for path in (self.path, self.records_path):
                _check_file(path)
        except OSError as error:
            culprit = error.filename or self.path
            raise ConfigError(
                option, f"cannot write to {culprit}: {error.strerror or error}"
            ) from error
        self._check_first_line(option)

    def _check_first_line(self, option: str) -> None:
        if not self.path.exists():
            return
        try:
            first = next(iter(read_rows(self.path)), None)
        except InputFileError as error:
            raise ConfigError(option, f"{error}; choose another file") from error
        if isinstance(first, InputFileError):
            raise ConfigError(
                option,
                f"not a results file: {first}; choose another file",
            )

    def last_record(self) -> dict[str, Any] | None:
        """The record that was appended last; None if there is none that can be read."""
        try:
            with self.records_path.open("rb") as records:
                records.seek(max(0, records.seek(0, os.SEEK_END) - _LONGEST_RECORD_BYTES))
                record = json.loads(records.read().splitlines()[-1])
        except (OSError, ValueError, IndexError):
            return None
        return record if isinstance(record, dict) else None

    def other_subject(self, configuration: Mapping[str, Any], names: Sequence[str]) -> list[str]:
        """Those of `names` in which the run appended last differs from `configuration`.

        The seven columns do not hold them: a report would mix the runs.
        """
        before = (self.last_record() or {}).get("configuration")
        if not isinstance(before, dict):
            return []
        return [n for n in names if before.get(n, configuration[n]) != configuration[n]]

    def append(self, row: ResultRow | None, record: Mapping[str, Any]) -> None:
        """Append one run: its record, and its row unless the run failed (`row` is None).

        Both files are locked for the time of writing, and each line is one write, so that runs that
        end at the same moment never mix their lines. Raises FlexbenchError when that is impossible.
        """
        # ASCII, because a command line may hold bytes that are no text.
        line = json.dumps(record, allow_nan=False)
        try:
            with _locked_for_append(self.records_path) as records:
                _write_line(records, line)
            if row is not None:
                with _locked_for_append(self.path) as rows:
                    header = f"{_HEADER}\n" if rows.tell() == 0 else ""
                    _write_line(rows, header + format_row(row))
        except OSError as error:
            raise FlexbenchError(
                f"{self.path}: the result could not be written: {error.strerror or error}",
                details=line,
            ) from error

    def append_failure(self, record: Mapping[str, Any], error: FlexbenchError) -> None:
        """Append the record of a run that `error` ended; if it fails, `error` tells that, too."""
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        try:
            self.append(None, {**record, "status": status, "error": error.message})
        except FlexbenchError as lost:
            error.add_details(f"{lost.message}\n{lost.details}")


class RecordsFile:
    """JSON lines at `path` alone, where there are no rows to go with them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, *, option: str = "--output") -> None:
        """Find out now what would make an append fail later. Raises ConfigError naming `option`."""
        try:
            _check_folder(self.path.parent, create=True)
            _check_file(self.path)
        except OSError as error:
            culprit = error.filename or self.path
            raise ConfigError(
                option, f"cannot write to {culprit}: {error.strerror or error}"
            ) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record as a line. Raises FlexbenchError, with the record, if it cannot."""
        line = json.dumps(record, allow_nan=False)
        try:
            with _locked_for_append(self.path) as records:
                _write_line(records, line)
        except OSError as error:
            raise FlexbenchError(
                f"{self.path}: the record could not be written: {error.strerror or error}",
                details=line,
            ) from error


def mixed_results_note(path: Path, other: Sequence[str]) -> str:
    """What to tell a person whose results file has runs that differ in `other`."""
    return (
        f"Note: {path} has runs with another {', '.join(other)}. Only the records beside it tell "
        "them apart, not its columns; use another --output to keep them in different files."
    )


def utc_now() -> str:
    """This moment in UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def _locked_for_append(path: Path) -> Iterator[IO[bytes]]:
    # Imported here: everyone who only reads results should not wait for it.
    import portalocker

    try:
        # Unbuffered: what could not be written is not to be tried again when the file is closed.
        with portalocker.Lock(path, mode="ab+", timeout=LOCK_TIMEOUT_S, buffering=0) as file:
            file.seek(0, os.SEEK_END)
            yield file
    except portalocker.AlreadyLocked as error:
        raise OSError(None, f"another process keeps {path} locked") from error
    except portalocker.LockException as error:
        raise OSError(None, f"{path} cannot be locked: {error}") from error


def _write_line(file: IO[bytes], line: str) -> None:
    data = (line + "\n").encode()
    size = file.tell()
    if size > 0:
        # A writer that was killed may have left half a line: keep ours apart from it.
        file.seek(size - 1)
        if file.read(1) != b"\n":
            data = b"\n" + data
    try:
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[file.write(remaining) :]
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), size)  # a full disk: leave no half of a line
        raise


def _check_folder(folder: Path, *, create: bool) -> None:
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(None, "is not a folder", str(existing))
    if create or existing == folder:
        # Trying is the only answer that also knows of read-only mounts, quotas and full disks.
        with (
            tempfile.TemporaryDirectory(dir=existing, prefix=".flexbench-") as probe,
            _locked_for_append(Path(probe) / "probe") as file,
        ):
            _write_line(file, "x" * _PROBE_BYTES)
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(None, "no permission", str(existing))


def _check_file(path: Path) -> None:
    if path.is_symlink():
        path = path.resolve()
        if not path.parent.is_dir():
            raise FileNotFoundError(None, "is a link into a folder that does not exist", str(path))
    if not path.exists():
        return
    if not path.is_file():
        raise OSError(None, "is not a regular file", str(path))
    with path.open("ab"):
        return
