"""`flexbench petals`: the command line of the swarm benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexbench.core.errors import ConfigError
from flexbench.core.options import MultiValueCommand
from flexbench.models.shapes import OPT_SHAPES
from flexbench.petals import config as defaults
from flexbench.petals.config import PetalsConfig
from flexbench.petals.model import DEFAULT_MAX_RETRIES

if TYPE_CHECKING:
    from flexbench.petals.plan import Plan

_SWARM = "Swarm"
_LOAD = "Load"
_LIMITS = "Time limits"


app = typer.Typer()


@app.command(cls=MultiValueCommand)
def petals(
    initial_peers: Annotated[
        list[str] | None,
        typer.Option(
            "--initial-peers",
            "--initial_peers",
            metavar="ADDRESS...",
            help="DHT peers of a running swarm. Without any, a private swarm is started on this "
            "machine and ended afterwards.",
            rich_help_panel=_SWARM,
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            autocompletion=lambda: list(OPT_SHAPES),
            help="OPT model whose dimensions are measured, facebook/opt-125m to opt-175b. Default: "
            f"{defaults.DEFAULT_EMBEDDED_PREFIX} for the private swarm, "
            f"{defaults.DEFAULT_REMOTE_PREFIX} with --initial-peers.",
            rich_help_panel=_SWARM,
        ),
    ] = None,
    dht_prefix: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Key of the model's blocks in the DHT. Default: MODEL with dots replaced by "
            "hyphens; opt6b for facebook/opt-6.7b.",
            rich_help_panel=_SWARM,
        ),
    ] = None,
    num_servers: Annotated[
        int, typer.Option(help="Servers of the private swarm.", rich_help_panel=_SWARM)
    ] = 2,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="|".join(defaults.DTYPES),
            autocompletion=lambda: list(defaults.DTYPES),
            help="Type of weights and activations. auto: bfloat16 on a GPU, float32 on a CPU.",
            rich_help_panel=_SWARM,
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda|cuda:N",
            help="Where clients and private servers compute. auto: the GPUs in turn, if any.",
            rich_help_panel=_SWARM,
        ),
    ] = "auto",
    batch_size: Annotated[
        int, typer.Option(help="Prompts per request.", rich_help_panel=_LOAD)
    ] = 1,
    num_micro_batches: Annotated[
        int, typer.Option(help="Requests of each client, one after another.", rich_help_panel=_LOAD)
    ] = 1,
    num_processes: Annotated[
        int, typer.Option(help="Clients at the same time.", rich_help_panel=_LOAD)
    ] = 1,
    sequence_length: Annotated[
        list[int] | None,
        typer.Option(
            metavar="INTEGER...",
            help="Prompt length in tokens; several are measured in turn. Default: 256 512 1024.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    max_tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="INTEGER...",
            help="New tokens per prompt; several are measured in turn, and 0 measures the prefill "
            "only. Default: 32.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    sweep: Annotated[
        bool | None,
        typer.Option(
            "--sweep/--no-sweep",
            help="Also measure 0 to 32 new tokens at length 512. Default: only for "
            "facebook/opt-30b when no lengths are given.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Of the prompts, and the private swarm's weights.", rich_help_panel=_LOAD
        ),
    ] = 0,
    connect_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="To reach the swarm's peers.", rich_help_panel=_LIMITS
        ),
    ] = 60.0,
    server_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="To start the private swarm.", rich_help_panel=_LIMITS
        ),
    ] = 300.0,
    warmup_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="For all clients to warm up.", rich_help_panel=_LIMITS
        ),
    ] = 600.0,
    run_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="For the timed part of a run.", rich_help_panel=_LIMITS
        ),
    ] = 3600.0,
    max_retries: Annotated[
        int,
        typer.Option(
            help="Attempts of a client at a failing server. Repeated ones are in the record.",
            rich_help_panel=_LIMITS,
        ),
    ] = DEFAULT_MAX_RETRIES,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Results, one tab-separated row a run, appended; a .jsonl file beside it gets "
            "every detail.",
        ),
    ] = defaults.DEFAULT_OUTPUT,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the logs of servers and clients here. Default: a temporary folder, kept "
            "only when something fails.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and stop.")
    ] = False,
) -> None:
    """Measure a Petals swarm with many clients at once.

    Every client warms up, then all are released together, each with its own prompts.
    Shown are the tokens per second of all clients and the mean latency of a request.
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
    from flexbench.petals.requirement import ensure_petals_installed
    from flexbench.petals.tables import plan_facts, plan_runs, results_table

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
