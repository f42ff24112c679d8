"""What the tests let worker processes do; here, because workers import their function by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from flexbench.core.processes import WorkerChannel


def report_and_finish(channel: WorkerChannel, *items: Any) -> None:
    channel.ready.set()
    channel.release.wait()
    channel.queue.put(channel.release.payload)
    for item in items:
        channel.queue.put(item)


def fail(_channel: WorkerChannel, message: str) -> None:
    print("about to fail", flush=True)
    raise RuntimeError(message)


def report_then_kill_itself(channel: WorkerChannel, signal_number: int) -> None:
    channel.queue.put("last words")
    os.kill(os.getpid(), signal_number)
    time.sleep(60)


def exit_silently(_channel: WorkerChannel) -> None:
    os._exit(7)


def wait_for_ever(channel: WorkerChannel) -> None:
    channel.ready.set()
    time.sleep(3600)


def start_a_stubborn_child(channel: WorkerChannel) -> None:
    """Start a program that ignores SIGTERM, report its process id, and wait."""
    child = subprocess.Popen([sys.executable, "-c", _STUBBORN], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    channel.queue.put((os.getpid(), child.pid))
    signal.pause()


_STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(3600)
"""


def leave_a_temporary_file(channel: WorkerChannel) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(delete=False) as file:
        channel.queue.put(file.name)


class FailsToArrive:
    """Can be sent to a worker, but not received."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_refuse, ())


def _refuse() -> None:
    raise ImportError("not in this process")


def generate_with_the_swarm_and_alone(
    channel: WorkerChannel, model: Any, sequence_length: int, max_tokens: int
) -> None:
    """Report (tokens of the swarm, tokens of the same model on one machine), as nested lists."""
    from pathlib import Path

    import torch
    from safetensors.torch import load_file
    from transformers.models.bloom import BloomForCausalLM

    from flexbench.petals.client import SwarmClient

    client = SwarmClient(model, process_index=0)
    prompts = client.prompts(2, 2, sequence_length)
    for token in range(4):  # the special tokens of BLOOM: unknown, begin, end, padding
        prompts[0][0, token] = token
    swarm = [client.generate(prompt, max_tokens)[0].tolist() for prompt in prompts]

    config = client._model.config
    local = BloomForCausalLM(config.__class__.__base__.from_dict(config.to_dict())).eval()
    weights = {}
    for shard in Path(model.weights_folder).glob("*.safetensors"):
        weights.update(load_file(shard))
    missing, unexpected = local.transformer.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([], [])
    local.tie_weights()
    local.generation_config.eos_token_id = None
    with torch.inference_mode():
        alone = [
            local.generate(prompt, max_new_tokens=max_tokens, do_sample=False).tolist()
            for prompt in prompts
        ]
    channel.queue.put((swarm, alone))
