"""What benchmarks/dist_offload.py starts: one model with its weights on disk, in one system.

The command line is JSON, see `Request` there; each result is a line of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

_FIRST_REAL_TOKEN = 4  # OPT's tokens 0 to 3 are special
_SEED = 0


def answer(**values: Any) -> None:
    """Say what came out."""
    print(json.dumps(values), flush=True)


def read_bytes() -> int:
    """What this process has had from disks, as the kernel counts it. The cache does not count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))


def prompts_of(request: dict[str, Any], vocab_size: int) -> torch.Tensor:
    """Random tokens, the same for every system."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (request["num_prompts"], request["prompt_len"])
    return torch.randint(_FIRST_REAL_TOKEN, vocab_size, shape, generator=generator)


def timed(mode: str, work: Callable[[], Any]) -> Any:
    """Do something, and tell how long it took and what it read."""
    before, started_at = read_bytes(), time.monotonic()
    result = work()
    seconds = time.monotonic() - started_at
    answer(
        mode=mode,
        started_at=started_at,
        seconds=seconds,
        read_bytes=read_bytes() - before,
        **(result or {}),
    )


# --- accelerate ---


def with_accelerate(request: dict[str, Any]) -> None:
    """disk_offload of OPTForCausalLM, as accelerate's documentation shows it.

    Its files are memory-mapped. Before each pass through the model their pages are taken out of
    the system's cache, where a model larger than memory would not be, either.
    """
    from accelerate import disk_offload
    from transformers import OPTForCausalLM

    folder = Path(request["offload_dir"])
    model = OPTForCausalLM.from_pretrained(
        request["folder"], dtype=getattr(torch, request["dtype"])
    ).eval()
    disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    files = [os.open(path, os.O_RDONLY) for path in folder.glob("*.dat")]
    for file in files:
        os.fdatasync(file)  # what is not written yet stays in the cache
    begun_at: list[float] = []

    def forget(*_: Any) -> None:
        for file in files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        begun_at.append(time.perf_counter())

    model.register_forward_pre_hook(forget)
    prompts = prompts_of(request, model.config.vocab_size)

    def generate() -> dict[str, Any]:
        begun_at.clear()
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=request["gen_len"],
                max_new_tokens=request["gen_len"],
                pad_token_id=1,
            )
        ends = [*begun_at[1:], time.perf_counter()]
        return {"token_ends_s": [end - begun_at[0] for end in ends], "access": "page cache"}

    for _ in range(request["repeats"]):
        timed("total", generate)


# --- flexbench ---


def with_flexbench(request: dict[str, Any]) -> None:
    """OptLM, with loads and computing overlapped, each by itself, and side by side."""
    from flexbench.dist import ExecutionEnv, OptLM
    from flexbench.dist.config import DistConfig
    from flexbench.dist.homes import aligned_empty
    from flexbench.dist.opt_config import load_opt_config
    from flexbench.dist.weights import LayerWeights

    config = DistConfig(
        model=request["folder"],
        dtype=request["dtype"],
        gpu_batch_size=request["gpu_batch_size"],
        num_gpu_batches=request["num_prompts"] // request["gpu_batch_size"],
        percent=tuple(request["percent"]),
    )
    env = ExecutionEnv.create(request["offload_dir"])
    shape = load_opt_config(Path(request["folder"]), dtype=request["dtype"])
    model = OptLM(shape, env, request["folder"], config.policy())
    prompts = prompts_of(request, shape.vocab_size).numpy()
    access = env.disk.access

    def generate() -> dict[str, Any]:
        model.generate(prompts, max_new_tokens=request["gen_len"])
        return {"token_ends_s": list(model.times.token_ends), "access": access}

    def compute() -> dict[str, Any]:
        """The same without the loads: weights are zeros."""
        zeroed: dict[int, int] = {}

        def load_nothing(_: LayerWeights, buffer: torch.Tensor) -> None:
            if zeroed.get(buffer.data_ptr(), 0) < len(buffer):
                zeroed[buffer.data_ptr()] = len(buffer.zero_())

        with patch.object(LayerWeights, "load", load_nothing):
            return generate()

    largest = max(weights.load_bytes for weights in model._weights)
    buffers = [aligned_empty(largest, torch.device("cpu")).zero_() for _ in range(2)]
    load = LayerWeights.load

    def read() -> dict[str, Any]:
        """The loads alone."""
        begun_at, ends = time.perf_counter(), []
        for _ in range(request["gen_len"]):
            for number, weights in enumerate(model._weights):
                if weights.load_bytes:
                    load(weights, buffers[number % 2][: weights.load_bytes])
            ends.append(time.perf_counter() - begun_at)
        return {"token_ends_s": ends}

    def at_once() -> dict[str, Any]:
        """Both, and neither waits for the other."""
        with ThreadPoolExecutor(1) as reader:
            reads = reader.submit(read)
            compute()
            return reads.result()

    work = {"total": generate, "disk": read, "compute": compute, "at once": at_once}
    for _ in range(request["repeats"]):
        for mode in request["modes"]:
            timed(mode, work[mode])
    model.close()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["num_threads"])
    {"accelerate": with_accelerate, "flexbench": with_flexbench}[settings["system"]](settings)
