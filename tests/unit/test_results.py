"""Rows and records on disk."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import portalocker
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.core.errors import ConfigError, FlexbenchError, InputFileError
from flexbench.core.results import (
    COLUMNS,
    RecordsFile,
    ResultRow,
    ResultsFile,
    format_row,
    parse_row,
    read_rows,
)

ROW = ResultRow(
    batch_size=1,
    num_micro_batches=3,
    num_processes=4,
    sequence_length=256,
    max_tokens=32,
    throughput=22.5,
    mean_latency=5.25,
)


def test_the_columns_are_those_of_the_original_script():
    assert COLUMNS == (
        "batch_size",
        "num_micro_batches",
        "num_processes",
        "sequence_length",
        "max_tokens",
        "throughput",
        "mean_latency",
    )
    assert format_row(ROW) == "1\t3\t4\t256\t32\t22.5\t5.25"


counts = st.integers(min_value=1, max_value=10**12)
figures = st.floats(min_value=0, allow_infinity=False, allow_nan=False)


@given(st.builds(
    ResultRow, batch_size=counts, num_micro_batches=counts, num_processes=counts,
    sequence_length=counts, max_tokens=st.integers(0, 10**9), throughput=figures,
    mean_latency=figures,
))  # fmt: skip
def test_a_row_is_read_as_it_was_written(row):
    assert parse_row(format_row(row)) == row


@given(st.text(max_size=60))
def test_any_text_is_a_row_or_a_value_error(text):
    try:
        row = parse_row(text)
    except ValueError:
        return
    assert row.batch_size >= 1
    assert math.isfinite(row.throughput)


@pytest.mark.parametrize("text", ["1_000", "+1", "1.0", "", " 1", "\u0661"])
def test_counts_are_plain_digits(text):
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        parse_row(f"{text}\t1\t1\t1\t1\t1.0\t1.0")


def test_a_new_file_gets_a_header_and_later_rows_do_not(tmp_path):
    results = ResultsFile(tmp_path / "petals.tsv")
    results.append(ROW, {"run": 1})
    results.append(ROW, {"run": 2})
    assert results.path.read_text() == "\t".join(COLUMNS) + "\n" + 2 * (format_row(ROW) + "\n")
    assert results.records_path == tmp_path / "petals.jsonl"
    assert results.records_path.read_text() == '{"run": 1}\n{"run": 2}\n'


def test_a_failed_run_has_a_record_and_no_row(tmp_path):
    results = ResultsFile(tmp_path / "petals.tsv")
    results.append(None, {"status": "failed"})
    assert not results.path.exists()
    assert json.loads(results.records_path.read_text()) == {"status": "failed"}


def test_a_file_without_header_stays_without(tmp_path):
    path = tmp_path / "original.tsv"
    path.write_text(format_row(ROW) + "\n")
    ResultsFile(path).check()
    ResultsFile(path).append(ROW, {})
    assert path.read_text() == 2 * (format_row(ROW) + "\n")


def test_half_a_line_of_a_killed_writer_is_kept_apart(tmp_path):
    path = tmp_path / "petals.tsv"
    path.write_text("\t".join(COLUMNS) + "\n1\t3\t4\t25")
    ResultsFile(path).append(ROW, {})
    rows = list(read_rows(path))
    assert isinstance(rows[0], InputFileError)
    assert rows[0].line == 2
    assert rows[1:] == [ROW]


def test_many_processes_appending_at_once_tear_no_line(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from flexbench.core.results import ResultRow, ResultsFile\n"
        "results = ResultsFile(Path(sys.argv[1]))\n"
        "for i in range(40):\n"
        "    row = ResultRow(batch_size=int(sys.argv[2]), num_micro_batches=i + 1,\n"
        "        num_processes=1, sequence_length=1, max_tokens=0, throughput=1 / 3,\n"
        "        mean_latency=0.1)\n"
        "    results.append(row, {'writer': sys.argv[2], 'padding': 'x' * 20_000})\n"
    )
    path = tmp_path / "shared.tsv"
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(number)])
        for number in (1, 2, 3, 4)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    rows = list(read_rows(path))
    assert sorted((r.batch_size, r.num_micro_batches) for r in rows) == [
        (writer, i + 1) for writer in (1, 2, 3, 4) for i in range(40)
    ]
    assert path.read_text().count("batch_size") == 1
    records = path.with_suffix(".jsonl").read_text().splitlines()
    assert len([json.loads(record) for record in records]) == 160


def test_a_command_line_that_is_no_text_is_recorded_all_the_same(tmp_path):
    results = ResultsFile(tmp_path / "petals.tsv")
    results.append(ROW, {"command": ["--output", "a\udcff.tsv"]})
    record = json.loads(results.records_path.read_text())
    assert record["command"][1] == "a\udcff.tsv"


def test_the_last_record_is_read_back(tmp_path):
    results = ResultsFile(tmp_path / "petals.tsv")
    assert results.last_record() is None
    results.append(ROW, {"run": 1})
    results.append(ROW, {"run": 2})
    assert results.last_record() == {"run": 2}
    results.records_path.write_text('{"run": 1}\n{"ru')
    assert results.last_record() is None


def test_records_of_similar_names_are_apart():
    assert ResultsFile(Path("opt-6.7b")).records_path == Path("opt-6.7b.jsonl")
    assert ResultsFile(Path("results/petals.tsv")).records_path == Path("results/petals.jsonl")


def test_a_full_disk_is_found_before_measuring_and_tears_no_line(tmp_path, monkeypatch):
    results = ResultsFile(tmp_path / "petals.tsv")
    results.append(ROW, {})
    before = results.path.read_bytes()

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        results.check()
    with pytest.raises(FlexbenchError, match="No space left on device"):
        results.append(ROW, {})
    assert results.path.read_bytes() == before
    assert results.records_path.read_text() == "{}\n"


def test_half_a_line_is_taken_back_when_the_disk_is_full(tmp_path):
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from flexbench.core.errors import FlexbenchError\n"
        "from flexbench.core.results import ResultRow, ResultsFile\n"
        "results = ResultsFile(Path(sys.argv[1]))\n"
        "row = ResultRow(batch_size=1, num_micro_batches=1, num_processes=1, sequence_length=1,\n"
        "    max_tokens=1, throughput=1.23456789, mean_latency=1.23456789)\n"
        "results.append(row, {})\n"
        "limit = results.path.stat().st_size + 15\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    results.append(row, {})\n"
        "except FlexbenchError as error:\n"
        "    sys.exit(str(error))\n"
    )
    path = tmp_path / "petals.tsv"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "could not be written: File too large" in done.stderr
    assert len(path.read_text().splitlines()) == 2
    assert path.read_text().endswith("\n")


def test_a_file_that_somebody_keeps_locked_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("flexbench.core.results.LOCK_TIMEOUT_S", 0.2)
    results = ResultsFile(tmp_path / "petals.tsv")
    with (
        portalocker.Lock(results.records_path, "a"),
        pytest.raises(FlexbenchError, match=r"petals\.jsonl locked"),
    ):
        results.append(ROW, {})


def test_a_record_that_is_not_json_is_never_written(tmp_path):
    results = ResultsFile(tmp_path / "petals.tsv")
    with pytest.raises(ValueError, match="Out of range float"):
        results.append(ROW, {"figure": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_checking_makes_the_folder_only_when_asked(tmp_path):
    results = ResultsFile(tmp_path / "new" / "folder" / "petals.tsv")
    results.check(create_folder=False)
    assert list(tmp_path.iterdir()) == []
    results.check()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_record_that_cannot_be_written_is_in_the_error(tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(FlexbenchError, match="could not be written") as raised:
        ResultsFile(folder / "petals.tsv").append(ROW, {"measured": 42})
    assert raised.value.details == '{"measured": 42}'


def test_devices_and_folders_are_no_results_files():
    with pytest.raises(ConfigError, match="is not a regular file"):
        ResultsFile(Path("/dev/null")).check()


def test_records_alone_need_no_rows(tmp_path):
    (tmp_path / "notes.tsv").write_text("somebody else's\n")
    records = RecordsFile(tmp_path / "new" / "notes.jsonl")
    records.check()
    records.append({"figure": 1})
    records.append({"figure": 2})
    lines = records.path.read_text().splitlines()
    assert lines == ['{"figure": 1}', '{"figure": 2}']
    beside = RecordsFile(tmp_path / "notes.jsonl")
    beside.check()
    beside.append({})
    assert (tmp_path / "notes.tsv").read_text() == "somebody else's\n"


def test_records_that_cannot_be_written_are_in_the_error(tmp_path):
    with pytest.raises(FlexbenchError, match=r"gone/x\.jsonl: the record could not") as raised:
        RecordsFile(tmp_path / "gone" / "x.jsonl").append({"measured": 42})
    assert raised.value.details == '{"measured": 42}'
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        RecordsFile(tmp_path / "file" / "x.jsonl").check()
