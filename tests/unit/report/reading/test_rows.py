"""Rows in bulk are the rows that `core.results.read_rows` finds, one by one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.core.errors import InputFileError
from flexbench.core.results import COLUMNS, ResultRow, format_row, parse_row, read_rows
from flexbench.report.reading import rows as reading_rows
from flexbench.report.reading.files import UnfinishedError
from flexbench.report.reading.rows import read_row_lines
from flexbench.report.store import RowLines, RunStore

HEADER = "\t".join(COLUMNS)
ROW = "1\t2\t4\t256\t32\t22.5\t5.25"
NOT_ENDED = "the line is not ended: it may be half written"


def read(path: Path, **options) -> tuple[list[tuple[int, ResultRow]], list[str]]:
    """Rows with the numbers of their lines, and errors."""
    rows, errors = [], []
    for found in read_row_lines(path, **options):
        if isinstance(found, InputFileError):
            errors.append(str(found))
        else:
            texts = [row.decode() for row in found.rows]
            rows += zip(found.lines, map(parse_row, texts), strict=True)
    return rows, errors


def read_plainly(path: Path) -> tuple[list[tuple[int, ResultRow]], list[str]]:
    """The same by `read_rows`; the lines of the rows by counting."""
    unfinished = [f"{path}:{line}: {NOT_ENDED}" for line in cut_off_unfinished(path)]
    entries = list(read_rows(path))
    errors = [str(one) for one in entries if isinstance(one, InputFileError)]
    lines = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, raw in enumerate(file, start=1):
            text = raw.rstrip("\r\n")
            if text and text != HEADER and not any(f":{number}: " in error for error in errors):
                lines.append(number)
    rows = [one for one in entries if isinstance(one, ResultRow)]
    return list(zip(lines, rows, strict=True)), errors + unfinished


def cut_off_unfinished(path: Path) -> list[int]:
    """Take off the last line of a file that begins with a header, if it has no end; its number."""
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines or lines[-1].endswith((b"\n", b"\r")):
        return []
    header = HEADER.encode()
    is_half_header = len(lines) == 1 and header.startswith(lines[0]) and header != lines[0]
    has_header = len(lines) > 1 and lines[0] == header + b"\n"
    if not has_header and not is_half_header:
        return []
    path.write_bytes(b"".join(lines[:-1]))
    return [len(lines)]


fields = st.sampled_from(
    [
        "1", "0", "7", "007", "1_000", " 1", "1 ", "+1", "-1", "٣", "", "x", "9" * 17, "9" * 18,
        "2.5", "0.1", "1e5", "1E-07", "1e400", "1e-400", "nan", "inf", ".5", "5.", "1e+16", "0x1",
        "1.5\x00", "\xa05", "\udcff", "123456789012345678", "0.1234567890123456789012345678901",
        "1e99", "1e100", "1e0x",
    ]
)  # fmt: skip
lines = st.one_of(
    st.just(ROW),
    st.just(ROW),
    st.just(HEADER),
    st.just(""),
    st.lists(fields, min_size=6, max_size=8).map("\t".join),
    st.tuples(st.integers(0, 6), fields).map(lambda change: with_field(*change)),
)
ends = st.sampled_from(["\n", "\n", "\n", "\r\n", "\r", "\r\r\n", "\n\n", "\x0b\n", "\x85\n"])


def with_field(index: int, value: str) -> str:
    values = ROW.split("\t")
    values[index] = value
    return "\t".join(values)


@given(
    parts=st.lists(st.tuples(lines, ends), max_size=8),
    last=lines,
    has_mark=st.booleans(),
    chunk_bytes=st.sampled_from([1, 7, 40, 100, 2**20]),
)
@settings(max_examples=100, deadline=None)
def test_rows_and_errors_are_those_of_reading_line_by_line(parts, last, has_mark, chunk_bytes):
    text = ("\ufeff" if has_mark else "") + "".join(line + end for line, end in parts) + last
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.tsv"
        path.write_bytes(text.encode(errors="surrogateescape"))
        found = read(path, chunk_bytes=chunk_bytes)
        assert found == read_plainly(path)


# Half a byte order mark alone is nothing to read_rows, and a malformed line here.
contents = st.binary(max_size=60).filter(lambda content: content not in (b"\xef", b"\xef\xbb"))


@given(content=contents, chunk_bytes=st.sampled_from([1, 5, 2**20]))
@settings(deadline=None)
def test_so_it_is_with_any_bytes(content, chunk_bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.tsv"
        path.write_bytes(content)
        found = read(path, chunk_bytes=chunk_bytes)
        assert found == read_plainly(path)


@pytest.fixture
def one_by_one(monkeypatch) -> list[int]:
    """How many parts of files were not recognized as a whole."""
    calls = []
    original = reading_rows._read_one_by_one

    def note(path, chunk, first_line):
        calls.append(first_line)
        return original(path, chunk, first_line)

    monkeypatch.setattr(reading_rows, "_read_one_by_one", note)
    return calls


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n{ROW}\n{ROW}\n",
        f"{ROW}\n{ROW}",
        f"{HEADER}\r\n{ROW}\r\n",
        f"{HEADER}\n1\t1\t1\t1\t0\t0.0\t1.5e-07\n",
    ],
)
def test_what_flexbench_and_the_original_write_is_read_as_a_whole(text, tmp_path, one_by_one):
    path = tmp_path / "rows.tsv"
    path.write_bytes(text.encode())
    rows, errors = read(path)
    assert rows
    assert not errors
    assert not one_by_one


def test_an_odd_line_slows_down_its_own_part_only(tmp_path, one_by_one):
    path = tmp_path / "rows.tsv"
    path.write_text(f"{ROW}\n" * 10 + "nonsense\n" + f"{ROW}\n" * 10)
    line_bytes = len(ROW) + 1
    rows, errors = read(path, chunk_bytes=5 * line_bytes)
    assert len(rows) == 20
    assert errors == [f"{path}:11: expected 7 tab-separated columns, found 1"]
    assert one_by_one == [11]


def test_half_a_row_below_a_header_is_no_row(tmp_path):
    path = tmp_path / "rows.tsv"
    text = f"{HEADER}\n{ROW}\n{ROW}"
    for end in range(len(HEADER) + len(ROW) + 3, len(text) + 1):
        path.write_text(text[:end])
        rows, errors = read(path)
        assert [line for line, _ in rows] == [2]
        assert errors == [f"{path}:3: {NOT_ENDED}"]
    for end in range(1, len(HEADER)):
        path.write_text(HEADER[:end])
        assert read(path) == ([], [f"{path}:1: {NOT_ENDED}"])
    (found,) = read_row_lines(path)
    assert isinstance(found, UnfinishedError)


@pytest.mark.parametrize("header", ["", f"{HEADER}\r\n", f"\ufeff{HEADER}\n"])
def test_original_and_edited_files_may_lack_the_last_end(tmp_path, header):
    path = tmp_path / "rows.tsv"
    path.write_bytes(f"{header}{ROW}".encode())
    rows, errors = read(path)
    assert len(rows) == 1
    assert not errors


@pytest.mark.parametrize("chunk_bytes", [1, 30, 2**20])
@pytest.mark.parametrize("header", [f"{HEADER}\n", ""])
def test_rows_may_be_read_to_where_the_file_ended_some_time_ago(tmp_path, chunk_bytes, header):
    path = tmp_path / "rows.tsv"
    one = f"{header}{ROW}\n"
    path.write_text(f"{one}{ROW}\n{ROW}\n")

    def num_rows(num_bytes: int) -> int:
        rows, errors = read(path, num_bytes=num_bytes, chunk_bytes=chunk_bytes)
        assert not errors
        return len(rows)

    assert num_rows(0) == 0
    assert num_rows(len(one)) == 1
    assert num_rows(len(one) + len(ROW) + 1) == 2
    assert num_rows(len(one) + 5) == 2  # what was half there is whole by now
    assert num_rows(10_000) == 3


def test_counts_that_no_column_holds_are_malformed(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(with_field(0, "1" + "0" * 18) + "\n")
    assert read(path) == ([], [f"{path}:1: batch_size must have at most 18 digits"])


def test_what_is_said_of_a_very_long_line_is_short(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(with_field(0, "x" * 100_000) + "\n")
    _, (error,) = read(path)
    assert error.startswith(f"{path}:1: batch_size must be a whole number")
    assert len(error) < 1000


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading_rows, "_LONGEST_LINE", 1000)
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(InputFileError, match="has a line of more than"):
        read(path, chunk_bytes=100)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputFileError, match=r"no\.tsv: cannot be read: No such file"):
        read(tmp_path / "no.tsv")
    with pytest.raises(InputFileError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_every_digit_reaches_the_database(tmp_path):
    figures = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 2.0**53 - 1, 0.0, 1e16, 1e-5]
    rows = [
        ResultRow(
            batch_size=1, num_micro_batches=2, num_processes=3, sequence_length=10**18 - 1,
            max_tokens=0, throughput=figure, mean_latency=0.1,
        )
        for figure in figures
    ]  # fmt: skip
    path = tmp_path / "rows.tsv"
    path.write_text("".join(f"{format_row(row)}\n" for row in rows))
    with RunStore() as store:
        store.add_rows(one for one in read_row_lines(path) if isinstance(one, RowLines))
        found = store.rows("SELECT * FROM runs ORDER BY id")
    assert [ResultRow(**{name: one[name] for name in COLUMNS}) for one in found] == rows
