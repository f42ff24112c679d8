"""Everything together: files and folders, as people have them."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from flexbench.core.errors import InputFileError
from flexbench.core.results import COLUMNS, format_row
from flexbench.report import reading as reading_module
from flexbench.report.reading import NUM_FIRST_SKIPPED, read_all
from flexbench.report.store import RunStore
from flexbench.serving.config import Load as ServingLoad
from tests.unit.report.reading.samples import (
    append,
    as_row,
    curve_record,
    dist_record,
    petals_record,
    server_record,
    serving_record,
    write_lines,
    write_point,
)

HEADER = "\t".join(COLUMNS)
ROW = "1\t2\t4\t256\t32\t22.5\t5.25"


@pytest.fixture
def store():
    with RunStore() as one:
        yield one


def runs(store) -> list[tuple]:
    found = store.rows("SELECT source, line, system, throughput FROM runs ORDER BY id")
    return [
        (Path(row["source"]).name, row["line"], row["system"], row["throughput"]) for row in found
    ]


def read(store, *paths: Path, skip_invalid: bool = False, **options):
    return read_all(paths, store, skip_invalid=skip_invalid, **options)


def test_a_folder_with_results_of_all_commands(store, tmp_path):
    append(tmp_path / "petals.tsv", petals_record(), petals_record(wall_s=5.0))
    append(tmp_path / "dist.tsv", dist_record(), dist_record(status="failed", error="x"))
    write_lines(tmp_path / "dist2.jsonl", dist_record(is_projected=True))
    write_point(tmp_path / "serving", serving_record())
    write_lines(tmp_path / "server_config.jsonl", server_record())
    write_lines(tmp_path / "serving" / "openai-curve-0.json", curve_record())
    (tmp_path / "original.tsv").write_text(f"{ROW}\n{ROW}\n")
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "dist.log").write_text("log")
    reading = read(store, tmp_path)
    assert sorted(runs(store), key=str) == sorted(
        [
            ("petals.jsonl", 1, "petals", 32.0),
            ("petals.jsonl", 2, "petals", 25.6),
            ("dist.jsonl", 1, "dist", 8.0),
            ("dist2.jsonl", 1, "dist", 8.0),
            (next((tmp_path / "serving").glob("openai-8*")).name, None, "serving", 1.5),
            ("original.tsv", 1, None, 22.5),
            ("original.tsv", 2, None, 22.5),
        ],
        key=str,
    )
    assert (reading.num_failed, reading.num_interrupted) == (1, 0)
    assert [one.figure for one in reading.predictions] == ["Weights"]
    assert [curve["points"] for curve in reading.curves] == [curve_record()["points"]]
    assert (reading.num_files, reading.num_foreign) == (11, 1)
    assert (reading.num_skipped, reading.first_skipped) == (0, ())


# --- one run, several times ---


def test_a_row_and_its_record_are_one_run(store, tmp_path):
    append(tmp_path / "r.tsv", petals_record())
    read(store, tmp_path / "r.tsv")
    assert runs(store) == [("r.jsonl", 1, "petals", 32.0)]


def test_rows_without_a_record_stay(store, tmp_path):
    path = tmp_path / "r.tsv"
    append(path, petals_record())
    with path.open("a") as file:  # the same figures twice more, and others, of nobody knows what
        file.write(f"{format_row(as_row(petals_record()))}\n" * 2 + f"{ROW}\n")
    read(store, path)
    assert runs(store) == [
        ("r.jsonl", 1, "petals", 32.0),
        ("r.tsv", 3, None, 32.0),
        ("r.tsv", 4, None, 32.0),
        ("r.tsv", 5, None, 22.5),
    ]


def test_equal_rows_with_as_many_records_go(store, tmp_path):
    repeats = [petals_record(started_at=f"2026-01-0{day}T00:00:00+00:00") for day in (1, 2)]
    append(tmp_path / "r.tsv", *repeats)
    read(store, tmp_path)
    assert runs(store) == [("r.jsonl", 1, "petals", 32.0), ("r.jsonl", 2, "petals", 32.0)]


def test_records_of_one_file_do_not_take_the_rows_of_another(store, tmp_path):
    append(tmp_path / "a.tsv", petals_record())
    (tmp_path / "b.tsv").write_text(f"{format_row(as_row(petals_record()))}\n")
    read(store, tmp_path)
    assert runs(store) == [("a.jsonl", 1, "petals", 32.0), ("b.tsv", 1, None, 32.0)]


def test_a_point_its_line_and_its_row_are_one_run(store, tmp_path):
    point = write_point(tmp_path, serving_record())
    write_point(tmp_path, serving_record(ServingLoad(concurrency=4, num_requests=20)))
    read(store, tmp_path)
    found = runs(store)
    assert len(found) == 2
    assert found[1] == (point.name, None, "serving", 1.5)  # the one that has latencies
    # Whatever is missing of the three, the rest is one run.
    for gone in ("serving.jsonl", "serving.tsv"):
        folder = tmp_path / f"without {gone}"
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("without*", gone))
        with RunStore() as other:
            read(other, folder)
            assert len(other) == 2


def test_a_point_that_was_measured_again_is_two_runs(store, tmp_path):
    write_point(tmp_path, serving_record(started_at="2026-01-01T00:00:00+00:00"))
    write_point(tmp_path, serving_record(started_at="2026-01-02T00:00:00+00:00"))
    read(store, tmp_path)
    found = store.rows("SELECT started_at, line FROM runs ORDER BY started_at")
    assert found == [
        {"started_at": "2026-01-01T00:00:00+00:00", "line": 1},  # its file is the second's by now
        {"started_at": "2026-01-02T00:00:00+00:00", "line": None},
    ]


def test_a_copy_of_a_folder_adds_nothing(store, tmp_path):
    append(tmp_path / "a" / "r.tsv", petals_record(), petals_record(wall_s=5.0))
    write_point(tmp_path / "a", serving_record())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    read(store, tmp_path)
    assert len(store) == 3


def test_failures_are_counted_once(store, tmp_path):
    write_point(tmp_path, serving_record(status="failed", error="x"))
    write_point(tmp_path, serving_record(status="interrupted", started_at="2026-02-02"))
    reading = read(store, tmp_path)
    assert (reading.num_failed, reading.num_interrupted) == (1, 1)
    assert len(store) == 0


def test_copied_records_of_servers_and_curves_are_counted_once(store, tmp_path):
    other = server_record(started_at="2026-02-02T00:00:00+00:00")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "server_config.jsonl", server_record(), other)
        write_lines(tmp_path / name / "openai-curve-0.json", curve_record())
    reading = read(store, tmp_path)
    assert len(reading.predictions) == 2  # of two servers that have the same figures
    assert len(reading.curves) == 1


def test_copied_rows_are_counted(store, tmp_path):
    append(tmp_path / "a.tsv", petals_record(wall_s=4.1234567))
    shutil.copy(tmp_path / "a.tsv", tmp_path / "b.tsv")
    reading = read(store, tmp_path)
    assert [system for _, _, system, _ in runs(store)] == ["petals"]
    assert reading.num_copies == 1


# --- others write meanwhile ---


def test_a_run_that_ends_while_files_are_read_is_not_a_row_without_its_record(
    store, tmp_path, monkeypatch
):
    path = tmp_path / "r.tsv"
    append(path, petals_record())
    original = reading_module.read_row_lines

    def read_late(*args, **options):
        append(path, petals_record(wall_s=5.0))
        return original(*args, **options)

    monkeypatch.setattr(reading_module, "read_row_lines", read_late)
    read(store, tmp_path)
    assert runs(store) == [("r.jsonl", 1, "petals", 32.0)]


def test_half_written_lines_are_told_and_no_error(store, tmp_path):
    append(tmp_path / "r.tsv", petals_record())
    for name, text in (("r.tsv", ROW[:-3]), ("r.jsonl", '{"schema_version": 1, "sys')):
        with (tmp_path / name).open("a") as file:
            file.write(text)
    reading = read(store, tmp_path)
    assert runs(store) == [("r.jsonl", 1, "petals", 32.0)]
    assert (reading.num_unfinished, reading.num_skipped) == (2, 0)
    assert reading.first_unfinished == (
        f"{tmp_path}/r.jsonl:2: not a record: it is not JSON (column 23); it may have been cut off",
        f"{tmp_path}/r.tsv:3: the line is not ended: it may be half written",
    )


# --- what is wrong ---


def test_a_malformed_line_stops_it_unless_it_is_to_be_skipped(store, tmp_path):
    path = tmp_path / "r.tsv"
    path.write_text(f"{HEADER}\n{ROW}\n" + "nonsense\n" * 9)
    lines = write_lines(tmp_path / "s.jsonl", petals_record(), "{")
    with pytest.raises(InputFileError, match=r"r\.tsv:3: expected 7 tab-separated columns"):
        read(store, path)
    with RunStore() as other:
        reading = read(other, path, lines, skip_invalid=True)
        assert len(other) == 2
    assert reading.num_skipped == 10
    assert len(reading.first_skipped) == NUM_FIRST_SKIPPED
    assert reading.first_skipped[0].startswith(f"{lines}:2: not a record: it is not JSON")
    assert reading.first_skipped[1].startswith(f"{path}:3: expected 7")


def test_what_was_named_has_to_be_readable_even_then(store, tmp_path):
    with pytest.raises(InputFileError, match=r"no\.tsv: cannot be read"):
        read(store, tmp_path / "no.tsv", skip_invalid=True)


def test_what_was_found_may_be_skipped(store, tmp_path):
    (tmp_path / "a.tsv").write_text(f"{ROW}\n")
    (tmp_path / "gone.tsv").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputFileError, match=r"gone\.tsv: cannot be read: No such file"):
        read(store, tmp_path)
    reading = read(store, tmp_path, skip_invalid=True)
    assert (reading.num_skipped, reading.num_files, len(store)) == (1, 1, 1)


def test_nothing_at_all_is_for_the_caller_to_tell(store, tmp_path):
    reading = read(store, tmp_path)
    assert (reading.num_files, len(store)) == (0, 0)
    (tmp_path / "empty.tsv").write_text(HEADER + "\n")
    assert read(store, tmp_path).num_files == 1
    assert len(store) == 0


@pytest.mark.parametrize(
    "name", ["<script>.tsv", "\x1b[31m.tsv", "a\nb.tsv", "*.tsv", "[x].tsv", "r\udcff.tsv"]
)
def test_file_names_are_texts(store, tmp_path, name):
    (tmp_path / name).write_text(f"{ROW}\n")
    (tmp_path / "other.tsv").write_text(f"{ROW}\n")
    read(store, tmp_path / name)
    (row,) = store.rows("SELECT source FROM runs")
    assert row["source"] == str(tmp_path / name).replace("\udcff", "\ufffd")


def test_hostile_texts_go_through(store, tmp_path):
    odd = "<script>alert(1)</script>\x1b[31m\x00\n"
    record = petals_record(model={"name": odd}, command=[odd, "\ud800"])
    read(store, write_lines(tmp_path / "r.jsonl", record))
    (row,) = store.rows("SELECT model, json_extract_string(details, '$.command[0]') AS c FROM runs")
    assert row == {"model": odd, "c": odd}


def test_progress_is_told(store, tmp_path):
    for number in range(450):
        (tmp_path / f"{number}.tsv").write_text(f"{ROW}\n")
    told = []
    read(store, tmp_path, tell=lambda *what: told.append(what))
    assert 100 < len(told) <= 226
    assert told[-1] == ("files", 450, 450)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})


def state(folder: Path) -> list[tuple]:
    """All that could be changed of files and folders."""
    found = []
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found.append(
            (path, status.st_mode, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, content)
        )
    return found


def test_reading_changes_nothing(store, tmp_path):
    append(tmp_path / "r.tsv", petals_record(), dist_record())
    write_point(tmp_path / "serving", serving_record())
    (tmp_path / "odd.tsv").write_bytes(b"\xef\xbb\xbf" + f"{ROW}\r\nnonsense\r".encode())
    (tmp_path / "broken.json").write_text('{"schema_version": 1,')
    before = state(tmp_path)
    working_folder = sorted(os.listdir())
    reading = read(store, tmp_path, skip_invalid=True)
    assert reading.num_skipped == 2
    assert state(tmp_path) == before
    assert sorted(os.listdir()) == working_folder
