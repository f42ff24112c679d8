"""Does the harness change what it measures?

On one private swarm, one client of the harness and a bare loop around the same generate call take
turns, request by request, each in a process of its own. Prints both medians and the median of the
pairs' ratios. The goal is a ratio within 1.02.

    .venv/bin/python benchmarks/harness_overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from flexbench.core.processes import Crew, Deadline, Item, Ready, Worker, WorkerChannel
from flexbench.core.progress import Silence
from flexbench.petals.client import client_process
from flexbench.petals.config import PetalsConfig
from flexbench.petals.measurement import Load
from flexbench.petals.model import SwarmModel
from flexbench.petals.plan import make_plan
from flexbench.petals.swarm import open_swarm

TIMEOUT_S = 300.0


class Turns:
    """Stands for both the harness's release and its queue: one request, then the other's turn."""

    def __init__(self, channel: WorkerChannel) -> None:
        self._channel = channel

    def wait(self) -> None:
        """Wait for the next turn."""
        self._channel.release.wait()
        self._channel.release.clear()

    def put(self, latency: float) -> None:
        """Report a request, then wait for the next turn."""
        self._channel.queue.put(float(latency))
        self.wait()


def harness_client(channel: WorkerChannel, model: SwarmModel, load: Load) -> None:
    """The client that `flexbench petals` runs."""
    turns = Turns(channel)
    client_process(
        channel.ready,
        turns,
        model,
        load.num_micro_batches,
        load.batch_size,
        load.sequence_length,
        load.max_tokens,
        0,
        turns,
    )


def bare_loop(channel: WorkerChannel, model: SwarmModel, load: Load) -> None:
    """What somebody would write to time Petals without a harness."""
    import torch

    from flexbench.petals_runtime.imports import DistributedBloomForCausalLM

    torch.set_num_threads(1)
    client = DistributedBloomForCausalLM.from_pretrained(
        model.weights_folder, config=model.to_bloom_config(), torch_dtype=torch.float32
    )
    client.generation_config.eos_token_id = None
    client.generation_config.pad_token_id = None
    prompt = torch.randint(model.shape.vocab_size, (load.batch_size, load.sequence_length))
    client.generate(prompt, max_new_tokens=1, do_sample=False)
    channel.ready.set()
    turns = Turns(channel)
    turns.wait()
    while True:
        started_at = time.perf_counter()
        client.generate(prompt, max_new_tokens=load.max_tokens, do_sample=False)
        turns.put(time.perf_counter() - started_at)


def next_of(crew: Crew, worker: Worker, kind: type[Any]) -> Any:
    """The next message of this kind from this worker."""
    deadline = Deadline(TIMEOUT_S, lambda: f"{worker.name} said nothing for {TIMEOUT_S:.0f} s")
    while True:
        sender, message = crew.next_message(deadline)
        if sender is worker and isinstance(message, kind):
            return message


def take_turn(crew: Crew, worker: Worker) -> float:
    """Let the worker do one request; its latency in seconds."""
    crew.release([worker])
    latency: float = next_of(crew, worker, Item).payload
    return latency


def run_pairs(crew: Crew, model: SwarmModel, load: Load) -> list[tuple[float, float]]:
    """Latencies of harness and bare loop, one pair for each request."""
    harness = crew.start("harness client", harness_client, model, load)
    next_of(crew, harness, Ready)
    bare = crew.start("bare loop", bare_loop, model, load)
    next_of(crew, bare, Ready)
    pairs = []
    for number in range(load.num_micro_batches - 1):
        # Whoever comes second might profit from the first: take turns at that, too.
        order = (harness, bare) if number % 2 else (bare, harness)
        latencies = {worker: take_turn(crew, worker) for worker in order}
        pairs.append((latencies[harness], latencies[bare]))
    return pairs


def main() -> None:
    """Alternate, and print."""
    parser = argparse.ArgumentParser(description="Latency in the harness against a bare loop.")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args()
    load = Load(
        num_processes=1,
        num_micro_batches=args.pairs + 1,
        batch_size=1,
        sequence_length=args.sequence_length,
        max_tokens=args.max_tokens,
    )
    config = PetalsConfig(sequence_lengths=(load.sequence_length,), max_tokens=(load.max_tokens,))
    with open_swarm(make_plan(config), progress=Silence()) as swarm:
        pairs = run_pairs(swarm.crew, swarm.model, load)
    ratios = [harness / bare for harness, bare in pairs]
    print(f"harness:   median {statistics.median(pair[0] for pair in pairs):.4f} s")
    print(f"bare loop: median {statistics.median(pair[1] for pair in pairs):.4f} s")
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"ratio:     median {statistics.median(ratios):.3f} of {len(ratios)} pairs "
        f"(middle half {low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()
