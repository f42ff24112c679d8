"""`flexbench serving`: the command line of the load generator."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import typer

from flexbench.core.errors import RunError
from flexbench.core.progress import Progress, Silence
from flexbench.ranks.launch import Launch, detect_launch
from flexbench.ranks.rank import first_rank_speaks, open_console
from flexbench.serving import config as defaults
from flexbench.serving import options
from flexbench.serving.client_options import ServingCommand, client_config_from
from flexbench.serving.config import Arrival, Meeting, ServingConfig
from flexbench.serving.plan import check_plan, config_from

if TYPE_CHECKING:
    from pathlib import Path

    from flexbench.serving.curve import Curve

app = typer.Typer(add_completion=False)


@app.command(cls=ServingCommand)
def serving(
    context: typer.Context,
    api: options.Api = "openai",
    model: options.Model = "auto",
    config_file: options.ConfigFile = None,
    tokenizer: options.Tokenizer = "auto",
    prompt_text_source: options.PromptTextSource = None,
    prompt_generator_seed: options.PromptGeneratorSeed = 0,
    prompt_length: options.PromptLength = 512,
    prompt_length_var: options.PromptLengthVar = 0.3,
    max_prompt_length: options.MaxPromptLength = None,
    max_new_tokens: options.MaxNewTokens = 64,
    max_new_tokens_var: options.MaxNewTokensVar = 0.3,
    shared_prefix: options.SharedPrefix = 0,
    streaming: options.Streaming = None,
    num_clients: options.NumClients = None,
    rate: options.Rate = None,
    arrival: options.ArrivalOption = Arrival.CONSTANT,
    burst_size: options.BurstSize = 1,
    num_requests_per_client: options.NumRequestsPerClient = 16,
    min_requests: options.MinRequests = 128,
    duration: options.Duration = None,
    warmup_requests: options.WarmupRequests = 1,
    num_workers: options.NumWorkers = None,
    use_threading: options.UseThreading = False,
    saturation: options.FindSaturation = False,
    slo: options.Slo = None,
    max_clients: options.MaxClients = 1024,
    max_rate: options.MaxRate = 10_000.0,
    early_stop_latency: options.EarlyStopLatency = 10.0,
    request_timeout: options.RequestTimeout = "120s",
    max_errors: options.MaxErrors = None,
    max_error_rate: options.MaxErrorRate = 0.5,
    service_timeout: options.ServiceTimeout = "600s",
    warmup_timeout: options.WarmupTimeout = "300s",
    result_dir: options.ResultDir = defaults.DEFAULT_RESULT_DIR,
    force: options.Force = False,
    log_dir: options.LogDir = None,
    head_ip: options.HeadIp = None,
    head_port: options.Port = None,
    comm_timeout: options.CommTimeout = 60.0,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
) -> None:
    """Load a serving endpoint: throughput-latency curves, saturation.

    Many clients, released together after warming up, send prompts to an
    endpoint. Shown are throughput, latencies, and where it saturates.
    The options of a client: flexbench serving --api NAME --help
    """
    # The options have the names that make_sweeps knows: nothing is gained by listing them again.
    arguments = dict(locals())
    launch = detect_launch(os.environ)
    with first_rank_speaks(launch):
        config = config_from(arguments, lambda name: client_config_from(context, model=name))
        meeting = Meeting(launch=launch, head_ip=head_ip, port=head_port, timeout_s=comm_timeout)
        check_plan(config)
    if dry_run:
        _print_plan(config, launch)
        return
    _run(config, meeting, log_dir, quiet=quiet or launch.rank > 0)


def _run(config: ServingConfig, meeting: Meeting, log_folder: Path | None, *, quiet: bool) -> None:
    # Imported here, not above: `flexbench --help` and completion should not wait for it.
    from flexbench.serving.bench import run_serving

    curves: list[Curve] = []
    try:
        with _progress(quiet=quiet) as progress:
            run_serving(
                config,
                meeting=meeting,
                progress=progress,
                log_folder=log_folder,
                on_curve=curves.append,
            )
    finally:
        # Also after an error, or Ctrl-C: what was measured until then is worth a look.
        if not quiet and any(curve.points for curve in curves):
            _print_curves(config, meeting.launch, [curve for curve in curves if curve.points])
    stopped = [point for curve in curves for point in curve.points if point.stopped_by is not None]
    if stopped and not config.is_search:
        raise RunError(f"{stopped[0].load.label}: {stopped[0].stopped_by}")


def _progress(*, quiet: bool) -> AbstractContextManager[Progress]:
    if quiet:
        return nullcontext(Silence())
    from flexbench.core.progress import progress_console, show_progress

    return show_progress(progress_console(), quiet=False)


def _print_plan(config: ServingConfig, launch: Launch) -> None:
    from flexbench.serving.printing import plan_table

    open_console(launch).print(plan_table(config))


def _print_curves(config: ServingConfig, launch: Launch, curves: list[Curve]) -> None:
    from flexbench.serving.printing import print_curve

    console = open_console(launch)
    for curve in curves:
        print_curve(console, config, curve)
    console.print(f"Results: {config.result_dir}", markup=False, highlight=False, soft_wrap=True)
