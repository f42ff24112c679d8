"""One stage of a pipeline, made ready on its rank: checked, joined with the others, loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from flexbench import __version__
from flexbench.core.errors import RunError
from flexbench.core.progress import Progress
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.hosts import look_around
from flexbench.dist.partition import Balance
from flexbench.dist.pipeline import DistOptLM
from flexbench.dist.plan import DistPlan
from flexbench.dist.process_group import open_process_group
from flexbench.dist.room import check_own_weights, check_room
from flexbench.ranks.launch import Launch
from flexbench.ranks.watch import LONGEST_RUN_S, PeerWatch


@contextmanager
def open_stage(plan: DistPlan, launch: Launch, watch: PeerWatch) -> Iterator[ExecutionEnv]:
    """The homes of a rank, which has been checked and has a process group with all others.

    Sets torch's number of threads. Raises ConfigError and InputFileError before anything is
    allocated, RunError when memory runs out.
    """
    host = look_around(watch, launch)
    torch.set_num_threads(host.num_threads)
    check_own_weights(plan, launch)
    if not plan.config.allow_overcommit:
        check_room(plan, launch, host)
    meet(watch, launch, "checked")
    env = ExecutionEnv.create(plan.config.offload_dir, local_rank=launch.local_rank)
    if env.has_gpu:
        torch.cuda.set_device(env.gpu.device)
    with open_process_group(watch, launch, backend=plan.backend), memory_errors():
        yield env


def meet(watch: PeerWatch, launch: Launch, where: str) -> None:
    """Wait until all ranks are here."""
    watch.publish(where, None)
    if launch.rank == 0:
        watch.collect(where, LONGEST_RUN_S)
    watch.share(f"{where}: go on", None, LONGEST_RUN_S)


def load_stage(plan: DistPlan, launch: Launch, env: ExecutionEnv, progress: Progress) -> DistOptLM:
    """The rank's layers, with their weights."""
    config = plan.config
    stage = plan.stages[launch.rank].stage
    num_layers = len(stage.layers) * (2 if plan.policy.sep_layer else 1)
    with progress.phase(
        "Loading weights", total=num_layers + stage.is_first + stage.is_last
    ) as phase:
        return DistOptLM(
            plan.model,
            env,
            plan.weights_path,
            plan.policy,
            launch.rank,
            plan.num_stages,
            config.comm_device,
            plan.num_inner_iterations,
            config.async_comm,
            balance=Balance(config.balance),
            positions_per_token=plan.positions_per_token,
            weight_seed=config.seed,
            on_layer=phase.advance,
        )


def fingerprint(plan: DistPlan) -> str:
    """What has to be the same on all ranks, hashed. Folders may differ from host to host."""
    local = ("offload_dir", "output", "log_file", "no_log", "verbose", "path", "model")
    config = {name: value for name, value in asdict(plan.config).items() if name not in local}
    model = asdict(plan.model) | {"name": None}
    described = json.dumps([__version__, config, model, plan.is_dummy], default=str, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Torch has no error of its own for a CPU without memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
            raise RunError(f"out of memory: {text.partition(chr(10))[0]}") from error
        raise
