"""Policies for tiny models, and one rank of a pipeline that runs many cases with such a model.

As a program, which mpirun starts, it is given a folder: `cases-S.json` says what to run with S
stages, `arrays.npz` what to put in and what has to come out. It writes what did not into a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from flexbench.dist.generation import Generation
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.opt_config import load_opt_config
from flexbench.dist.partition import Balance
from flexbench.dist.pipeline import DistOptLM
from flexbench.dist.policy import Policy
from flexbench.dist.schedule import Step

DEADLINE_S = 100
# Percentages of gpu and cpu; the rest is on disk.
HOMES = {"gpu": (100, 0), "cpu": (0, 100), "disk": (0, 0), "mixed": (30, 40)}


def policy(
    batch_size: int = 2,
    num_batches: int = 1,
    *,
    weights: tuple[float, float] = (100, 0),
    cache: tuple[float, float] = (100, 0),
    activations: tuple[float, float] = (100, 0),
    **changed: Any,
) -> Policy:
    """Everything on the gpu, and nothing at the same time, until something else is said."""
    values: dict[str, Any] = {
        "overlap": False,
        "sep_layer": False,
        "pin_weight": True,
        "cpu_cache_compute": False,
        "attn_sparsity": 1.0,
        "compress_weight": False,
        "comp_weight_config": None,
        "compress_cache": False,
        "comp_cache_config": None,
    }
    return Policy(batch_size, num_batches, *weights, *cache, *activations, **{**values, **changed})


def allocated(env: ExecutionEnv) -> list[int]:
    """Bytes at gpu, cpu and disk."""
    return [home.ledger.allocated_bytes for home in (env.gpu, env.cpu, env.disk)]


def count_computed(patch: Callable[[Any, str, Any], None] = setattr) -> list[str]:
    """The names of layers, each time that one is computed in this process from now on."""
    computed: list[str] = []
    compute = Generation._compute_span

    def counted(self: Generation, step: Step) -> Any:
        computed.extend(self._layers[layer].name for layer in self._spans[step.layer])
        return compute(self, step)

    patch(Generation, "_compute_span", counted)
    return computed


def count_units(new: Any, block: int, stop: int | None) -> int:
    """Tokens of blocks of prompts that have to be computed: all until the whole block has ended."""
    return sum(
        not all(stop is not None and stop in row[:token] for row in rows)
        for rows in new.reshape(-1, block, new.shape[1]).tolist()
        for token in range(new.shape[1])
    )


def run_case(
    case: dict[str, Any],
    arrays: Any,
    folder: Path,
    rank: int,
    num_stages: int,
    computed: list[str],
) -> list[str]:
    """What is wrong with this case; all ranks run it at the same time."""
    env = ExecutionEnv.create(folder / f"offload-{rank}")
    model = DistOptLM(
        load_opt_config(folder / "model", dtype="float32"),
        env,
        str(folder / "model"),
        policy(**case["policy"]),
        rank,
        num_stages,
        case["comm_device"],
        case["iterations"],
        case["is_async"],
        balance=Balance(case["balance"]),
    )
    of_weights = allocated(env)
    problems = []
    inputs = arrays["inputs"][: case["num_prompts"]]
    for call in case["calls"]:
        print(f"{case}: {call}", file=sys.stderr, flush=True)
        options = dict(call)
        expected = arrays[options.pop("expected")][: len(inputs)]
        gen_len = expected.shape[1] - inputs.shape[1]
        computed.clear()
        result = model.generate(inputs, gen_len, **options)
        if result.tolist() != expected.tolist():
            problems.append(f"{call}: {result.tolist()} instead of {expected.tolist()}")
        units = count_units(expected[:, -gen_len:], model.policy.block_size, options.get("stop"))
        if len(computed) != units * len(model.layers) * model.policy.num_gpu_batches:
            problems.append(f"{call}: {len(computed)} layers were computed for {units} units")
        if allocated(env) != of_weights:
            problems.append(f"{call}: {allocated(env)} bytes are left of {of_weights}")
    model.close()
    if any(allocated(env)):
        problems.append(f"{allocated(env)} bytes are left after close()")
    return [f"{case}: {problem}" for problem in problems]


def main() -> None:
    folder = Path(sys.argv[1])
    rank, num_stages = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
    with (folder / f"stage-{num_stages}-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'store-{num_stages}'}",
        rank=rank,
        world_size=num_stages,
        timeout=timedelta(seconds=DEADLINE_S),
    )
    cases = json.loads((folder / f"cases-{num_stages}.json").read_text())
    with np.load(folder / "arrays.npz") as file:
        arrays = dict(file)
    computed = count_computed()
    problems = [
        problem
        for case in cases
        for problem in run_case(case, arrays, folder, rank, num_stages, computed)
    ]
    distributed.barrier()
    distributed.destroy_process_group()
    report = {"rank": rank, "cases": len(cases), "problems": problems}
    (folder / f"report-{num_stages}-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
