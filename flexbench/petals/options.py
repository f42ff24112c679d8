"""The options of `flexbench petals`, one alias each; the command's signature has their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexbench.models.shapes import OPT_SHAPES
from flexbench.petals import config as defaults

_SWARM = "Swarm"
_LOAD = "Load"
_LIMITS = "Time limits"

InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        "--initial_peers",
        metavar="ADDRESS...",
        help="DHT peers of a running swarm. Without any, a private swarm is started on this "
        "machine and ended afterwards.",
        rich_help_panel=_SWARM,
    ),
]

Prefix = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        autocompletion=lambda: list(OPT_SHAPES),
        help="OPT model whose dimensions are measured, facebook/opt-125m to opt-175b. Default: "
        f"{defaults.DEFAULT_EMBEDDED_PREFIX} for the private swarm, "
        f"{defaults.DEFAULT_REMOTE_PREFIX} with --initial-peers.",
        rich_help_panel=_SWARM,
    ),
]

DhtPrefix = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Key of the model's blocks in the DHT. Default: MODEL with dots replaced by "
        "hyphens; opt6b for facebook/opt-6.7b.",
        rich_help_panel=_SWARM,
    ),
]

NumServers = Annotated[
    int, typer.Option(help="Servers of the private swarm.", rich_help_panel=_SWARM)
]

Dtype = Annotated[
    str,
    typer.Option(
        metavar="|".join(defaults.DTYPES),
        autocompletion=lambda: list(defaults.DTYPES),
        help="Type of weights and activations. auto: bfloat16 on a GPU, float32 on a CPU.",
        rich_help_panel=_SWARM,
    ),
]

Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N",
        help="Where clients and private servers compute. auto: the GPUs in turn, if any.",
        rich_help_panel=_SWARM,
    ),
]

BatchSize = Annotated[int, typer.Option(help="Prompts per request.", rich_help_panel=_LOAD)]

NumMicroBatches = Annotated[
    int, typer.Option(help="Requests of each client, one after another.", rich_help_panel=_LOAD)
]

NumProcesses = Annotated[int, typer.Option(help="Clients at the same time.", rich_help_panel=_LOAD)]

SequenceLength = Annotated[
    list[int] | None,
    typer.Option(
        metavar="INTEGER...",
        help="Prompt length in tokens; several are measured in turn. Default: 256 512 1024.",
        rich_help_panel=_LOAD,
    ),
]

MaxTokens = Annotated[
    list[int] | None,
    typer.Option(
        metavar="INTEGER...",
        help="New tokens per prompt; several are measured in turn, and 0 measures the prefill "
        "only. Default: 32.",
        rich_help_panel=_LOAD,
    ),
]

Sweep = Annotated[
    bool | None,
    typer.Option(
        "--sweep/--no-sweep",
        help="Also measure 0 to 32 new tokens at length 512. Default: only for "
        "facebook/opt-30b when no lengths are given.",
        rich_help_panel=_LOAD,
    ),
]

Seed = Annotated[
    int,
    typer.Option(help="Of the prompts, and the private swarm's weights.", rich_help_panel=_LOAD),
]

ConnectTimeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="To reach the swarm's peers.", rich_help_panel=_LIMITS),
]

ServerTimeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="To start the private swarm.", rich_help_panel=_LIMITS),
]

WarmupTimeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="For all clients to warm up.", rich_help_panel=_LIMITS),
]

RunTimeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="For the timed part of a run.", rich_help_panel=_LIMITS),
]

MaxRetries = Annotated[
    int,
    typer.Option(
        help="Attempts of a client at a failing server. Repeated ones are in the record.",
        rich_help_panel=_LIMITS,
    ),
]

Output = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="Results, one tab-separated row a run, appended; a .jsonl file beside it gets "
        "every detail.",
    ),
]

LogDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep the logs of servers and clients here. Default: a temporary folder, kept "
        "only when something fails.",
    ),
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]
