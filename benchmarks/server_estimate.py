"""How near the estimates of `flexbench server-config` come to real Petals servers.

For each case a model in random weights is written to a temporary folder, one of its blocks is
measured, and a real server is started by `--launch`. A client then fills its attention cache. What
was predicted is printed beside what the server announces and its process takes. The goal is 5 % for
weights and cache.

    .venv/bin/python benchmarks/server_estimate.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flexbench.models.shapes import ModelShape

START_TIMEOUT_S = 300
NUM_LAYERS = 24
# Petals' longest session of a BLOOM, and how much of it a client sends at a time.
SESSION_TOKENS = 2048
STEP_TOKENS = 128
# Kept until the end: hivemind's objects complain when they are collected.
MODELS: list[Any] = []


@dataclass(frozen=True)
class Case:
    """A BLOOM of `hidden_size`, and how many of its blocks are served in which type."""

    hidden_size: int
    num_heads: int
    num_blocks: int
    dtype: str
    attn_cache_tokens: int


CASES = (
    Case(1024, 16, 8, "float32", 4096),
    Case(1024, 16, 12, "bfloat16", 8192),
    Case(2048, 16, 4, "float32", 4096),
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
        num_hidden_layers=NUM_LAYERS,
        vocab_size=1000,
    )
    config = SwarmModel(shape=shape, dht_prefix="random", initial_peers=()).to_bloom_config()
    dtype = getattr(torch, case.dtype)
    write_config(folder, config, dtype)
    write_client_shard(folder, config, dtype, 0)
    write_blocks(folder, config, dtype, 0, range(NUM_LAYERS))


@contextmanager
def server(folder: Path, case: Case) -> Iterator[tuple[dict[str, Any], psutil.Process]]:
    """Estimate, measure and start a server: its record, and its process while the block runs."""
    output = folder / "server_config.jsonl"
    command = [
        *(str(Path(sys.executable).with_name("flexbench")), "server-config", str(folder)),
        *(
            "--device",
            "cpu",
            "--torch-dtype",
            case.dtype,
            "--block-indices",
            f"0:{case.num_blocks}",
        ),
        *("--attn-cache-tokens", str(case.attn_cache_tokens), "--new-swarm", "--dht-prefix", "b"),
        *("--network", "100Mbit/s", "--measure", "--force", "--launch", "--quiet"),
        *("--output", str(output), "--format", "json"),
    ]
    # Large pieces are to be apart from small ones: then memory tells what the cache takes.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | allocator)
    try:
        expires_at = time.monotonic() + START_TIMEOUT_S
        while not (output.exists() and output.read_text().endswith("\n")):
            if process.poll() is not None or time.monotonic() > expires_at:
                raise SystemExit(f"the server of {case} did not start")
            time.sleep(0.2)
        workers = psutil.Process(process.pid).children(recursive=True)
        titles = {" ".join(worker.cmdline()).strip(): worker for worker in reversed(workers)}
        yield json.loads(output.read_text()), titles["flexbench: server"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def fill_cache(folder: Path, case: Case, record: dict[str, Any], process: psutil.Process) -> int:
    """Bytes by which the server's memory grows when sessions fill its attention cache."""
    from flexbench.petals_runtime.imports import DistributedBloomForCausalLM, torch

    peers = record["measured"]["visible_addresses"]
    model = DistributedBloomForCausalLM.from_pretrained(
        str(folder), initial_peers=peers, dht_prefix="b", torch_dtype=getattr(torch, case.dtype)
    )
    MODELS.append(model)
    blocks = model.transformer.h[: case.num_blocks]
    hidden = torch.zeros(1, STEP_TOKENS, case.hidden_size, dtype=getattr(torch, case.dtype))

    def fill(num_sessions: int) -> int:
        with torch.inference_mode(), ExitStack() as sessions:
            for _ in range(num_sessions):
                opened = blocks.inference_session(max_length=SESSION_TOKENS)
                session = sessions.enter_context(opened)
                for _ in range(SESSION_TOKENS // STEP_TOKENS):
                    session.step(hidden)
            return int(process.memory_info().rss)

    # What is needed besides the cache is there with the first session.
    num_sessions = case.attn_cache_tokens // SESSION_TOKENS
    one, all_of_them = fill(1), fill(num_sessions)
    return (all_of_them - one) * num_sessions // (num_sessions - 1)


def main() -> None:
    """Run all cases, and print their figures."""
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="fb-") as name:
            write_model(Path(name), case)
            with server(Path(name), case) as (record, process):
                filled = fill_cache(Path(name), case, record, process)
        print(case)
        for figure in record["comparison"]:
            show(figure["name"], figure["predicted"], figure["measured"])
        show("Memory taken by cache", record["predicted"]["cache_bytes"], filled)


def show(name: str, predicted: float | None, measured: float | None) -> None:
    """One line: predicted, measured, and the error as a share of the latter."""
    if predicted is None or not measured:
        print(f"  {name:24} not known")
    else:
        error = predicted / measured - 1
        print(f"  {name:24}{predicted:16,.0f}{measured:16,.0f} {error:+8.1%}", flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    for started in psutil.Process().children(recursive=True):
        started.kill()
    os._exit(0)  # see MODELS
