"""How near the estimates of `flexbench server-config` come to real Petals servers.

For each case, a model in random weights is written to a temporary folder, one of its blocks is
measured, a real server is started by `--launch`, and what was predicted is printed beside what the
server announces and its process takes. The goal is 5 % for weights and cache.

    .venv/bin/python benchmarks/server_estimate.py
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from flexbench.models.shapes import ModelShape

START_TIMEOUT_S = 300


@dataclass(frozen=True)
class Case:
    """A BLOOM of `hidden_size`, and how many of its blocks are served in which type."""

    hidden_size: int
    num_heads: int
    num_blocks: int
    dtype: str
    attn_cache_tokens: int


CASES = (
    Case(1024, 16, 12, "float32", 4096),
    Case(1024, 16, 24, "bfloat16", 16384),
    Case(2048, 16, 6, "float32", 4096),
)


def write_model(folder: Path, case: Case) -> None:
    """A BLOOM with random weights, as Petals reads it."""
    from flexbench.petals.model import SwarmModel
    from flexbench.petals.weights import write_blocks, write_client_shard, write_config
    from flexbench.petals_runtime.imports import torch

    shape = ModelShape(
        name="random",
        hidden_size=case.hidden_size,
        num_attention_heads=case.num_heads,
        num_hidden_layers=24,
        vocab_size=1000,
    )
    model = SwarmModel(shape=shape, dht_prefix="random", initial_peers=())
    dtype = getattr(torch, case.dtype)
    write_config(folder, model.to_bloom_config(), dtype)
    write_client_shard(folder, model.to_bloom_config(), dtype, 0)
    write_blocks(folder, model.to_bloom_config(), dtype, 0, range(24))


def serve(folder: Path, case: Case) -> dict[str, object]:
    """Estimate, measure and start a server, end it, and return its record."""
    output = folder / "server_config.jsonl"
    command = [
        *(str(Path(sys.executable).with_name("flexbench")), "server-config", str(folder)),
        *("--device", "cpu", "--torch-dtype", case.dtype, "--num-blocks", str(case.num_blocks)),
        *("--attn-cache-tokens", str(case.attn_cache_tokens), "--new-swarm"),
        *("--network", "100Mbit/s", "--measure", "--force", "--launch", "--quiet"),
        *("--output", str(output), "--format", "json"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        expires_at = time.monotonic() + START_TIMEOUT_S
        while not (output.exists() and output.read_text().endswith("\n")):
            if process.poll() is not None or time.monotonic() > expires_at:
                raise SystemExit(f"the server of {case} did not start")
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    record: dict[str, object] = json.loads(output.read_text())
    return record


def main() -> None:
    """Run all cases, and print their figures."""
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="fb-") as name:
            write_model(Path(name), case)
            comparison = serve(Path(name), case)["comparison"]
        print(case)
        assert isinstance(comparison, list)
        for figure in comparison:
            error = "" if figure["error"] is None else f"{figure['error']:+8.1%}"
            predicted, measured = figure["predicted"] or 0, figure["measured"] or 0
            print(f"  {figure['name']:24}{predicted:16,.0f}{measured:16,.0f} {error}")


if __name__ == "__main__":
    main()
