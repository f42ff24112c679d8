"""What `flexbench serving` takes, refuses and plans, and what a run against the dummy leaves."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexbench.cli import app

# 20 requests of 5 ms each, two at a time.
QUICK = ("--api", "dummy", "--ttft-ms", 5, "--itl-ms", 0, "--prompt-length", 16, "--max-new-tokens", 2,
         "--max-new-tokens-var", 0, "--num-clients", 2, "--min-requests", 20, "--num-requests-per-client", 1)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default --result-dir is relative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_", "TORCHELASTIC")):
            monkeypatch.delenv(name)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["serving", *map(str, arguments)])


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).replace("│", " ").split())


# --- help ----------------------------------------------------------------------------------------


def test_help_has_panels_and_the_options_of_a_client():
    general = plain(invoke("--help").output)
    for words in ("Load a serving endpoint", "What is measured", "Prompts", "Load", "Saturation", "Limits", "Results", "Several machines", "--num-clients", "--api-url"):  # fmt: skip
        assert words in general
    assert "--ttft-ms" not in general
    dummy = plain(invoke("--api", "dummy", "--help").output)
    assert "--ttft-ms" in dummy
    assert "--api-url" not in dummy


# --- plans ---------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_plan_and_leaves_nothing(tmp_path):
    done = invoke("--api", "dummy", "--num-clients", 1, 8, "--prompt-length", 100, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "100 ± 30 64 ± 19 1 client, 8 clients" in plain(done.output)
    assert left_in(tmp_path) == []


def test_a_dry_run_of_a_rate_and_of_a_search():
    rate = invoke("--api", "dummy", "--rate", 0.5, "--arrival", "poisson", "--dry-run")
    assert "0.5 requests/s, poisson" in plain(rate.output)
    search = invoke("--api", "dummy", "--saturation", "--dry-run")
    assert "search from 1 client" in plain(search.output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--num-clients", 1, "--rate", 2), "--rate: is another kind of load than --num-clients"),
        (("--num-clients", 0), "--num-clients"),
        (("--duration", "never"), "--duration"),
        (("--slo", "ttft:p98<1s"), "--slo"),
        (("--slo", "ttft:p99<1s", "--no-streaming"), "--slo"),
        (("--prompt-length", 0), "--prompt-length"),
        (("--capacity", 0), "--capacity"),
        (("--ttft-ms", -1), "--ttft-ms"),
        (("--api-url", "http://127.0.0.1"), "--api-url: is an option of --api openai"),
        (("--tp-size", 2), "--tp-size: is an option of --api vllm"),
        (("--prompt-text-source", "no/such.txt"), "there is no such file"),
        (("--nothing", 1), "--nothing"),
        (("--arrival", "sometimes"), "--arrival"),
        (("--max-error-rate", 2), "--max-error-rate"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path, arguments, words):
    done = invoke("--api", "dummy", *arguments, "--min-requests", 1)
    assert done.exit_code == 2, done.output
    assert words in plain(done.output)
    assert "Traceback" not in done.output
    assert left_in(tmp_path) == []


def test_a_client_that_does_not_exist(tmp_path):
    done = invoke("--api", "dumy", "--num-clients", 1)
    assert done.exit_code == 2
    assert "dumy" in done.output
    assert "dummy" in done.output


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/results"])
def test_a_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    done = invoke(*QUICK, "--result-dir", place)
    assert done.exit_code == 2
    assert done.output.splitlines()[-1].startswith("Error: --result-dir: ")


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httptools", None)
    done = invoke("--api", "openai", "--api-url", "http://127.0.0.1:9", "--num-clients", 1)
    assert done.exit_code == 2
    assert "pip install 'flexbench[serving]'" in done.output


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_shows_a_curve_and_keeps_its_points(tmp_path):
    done = invoke(*QUICK)
    assert done.exit_code == 0, done.output
    assert "clients" in done.output
    assert "TTFT = first content - sent" in plain(done.output)
    assert "Results: results/serving" in done.output
    left = left_in(tmp_path)
    (file,) = [name for name in left if re.search(r"/dummy-2-clients-[0-9a-f]{12}\.json$", name)]
    assert {"results/serving/serving.tsv", "results/serving/serving.jsonl"} < set(left)
    record = json.loads((tmp_path / file).read_text())
    assert record["status"] == "ok"
    assert record["figures"]["num_ok"] == 20
    # Timers of uvloop count whole milliseconds.
    assert record["figures"]["ttft"]["min"] > 0.0035
    assert len(record["requests"]["rows"]) == 20
    assert record["configuration"]["client"]["ttft_ms"] == 5.0

    again = invoke(*QUICK)
    assert again.exit_code == 0
    assert "1 of 1 points had been measured before (--force repeats)." in plain(again.output)
    assert left_in(tmp_path) == left


def test_a_quiet_run_says_nothing(tmp_path):
    done = invoke(*QUICK, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert "results/serving/serving.tsv" in left_in(tmp_path)


def test_failures_end_a_run_with_an_error(tmp_path):
    done = invoke(*QUICK, "--fail-rate", 1, "--warmup-requests", 0, "--duration", "20s")
    assert done.exit_code == 1
    assert re.search(r"Error: 2 clients: \d+ of \d+ requests failed; --max-error-rate is 0.5", done.output)  # fmt: skip
    assert "http_5xx" in done.output
    done = invoke(*QUICK, "--fail-rate", 1)
    assert done.exit_code == 1
    assert "Error: 2 clients: no warm-up request succeeded: 2 x http_5xx" in done.output


def test_names_of_deepspeedometer_are_understood(tmp_path):
    done = invoke(*QUICK, "--prompt_lenght_var", 0, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "--prompt-length-var" in done.output
    assert "16 2 2 clients" in plain(done.output)


def test_threads_send_a_load_too(tmp_path):
    done = invoke(*QUICK, "--use-threading", "--num-workers", 2)
    assert done.exit_code == 0, done.output


def test_a_search_says_where_the_dummy_saturates():
    # Two places, 20 ms each: 100 requests/s.
    done = invoke("--api", "dummy", "--capacity", 2, "--ttft-ms", 20, "--prompt-length", 16, "--max-new-tokens", 1,
                  "--max-new-tokens-var", 0, "--saturation", "--duration", "300ms", "--max-clients", 4)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Highest throughput: " in plain(done.output)
