"""Which runs are the same one, within one store and in two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.report.reading import copies, read_all
from flexbench.report.reading.copies import drop_copies, drop_files_of
from flexbench.report.store import RowLines, RunStore
from tests.unit.report.reading.samples import append, petals_record
from tests.unit.report.stores import run

SHORT = "22.5\t5.25"
FULL = "22.512345678\t5.25"
OTHER = "22.512345679\t5.25"


@pytest.fixture
def store():
    with RunStore() as one:
        yield one


@pytest.fixture
def other():
    with RunStore() as one:
        yield one


def add_rows(store: RunStore, source: str | Path, *figures: str) -> None:
    rows = [f"1\t2\t4\t256\t32\t{pair}".encode() for pair in figures]
    store.add_rows([RowLines(source=Path(source), lines=range(1, len(rows) + 1), rows=rows)])


def add_record(store: RunStore, record_id: str, figures: str, row_file: str | None = None) -> None:
    throughput, mean_latency = map(float, figures.split("\t"))
    store.add(
        [
            run(
                source=Path(f"{record_id}.jsonl"),
                line=1,
                record_id=record_id,
                row_file=None if row_file is None else Path(row_file),
                num_micro_batches=2,
                num_processes=4,
                sequence_length=256,
                throughput=throughput,
                mean_latency=mean_latency,
            )
        ]
    )


def left(store: RunStore) -> list[tuple[str, int]]:
    """Sources and lines of what is still there."""
    found = store.rows("SELECT source, line FROM runs ORDER BY id")
    return [(row["source"], row["line"]) for row in found]


# --- rows of several files ---


def test_equal_rows_of_two_files_are_one_run(store):
    add_rows(store, "a.tsv", FULL, OTHER)
    add_rows(store, "b.tsv", FULL, OTHER)
    add_rows(store, "c.tsv", OTHER)
    assert drop_copies(store) == 3
    assert left(store) == [("a.tsv", 1), ("a.tsv", 2)]


def test_equal_rows_of_one_file_are_repeats(store):
    add_rows(store, "a.tsv", FULL, FULL)
    assert drop_copies(store) == 0
    assert len(store) == 2


def test_of_repeats_in_copies_as_many_stay_as_the_fullest_file_has(store):
    add_rows(store, "a.tsv", FULL)
    add_rows(store, "b.tsv", FULL, FULL, FULL)
    add_rows(store, "c.tsv", FULL, FULL)
    assert drop_copies(store) == 3
    assert left(store) == [("a.tsv", 1), ("b.tsv", 2), ("b.tsv", 3)]


@pytest.mark.parametrize(
    ("figures", "is_copy"),
    [
        ("20.0\t5.0", False),
        ("22.512\t5.25", False),
        ("22.5123\t5.25", True),
        ("22.5\t5.25001", True),
        ("123450.0\t1.0", False),
        ("123456.0\t1.0", True),
        ("0.00012345\t1.0", False),
        ("0.000123456\t1.0", True),
        ("0.0\t0.0", False),
        ("1.7976931348623157e308\t1.0", True),
        ("5e-324\t1.0", False),
    ],
)
def test_figures_need_six_digits_not_to_be_equal_by_chance(store, figures, is_copy):
    add_rows(store, "a.tsv", figures)
    add_rows(store, "b.tsv", figures)
    assert drop_copies(store) == int(is_copy)


def test_another_configuration_is_another_run(store):
    add_rows(store, "a.tsv", FULL)
    row = f"1\t2\t4\t256\t64\t{FULL}".encode()
    store.add_rows([RowLines(source=Path("b.tsv"), lines=[1], rows=[row])])
    assert drop_copies(store) == 0


# --- rows and records ---


def test_a_row_under_another_name_is_that_of_its_record(store):
    add_record(store, "r", FULL, "r.tsv")
    add_rows(store, "r.tsv", FULL)
    add_rows(store, "old.tsv", FULL, OTHER)
    assert drop_copies(store) == 1  # the one beside its record is none
    assert left(store) == [("r.jsonl", 1), ("old.tsv", 2)]


def test_without_all_digits_only_the_record_beside_it_is_a_rows_own(store):
    add_record(store, "r", SHORT, "r.tsv")
    add_rows(store, "r.tsv", SHORT, SHORT)
    add_rows(store, "old.tsv", SHORT)
    assert drop_copies(store) == 0
    assert left(store) == [("r.jsonl", 1), ("r.tsv", 2), ("old.tsv", 1)]


def test_a_record_takes_one_row_of_each_copy(store):
    add_record(store, "r", FULL, "r.tsv")
    add_rows(store, "r.tsv", FULL, FULL)
    add_rows(store, "copy.tsv", FULL, FULL)
    assert drop_copies(store) == 2
    assert left(store) == [("r.jsonl", 1), ("r.tsv", 2)]


@given(
    files=st.lists(st.lists(st.sampled_from([SHORT, FULL, OTHER]), max_size=4), max_size=4),
    records=st.lists(st.sampled_from([SHORT, FULL, OTHER]), max_size=3),
)
@settings(max_examples=12, deadline=None)
def test_so_many_runs_stay_as_there_were(files, records):
    with RunStore() as store:
        for number, figures in enumerate(records):
            add_record(store, f"r{number}", figures)
        for number, rows in enumerate(files):
            if rows:
                add_rows(store, f"{number}.tsv", *rows)
        drop_copies(store)
        found = store.rows("SELECT throughput, count(*) AS number FROM runs GROUP BY ALL")
    expected = {}
    for figures in (SHORT, FULL, OTHER):
        by_file = [rows.count(figures) for rows in files]
        in_records = records.count(figures)
        rows = max([in_records, *by_file]) if figures != SHORT else sum(by_file) + in_records
        if rows:
            expected[float(figures.partition("\t")[0])] = rows
    assert {row["throughput"]: row["number"] for row in found} == expected


def test_in_parts_it_is_the_same(store, monkeypatch):
    monkeypatch.setattr(copies, "_MOST_AT_ONCE", 3)
    figures = [f"22.5123456{number:02}\t5.25" for number in range(20)]
    add_rows(store, "a.tsv", *figures)
    add_rows(store, "b.tsv", *figures, *figures)
    assert drop_copies(store) == 20
    assert len(store) == 40


# --- two stores ---


def test_files_that_are_on_both_sides_stay_on_one(store, other, tmp_path):
    for name, wall_s in (("old", 4.0), ("new", 5.0)):
        append(tmp_path / name / "r.tsv", petals_record(wall_s=wall_s))
    read_all([tmp_path], store, skip_invalid=False)
    read_all([tmp_path / "old"], other, skip_invalid=False)
    assert drop_files_of(store, other) == 1
    assert left(store) == [(str(tmp_path / "new" / "r.jsonl"), 1)]
    assert len(other) == 1


def test_a_file_is_the_same_whatever_it_is_called(store, other, tmp_path):
    path = tmp_path / "a.tsv"
    path.touch()
    os.link(path, tmp_path / "b.tsv")
    add_rows(other, path, SHORT)
    add_rows(store, tmp_path / "b.tsv", SHORT, SHORT)
    add_rows(store, "gone.tsv", SHORT)
    assert drop_files_of(store, other) == 2
    assert left(store) == [("gone.tsv", 1)]


def test_results_may_be_compared_with_themselves_and_with_a_copy(store, other):
    add_rows(other, "a.tsv", FULL)
    add_rows(store, "a.tsv", FULL)
    assert drop_files_of(store, other) == 0
    assert len(store) == 1
    add_rows(store, "copy.tsv", FULL)
    assert drop_files_of(store, other) == 1
    assert left(store) == [("copy.tsv", 1)]
