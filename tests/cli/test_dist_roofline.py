"""`flexbench dist --roofline`: what it measures, shows, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="flexbench dist needs torch")

import torch
from typer.testing import CliRunner

from flexbench.cli import app
from flexbench.dist.roofline import measuring
from tests.integration.dist.conftest import write_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT model of a few kilobytes."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ceilings of arrays too small to say much, measured in a moment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("_ARRAY_BYTES", "_COPY_BYTES", "_DISK_BYTES"):
        monkeypatch.setattr(measuring, name, 2**20)
    monkeypatch.setattr(measuring, "_CPU_WIDTH", 64)
    monkeypatch.setattr(measuring, "_BUDGET_S", 0.0)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def invoke(*arguments: object) -> Any:
    load = ("--prompt-len", 16, "--gen-len", 4)
    return CliRunner().invoke(app, ["dist", *map(str, (*load, *arguments))])


def record_in(folder: Path) -> dict[str, Any]:
    (line,) = (folder / "results" / "dist.jsonl").read_text().splitlines()
    record: dict[str, Any] = json.loads(line)
    return record


def test_floors_and_times_are_shown_and_kept(tiny: Path, tmp_path: Path) -> None:
    everywhere = ("--percent", 30, 40, 30, 40, 30, 40, "--offload-dir", tmp_path / "offload")
    result = invoke("--model", tiny, "--roofline", *everywhere)

    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "Roofline" in result.stdout
    assert "Ceilings: memory" in result.stdout
    for phase in ("Ceilings before the run", "Ceilings after the run"):
        assert f"{phase}: done in" in result.stderr
    record = record_in(tmp_path)
    (stage,) = record["roofline"]["stages"]
    (observed,) = record["stages"]
    assert stage["rank"] == 0
    assert stage["disk_access"] == observed["disk_access"]
    assert stage["disk_access"] in ("direct", "page cache", "memory")
    assert stage["ceilings"]["num_threads"] == 1
    assert stage["ceilings"]["disk_read_bytes_per_s"] > 0
    lines = {line["what"]: line for line in stage["lines"]}
    measured = {
        "prefill": "prefill_compute_s", "decode": "decode_compute_s",
        "weight_load": "weight_load_s", "cache_load": "cache_load_s",
        "cache_store": "cache_store_s", "hidden": "hidden_s",
    }  # fmt: skip
    assert {what: line["measured_s"] for what, line in lines.items()} == {
        what: observed[name] for what, name in measured.items()
    }
    for line in lines.values():
        assert line["floor_s"] > 0
        assert line["fraction"] == pytest.approx(line["floor_s"] / line["measured_s"])
    for name in ("prefill", "decode", "weight_load"):
        assert record["figures"][f"{name}_roofline"] == pytest.approx(lines[name]["fraction"])
    # The measuring itself is neither in what the run held on disk, nor left there.
    (placed,) = record["placement"]
    kinds = ("weights", "cache", "activations")
    assert observed["disk_peak_bytes"] == sum(placed[kind]["disk"] for kind in kinds)
    assert list((tmp_path / "offload").iterdir()) == []


def test_compute_seconds_are_those_of_prefill_and_decoding(tiny: Path, tmp_path: Path) -> None:
    assert invoke("--model", tiny).exit_code == 0
    record = record_in(tmp_path)

    (stage,) = record["stages"]
    assert stage["compute_s"] == pytest.approx(
        stage["prefill_compute_s"] + stage["decode_compute_s"]
    )
    assert min(stage["prefill_compute_s"], stage["decode_compute_s"]) > 0
    assert stage["disk_access"] is None
    assert "roofline" not in record
    assert not any("roofline" in name for name in record["figures"])
    assert "ceilings" not in stage


def test_a_report_has_the_figures(tiny: Path) -> None:
    assert invoke("--model", tiny, "--roofline").exit_code == 0

    report = ["report", "results/dist.tsv", "--figure", "prefill_roofline", "--format", "json"]
    result = CliRunner().invoke(app, report)

    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["prefill_roofline_mean"] > 0


def test_of_a_projected_run_what_was_done_is_counted(tiny: Path, tmp_path: Path) -> None:
    result = invoke("--model", tiny, "--roofline", "--gen-len", 8, "--cut-gen-len", 4)
    assert result.exit_code == 0, result.output
    cut = record_in(tmp_path)["roofline"]["stages"][0]["lines"]
    (tmp_path / "results" / "dist.jsonl").unlink()
    assert invoke("--model", tiny, "--roofline").exit_code == 0
    whole = record_in(tmp_path)["roofline"]["stages"][0]["lines"]

    for one, other in zip(cut, whole, strict=True):
        assert (one["what"], one["flops"], one["num_bytes"]) == (
            other["what"], other["flops"], other["num_bytes"],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--dry-run",), "measures a run"),
        (("--stop", 2), "--stop leaves out"),
        (("--debug-mode", "breakdown"), "--debug-mode leaves out"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_what_cannot_be_counted_is_refused(
    arguments: tuple[object, ...], reason: str, tiny: Path, tmp_path: Path
) -> None:
    result = invoke("--model", tiny, "--roofline", *arguments)

    assert result.exit_code == 2
    assert f"--roofline: {reason}" in result.stderr or reason in result.stderr
    assert list(tmp_path.iterdir()) == []
