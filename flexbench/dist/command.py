"""`flexbench dist`: the command line of the offloading pipeline."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from flexbench.core.checks import check_count
from flexbench.core.environment import may_have_gpu
from flexbench.core.errors import ConfigError, MissingDependencyError
from flexbench.core.options import SwitchCommand
from flexbench.dist import config as defaults
from flexbench.dist import options
from flexbench.dist.config import DistConfig, config_from
from flexbench.dist.partition import Balance
from flexbench.dist.policy_search import options as search_options
from flexbench.dist.policy_search.request import PolicyRequest
from flexbench.ranks.launch import MAX_PORT, Launch, detect_launch
from flexbench.ranks.rank import first_rank_speaks, open_console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from flexbench.dist.benchmark import Outcome
    from flexbench.dist.plan import DistPlan
    from flexbench.dist.roofline.lines import StageRoofline


app = typer.Typer(add_completion=False)


class DistCommand(SwitchCommand):
    """Its options, and what is to be done: `plan` is no share of --percent."""

    def is_further_value(self, argument: str) -> bool:
        """Anything else after --percent is one of its numbers, or meant to be."""
        return argument != search_options.PLAN


@app.command(cls=DistCommand)
def dist(
    action: search_options.Action = None,
    model: options.Model = defaults.DEFAULT_MODEL,
    path: options.WeightsPath = None,
    offload_dir: options.OffloadDir = None,
    dtype: options.Dtype = "auto",
    prompt_len: options.PromptLen = 512,
    gen_len: options.GenLen = 32,
    cut_gen_len: options.CutGenLen = None,
    debug_mode: options.DebugMode = None,
    gpu_batch_size: options.GpuBatchSize = None,
    num_gpu_batches: options.NumGpuBatches = None,
    do_sample: options.DoSample = False,
    temperature: options.Temperature = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    policy: search_options.PolicyChoice = search_options.GIVEN,
    percent: options.PercentShares = None,
    max_batch: search_options.MaxBatch = None,
    gpu_memory: search_options.GpuMemory = None,
    cpu_memory: search_options.CpuMemory = None,
    sep_layer: options.SepLayer = True,
    pin_weight: options.PinWeight = True,
    cpu_cache_compute: options.CpuCacheCompute = False,
    attn_sparsity: options.AttnSparsity = 1.0,
    compress_weight: options.CompressWeight = False,
    compress_cache: options.CompressCache = False,
    overlap: options.Overlap = True,
    allow_overcommit: options.AllowOvercommit = False,
    head_ip: options.HeadIp = None,
    port: options.Port = None,
    use_mpi: options.UseMpi = False,
    rank: options.Rank = None,
    local_rank: options.LocalRank = None,
    world_size: options.WorldSize = None,
    comm_device: options.CommDevice = "gpu",
    num_inner_iterations: options.NumInnerIterations = None,
    async_comm: options.AsyncComm = False,
    balance: options.BalanceBy = Balance.LAYERS,
    comm_timeout: options.CommTimeout = defaults.DEFAULT_COMM_TIMEOUT_S,
    output: options.Output = defaults.DEFAULT_OUTPUT,
    log_file: options.LogFile = defaults.AUTO_LOG,
    no_log: options.NoLog = False,
    verbose: options.Verbose = 1,
    quiet: options.Quiet = False,
    roofline: options.Roofline = False,
    dry_run: options.DryRun = False,
) -> None:
    """Measure OPT inference with offloading, as a pipeline of processes.

    One process by itself; several under mpirun, srun or torchrun, which are
    recognized: mpirun -np 2 flexbench dist. Weights, cache and activations
    are on gpu, cpu and disk as --percent says.
    """
    # The options have the names that config_from knows: nothing is gained by listing them again.
    arguments = dict(locals())
    launch = detect_launch(
        os.environ, rank=rank, local_rank=local_rank, world_size=world_size, use_mpi=use_mpi
    )
    with first_rank_speaks(launch):
        if port is not None:
            check_count("--port", port, minimum=1, maximum=MAX_PORT)
        if roofline and dry_run:
            raise ConfigError("--roofline", "measures a run, and there is none with --dry-run")
        config = config_from(arguments)
        request = _request(arguments)
        plan = _plan(config, launch)
    if request is not None:
        plan = _search(plan, request, launch, head_ip, port, quiet=quiet)
    if dry_run or action is not None:
        _show_plan(plan, launch)
        return
    _run(plan, launch, head_ip, port, quiet=quiet)


def _request(arguments: Mapping[str, Any]) -> PolicyRequest | None:
    """What the search for a policy may choose; None: everything is given."""
    action, policy = arguments["action"], arguments["policy"]
    if action not in (None, search_options.PLAN):
        raise ConfigError(
            "flexbench dist", f"unknown action {action!r}; accepted: {search_options.PLAN}"
        )
    if policy not in search_options.POLICIES:
        accepted = ", ".join(search_options.POLICIES)
        raise ConfigError("--policy", f"unknown value {policy!r}; accepted: {accepted}")
    bounds = {
        name: arguments[name]
        for name in ("max_batch", "gpu_memory", "cpu_memory")
        if arguments[name] is not None
    }
    if action is None and policy != search_options.AUTO:
        for name in bounds:
            raise ConfigError(f"--{name.replace('_', '-')}", "only --policy auto has use for it")
        return None
    return PolicyRequest(
        is_batch_fixed=arguments["gpu_batch_size"] is not None,
        is_num_batches_fixed=arguments["num_gpu_batches"] is not None,
        is_percent_fixed=bool(arguments["percent"]),
        **bounds,
    )


def _search(
    plan: DistPlan,
    request: PolicyRequest,
    launch: Launch,
    head_ip: str | None,
    port: int | None,
    *,
    quiet: bool,
) -> DistPlan:
    try:
        from flexbench.dist.policy_search.together import search_policy
    except ImportError as error:
        raise _missing(error) from error
    from flexbench.core.progress import show_progress

    is_silent = quiet or launch.rank > 0
    with (
        first_rank_speaks(launch),
        show_progress(open_console(launch, stderr=True), quiet=is_silent) as progress,
    ):
        return search_policy(plan, request, launch, head_ip=head_ip, port=port, progress=progress)


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"flexbench dist needs {error.name}, which is not installed: pip install 'flexbench[dist]'"
    )


def _plan(config: DistConfig, launch: Launch) -> DistPlan:
    try:
        import torch

        import flexbench.dist.benchmark  # noqa: F401 - for what it imports in turn
        from flexbench.dist.plan import make_plan
    except ImportError as error:
        raise _missing(error) from error
    has_gpu = may_have_gpu() and torch.cuda.is_available()
    return make_plan(config, num_stages=launch.world_size, has_gpu=has_gpu)


def _show_plan(plan: DistPlan, launch: Launch) -> None:
    from flexbench.dist.tables import placement_table, plan_facts

    console = open_console(launch)
    console.print(plan_facts(plan))
    if plan.search is not None:
        from flexbench.dist.policy_search.tables import search_facts

        console.print(search_facts(plan, plan.search))
    console.print(placement_table(plan))


def _run(
    plan: DistPlan, launch: Launch, head_ip: str | None, port: int | None, *, quiet: bool
) -> None:
    from flexbench.core.progress import show_progress
    from flexbench.core.results import ResultsFile
    from flexbench.dist.benchmark import run_benchmark

    verbose = 0 if quiet else plan.config.verbose
    if verbose >= 1:
        _show_plan(plan, launch)
    is_silent = quiet or launch.rank > 0
    with show_progress(open_console(launch, stderr=True), quiet=is_silent) as progress:
        outcome = run_benchmark(
            plan,
            launch,
            head_ip=head_ip,
            port=port,
            progress=progress,
        )
    if outcome is None:
        return
    if not quiet:
        _show_outcome(plan, launch, outcome, verbose)
    outcome.keep()
    if not quiet:
        where = str(plan.config.output)
        if plan.config.is_projected:
            records = ResultsFile(plan.config.output).records_path
            where = f"{records}, and not to {where}: figures are projected"
        open_console(launch).print(
            f"Added to {where}", markup=False, highlight=False, soft_wrap=True
        )


def _show_roofline(console: Console, stages: Sequence[StageRoofline]) -> None:
    from flexbench.dist.roofline.table import ceilings_text, roofline_table

    console.print(roofline_table(stages))
    console.print(ceilings_text(stages), highlight=False)


def _show_outcome(plan: DistPlan, launch: Launch, outcome: Outcome, verbose: int) -> None:
    from flexbench.dist import tables

    console = open_console(launch)
    measurement = outcome.measurement
    console.print(tables.results_table(plan, measurement))
    if plan.search is not None:
        from flexbench.dist.policy_search.tables import comparison_table

        console.print(comparison_table(plan.search, measurement))
    if measurement.roofline:
        _show_roofline(console, measurement.roofline)
    if verbose >= 1:
        console.print(tables.stages_table(measurement))
        console.print(tables.verdict(plan, measurement), highlight=False)
        console.print(tables.memory_table(plan, measurement))
    if verbose >= 2:
        for index in sorted({0, len(outcome.output_ids) - 1}):
            tokens = outcome.output_ids[index, plan.config.prompt_len :].tolist()
            console.print(f"Prompt {index}: {tokens}", markup=False, highlight=False)
