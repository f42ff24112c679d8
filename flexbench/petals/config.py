"""What `flexbench petals` was asked to do, validated before anything starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexbench.core.checks import check_count, check_seconds, check_seed
from flexbench.core.errors import ConfigError
from flexbench.models.shapes import ModelShape
from flexbench.petals.model import (
    DEFAULT_MAX_RETRIES,
    dht_prefix_for,
    shape_for_prefix,
)

DEFAULT_EMBEDDED_PREFIX = "facebook/opt-125m"
DEFAULT_REMOTE_PREFIX = "facebook/opt-175b"
DEFAULT_SEQUENCE_LENGTHS = (256, 512, 1024)
DEFAULT_MAX_TOKENS = 32
DEFAULT_OUTPUT = Path("results/petals.tsv")
SWEEP_PREFIX = "facebook/opt-30b"
SWEEP_SEQUENCE_LENGTH = 512
SWEEP_MAX_TOKENS = range(0, 33)

DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_PEER_ADDRESS = re.compile(r"(/[^/\s]+)+/p2p/\w+")


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """What one run asks of every client: prompts of this length, and so many new tokens."""

    sequence_length: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class PetalsConfig:
    """The whole benchmark. Times are in seconds.

    Raises ConfigError, which names the option and what it accepts, for values that cannot work.
    """

    initial_peers: tuple[str, ...] = ()
    """Addresses of DHT peers of a running swarm; without any, an embedded swarm is started."""
    prefix: str = DEFAULT_EMBEDDED_PREFIX
    """The OPT model whose dimensions are measured."""
    dht_prefix: str | None = None
    """The key of its blocks in the DHT, if it is not the one that follows from `prefix`."""
    batch_size: int = 1
    num_micro_batches: int = 1
    num_processes: int = 1
    sequence_lengths: tuple[int, ...] = DEFAULT_SEQUENCE_LENGTHS
    max_tokens: tuple[int, ...] = (DEFAULT_MAX_TOKENS,)
    sweep: bool | None = None
    """Add runs of 0 to 32 new tokens at sequence length 512; None: only for opt-30b."""
    dtype: str = "auto"
    device: str = "auto"
    num_servers: int = 2
    """Servers of the embedded swarm."""
    connect_timeout_s: float = 60.0
    server_timeout_s: float = 300.0
    warmup_timeout_s: float = 600.0
    run_timeout_s: float = 3600.0
    max_retries: int = DEFAULT_MAX_RETRIES
    """How often a client calls a failing server before it gives up."""
    output: Path = DEFAULT_OUTPUT
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value on its own, then what has to fit together."""
        for option, value in (
            ("--batch-size", self.batch_size),
            ("--num-micro-batches", self.num_micro_batches),
            ("--num-processes", self.num_processes),
            ("--num-servers", self.num_servers),
            ("--max-retries", self.max_retries),
        ):
            check_count(option, value, minimum=1)
        _check_counts("--sequence-length", self.sequence_lengths, minimum=1)
        _check_counts("--max-tokens", self.max_tokens, minimum=0)
        check_seed("--seed", self.seed)
        for option, seconds in (
            ("--connect-timeout", self.connect_timeout_s),
            ("--server-timeout", self.server_timeout_s),
            ("--warmup-timeout", self.warmup_timeout_s),
            ("--run-timeout", self.run_timeout_s),
        ):
            check_seconds(option, seconds)
        self._check_device()
        self._check_swarm()

    def _check_device(self) -> None:
        if self.dtype not in DTYPES:
            accepted = ", ".join(DTYPES)
            raise ConfigError("--dtype", f"unknown type {self.dtype!r}; accepted: {accepted}")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                "--device", f"unknown device {self.device!r}; accepted: auto, cpu, cuda, cuda:N"
            )
        if self.dtype == "float16" and self.device == "cpu":
            raise ConfigError(
                "--dtype", "Petals has no float16 on a CPU; accepted there: float32, bfloat16"
            )

    def _check_swarm(self) -> None:
        num_blocks = self.shape.num_hidden_layers
        if not self.initial_peers and self.num_servers > num_blocks:
            raise ConfigError(
                "--num-servers",
                f"{self.num_servers} servers cannot share the {num_blocks} blocks of "
                f"{self.shape.name}; accepted: 1 to {num_blocks}",
            )
        for peer in self.initial_peers:
            if not _PEER_ADDRESS.fullmatch(peer):
                raise ConfigError(
                    "--initial-peers",
                    f"{peer!r} is not a peer's address; accepted: "
                    "/ip4/ADDRESS/tcp/PORT/p2p/PEER_ID, as a server or run_dht prints it",
                )
        if self.dht_prefix is not None and not re.fullmatch(r"[^.\s]+", self.dht_prefix):
            raise ConfigError(
                "--dht-prefix", f"{self.dht_prefix!r} must not be empty or contain dots or spaces"
            )

    @property
    def shape(self) -> ModelShape:
        """The model's dimensions."""
        return shape_for_prefix(self.prefix)

    @property
    def is_embedded(self) -> bool:
        """Whether flexbench starts the swarm itself."""
        return not self.initial_peers

    @property
    def effective_dht_prefix(self) -> str:
        """The key under which the blocks are looked up."""
        return self.dht_prefix or dht_prefix_for(self.shape.name)

    def runs(self) -> list[RunShape]:
        """The runs in order, each combination once."""
        shapes = [
            RunShape(sequence_length=length, max_tokens=tokens)
            for length in self.sequence_lengths
            for tokens in self.max_tokens
        ]
        sweep = self.shape.name == SWEEP_PREFIX if self.sweep is None else self.sweep
        if sweep:
            shapes += [
                RunShape(sequence_length=SWEEP_SEQUENCE_LENGTH, max_tokens=tokens)
                for tokens in SWEEP_MAX_TOKENS
            ]
        return list(dict.fromkeys(shapes))


def _check_counts(option: str, values: Sequence[int], *, minimum: int) -> None:
    if not values:
        raise ConfigError(option, "needs at least one value")
    for value in values:
        check_count(option, value, minimum=minimum)
