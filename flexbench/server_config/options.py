"""The options of `flexbench server-config`; the command's signature has their defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from flexbench.core.options import MultiValueCommand
from flexbench.models.families import DTYPE_BYTES
from flexbench.models.published import PUBLISHED_NAMES
from flexbench.server_config.budget import QUANT_TYPES
from flexbench.server_config.formats import Format

_SERVER = "Server"
_SPEED = "Speed"
_SWARM = "Swarm, without --dry-run"
_QUESTION = "Question and answer"


class ServerConfigCommand(MultiValueCommand):
    """Options may be written as run_server writes them, with underscores and several values."""

    _VALUE = re.compile(r"/(ip4|ip6|dns\w*)/.*|cuda:\d+|[\d.]+\s*[kmgt]?i?b", re.IGNORECASE)

    def is_further_value(self, argument: str) -> bool:
        """Addresses, devices and sizes; anything else after a value is the model."""
        return self._VALUE.fullmatch(argument) is not None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace underscores in names of options, then parse as usual."""
        names = [argument.partition("=") for argument in args]
        return super().parse_args(
            ctx,
            [
                (name.replace("_", "-") if name.startswith("--") else name) + equals + value
                for name, equals, value in names
            ],
        )


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=lambda: list(PUBLISHED_NAMES),
        help="A built-in name, a model folder or a config.json (BLOOM, OPT, Llama, Falcon, "
        "Mixtral). Default: bigscience/bloom.",
        show_default=False,
    ),
]

# --- question and answer -----------------------------------------------------------------------

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only calculate: no network, no GPU and no Petals needed.",
        rich_help_panel=_QUESTION,
    ),
]
OutputFormat = Annotated[
    Format, typer.Option("--format", help="How to print the answer.", rich_help_panel=_QUESTION)
]
NumServers = Annotated[
    int | None,
    typer.Option(
        help="Servers of this kind in the swarm. Default: the fewest that hold the model.",
        rich_help_panel=_QUESTION,
    ),
]
Hops = Annotated[
    int | None,
    typer.Option(help="Servers on a client's way. Default: the fewest.", rich_help_panel=_QUESTION),
]
Rtt = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Round trip between client and servers, such as 20ms. Default: unknown, which "
        "Petals' clients count as 0.15 s one way.",
        rich_help_panel=_QUESTION,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress, no log lines.", rich_help_panel=_QUESTION),
]

# --- the server --------------------------------------------------------------------------------

GpuMemory = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SIZE...",
        help="Memory of the GPU, such as 24GiB; of several GPUs of one server if repeated; "
        "8GiB:192GiB for all common sizes in between, 8GiB:64GiB:4GiB for steps.",
        rich_help_panel=_SERVER,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="Where the server computes: auto, cpu, cuda, cuda:N, mps. auto: on the GPU.",
        rich_help_panel=_SERVER,
    ),
]
TensorParallelDevices = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE...",
        help="GPUs that share every block, such as cuda:0 cuda:1.",
        rich_help_panel=_SERVER,
    ),
]
TorchDtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        autocompletion=lambda: ["auto", *DTYPE_BYTES],
        help="Type of weights and cache: auto, float32, float16, bfloat16. auto: the model's, "
        "and bfloat16 for float32.",
        rich_help_panel=_SERVER,
    ),
]
QuantType = Annotated[
    str | None,
    typer.Option(
        metavar="QUANT",
        autocompletion=lambda: list(QUANT_TYPES),
        help="Quantization of weights: none, int8, nf4. Default: nf4 on CUDA, none elsewhere.",
        rich_help_panel=_SERVER,
    ),
]
AttnCacheTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens in the attention cache. Default: 16384 where heads share keys and "
        "values, 4096 elsewhere.",
        rich_help_panel=_SERVER,
    ),
]
NumBlocks = Annotated[
    int | None,
    typer.Option(
        help="How many blocks to host: what do they need? Default: all that fit.",
        rich_help_panel=_SERVER,
    ),
]
BlockIndices = Annotated[
    str | None,
    typer.Option(metavar="START:END", help="Which blocks to host.", rich_help_panel=_SERVER),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FOLDER",
        help="A LoRA adapter, whose size is read; repeat the option for several.",
        rich_help_panel=_SERVER,
    ),
]
AdapterMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of all adapters in one block. Default: read from their folders.",
        rich_help_panel=_SERVER,
    ),
]
CudaContext = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="What CUDA itself takes of each GPU; Petals does not count it.",
        rich_help_panel=_SERVER,
    ),
]

# --- speed -------------------------------------------------------------------------------------

Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Measure one block on this machine, and its network.",
        rich_help_panel=_SPEED,
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Measure again what was measured before.", rich_help_panel=_SPEED),
]
ForwardRps = Annotated[
    float | None,
    typer.Option(
        metavar="TOKENS/S",
        help="Speed of one block with batches of 1024 tokens.",
        rich_help_panel=_SPEED,
    ),
]
InferenceRps = Annotated[
    float | None,
    typer.Option(
        metavar="TOKENS/S",
        help="Speed of one block with one token at a time.",
        rich_help_panel=_SPEED,
    ),
]
NetworkSpeed = Annotated[
    str | None,
    typer.Option(
        "--network",
        metavar="DOWN[:UP]",
        help="Bandwidth, such as 100Mbit/s or 1Gbit/s:40Mbit/s. Default: 100Mbit/s, as Petals "
        "assumes.",
        rich_help_panel=_SPEED,
    ),
]
Relay = Annotated[
    bool,
    typer.Option(
        "--relay/--no-relay",
        help="The server is reached over a relay: a fifth of its network counts.",
        rich_help_panel=_SPEED,
    ),
]
MeasureTimeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="Limit for --measure.", rich_help_panel=_SPEED),
]

# --- the swarm ---------------------------------------------------------------------------------

InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDRESS...",
        help="DHT peers of the swarm to join, /ip4/.../tcp/.../p2p/...; 'public' is Petals' public "
        "swarm.",
        rich_help_panel=_SWARM,
    ),
]
NewSwarm = Annotated[
    bool, typer.Option("--new-swarm", help="Begin a swarm.", rich_help_panel=_SWARM)
]
DhtPrefix = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Key of the model's blocks in the DHT. Default: Petals' own; a folder's name.",
        rich_help_panel=_SWARM,
    ),
]
Port = Annotated[
    int | None,
    typer.Option(
        help="Listen on this port of all interfaces. Default here: loopback only.",
        rich_help_panel=_SWARM,
    ),
]
PublicIp = Annotated[
    str | None,
    typer.Option(metavar="IP", help="Announce this address, with --port.", rich_help_panel=_SWARM),
]
HostMaddrs = Annotated[
    list[str] | None,
    typer.Option(metavar="ADDRESS...", help="Listen on these.", rich_help_panel=_SWARM),
]
AnnounceMaddrs = Annotated[
    list[str] | None,
    typer.Option(metavar="ADDRESS...", help="Announce these.", rich_help_panel=_SWARM),
]
IdentityPath = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Key file that keeps the server's peer ID.", rich_help_panel=_SWARM
    ),
]
PublicName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Announced name.", rich_help_panel=_SWARM)
]
Launch = Annotated[
    bool,
    typer.Option(
        "--launch",
        help="Start the server, and compare what it takes with the estimate.",
        rich_help_panel=_SWARM,
    ),
]
ConnectTimeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", help="Limit for looking at the swarm.", rich_help_panel=_SWARM),
]
ServerTimeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="Limit for the server's start, downloads included.",
        rich_help_panel=_SWARM,
    ),
]
LogDir = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keep the processes' logs here.", rich_help_panel=_SWARM),
]
Output = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="Where a launched server's predicted and measured figures go, as JSON lines.",
        rich_help_panel=_SWARM,
    ),
]
