"""The whole command against real servers: a service is started, searched, and gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

SHORT = (
    *("--prompt-length", "16", "--prompt-length-var", "0"),
    *("--max-new-tokens", "8", "--max-new-tokens-var", "0"),
)


def run_serving(folder: Path, *arguments: str) -> str:
    """Run the command; what it printed. Nothing of its process group is left."""
    command = [str(Path(sys.executable).parent / "flexbench"), "serving", *arguments]
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(
        [*command, "--result-dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    marks = (str(folder.parent), "vllm")
    left = [
        process.cmdline()
        for process in psutil.process_iter()
        if process.pid not in before and any(m in " ".join(process.cmdline()) for m in marks)
    ]
    assert left == []
    return done.stdout


def curve_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*-curve-*.json")
    curve: dict[str, Any] = json.loads(path.read_text())
    return curve


def points_in(folder: Path) -> list[dict[str, Any]]:
    names = [point["file"] for point in curve_in(folder)["points"]]
    return [json.loads((folder / name).read_text()) for name in names]


def test_one_command_finds_where_vllm_saturates(
    tmp_path: Path, tiny_model: str, vllm_command: str
) -> None:
    output = run_serving(
        tmp_path / "results",
        *("--api", "vllm", "--model", tiny_model, "--vllm-command", vllm_command),
        *("--vllm-args", "--enforce-eager --max-num-seqs 2 --max-model-len 512"),
        *("--saturation", "--max-clients", "4", "--duration", "1s"),
        *SHORT,
    )
    assert "Highest throughput:" in output
    curve = curve_in(tmp_path / "results")
    assert curve["saturation"]["highest_requests_per_s"] > 0
    assert {point["load"]["concurrency"] for point in curve["points"]} >= {1, 2, 4}
    for point in points_in(tmp_path / "results"):
        assert point["status"] == "ok"
        assert point["figures"]["num_failed"] == 0
        # The server's own count is what was asked for, and that of the prompt is the tokenizer's.
        assert point["figures"]["share_counted_by_server"] == 1
        assert point["figures"]["share_short_outputs"] == 0
        assert point["figures"]["share_other_prompt_length"] == 0
        assert point["service"]["version"]


def test_a_curve_of_transformers_serve(
    tmp_path: Path, tiny_model: str, transformers_serve: str
) -> None:
    run_serving(
        tmp_path / "results",
        *("--api-url", transformers_serve, "--model", tiny_model),
        *("--num-clients", "1", "2", "--min-requests", "6", "--num-requests-per-client", "1"),
        *SHORT,
    )
    points = points_in(tmp_path / "results")
    assert [point["figures"]["num_ok"] for point in points] == [6, 6]
    for point in points:
        assert point["figures"]["num_failed"] == 0
        assert 0 < point["figures"]["ttft"]["p50"] <= point["figures"]["e2e"]["p50"]
