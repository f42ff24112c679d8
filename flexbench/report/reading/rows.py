"""Rows of results files, a million in a second or two.

Nearly every file is exactly as `core.results` writes it. A part of a file that one regular
expression recognizes as such is passed on as it is, and read by the database. All that is a little
different, if only a blank line, is read by `core.results.parse_row`, line by line: what a row is,
and what is said of a malformed one, is decided there alone.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flexbench.core.errors import InputFileError
from flexbench.core.results import (
    COLUMNS,
    CONFIGURATION_COLUMNS,
    ResultRow,
    format_row,
    parse_row,
)
from flexbench.core.units import format_bytes
from flexbench.report.reading.files import UnfinishedError
from flexbench.report.store import RowLines

CHUNK_BYTES = 2**20
_HEADER = "\t".join(COLUMNS)
_LONGEST_LINE = 64 * 2**20
_LONGEST_PROBLEM = 500
_MOST_DIGITS = 18  # that any whole number of the database's columns can have
# Less than what parse_row takes, never more. No part of it is tried a second time (`+` behind a
# quantifier), so that its time grows with the length of the text and not faster.
_COUNT = rb"[1-9][0-9]{0,17}+"
_COUNT_OR_NONE = rb"[0-9]{1,18}+"
_FIGURE = rb"[0-9]{1,17}+(?:\.[0-9]{1,30}+)?+(?:[eE][+-]?+[0-9]{1,2}+)?+"
_LINE = rb"\t".join([_COUNT, _COUNT, _COUNT, _COUNT, _COUNT_OR_NONE, _FIGURE, _FIGURE])
_LINES = re.compile(rb"(?:" + _LINE + rb"\r?+\n)*+")
_HEADER_LINE = re.compile(re.escape(_HEADER.encode()) + rb"\r?\n")
_NOT_ENDED = "the line is not ended: it may be half written"


def read_row_lines(
    path: Path, *, num_bytes: int | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[RowLines | InputFileError]:
    """The rows of a results TSV, with or without a header, some thousands at a time.

    With `num_bytes`, only those that begin in so many bytes. A malformed line comes as the
    InputFileError that describes it. The rows and errors are those of `core.results.read_rows`; but
    counts that no column can hold are errors here, and below a header as flexbench writes it, which
    ends each line, a last line without an end is an UnfinishedError. Raises InputFileError when the
    file itself cannot be read.
    """
    line = 1
    is_ours = False
    try:
        with path.open("rb") as file:
            for chunk in _chunks(path, file, chunk_bytes, num_bytes):
                header = _HEADER_LINE.match(chunk) if line == 1 else None
                is_ours |= line == 1 and _begins_like_ours(chunk)
                if not chunk.endswith((b"\n", b"\r")):
                    if is_ours:
                        yield UnfinishedError(path, _NOT_ENDED, line=line)
                        return
                    chunk += b"\n"
                start = header.end() if header is not None else 0
                if _LINES.fullmatch(chunk, start):
                    rows = chunk[start:].replace(b"\r", b"").split(b"\n")[:-1]
                    line += header is not None
                    if rows:
                        numbers = range(line, line + len(rows))
                        yield RowLines(source=path, lines=numbers, rows=rows)
                    line += len(rows)
                else:
                    for found in _read_one_by_one(path, chunk, line):
                        if isinstance(found, int):
                            line = found
                        else:
                            yield found
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror or error}") from error


def _begins_like_ours(text: bytes) -> bool:
    """Whether it has the header, or half of it, and nobody has edited it since, as on Windows."""
    header = f"{_HEADER}\n".encode()
    return text.startswith(header) or (header.startswith(text) and text != header[:-1])


def _chunks(path: Path, file: IO[bytes], size: int, num_bytes: int | None) -> Iterator[bytes]:
    """The file in parts that end with a line; a last line that has no end is a part of its own."""
    rest = b""
    remaining = sys.maxsize if num_bytes is None else num_bytes
    while data := file.read(min(size, remaining)):
        remaining -= len(data)
        data = rest + data
        cut = _end_of_last_line(data)
        rest = data[cut:]
        if cut:
            yield data[:cut]
        elif len(rest) > _LONGEST_LINE:
            raise InputFileError(path, f"has a line of more than {format_bytes(_LONGEST_LINE)}")
    if rest:
        # Where the file has grown, the line that was half there.
        rest += file.readline(_LONGEST_LINE)
    cut = max(rest.rfind(end) for end in (b"\n", b"\r")) + 1
    yield from (part for part in (rest[:cut], rest[cut:]) if part)


def _end_of_last_line(data: bytes) -> int:
    cut = data.rfind(b"\n") + 1
    # A \r alone ends a line, too; the last byte may be the half of a \r\n.
    return cut or data.rfind(b"\r", 0, -1) + 1


def _read_one_by_one(
    path: Path, chunk: bytes, first_line: int
) -> Iterator[RowLines | InputFileError | int]:
    """The rows and errors of a part of a file; at last, the number of the line after it."""
    encoding = "utf-8-sig" if first_line == 1 else "utf-8"
    # Bytes that are no text get through to the line that has them, which is then malformed.
    text = io.TextIOWrapper(io.BytesIO(chunk), encoding, errors="surrogateescape", newline="")
    numbers: list[int] = []
    rows: list[bytes] = []
    number = first_line - 1
    for number, raw_line in enumerate(text, start=first_line):
        line = raw_line.rstrip("\r\n")
        # A header may also stand further down, where somebody has joined files.
        if not line or line == _HEADER:
            continue
        try:
            row = parse_row(line)
            _check_size(row)
        except ValueError as error:
            yield InputFileError(path, _shortened(str(error)), line=number)
        else:
            numbers.append(number)
            rows.append(format_row(row).encode())
    if rows:
        yield RowLines(source=path, lines=numbers, rows=rows)
    yield number + 1


def _check_size(row: ResultRow) -> None:
    for name in CONFIGURATION_COLUMNS:
        if getattr(row, name) >= 10**_MOST_DIGITS:
            raise ValueError(f"{name} must have at most {_MOST_DIGITS} digits")


def _shortened(problem: str) -> str:
    """What is wrong with a very long line, in fewer words."""
    if len(problem) <= _LONGEST_PROBLEM:
        return problem
    return f"{problem[:_LONGEST_PROBLEM]}..."
