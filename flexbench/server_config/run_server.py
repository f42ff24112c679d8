"""The command that starts the server which was estimated."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from flexbench.core.folders import local_path
from flexbench.models.families import DecoderSpec
from flexbench.petals_runtime.moved_names import need_moved_names
from flexbench.server_config.config import ServerConfig
from flexbench.server_config.estimate import Estimate

RUN_SERVER = "petals.cli.run_server"
# What --initial-peers says for Petals' public swarm.
PUBLIC_SWARM = "public"


@dataclass(frozen=True, kw_only=True)
class SwarmEntrance:
    """How a server joins a swarm, and where it listens. Empty: Petals' own defaults."""

    initial_peers: tuple[str, ...] = ()
    new_swarm: bool = False
    dht_prefix: str | None = None
    host_maddrs: tuple[str, ...] = ()
    announce_maddrs: tuple[str, ...] = ()
    port: int | None = None
    public_ip: str | None = None
    identity_path: str | None = None
    public_name: str | None = None

    @property
    def is_public(self) -> bool:
        """Whether it is Petals' public swarm that is named."""
        return self.initial_peers == (PUBLIC_SWARM,)

    @property
    def named_peers(self) -> tuple[str, ...]:
        """The peers as run_server takes them: none for the public swarm, which it then joins."""
        return () if self.is_public else self.initial_peers


def default_dht_prefix(model: DecoderSpec) -> str:
    """The key under which Petals announces the blocks of `model` if nobody says another.

    Source: petals/models/*/config.py. Petals has none for a local folder, so its name is taken. No
    prefix may contain a dot or a blank, which separate the numbers of blocks.
    """
    path = local_path(model.name)
    if path is not None:
        return re.sub(r"[.\s]", "-", path.resolve().name) or "model"
    name = model.name.replace(".", "-")
    repository = name.rpartition("/")[2]
    match model.family:
        case "bloom":
            return f"{name}-petals"
        case "llama":
            return repository if repository.endswith("-hf") else f"{repository}-hf"
        case "falcon":
            return repository
        case _:
            return name


def run_server_program() -> tuple[str, ...]:
    """What starts run_server in this environment, or in any other where Petals is installed."""
    if need_moved_names():
        return ("python", "-m", "flexbench.petals_runtime", RUN_SERVER)
    return ("python", "-m", RUN_SERVER)


def run_server_arguments(
    config: ServerConfig, estimate: Estimate, entrance: SwarmEntrance
) -> tuple[str, ...]:
    """The arguments of run_server. All that decides the server's size is named.

    Formats and cache are written out, so that another version's defaults change nothing.
    """
    setup = estimate.setup
    arguments = [config.model.name]
    if config.block_indices is not None and estimate.block_range is not None:
        blocks = estimate.block_range
        arguments += ["--block_indices", f"{blocks.start}:{blocks.stop}"]
    else:
        arguments += ["--num_blocks", str(estimate.num_blocks)]
    arguments += ["--torch_dtype", setup.torch_dtype, "--quant_type", setup.quant_type]
    arguments += ["--attn_cache_tokens", str(estimate.attn_cache_tokens)]
    if len(setup.devices) > 1 or config.tensor_parallel_devices:
        # The device that has inputs and outputs; it need not be one of the others.
        first = config.device if ":" in config.device else setup.devices[0]
        arguments += ["--device", first, "--tensor_parallel_devices", *setup.devices]
    elif config.device != "auto" or setup.device_type != "cuda":
        arguments += ["--device", setup.devices[0]]
    if config.adapters:
        arguments += ["--adapters", *config.adapters]
    if entrance.dht_prefix is None and local_path(config.model.name):
        entrance = replace(entrance, dht_prefix=default_dht_prefix(config.model))
    return (*arguments, *_entrance_arguments(entrance))


def _entrance_arguments(entrance: SwarmEntrance) -> list[str]:
    arguments: list[str] = []
    if entrance.new_swarm:
        arguments.append("--new_swarm")
    for option, values in (
        ("--initial_peers", entrance.named_peers),
        ("--host_maddrs", entrance.host_maddrs),
        ("--announce_maddrs", entrance.announce_maddrs),
    ):
        if values:
            arguments += [option, *values]
    for option, value in (
        ("--dht_prefix", entrance.dht_prefix),
        ("--port", entrance.port),
        ("--public_ip", entrance.public_ip),
        ("--identity_path", entrance.identity_path),
        ("--public_name", entrance.public_name),
    ):
        if value is not None:
            # In one word: the value may begin with a dash.
            arguments += [f"{option}={value}"] if str(value)[:1] == "-" else [option, str(value)]
    return arguments


def run_server_command(
    config: ServerConfig, estimate: Estimate, entrance: SwarmEntrance
) -> str | None:
    """The whole command as it is typed into a shell; None if there is no such server.

    Petals serves no OPT models, none of less than one block, and none from a file alone.
    """
    path = local_path(config.model.name)
    is_file = path is not None and path.is_file()
    if config.model.family == "opt" or is_file or not estimate.num_blocks:
        return None
    return shlex.join([*run_server_program(), *run_server_arguments(config, estimate, entrance)])
