"""`flexbench report` on results of all commands: comparisons, gates, formats, files."""

from __future__ import annotations

import csv
import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexbench.cli import app
from tests.unit.report.reading.samples import (
    append,
    dist_record,
    petals_record,
    server_record,
    serving_record,
    write_lines,
    write_point,
)

needs_plots = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("jinja2", "plotext", "vl_convert")),
    reason="needs the plots extra",
)


def report(*arguments: str | Path):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def petals_runs(folder: Path, *walls_s: float, **changes) -> Path:
    """Runs of one configuration: 128 tokens in so many seconds each."""
    folder.mkdir(exist_ok=True)
    for number, wall_s in enumerate(walls_s):
        moment = f"2026-01-02T03:04:{number:02}.000+00:00"
        append(folder / "petals.tsv", petals_record(wall_s=wall_s, started_at=moment, **changes))
    return folder


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with results of all commands."""
    folder = petals_runs(tmp_path / "results", 4.0, 4.2)
    append(folder / "dist.tsv", dist_record())
    append(folder / "dist.tsv", dist_record(is_projected=True))
    (folder / "serving").mkdir()
    write_point(folder / "serving", serving_record())
    write_lines(folder / "server_config.jsonl", server_record())
    (folder / "old.tsv").write_text("1\t1\t4\t256\t32\t20.0\t6.0\n")
    return folder


def test_a_folder_with_results_of_all_commands_is_one_report(results):
    result = report(results, "--format", "json")
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout)
    runs = [(one["system"], one["num_runs"]) for one in records if one["table"] == "runs"]
    assert sorted(runs, key=str) == sorted(
        [("petals", 2), ("dist", 1), ("dist", 1), ("serving", 1), (None, 1)], key=str
    )
    assert sum(one["table"] == "predictions" for one in records) == 1


def test_every_format_can_be_written_to_a_file(results, tmp_path):
    for name in ("table", "markdown", "csv", "json"):
        path = tmp_path / "made" / f"report.{name}"
        result = report(results, "--format", name, "--output", path)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "petals" in path.read_text()
    assert json.loads((tmp_path / "made" / "report.json").read_text())


def test_reports_do_not_change_their_input(results, tmp_path):
    def state() -> dict[Path, tuple[bytes, int]]:
        files = (path for path in results.rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = state()
    assert report(results, "--baseline", results, "--allow-mixed").exit_code == 0
    assert state() == before
    for paths, output in (
        ([results / "petals.tsv"], results / "petals.tsv"),
        ([results], results / "dist.jsonl"),
        ([results / "petals.tsv"], results / "petals.jsonl"),  # which is read beside it
        (
            [results / "old.tsv", "--baseline", results / "serving"],
            results / "serving" / "serving.tsv",
        ),
    ):
        refused = report(*paths, "--output", output)
        assert refused.exit_code == 2
        assert "one of the files to read" in refused.stderr
        assert state() == before


# --- comparison ---


def test_two_runs_of_the_same_configuration_compare_as_equal(tmp_path):
    old, new = petals_runs(tmp_path / "old", 4.0), petals_runs(tmp_path / "new", 4.1)
    result = report(new, "--baseline", old, "--format", "json")
    assert result.exit_code == 0, result.output
    throughput, latency = json.loads(result.stdout)
    assert throughput["table"] == "comparison"
    assert throughput["ratio"] == pytest.approx(4.0 / 4.1)
    assert "equal" in throughput["verdict"]
    assert "equal" in latency["verdict"]


def test_a_slowed_run_is_slower_and_ends_with_exit_code_3(tmp_path):
    old, new = petals_runs(tmp_path / "old", 4.0), petals_runs(tmp_path / "new", 6.0)
    result = report(new, "--baseline", old)
    assert result.exit_code == 3
    assert "slower" in result.stdout
    assert result.stderr == ""  # it is said once, below the table
    quiet = report(new, "--baseline", old, "--format", "csv")
    assert quiet.exit_code == 3
    assert "slower" in quiet.stderr or "worse" in quiet.stderr
    assert report(old, "--baseline", new).exit_code == 0
    assert report(new, "--baseline", old, "--max-regression", "60%").exit_code == 0


def test_a_difference_within_the_noise_of_repeats_is_no_regression(tmp_path):
    old = petals_runs(tmp_path / "old", 3.0, 4.0, 5.0, 3.5, 4.5)
    new = petals_runs(tmp_path / "new", 4.9, 3.6, 5.4, 4.0, 4.4)
    assert report(new, "--baseline", old).exit_code == 0
    steady = petals_runs(tmp_path / "steady", 4.0, 4.01, 3.99, 4.0, 4.0)
    slower = petals_runs(tmp_path / "slower", 4.6, 4.61, 4.59, 4.6, 4.6)
    assert report(slower, "--baseline", steady).exit_code == 3


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"machine": {"os": "Linux", "cpu": "Other CPU", "num_cpus": 64, "gpus": []}}, "machine"),
        ({"model": petals_record()["model"] | {"name": "facebook/opt-30b"}}, "model"),
    ],
)
def test_runs_that_cannot_be_compared_are_not(tmp_path, changes, column):
    old, new = petals_runs(tmp_path / "old", 4.0), petals_runs(tmp_path / "new", 4.0, **changes)
    result = report(new, "--baseline", old)
    assert result.exit_code == 2
    assert column in result.stderr
    assert "--allow-mixed" in result.stderr
    allowed = report(new, "--baseline", old, "--allow-mixed", "--format", "json")
    assert allowed.exit_code == 0
    assert {row["mixed"] for row in json.loads(allowed.stdout)} == {True}


def test_results_compared_with_themselves_or_a_copy_are_equal(tmp_path):
    old = petals_runs(tmp_path / "old", 4.0)
    shutil.copytree(old, tmp_path / "copy")
    for new in (old, tmp_path / "copy"):
        result = report(new, "--baseline", old, "--format", "json")
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)
        assert {(row["ratio"], row["verdict"]) for row in rows} == {(1.0, "equal")}


def test_a_baseline_within_the_folder_is_not_compared_with_itself(tmp_path):
    petals_runs(tmp_path / "old", 4.0)
    petals_runs(tmp_path / "new", 6.0)
    result = report(tmp_path, "--baseline", tmp_path / "old", "--format", "json")
    assert result.exit_code == 3
    assert "Left out of the new runs: 1 run in files of the baseline." in result.stderr
    assert {row["new_runs"] for row in json.loads(result.stdout)} == {1}


def test_nothing_in_common_is_wrong_input(tmp_path):
    old = petals_runs(tmp_path / "old", 4.0)
    (tmp_path / "new").mkdir()
    append(tmp_path / "new" / "dist.tsv", dist_record())
    result = report(tmp_path / "new", "--baseline", old)
    assert result.exit_code == 2
    assert "--baseline" in result.stderr


@pytest.mark.parametrize("share", ["", "x", "-1%", "100%", "1.0", "nan", "5%%"])
def test_the_accepted_regression_must_be_a_share(results, share):
    result = report(results, "--baseline", results, f"--max-regression={share}")
    assert result.exit_code == 2
    assert "--max-regression: must be a share" in result.stderr


# --- what is selected, and how ---


def test_averages_over_what_differs_are_refused_unless_allowed(results):
    result = report(results, "--filter", "system=dist", "--group-by", "model")
    assert result.exit_code == 2
    assert "measured" in result.stderr
    assert "projected" in result.stderr
    allowed = report(
        results,
        "--filter",
        "system=dist",
        "--group-by",
        "model",
        "--allow-mixed",
        "--format",
        "json",
    )
    (row,) = json.loads(allowed.stdout)
    assert (row["num_runs"], row["mixed"]) == (2, True)
    apart = report(
        results, "--filter", "system=dist", "--group-by", "model,basis", "--format", "json"
    )
    assert [row["num_runs"] for row in json.loads(apart.stdout)] == [1, 1]


def test_filters_hold_for_all_tables(results):
    rows = list(
        csv.DictReader(
            io.StringIO(report(results, "--filter", "system=petals", "--format", "csv").stdout)
        )
    )
    assert {row["system"] for row in rows} == {"petals"}
    servers = json.loads(
        report(results, "--filter", "system=server-config", "--format", "json").stdout
    )
    assert {row["table"] for row in servers} == {"predictions"}
    nothing = report(results, "--filter", "num_processes>1000")
    assert nothing.exit_code == 2
    assert "no runs in there that are selected" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "colour=red"], "--filter: there is no column 'colour'"),
        (["--filter", "nonsense"], "--filter"),
        (["--group-by", "colour"], "--group-by"),
        (["--sort", "colour"], "--sort"),
        (["--figure", "colour"], "--figure"),
        (["--stat", "colour"], "--stat"),
        (["--plot", "colour"], "--plot: there is no plot 'colour'; there are: throughput-latency"),
        (["--plot", "all", "--format", "csv"], "--plot"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_words_that_mean_nothing_are_answered_with_those_that_do(results, arguments, message):
    result = report(results, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_output_that_cannot_be_written_is_said(results, tmp_path):
    (tmp_path / "file").touch()
    result = report(results, "--output", tmp_path / "file" / "report.txt")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert report(results, "--output", tmp_path).exit_code == 2


def test_failed_runs_are_counted_and_in_no_figure(tmp_path):
    folder = petals_runs(tmp_path / "results", 4.0)
    failed = petals_record(status="failed", error="lost", started_at="2026-02-02T00:00:00+00:00")
    append(folder / "petals.tsv", failed)
    result = report(folder)
    assert result.exit_code == 0
    assert "Records of runs that failed, which are in no figure: 1." in result.stdout
    assert [row["num_runs"] for row in json.loads(report(folder, "--format", "json").stdout)] == [1]


# --- pictures and the page ---


@needs_plots
def test_plots_are_drawn_in_the_terminal_and_saved_as_files(results, tmp_path):
    drawn = report(results, "--plot", "throughput-latency")
    assert drawn.exit_code == 0, drawn.output
    assert max(map(len, drawn.stdout.splitlines())) <= 80
    saved = report(results, "--save-plots", tmp_path / "plots")
    assert saved.exit_code == 0, saved.output
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert any(name.endswith(".png") for name in names)
    assert {Path(name).stem for name in names if name.endswith(".svg")} == {
        Path(name).stem for name in names if name.endswith(".png")
    }
    assert any(name.startswith("timeline") for name in names)


@needs_plots
def test_the_page_is_one_file_with_everything(results, tmp_path):
    hostile = petals_record(started_at="2026-03-03T00:00:00+00:00")
    hostile["model"] = hostile["model"] | {"name": "<script>alert(1)</script>"}
    append(results / "<img src=x onerror=alert(2)>.tsv", hostile)
    result = report(results, "--format", "html", "--output", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page
    assert 'http-equiv="Content-Security-Policy"' in page
    assert "flexbench petals" in page
    assert "2 servers" in page
    assert ' src="http' not in page


@needs_plots
def test_a_page_tells_the_verdict_of_a_comparison(tmp_path):
    old, new = petals_runs(tmp_path / "old", 4.0), petals_runs(tmp_path / "new", 6.0)
    result = report(
        new, "--baseline", old, "--format", "html", "--output", tmp_path / "report.html"
    )
    assert result.exit_code == 3
    assert "slower" in (tmp_path / "report.html").read_text()
