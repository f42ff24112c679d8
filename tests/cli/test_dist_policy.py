"""`flexbench dist --policy auto` and `flexbench dist plan`, with a model of a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexbench.cli import app

SHORT = ("--prompt-len", 16, "--gen-len", 8)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch = _needed()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "80")
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def _needed() -> Any:
    pytest.importorskip("scipy", reason="it solves the linear programme")
    return pytest.importorskip("torch", reason="models are computed with torch")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _needed()  # this is made before all else
    from tests.integration.dist.conftest import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["dist", *map(str, arguments)])


def test_plan_shows_a_policy_and_runs_nothing(tiny, tmp_path):
    result = invoke("plan", "--model", tiny, *SHORT, "--max-batch", 6)
    assert result.exit_code == 0, result.output
    for word in (
        "Policy",
        "--percent 100 0 100 0 100 0",
        "Expected",
        "Bound by",
        "at most 6 prompts",
    ):
        assert word in " ".join(result.stdout.split())
    assert max(map(len, result.output.splitlines())) <= 80
    assert "Measuring layers" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["first", "after numbers", "last"])
def test_plan_may_stand_anywhere(where, tiny):
    options = [
        "--model",
        tiny,
        *SHORT,
        "--gpu-batch-size",
        3,
        "--num-gpu-batches",
        2,
        "--policy",
        "auto",
    ]
    numbers = ["--percent", 100, 0, 100, 0, 100, 0]
    arguments = {
        "first": ["plan", *options, *numbers],
        "after numbers": [*numbers, "plan", *options],
        "last": [*options, *numbers, "plan"],
    }[where]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "--gpu-batch-size 3 --num-gpu-batches 2 --percent 100 0 100 0 100 0" in shown


def test_auto_runs_what_it_chose_and_keeps_what_it_expected(tiny, tmp_path):
    result = invoke(
        "--model", tiny, *SHORT, "--policy", "auto", "--gpu-batch-size", 2, "--max-batch", 4
    )
    assert result.exit_code == 0, result.output
    assert "Expected and measured" in result.stdout
    record = json.loads((tmp_path / "results" / "dist.jsonl").read_text())
    configuration, search = record["configuration"], record["policy_search"]
    assert configuration["gpu_batch_size"] == 2
    assert configuration["percent"] == [100, 0, 100, 0, 100, 0]
    assert record["run"]["num_prompts"] <= 4
    assert search["predicted"]["num_prompts"] == record["run"]["num_prompts"]
    assert search["predicted"]["total_throughput"] > 0
    assert search["request"]["is_batch_fixed"] is True
    assert search["limits"]["cpu"] > 0
    assert CliRunner().invoke(app, ["report", "results/dist.tsv"]).exit_code == 0


def test_what_does_not_fit_into_memory_goes_to_disk(tiny, tmp_path):
    given = ("--model", tiny, *SHORT, "--gpu-batch-size", 4, "--num-gpu-batches", 4)
    whole = invoke("plan", *given)
    assert "--percent 100 0 100 0 100 0" in " ".join(whole.stdout.split())
    needed = json.loads(invoke_for_record(tmp_path, *given))["placement"][0]
    sizes = [needed[kind] for kind in ("weights", "cache", "activations", "buffers", "temporaries")]
    everything = sum(size["gpu"] + size["cpu"] for size in sizes)
    less = (everything - needed["cache"]["gpu"] / 2) / 2**30
    result = invoke("plan", *given, "--cpu-memory", f"{less:.9f}", "--offload-dir", tmp_path)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "--percent 100 0 100 0 100 0" not in shown
    assert "weights from disk" in shown


def invoke_for_record(folder: Path, *arguments: object) -> str:
    result = invoke(*arguments, "--no-log")
    assert result.exit_code == 0, result.output
    return (folder / "results" / "dist.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--cpu-memory", "0.00001"], "--cpu-memory: no policy fits into"),
        (["--policy", "auto", "--cpu-memory", "0.00001"], "--cpu-memory: no policy fits into"),
        (["plan", "--cpu-memory", "0.0"], "--cpu-memory: must be a number of GiB above 0"),
        (["plan", "--max-batch", 0], "--max-batch: must be a whole number of at least 1"),
        (["--max-batch", 4], "--max-batch: only --policy auto has use for it"),
        (["--cpu-memory", 4], "--cpu-memory: only --policy auto has use for it"),
        (["--policy", "best"], "--policy: unknown value 'best'; accepted: given, auto"),
        (["plot"], "unknown action 'plot'; accepted: plan"),
        (["plan", "plan"], "unexpected extra argument"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(arguments, message, tiny, tmp_path):
    result = invoke("--model", tiny, *SHORT, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "results").exists()


def test_a_gpu_has_to_be_there_to_be_limited(tiny):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = invoke("plan", "--model", tiny, *SHORT, "--gpu-memory", 1)
    assert result.exit_code == 2
    assert "--gpu-memory: there is no CUDA here" in result.stderr


def test_a_search_can_be_interrupted(tiny, monkeypatch, tmp_path):
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flexbench.dist.model.OptLM.generate", interrupt)
    result = invoke("plan", "--model", tiny, *SHORT)
    assert result.exit_code == 130
    assert "Stopped by Ctrl-C." in result.stderr
