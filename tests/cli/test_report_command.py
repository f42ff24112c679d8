"""`flexbench report` on small files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexbench.cli import app

HEADER = (
    "batch_size\tnum_micro_batches\tnum_processes\tsequence_length\tmax_tokens\tthroughput"
    "\tmean_latency\n"
)
ORIGINAL = "1\t1\t4\t256\t32\t20.0\t6.0\n1\t1\t4\t512\t32\t10.0\t12.5\n"
OURS = HEADER + "1\t1\t4\t256\t32\t24.0\t5.0\n"


@pytest.fixture
def files(tmp_path) -> list[str]:
    (tmp_path / "original.tsv").write_text(ORIGINAL)
    (tmp_path / "ours.tsv").write_text(OURS)
    return [str(tmp_path / "original.tsv"), str(tmp_path / "ours.tsv")]


def report(*arguments: str):
    return CliRunner().invoke(app, ["report", *arguments])


def test_files_with_and_without_header_are_grouped_together(files):
    result = report(*files, "--format", "json")
    assert result.exit_code == 0
    first, second = json.loads(result.stdout)
    assert first.items() >= {
        "table": "runs", "system": None, "model": None, "batch_size": 1, "num_micro_batches": 1,
        "num_processes": 4, "sequence_length": 256, "max_tokens": 32, "throughput_mean": 22.0,
        "throughput_min": 20.0, "throughput_max": 24.0, "throughput_median": 22.0,
        "mean_latency_mean": 5.5, "mean_latency_min": 5.0, "mean_latency_max": 6.0, "num_runs": 2,
    }.items()  # fmt: skip
    assert first["throughput_std"] == pytest.approx(8**0.5)
    assert first["throughput_ci_low"] < 22.0 < first["throughput_ci_high"]
    assert second["num_runs"] == 1
    assert second["throughput_mean"] == 10.0
    assert second["throughput_std"] is second["throughput_ci_low"] is None


def test_csv_and_markdown_say_the_same(files):
    rows = list(csv.DictReader(io.StringIO(report(*files, "--format", "csv").stdout)))
    assert [row["throughput_mean"] for row in rows] == ["22.0", "10.0"]
    lines = report(*files, "--format", "markdown").stdout.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("| batch |")]
    assert set(lines[head + 1]) == set("|-: ")
    assert lines[head + 2].startswith("| 1 | 1 | 4 | 256 | 32 | 22 |")
    assert lines[head + 3].startswith("| 1 | 1 | 4 | 512 | 32 | 10 |")


def test_the_table_fits_into_80_columns(files):
    result = report(*files)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in result.stdout
    assert ["1", "1", "4", "256", "32", "22"] in [line.split()[:6] for line in lines]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1\t1\t4\t256\t32\t20.0", "expected 7 tab-separated columns, found 6"),
        ("1\t1\t4\t256\t32\t20.0\t6.0\t7", "expected 7 tab-separated columns, found 8"),
        ("1\t1\tfour\t256\t32\t20.0\t6.0", "num_processes must be a whole number of at least 1, not 'four'"),
        ("0\t1\t4\t256\t32\t20.0\t6.0", "batch_size must be a whole number of at least 1, not '0'"),
        ("1\t1\t4\t256\t-1\t20.0\t6.0", "max_tokens must be a whole number of at least 0, not '-1'"),
        ("1\t1\t4\t256\t32\tnan\t6.0", "throughput must be a finite number of at least 0, not 'nan'"),
        ("1\t1\t4\t256\t32\t20.0\tinf", "mean_latency must be a finite number of at least 0, not 'inf'"),
        ("1\t1\t4\t256\t32\t20.0\t-6.0", "mean_latency must be"),
        ("1 1 4 256 32 20.0 6.0", "expected 7 tab-separated columns, found 1"),
        (HEADER.replace("batch_size", "batch").strip(), "batch_size must be"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_reported_with_file_and_line(line, problem, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(HEADER + "1\t1\t4\t256\t32\t24.0\t5.0\n" + line + "\n")
    result = report(str(path))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"{path}:3: " in result.stderr
    assert problem in result.stderr


def test_skipped_lines_are_counted(files):
    Path(files[0]).write_text(ORIGINAL + "nonsense\n\n1\t2\n")
    result = report(*files, "--skip-invalid", "--format", "json")
    assert result.exit_code == 0
    assert [group["num_runs"] for group in json.loads(result.stdout)] == [2, 1]
    assert result.stderr.splitlines()[0] == "Skipped 2 malformed lines and records:"
    assert "original.tsv:3: expected 7 tab-separated columns, found 1" in result.stderr


def test_skipped_lines_are_counted_even_when_nothing_is_left(tmp_path):
    (tmp_path / "rows.tsv").write_text("nonsense\n")
    result = report(str(tmp_path / "rows.tsv"), "--skip-invalid")
    assert result.exit_code == 2
    assert result.stderr.startswith("Skipped 1 malformed line or record:\n")
    assert "no runs in there" in result.stderr


def test_means_lie_between_the_smallest_and_the_largest(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(3 * "1\t1\t1\t1\t1\t0.1\t1e308\n")
    group = json.loads(report(str(path), "--format", "json").stdout)[0]
    assert group["throughput_mean"] == 0.1
    assert group["mean_latency_mean"] == 1e308


@pytest.mark.parametrize("content", ["", HEADER, "\n"])
def test_no_runs_is_an_error(content, tmp_path):
    (tmp_path / "empty.tsv").write_text(content)
    result = report(str(tmp_path / "empty.tsv"))
    assert result.exit_code == 2
    assert "empty.tsv: no runs in there" in result.stderr


def test_files_that_cannot_be_read_are_errors(tmp_path):
    assert "cannot be read: No such file" in report(str(tmp_path / "no.tsv")).stderr
    assert "no runs in there" in report(str(tmp_path)).stderr


def test_bytes_that_are_no_text_make_their_line_malformed(tmp_path):
    path = tmp_path / "binary.tsv"
    path.write_bytes(OURS.encode() + b"1\t1\t\xff\t256\t32\t20.0\t6.0\n" + ORIGINAL.encode())
    result = report(str(path))
    assert result.exit_code == 2
    assert f"{path}:3: num_processes must be a whole number of at least 1" in result.stderr
    result = report(str(path), "--skip-invalid", "--format", "json")
    assert [group["num_runs"] for group in json.loads(result.stdout)] == [2, 1]


def test_windows_line_ends_and_a_missing_last_one_are_fine(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes(OURS.replace("\n", "\r\n").rstrip().encode())
    assert json.loads(report(str(path), "--format", "json").stdout)[0]["throughput_mean"] == 24.0


def test_joined_files_and_byte_order_marks_are_fine(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("\ufeff" + OURS + OURS, encoding="utf-8")
    assert json.loads(report(str(path), "--format", "json").stdout)[0]["num_runs"] == 2


def test_reports_do_not_change_their_input(files):
    before = [Path(file).read_bytes() for file in files]
    report(*files)
    assert [Path(file).read_bytes() for file in files] == before


def server_record(**changes):
    record = {
        "schema_version": 1,
        "system": "server-config",
        "status": "ok",
        "predicted": {"model": "bigscience/bloom-560m", "num_blocks": 12},
        "comparison": [
            {"name": "Weights", "unit": "bytes", "predicted": 1030.0, "measured": 1000.0, "error": 0.03},
            {"name": "Throughput announced", "unit": "tokens/s", "predicted": None, "measured": 50.0, "error": None},
        ],
    }  # fmt: skip
    return json.dumps(record | changes) + "\n"


BLOCKS = {"model": "bloom", "num_blocks": float("inf")}
NOT_TOLD = dict.fromkeys(
    ["machine", "device", "dtype", "quantization", "cache_tokens", "adapter_bytes", "is_relayed"]
)
FIGURE = {"name": "W", "unit": "bytes", "predicted": 1.0, "measured": 1.0, "error": 0.0}


def test_predicted_beside_measured(tmp_path, monkeypatch):
    path = tmp_path / "server_config.jsonl"
    weights = {"name": "Weights", "unit": "bytes", "predicted": 990.0, "measured": 1000.0, "error": -0.01}  # fmt: skip
    path.write_text(
        server_record() + server_record(comparison=[weights]) + server_record(status="failed")
    )
    before = path.read_bytes()
    result = report(str(path), "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [
        {"table": "predictions", "model": "bigscience/bloom-560m", "num_blocks": 12,
         **NOT_TOLD, "figure": "Weights", "unit": "bytes",
         "predicted": 1010.0, "measured": 1000.0, "error": pytest.approx(0.01), "num_runs": 2},
        {"table": "predictions", "model": "bigscience/bloom-560m", "num_blocks": 12,
         **NOT_TOLD, "figure": "Throughput announced",
         "unit": "tokens/s", "predicted": None, "measured": 50.0, "error": None, "num_runs": 1},
    ]  # fmt: skip
    table = report(str(path)).stdout
    assert "+1.0%" in table
    assert max(map(len, table.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "120")
    assert "bigscience/bloom-560m" in report(str(path)).stdout
    assert report(str(path), "--format", "csv").stdout.count("\n") == 3
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a record: it is not JSON (column 2)"),
        ("[" * 100_000, "it is not JSON that can be read"),
        ("[]", "it must be a JSON object, not a list"),
        (server_record(schema_version=7), "schema_version 7"),
        (server_record(predicted={}), "'model' is missing"),
        (server_record(predicted=3), "predicted must be a JSON object, not 3"),
        (server_record(predicted=BLOCKS), "num_blocks must be a whole number of at least 1, not Infinity"),
        (server_record(predicted=BLOCKS).replace("Infinity", "1e400"), "num_blocks must be"),
        (server_record(predicted=BLOCKS | {"num_blocks": 12.5}), "num_blocks must be a whole number of at least 1, not 12.5"),
        (server_record(predicted=BLOCKS | {"num_blocks": True}), "num_blocks must be a whole number of at least 1, not true"),
        (server_record(predicted=BLOCKS | {"num_blocks": "12"}), "num_blocks must be"),
        (server_record(predicted=BLOCKS | {"model": 5}), "model must be a text, not 5"),
        (server_record(predicted=BLOCKS | {"model": "\ud800"}), "model must be a text"),
        (server_record(comparison=[FIGURE | {"predicted": "many"}]), 'predicted must be a finite number, not "many"'),
        (server_record(comparison=[FIGURE | {"measured": float("nan")}]), "measured must be a finite number, not NaN"),
        (server_record(comparison=[FIGURE | {"error": 10**400}]), "error must be a finite number, not 1000"),
        (server_record(comparison=[FIGURE | {"name": {}}]), "name must be a text, not an object"),
        (server_record(comparison=[7]), "each of comparison must be a JSON object, not 7"),
        (server_record(comparison=3), "comparison must be a list, not 3"),
        ("{}", "'schema_version' is missing"),
    ],
)  # fmt: skip
def test_malformed_records_are_named_or_counted(tmp_path, line, reason):
    path = tmp_path / "server_config.jsonl"
    path.write_text(server_record() + line.rstrip("\n") + "\n")
    result = report(str(path))
    assert result.exit_code == 2
    assert f"{path}:2" in result.stderr
    assert reason in result.stderr
    skipped = report(str(path), "--skip-invalid")
    assert skipped.exit_code == 0
    assert "Skipped 1 malformed line or record:" in skipped.stderr
    assert reason in skipped.stderr


def test_runs_and_predictions_are_two_tables(tmp_path, files):
    path = tmp_path / "server_config.jsonl"
    path.write_text(server_record())
    records = json.loads(report(str(path), *files, "--format", "json").stdout)
    assert [record["table"] for record in records] == 2 * ["runs"] + 2 * ["predictions"]
    path.write_text(server_record(status="failed"))
    assert "server_config.jsonl: no runs in there" in report(str(path)).stderr


def test_names_do_not_end_the_cells_of_a_markdown_table(tmp_path):
    path = tmp_path / "server_config.jsonl"
    path.write_text(
        server_record(predicted={"model": "a|b\r\nc", "num_blocks": 12})
        + server_record(predicted={"model": "d", "num_blocks": 12})
    )
    lines = report(str(path), "--format", "markdown").stdout.splitlines()
    assert any(line.startswith("| a\\|b c | Weights |") for line in lines)


def test_means_of_large_figures_are_finite(tmp_path):
    path = tmp_path / "server_config.jsonl"
    path.write_text(3 * server_record(comparison=[FIGURE | {"predicted": 1.7e308}]))
    assert json.loads(report(str(path), "--format", "json").stdout)[0]["predicted"] == 1.7e308
