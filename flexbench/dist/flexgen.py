"""FlexGen's entry points, for programs that were written for its scripts."""

from __future__ import annotations

import argparse
import os
from typing import Any

from flexbench.core.progress import Silence
from flexbench.core.results import ResultRow
from flexbench.dist.config import config_from
from flexbench.ranks.launch import detect_launch


def run_flexllmgen_dist(args: Any) -> ResultRow | None:
    """Run the benchmark as `args`, an argparse namespace of the original's options, describes it.

    Arguments that are missing have the defaults of `flexbench dist`. The launcher is recognized if
    rank and world_size are None or missing. Returns the run's row on rank 0, None on the
    others. Raises as `run_benchmark` does. When another rank is lost, or a signal to stop comes,
    while this process waits within torch, this process is ended.
    """
    import torch

    from flexbench.dist.benchmark import run_benchmark
    from flexbench.dist.plan import make_plan

    config = config_from(vars(args))
    launch = detect_launch(
        os.environ,
        rank=getattr(args, "rank", None),
        local_rank=getattr(args, "local_rank", None),
        world_size=getattr(args, "world_size", None),
        use_mpi=getattr(args, "use_mpi", False),
    )
    plan = make_plan(config, num_stages=launch.world_size, has_gpu=torch.cuda.is_available())
    outcome = run_benchmark(
        plan,
        launch,
        head_ip=getattr(args, "head_ip", None),
        port=getattr(args, "port", None),
        progress=Silence(),
    )
    if outcome is None:
        return None
    outcome.keep()
    return outcome.measurement.row()


def add_distributed_parser_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the original that concern several processes."""
    parser.add_argument("--head-ip", help="address of rank 0's host")
    parser.add_argument("--port", type=int, help="port at that address")
    parser.add_argument("--rank", type=int, help="number of this process")
    parser.add_argument("--local-rank", type=int, help="its number on this host")
    parser.add_argument("--world-size", type=int, help="number of processes")
    parser.add_argument("--use-mpi", action="store_true", help="insist on mpirun")
    parser.add_argument("--comm-device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--num-inner-iterations", type=int, help="blocks under way at once")
    parser.add_argument("--async-comm", action="store_true", help="send while computing")
