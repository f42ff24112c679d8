"""Records of runs: JSON lines beside a results TSV, and files that are one record each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from flexbench.core.errors import InputFileError
from flexbench.core.results import RECORD_SCHEMA_VERSION
from flexbench.core.units import format_bytes
from flexbench.report.predictions import Prediction
from flexbench.report.reading import dist, petals, requests, server_config, serving
from flexbench.report.reading.fields import RecordError, as_object, quote, value_of
from flexbench.report.reading.files import Kind, ResultFile, UnfinishedError
from flexbench.report.reading.parts import Origin
from flexbench.report.runs import Run

OK, FAILED, INTERRUPTED = "ok", "failed", "interrupted"
LONGEST_RECORD_BYTES = 2**30
_BYTE_ORDER_MARK = "\ufeff"
_MARK = "schema_version"
# A larger file that nobody named is not even looked through when it has no such mark.
_SMALL_BYTES = 8 * 2**20
_ANY_DIGIT = str.maketrans("123456789", "000000000")
_MANY_DIGITS = 19 * "0"
_LARGEST = 2**63
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
# What is left of a word or a number that is cut off: tr, 1.5e-
_HALVES = {word[:end] for word in _WORDS for end in range(1, len(word))} | {".", "e", "e-", "e+"}

_ADAPTERS: dict[str, Callable[[Mapping[str, Any], Origin], Run]] = {
    petals.SYSTEM: petals.run_of,
    dist.SYSTEM: dist.run_of,
    serving.SYSTEM: serving.run_of,
}
SYSTEMS = (*_ADAPTERS, serving.CURVE_SYSTEM, server_config.SYSTEM)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not come to its end."""

    status: str
    """failed or interrupted."""
    record_id: str | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Where the points of a serving curve are, and what a search found there."""

    record: Mapping[str, Any]
    record_id: str | None


@dataclass(frozen=True, kw_only=True)
class Server:
    """What was predicted of a server that was launched, and what it turned out to be."""

    predictions: list[Prediction]
    record_id: str | None


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A file that was found in a folder and has nothing to do with flexbench."""


Found = Run | Failure | Curve | Server | Foreign


def read_records(file: ResultFile) -> Iterator[Found | InputFileError]:
    """What the records of a file tell, in their order.

    A malformed record comes as the InputFileError that describes it, so that the caller decides
    whether to stop there; half a line at the end as an UnfinishedError. Raises InputFileError when
    the file itself cannot be read.
    """
    try:
        with file.path.open("rb") as data:
            if file.kind is Kind.RECORD:
                yield from _read_one(file, data)
            else:
                yield from _read_lines(file, data)
    except OSError as error:
        raise InputFileError(file.path, f"cannot be read: {error.strerror or error}") from error


def _read_one(file: ResultFile, data: IO[bytes]) -> Iterator[Found | InputFileError]:
    content = data.read(LONGEST_RECORD_BYTES + 1)
    if len(content) > _SMALL_BYTES and not file.is_named and _MARK.encode() not in content:
        yield Foreign()
        return
    if len(content) > LONGEST_RECORD_BYTES:
        yield InputFileError(file.path, _too_long())
        return
    try:
        yield _found(file, None, content)
    except _SeveralError:
        data.seek(0)
        yield from _read_lines(file, data)
    except RecordError as error:
        line = getattr(error.__cause__, "lineno", None)
        yield InputFileError(file.path, f"not a record: {error}", line=line)


def _read_lines(file: ResultFile, data: IO[bytes]) -> Iterator[Found | InputFileError]:
    is_first = True
    number = 0
    while line := data.readline(LONGEST_RECORD_BYTES + 1):
        number += 1
        if len(line) > LONGEST_RECORD_BYTES:
            yield InputFileError(file.path, _too_long(), line=number)
            _skip_line(data)
            continue
        if not line.strip():
            continue
        try:
            found = _found(file, number, line, may_be_foreign=is_first)
        except RecordError as error:
            is_half = isinstance(error, _CutOffError) and not line.endswith(b"\n")
            kind = UnfinishedError if is_half else InputFileError
            yield kind(file.path, f"not a record: {error}", line=number)
        else:
            yield found
            if isinstance(found, Foreign):
                return
        is_first = False


def _skip_line(data: IO[bytes]) -> None:
    while (part := data.readline(_SMALL_BYTES)) and not part.endswith(b"\n"):
        pass


def _too_long() -> str:
    return f"is no record: it has more than {format_bytes(LONGEST_RECORD_BYTES)}"


def _found(
    file: ResultFile, line: int | None, content: bytes, *, may_be_foreign: bool = True
) -> Found:
    """What a record tells. Raises RecordError for what is none."""
    value = _load(content)
    is_ours = isinstance(value, dict) and _MARK in value and "system" in value
    if may_be_foreign and not file.is_named and not is_ours:
        return Foreign()
    record = as_object("it", value)
    record_id = hashlib.blake2b(content.strip(), digest_size=16).hexdigest()
    origin = Origin(path=file.path, line=line, rows_path=file.rows_path, record_id=record_id)
    try:
        return _told(record, origin)
    except RecursionError as error:
        raise RecordError("it is nested too deeply") from error


class _SeveralError(RecordError):
    """A record, and more behind it."""


class _CutOffError(RecordError):
    """The beginning of a record."""


def _load(content: bytes) -> Any:
    """The JSON value, in which the requests of a point are their latencies."""
    text = content.decode(errors="replace").removeprefix(_BYTE_ORDER_MARK).rstrip()
    point = requests.load_point(text)
    if point is not None:
        return point
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise _SeveralError(f"it is not JSON (column {error.colno})") from error
        problem = f"it is not JSON (column {error.colno})"
        if _is_cut_off(text, error):
            raise _CutOffError(f"{problem}; it may have been cut off") from error
        raise RecordError(problem) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("it is not JSON that can be read") from error
    if isinstance(value, dict) and value.get("system") == serving.SYSTEM and requests.NAME in value:
        value[requests.NAME] = requests.latencies_of(value[requests.NAME])
    return value


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether it ends where more was expected, be it in the middle of a word."""
    rest = text[error.pos :]
    if error.msg.startswith("Invalid \\u"):
        return '"' not in rest
    return not rest or error.msg.startswith("Unterminated string") or rest in _HALVES


def _told(record: Mapping[str, Any], origin: Origin) -> Found:
    _check_version(value_of(record, _MARK))
    system = value_of(record, "system")
    if system not in SYSTEMS:
        raise RecordError(f"system {quote(system)} is none of {', '.join(SYSTEMS)}")
    if system == serving.CURVE_SYSTEM:
        return Curve(record=serving.curve_of(record), record_id=origin.record_id)
    status = value_of(record, "status")
    if status not in (OK, FAILED, INTERRUPTED):
        raise RecordError(f"status must be ok, failed or interrupted, not {quote(status)}")
    if status != OK:
        is_point = system == serving.SYSTEM
        identity = serving.identity_of(record) if is_point else origin.record_id
        return Failure(status=status, record_id=identity)
    if system == server_config.SYSTEM:
        predictions = server_config.predictions_of(record)
        return Server(predictions=predictions, record_id=origin.record_id)
    run = _ADAPTERS[system](record, origin)
    _check_storable(run)
    return run


def _check_version(version: Any) -> None:
    is_number = isinstance(version, int) and not isinstance(version, bool)
    if is_number and version > RECORD_SCHEMA_VERSION:
        raise RecordError(
            f"schema_version {quote(version)} is of a newer flexbench; "
            f"{RECORD_SCHEMA_VERSION} is the newest one known here"
        )
    if not is_number or version != RECORD_SCHEMA_VERSION:
        raise RecordError(
            f"schema_version {quote(version)} is not {RECORD_SCHEMA_VERSION}, the one known here"
        )


def _check_storable(run: Run) -> None:
    """Raise RecordError for numbers in the details that no database has."""
    try:
        text = json.dumps(run.details, allow_nan=False)
    except ValueError as error:
        raise RecordError("it has a number that is not finite") from error
    # Looked for at once, where a walk through the record would take longer than all the rest.
    if _MANY_DIGITS in text.translate(_ANY_DIGIT) and _has_large_number(run.details):
        raise RecordError("it has a number with too many digits")


def _has_large_number(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_large_number, value.values()))
    if isinstance(value, list):
        return any(map(_has_large_number, value))
    return isinstance(value, int) and abs(value) >= _LARGEST
