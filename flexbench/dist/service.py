"""`python -m flexbench.dist.service`: OPT inference with offloading, served over HTTP.

A program of its own, which `flexbench serving --api dist` starts, by itself or under mpirun. It
listens on 127.0.0.1 only; `flexbench.dist.completions` says what it answers. Its options are those
of `flexbench dist`, where they mean the same.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from flexbench.core.errors import FlexbenchError, Interrupted
from flexbench.core.options import SwitchCommand
from flexbench.dist import config as defaults
from flexbench.dist import options
from flexbench.dist.config import config_from
from flexbench.dist.partition import Balance
from flexbench.ranks.launch import detect_launch
from flexbench.ranks.rank import first_rank_speaks, open_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=SwitchCommand)
def service(
    port: Annotated[int, typer.Option(help="Where to listen, on 127.0.0.1. 0: a free one.")] = 0,
    served_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name in requests. Default: MODEL."),
    ] = None,
    batch_wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="How long a block that has its first prompt waits for more."
        ),
    ] = 0.01,
    prompt_len: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 512,
    gen_len: Annotated[int, typer.Option(help="The most new tokens of a prompt.")] = 32,
    model: options.Model = defaults.DEFAULT_MODEL,
    path: options.WeightsPath = None,
    offload_dir: options.OffloadDir = None,
    dtype: options.Dtype = "auto",
    gpu_batch_size: options.GpuBatchSize = 4,
    num_gpu_batches: options.NumGpuBatches = 1,
    seed: options.Seed = 0,
    percent: options.PercentShares = None,
    sep_layer: options.SepLayer = True,
    pin_weight: options.PinWeight = True,
    cpu_cache_compute: options.CpuCacheCompute = False,
    attn_sparsity: options.AttnSparsity = 1.0,
    compress_weight: options.CompressWeight = False,
    compress_cache: options.CompressCache = False,
    overlap: options.Overlap = True,
    allow_overcommit: options.AllowOvercommit = False,
    rank: options.Rank = None,
    local_rank: options.LocalRank = None,
    world_size: options.WorldSize = None,
    comm_device: options.CommDevice = "gpu",
    num_inner_iterations: options.NumInnerIterations = None,
    async_comm: options.AsyncComm = False,
    balance: options.BalanceBy = Balance.LAYERS,
    comm_timeout: options.CommTimeout = defaults.DEFAULT_COMM_TIMEOUT_S,
) -> None:
    """Serve an OPT model with offloading, as a pipeline of processes, over HTTP."""
    # The options have the names that config_from knows: nothing is gained by listing them again.
    arguments = dict(locals())
    launch = detect_launch(os.environ, rank=rank, local_rank=local_rank, world_size=world_size)
    with first_rank_speaks(launch):
        config = config_from(arguments)

        import torch

        from flexbench.core.environment import may_have_gpu
        from flexbench.core.progress import show_progress
        from flexbench.dist.plan import make_plan
        from flexbench.dist.serve import ServiceConfig, run_service

        has_gpu = may_have_gpu() and torch.cuda.is_available()
        # Its lengths are the longest that may come, and say nothing of those that will.
        plan = make_plan(
            config, num_stages=launch.world_size, has_gpu=has_gpu, positions_per_token=1.0
        )
        serving = ServiceConfig(
            port=port, served_name=served_name or model, batch_wait_s=batch_wait
        )
    with show_progress(open_console(launch, stderr=True), quiet=launch.rank > 0) as progress:
        run_service(plan, launch, serving, progress=progress)


def _on_stop(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def main() -> None:
    """Run the program; every FlexbenchError becomes a line and an exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_stop)
    try:
        app()
    except FlexbenchError as error:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if not error.is_shown:
            prefix = "" if isinstance(error, Interrupted) else "Error: "
            sys.stderr.write(f"{prefix}{error.message}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
