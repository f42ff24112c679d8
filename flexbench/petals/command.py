"""`flexbench petals`: the command line of the swarm benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flexbench.core.errors import ConfigError
from flexbench.core.options import MultiValueCommand
from flexbench.petals import config as defaults
from flexbench.petals import options
from flexbench.petals.config import PetalsConfig
from flexbench.petals.model import DEFAULT_MAX_RETRIES

if TYPE_CHECKING:
    from flexbench.petals.plan import Plan


app = typer.Typer(add_completion=False)


@app.command(cls=MultiValueCommand)
def petals(
    initial_peers: options.InitialPeers = None,
    prefix: options.Prefix = None,
    dht_prefix: options.DhtPrefix = None,
    num_servers: options.NumServers = 2,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    batch_size: options.BatchSize = 1,
    num_micro_batches: options.NumMicroBatches = 1,
    num_processes: options.NumProcesses = 1,
    sequence_length: options.SequenceLength = None,
    max_tokens: options.MaxTokens = None,
    sweep: options.Sweep = None,
    seed: options.Seed = 0,
    connect_timeout: options.ConnectTimeout = 60.0,
    server_timeout: options.ServerTimeout = 300.0,
    warmup_timeout: options.WarmupTimeout = 600.0,
    run_timeout: options.RunTimeout = 3600.0,
    max_retries: options.MaxRetries = DEFAULT_MAX_RETRIES,
    output: options.Output = defaults.DEFAULT_OUTPUT,
    log_dir: options.LogDir = None,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
) -> None:
    """Measure a Petals swarm with many clients at once.

    Clients warm up, are released together, and each sends its own prompts.
    Shown are tokens per second of all clients, and the mean request latency.
    """
    peers = tuple(initial_peers or ())
    if prefix is None:
        prefix = defaults.DEFAULT_REMOTE_PREFIX if peers else defaults.DEFAULT_EMBEDDED_PREFIX
    lengths_given = sequence_length is not None or max_tokens is not None
    if sweep is None and lengths_given:
        sweep = False
    config = PetalsConfig(
        initial_peers=peers,
        prefix=prefix,
        dht_prefix=dht_prefix,
        batch_size=batch_size,
        num_micro_batches=num_micro_batches,
        num_processes=num_processes,
        sequence_lengths=tuple(sequence_length or defaults.DEFAULT_SEQUENCE_LENGTHS),
        max_tokens=tuple(max_tokens or (defaults.DEFAULT_MAX_TOKENS,)),
        sweep=sweep,
        dtype=dtype,
        device=device,
        num_servers=num_servers,
        connect_timeout_s=connect_timeout,
        server_timeout_s=server_timeout,
        warmup_timeout_s=warmup_timeout,
        run_timeout_s=run_timeout,
        max_retries=max_retries,
        output=output,
        seed=seed,
    )
    _run(config, log_dir, quiet=quiet, dry_run=dry_run)


def _run(config: PetalsConfig, log_folder: Path | None, *, quiet: bool, dry_run: bool) -> None:
    # Imported here, not above: `flexbench --help` and completion should not wait for them.
    from rich.console import Console

    from flexbench.core.progress import show_progress
    from flexbench.core.results import ResultsFile
    from flexbench.petals.bench import run_benchmark
    from flexbench.petals.plan import check_resources, make_plan
    from flexbench.petals.tables import plan_facts, plan_runs, results_table
    from flexbench.petals_runtime.requirement import ensure_petals_installed

    plan = make_plan(config)
    if dry_run:
        ResultsFile(config.output).check(create_folder=False)
        Console().print(plan_facts(plan), plan_runs(plan))
        _note_missing_resources(plan)
        return
    check_resources(plan)
    ensure_petals_installed()
    with show_progress(Console(stderr=True), quiet=quiet) as progress:
        rows = run_benchmark(plan, log_folder=log_folder, progress=progress)
    if not quiet:
        console = Console()
        console.print(results_table(plan, rows))
        console.print(f"Added to {config.output}", markup=False, highlight=False, soft_wrap=True)


def _note_missing_resources(plan: Plan) -> None:
    from flexbench.petals.plan import check_resources

    try:
        check_resources(plan)
    except ConfigError as error:
        typer.echo(f"Not on this machine: {error}", err=True)
