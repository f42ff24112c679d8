"""The table of runs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from flexbench.core.errors import ConfigError, FlexbenchError
from flexbench.report import store as store_module
from flexbench.report.runs import Run
from flexbench.report.store import COLUMNS, RowLines, RunStore

ROW = b"1\t2\t4\t256\t32\t22.5\t5.25"


def run(**changes) -> Run:
    values = {
        "source": Path("results/petals.jsonl"),
        "batch_size": 1,
        "num_micro_batches": 2,
        "num_processes": 4,
        "sequence_length": 256,
        "max_tokens": 32,
    }
    return Run(**(values | changes))


@pytest.fixture
def store():
    with RunStore() as one:
        yield one


def test_a_run_is_in_the_table_as_it_is(store):
    store.add(
        [
            run(
                line=3,
                system="petals",
                throughput=0.1,
                num_gpus=0,
                row_file=Path("results/petals.tsv"),
                setup={"b": True, "a": "x"},
                figures={"ttft_p99": 0.25},
                details={"machine": {"cpu": "EPYC"}, "many": [1, 2.5, None]},
            ),
            run(source=Path("other.jsonl")),
        ]
    )
    first, second = store.rows("SELECT * FROM runs ORDER BY id")
    assert (first["id"], second["id"]) == (1, 2)
    assert first["source"] == "results/petals.jsonl"
    assert (first["line"], first["system"], first["num_gpus"]) == (3, "petals", 0)
    assert (first["throughput"], first["mean_latency"]) == (0.1, None)
    assert first["row_file"] == "results/petals.tsv"
    assert first["setup"] == '{"a":"x","b":true}'  # in one order, whatever it was
    assert json.loads(first["figures"]) == {"ttft_p99": 0.25}
    assert json.loads(first["details"]) == {"machine": {"cpu": "EPYC"}, "many": [1, 2.5, None]}
    assert (second["source"], second["model"], second["setup"]) == ("other.jsonl", None, "{}")
    assert len(store) == 2


def test_rows_are_numbered_on_and_have_no_details(store):
    store.add([run()])
    store.add_rows(
        [
            RowLines(source=Path("a.tsv"), lines=range(2, 4), rows=[ROW, ROW]),
            RowLines(source=Path("a.tsv"), lines=[7], rows=[ROW]),
            RowLines(source=Path("b.tsv"), lines=[1], rows=[ROW]),
        ]
    )
    store.add([run(source=Path("c.jsonl"))])
    found = store.rows("SELECT id, source, line, max_tokens, throughput FROM runs ORDER BY id")
    assert [(row["source"], row["line"]) for row in found] == [
        ("results/petals.jsonl", None),
        ("a.tsv", 2),
        ("a.tsv", 3),
        ("a.tsv", 7),
        ("b.tsv", 1),
        ("c.jsonl", None),
    ]
    assert len({row["id"] for row in found}) == 6
    assert (found[1]["max_tokens"], found[1]["throughput"]) == (32, 22.5)
    (row,) = store.rows("SELECT setup, figures, details, system FROM runs WHERE source = 'b.tsv'")
    assert row == {"setup": "{}", "figures": "{}", "details": "{}", "system": None}


def test_nothing_is_added_of_nothing(store):
    store.add([])
    store.add_rows([])
    assert len(store) == 0
    assert store.keys("setup") == []


def test_many_batches_are_as_good_as_one(store, monkeypatch):
    monkeypatch.setattr(store_module, "_BATCH_BYTES", 2000)
    store.add(run(line=number) for number in range(1, 51))
    store.add_rows(
        RowLines(source=Path("a.tsv"), lines=range(start, start + 10), rows=[ROW] * 10)
        for start in range(1, 501, 10)
    )
    (counts,) = store.rows(
        "SELECT count(*) AS runs, count(DISTINCT id) AS ids, max(id) AS last, "
        "count(DISTINCT line) FILTER (source = 'a.tsv') AS lines FROM runs"
    )
    assert counts == {"runs": 550, "ids": 550, "last": 550, "lines": 500}


HOSTILE = (
    "<script>alert(1)</script>",
    "\x1b[31mred\x1b[0m",
    "two\nlines\ttab",
    "quote ' and \" and \\ and \\u0000",
    "nul\x00in it",
    "half \ud800 pair",
    "'); DROP TABLE runs; --",
    "✓ Ω \U0001f600",
    "",
    "null",
    "NaN",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts(store, text):
    printable = text.encode(errors="replace").decode()
    store.add([run(model=text, setup={text: text}, figures={text: 1.5}, details={text: [text]})])
    (row,) = store.rows("SELECT model, setup, details FROM runs")
    assert row["model"] == printable
    assert json.loads(row["setup"]) == {printable: printable}
    assert json.loads(row["details"]) == {printable: [printable]}
    assert store.keys("setup") == [printable]


@pytest.mark.parametrize(
    "name",
    ["a b", "quote'd", 'double"d', "back\\slash", "a.b", "*", "$", "Ω", "a/b", "~1", "0", ""],
)
def test_settings_and_figures_are_found_by_any_name(store, name):
    store.add([run(setup={name: "x", "other": "y"}, figures={name: 2.5, "other": 1.0})])
    column = store.column(name, option="--group-by")
    figure = store.figure(name, option="--figure")
    query = f"SELECT {column} AS c, {figure} AS f FROM runs"  # noqa: S608
    assert store.rows(query) == [{"c": "x", "f": 2.5}]


def test_columns_and_figures_by_their_own_names(store):
    store.add([run(throughput=2.0, setup={"device": "cpu"}, figures={"ttft_p99": 1.0})])
    assert store.column("num_processes", option="--group-by") == '"num_processes"'
    assert store.figure("throughput", option="--figure") == '"throughput"'
    with pytest.raises(ConfigError, match=r"--group-by: there is no column 'colour'; there are: "):
        store.column("colour", option="--group-by")
    assert "setup" in store.column("device", option="--group-by")
    with pytest.raises(ConfigError, match=r"no column 'devise'; did you mean device"):
        store.column("devise", option="--group-by")
    with pytest.raises(ConfigError, match=r"--figure: there is no figure 'device'.*ttft_p99"):
        store.figure("device", option="--figure")
    assert "throughput" in COLUMNS
    assert "details" not in COLUMNS


def test_bytes_in_file_names_that_are_no_text_are_shown_as_such(store):
    store.add([run(source=Path("r\udcff.jsonl"))])
    store.add_rows([RowLines(source=Path("r\udcff.tsv"), lines=[1], rows=[ROW])])
    names = [row["source"] for row in store.rows("SELECT source FROM runs ORDER BY id")]
    assert names == ["r\ufffd.jsonl", "r\ufffd.tsv"]


def test_its_folder_may_have_any_name_and_goes_with_it(tmp_path, monkeypatch):
    folder = tmp_path / "o'dd [a-z] {b} *"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with RunStore() as store:
        store.add([run()])
        store.add_rows([RowLines(source=Path("a.tsv"), lines=[1], rows=[ROW])])
        assert len(store) == 2
        assert list(folder.iterdir())
    assert not list(folder.iterdir())


def test_memory_is_limited_and_nothing_is_fetched(store):
    found = store.rows("SELECT name, value FROM duckdb_settings()")
    settings = {row["name"]: row["value"] for row in found}
    assert settings["autoinstall_known_extensions"] == "false"
    assert settings["memory_limit"] == "488.2 MiB"  # 512 MB
    assert "flexbench-report-" in settings["temp_directory"]
    with pytest.raises(FlexbenchError, match=r"could not be kept in .*: "):
        store.execute("SELECT * FROM st_read('x')")  # of an extension


def test_a_long_record_is_taken_in(store):
    store.add([run(details={"text": "x" * 20_000_000}), run()])
    (row,) = store.rows("SELECT length(CAST(details AS VARCHAR)) AS size FROM runs WHERE id = 1")
    assert row["size"] > 20_000_000
    assert len(store) == 2


def test_what_does_not_fit_into_its_memory_goes_to_the_disk(store, monkeypatch):
    store.execute("SET memory_limit = '120MB'")
    rows = [ROW] * 10_000
    store.add_rows(
        RowLines(source=Path(f"{name}.tsv"), lines=range(1, 10_001), rows=rows)
        for name in range(100)
    )
    (largest,) = store.rows(
        "SELECT max(nth) AS nth FROM (SELECT row_number() OVER (ORDER BY hash(id)) AS nth FROM runs)"
    )
    assert largest == {"nth": 1_000_000}
