"""From what was typed to a `Request`: texts are parsed, switches that contradict are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbench.core.checks import check_seconds
from flexbench.core.errors import ConfigError
from flexbench.core.units import parse_bit_rate, parse_bytes, parse_seconds
from flexbench.models.config_file import find_model
from flexbench.server_config.config import ServerConfig
from flexbench.server_config.formats import Format
from flexbench.server_config.hardware import parse_gpu_memory
from flexbench.server_config.run_server import SwarmEntrance
from flexbench.server_config.speeds import Network

DEFAULT_OUTPUT = Path("results/server_config.jsonl")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the command: a server, how it joins a swarm, and what is asked. Times in s."""

    config: ServerConfig
    entrance: SwarmEntrance
    dry_run: bool = True
    launch: bool = False
    measure: bool = False
    force: bool = False
    measure_timeout_s: float = 600.0
    connect_timeout_s: float = 60.0
    server_timeout_s: float = 1800.0
    output_format: Format = Format.TABLE
    quiet: bool = False
    log_folder: Path | None = None
    output: Path = DEFAULT_OUTPUT

    def __post_init__(self) -> None:
        """Raise ConfigError for switches that contradict each other."""
        if self.dry_run and self.launch:
            raise ConfigError("--launch", "starts a server, which --dry-run forbids")
        if self.force and not self.measure:
            raise ConfigError("--force", "measures again, so it needs --measure")
        if not (self.dry_run or self.entrance.initial_peers or self.entrance.new_swarm):
            raise ConfigError(
                "--initial-peers",
                "is needed to look at a swarm ('public' for Petals' own); --new-swarm begins one, "
                "and --dry-run calculates without any",
            )
        if self.output.suffix != ".jsonl":
            raise ConfigError("--output", f"must end with .jsonl, not {self.output.name!r}")
        for option, seconds in (
            ("--measure-timeout", self.measure_timeout_s),
            ("--connect-timeout", self.connect_timeout_s),
            ("--server-timeout", self.server_timeout_s),
        ):
            check_seconds(option, seconds)


def request_from(arguments: Mapping[str, Any]) -> Request:
    """The request of the command's arguments, by their names. Raises ConfigError."""
    get = arguments.__getitem__
    same = ("dry_run", "launch", "measure", "force", "output_format", "quiet", "output")
    return Request(
        config=_config(arguments),
        entrance=_entrance(arguments),
        measure_timeout_s=get("measure_timeout"),
        connect_timeout_s=get("connect_timeout"),
        server_timeout_s=get("server_timeout"),
        log_folder=get("log_dir"),
        **{name: get(name) for name in same},
    )


def _config(arguments: Mapping[str, Any]) -> ServerConfig:
    get = arguments.__getitem__
    same = (
        *("device", "torch_dtype", "quant_type", "attn_cache_tokens", "num_blocks"),
        *("block_indices", "relay", "forward_rps", "inference_rps", "hops", "num_servers"),
    )
    rtt, adapter_memory = get("rtt"), get("adapter_memory")
    return ServerConfig(
        model=find_model(get("model")),
        gpu_memory=parse_gpu_memory(get("gpu_memory")) if get("gpu_memory") else (),
        tensor_parallel_devices=_tuple(get("tensor_parallel_devices")),
        adapters=_tuple(get("adapters")),
        adapter_memory_bytes=(
            None if adapter_memory is None else parse_bytes("--adapter-memory", adapter_memory)
        ),
        network=_network(get("network")),
        rtt_s=None if rtt is None else parse_seconds("--rtt", rtt),
        cuda_context_bytes=parse_bytes("--cuda-context", get("cuda_context")),
        **{name: get(name) for name in same},
    )


def _entrance(arguments: Mapping[str, Any]) -> SwarmEntrance:
    get = arguments.__getitem__
    same = ("new_swarm", "dht_prefix", "port", "public_ip", "identity_path", "public_name")
    return SwarmEntrance(
        initial_peers=_tuple(get("initial_peers")),
        host_maddrs=_tuple(get("host_maddrs")),
        announce_maddrs=_tuple(get("announce_maddrs")),
        **{name: get(name) for name in same},
    )


def _tuple(values: list[str] | None) -> tuple[str, ...]:
    return tuple(values or ())


def _network(text: str | None) -> Network | None:
    if text is None:
        return None
    down, _, up = text.partition(":")
    return Network(
        download_bits_per_s=parse_bit_rate("--network", down),
        upload_bits_per_s=parse_bit_rate("--network", up or down),
        source="given",
    )
