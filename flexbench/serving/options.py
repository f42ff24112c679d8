"""The options of `flexbench serving` that all clients share; the signature has their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexbench.serving.client_options import complete_api
from flexbench.serving.config import Arrival

_WHAT = "What is measured"
_PROMPTS = "Prompts"
_LOAD = "Load"
_SATURATION = "Saturation"
_LIMITS = "Limits"
_RESULTS = "Results"
_RANKS = "Several machines"

Api = Annotated[
    str,
    typer.Option(
        "--api",
        metavar="NAME",
        autocompletion=complete_api,
        help="Client to use: openai, vllm, fastgen, azureml, petals, dist, dummy, or an installed "
        "plug-in.",
        rich_help_panel=_WHAT,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Model to ask for, and to tokenize prompts for. auto: the one that the endpoint "
        "serves.",
        rich_help_panel=_WHAT,
    ),
]

# --- prompts -------------------------------------------------------------------------------------

ConfigFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--config-file",
        metavar="FILE...",
        help="YAML with values of the options below; lists of values are measured in all "
        "combinations.",
        rich_help_panel=_PROMPTS,
    ),
]
Tokenizer = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="auto (that of a local --model folder, else byte), byte, or a folder or hub name.",
        rich_help_panel=_PROMPTS,
    ),
]
PromptTextSource = Annotated[
    str | None,
    typer.Option(
        "--prompt-text-source",
        metavar="TEXT|FILE",
        help="Text, text file or .jsonl dataset that prompts are taken from.",
        rich_help_panel=_PROMPTS,
    ),
]
PromptGeneratorSeed = Annotated[
    int,
    typer.Option(
        "--prompt-generator-seed",
        metavar="N",
        help="Seed of prompts, lengths and arrivals.",
        rich_help_panel=_PROMPTS,
    ),
]
PromptLength = Annotated[
    int,
    typer.Option(
        "--prompt-length",
        metavar="TOKENS",
        help="Mean length of a prompt.",
        rich_help_panel=_PROMPTS,
    ),
]
PromptLengthVar = Annotated[
    float,
    typer.Option(
        "--prompt-length-var",
        metavar="FRACTION",
        help="Standard deviation of prompt lengths as a fraction of their mean; 0: all equal.",
        rich_help_panel=_PROMPTS,
    ),
]
MaxPromptLength = Annotated[
    int | None,
    typer.Option(
        "--max-prompt-length",
        metavar="TOKENS",
        help="Longest prompt. Default: 4000, or the mean if that is more.",
        show_default=False,
        rich_help_panel=_PROMPTS,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        metavar="TOKENS",
        help="Mean number of tokens to generate.",
        rich_help_panel=_PROMPTS,
    ),
]
MaxNewTokensVar = Annotated[
    float,
    typer.Option(
        "--max-new-tokens-var",
        metavar="FRACTION",
        help="Their standard deviation as a fraction of the mean; 0: all equal.",
        rich_help_panel=_PROMPTS,
    ),
]
SharedPrefix = Annotated[
    int,
    typer.Option(
        "--shared-prefix",
        metavar="TOKENS",
        help="Let all prompts begin with the same tokens; by default no two do.",
        rich_help_panel=_PROMPTS,
    ),
]
Streaming = Annotated[
    bool | None,
    typer.Option(
        "--streaming/--no-streaming",
        help="Ask for tokens as they are generated. Default: if the client can.",
        show_default=False,
        rich_help_panel=_PROMPTS,
    ),
]

# --- load ----------------------------------------------------------------------------------------

NumClients = Annotated[
    list[int] | None,
    typer.Option(
        "--num-clients",
        metavar="N...",
        help="Closed loop: so many clients at once, each sends when its last answer has ended. "
        "Default: 1 2 4 6 8 12 16 20 24 28 32.",
        show_default=False,
        rich_help_panel=_LOAD,
    ),
]
Rate = Annotated[
    list[float] | None,
    typer.Option(
        "--rate",
        metavar="R...",
        help="Open loop instead: requests per second, whether or not answers come.",
        rich_help_panel=_LOAD,
    ),
]
ArrivalOption = Annotated[
    Arrival,
    typer.Option("--arrival", help="Spacing of an open loop's requests.", rich_help_panel=_LOAD),
]
BurstSize = Annotated[
    int,
    typer.Option(
        "--burst-size",
        metavar="N",
        help="Requests of a burst, with --arrival burst.",
        rich_help_panel=_LOAD,
    ),
]
NumRequestsPerClient = Annotated[
    int,
    typer.Option(
        "--num-requests-per-client",
        metavar="N",
        help="Requests for each client.",
        rich_help_panel=_LOAD,
    ),
]
MinRequests = Annotated[
    int,
    typer.Option(
        "--min-requests",
        metavar="N",
        help="At least so many requests at a point.",
        rich_help_panel=_LOAD,
    ),
]
Duration = Annotated[
    str | None,
    typer.Option(
        "--duration",
        metavar="TIME",
        help="Send for so long at a point, such as 30s, instead of a number of requests.",
        rich_help_panel=_LOAD,
    ),
]
WarmupRequests = Annotated[
    int,
    typer.Option(
        "--warmup-requests",
        metavar="N",
        help="Requests of each client before a point that are not measured.",
        rich_help_panel=_LOAD,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        "--num-workers",
        metavar="N",
        help="Processes that send the load. Default: one for 128 clients, as far as there are "
        "CPUs.",
        show_default=False,
        rich_help_panel=_LOAD,
    ),
]
UseThreading = Annotated[
    bool,
    typer.Option("--use-threading", help="Threads of one process instead.", rich_help_panel=_LOAD),
]

# --- saturation ----------------------------------------------------------------------------------

FindSaturation = Annotated[
    bool,
    typer.Option(
        "--saturation",
        help="Search for the number of clients, or the rate with --rate, at which the endpoint "
        "saturates.",
        rich_help_panel=_SATURATION,
    ),
]
Slo = Annotated[
    list[str] | None,
    typer.Option(
        "--slo",
        metavar="CONDITION...",
        help="What must hold, such as 'ttft:p99<200ms': for goodput, and for the search.",
        rich_help_panel=_SATURATION,
    ),
]
MaxClients = Annotated[
    int,
    typer.Option(
        "--max-clients",
        metavar="N",
        help="The search goes no further.",
        rich_help_panel=_SATURATION,
    ),
]
MaxRate = Annotated[
    float,
    typer.Option(
        "--max-rate",
        metavar="R",
        help="Nor does a search over --rate, in requests per second.",
        rich_help_panel=_SATURATION,
    ),
]

# --- limits --------------------------------------------------------------------------------------

EarlyStopLatency = Annotated[
    float,
    typer.Option(
        "--early-stop-latency",
        metavar="SECONDS",
        help="No more clients once the mean latency is above this; 0: never stop early.",
        rich_help_panel=_LIMITS,
    ),
]
RequestTimeout = Annotated[
    str,
    typer.Option(
        "--request-timeout",
        metavar="TIME",
        help="A request that takes longer has failed.",
        rich_help_panel=_LIMITS,
    ),
]
MaxErrors = Annotated[
    int | None,
    typer.Option(
        "--max-errors",
        metavar="N",
        help="End a point when more requests have failed.",
        rich_help_panel=_LIMITS,
    ),
]
MaxErrorRate = Annotated[
    float,
    typer.Option(
        "--max-error-rate",
        metavar="FRACTION",
        help="End a point when a larger part of its requests, at least 20, has failed.",
        rich_help_panel=_LIMITS,
    ),
]
ServiceTimeout = Annotated[
    str,
    typer.Option(
        "--service-timeout",
        metavar="TIME",
        help="How long a service may take to be ready.",
        rich_help_panel=_LIMITS,
    ),
]
WarmupTimeout = Annotated[
    str,
    typer.Option(
        "--warmup-timeout",
        metavar="TIME",
        help="How long connecting and warming up may take.",
        rich_help_panel=_LIMITS,
    ),
]

# --- results -------------------------------------------------------------------------------------

ResultDir = Annotated[
    Path,
    typer.Option(
        "--result-dir",
        metavar="FOLDER",
        help="One JSON a point goes there, and serving.tsv for reports.",
        rich_help_panel=_RESULTS,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Measure points again that the folder has already.",
        rich_help_panel=_RESULTS,
    ),
]
LogDir = Annotated[
    Path | None,
    typer.Option(
        "--log-dir",
        metavar="FOLDER",
        help="Keep the logs of services and generators there.",
        rich_help_panel=_RESULTS,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Say nothing but errors.", rich_help_panel=_RESULTS),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show what would be measured, and send nothing.",
        rich_help_panel=_RESULTS,
    ),
]
HeadIp = Annotated[
    str | None,
    typer.Option(
        "--head-ip",
        metavar="ADDRESS",
        help="Under mpirun, torchrun or Slurm: where rank 0 is reached.",
        rich_help_panel=_RANKS,
    ),
]
Port = Annotated[
    int | None,
    typer.Option("--head-port", metavar="N", help="And at which port.", rich_help_panel=_RANKS),
]
CommTimeout = Annotated[
    float,
    typer.Option(
        "--comm-timeout",
        metavar="SECONDS",
        help="How long ranks wait for each other.",
        rich_help_panel=_RANKS,
    ),
]
