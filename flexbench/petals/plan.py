"""What a benchmark will need and do, worked out before anything starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from flexbench.core.environment import may_have_gpu, memory_bytes, num_cpus, num_gpus
from flexbench.core.errors import ConfigError
from flexbench.core.folders import temporary_folder
from flexbench.core.units import format_bytes
from flexbench.models.families import DTYPE_BYTES
from flexbench.petals.config import PetalsConfig, RunShape
from flexbench.petals.model import split_blocks
from flexbench.petals.peers import ServerSpec

# Petals' default of 8 handlers, a process each, is meant for a server with a machine of its own.
_NUM_HANDLERS = 2
# Petals' own defaults, which are kept where the load does not need more.
_MIN_ATTN_CACHE_TOKENS = 4096
_MIN_MAX_BATCH_SIZE = 2048
_MIN_INFERENCE_MAX_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs, and for an embedded swarm its servers and their sizes in bytes."""

    config: PetalsConfig
    runs: tuple[RunShape, ...]
    servers: tuple[ServerSpec, ...]
    bytes_per_value: int

    @property
    def block_bytes(self) -> int:
        """Weights of one block."""
        return self.config.shape.block_parameters * self.bytes_per_value

    @property
    def client_bytes(self) -> int:
        """Weights that every client holds: the embeddings."""
        return self.config.shape.embedding_parameters * self.bytes_per_value

    @property
    def weights_bytes(self) -> int:
        """Weights of the whole model, which an embedded swarm writes to the temporary folder."""
        return self.block_bytes * self.config.shape.num_hidden_layers + self.client_bytes

    def cache_bytes(self, server: ServerSpec) -> int:
        """The most that the attention cache of a server can take: keys and values of its blocks."""
        values = 2 * self.config.shape.hidden_size * server.attn_cache_tokens * len(server.blocks)
        return values * self.bytes_per_value

    @property
    def expected_tokens(self) -> int:
        """Tokens that all runs together generate."""
        return sum(self.expected_tokens_of(run) for run in self.runs)

    def expected_tokens_of(self, run: RunShape) -> int:
        """P x M x B x T of one run."""
        config = self.config
        requests = config.num_processes * config.num_micro_batches
        return requests * config.batch_size * run.max_tokens


def make_plan(config: PetalsConfig) -> Plan:
    """Work out the runs and the servers."""
    runs = tuple(config.runs())
    # The warm-up generates one token even where the run generates none.
    longest = max(run.sequence_length + max(run.max_tokens, 1) for run in runs)
    tokens_in_flight = config.num_processes * config.batch_size * longest
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if _computes_on_gpu(config) else "float32"
    servers = [
        ServerSpec(
            blocks=blocks,
            num_threads=max(1, num_cpus() // config.num_servers),
            num_handlers=_NUM_HANDLERS,
            # Twice what is in flight: a server frees a session's cache a little after its client
            # has begun the next, and a request that waits for cache would be a false figure.
            attn_cache_tokens=max(_MIN_ATTN_CACHE_TOKENS, 2 * tokens_in_flight),
            max_batch_size=max(_MIN_MAX_BATCH_SIZE, config.batch_size * longest),
            inference_max_length=max(_MIN_INFERENCE_MAX_LENGTH, longest),
        )
        for blocks in split_blocks(config.shape.num_hidden_layers, config.num_servers)
    ]
    return Plan(
        config=config,
        runs=runs,
        servers=tuple(servers) if config.is_embedded else (),
        bytes_per_value=DTYPE_BYTES[dtype],
    )


def check_resources(plan: Plan) -> None:
    """Raise ConfigError for what this machine cannot do: a device it lacks, a swarm too large."""
    _check_device(plan.config)
    if plan.servers:
        _check_space(plan)


def _computes_on_gpu(config: PetalsConfig) -> bool:
    return config.device != "cpu" and may_have_gpu()


def _check_device(config: PetalsConfig) -> None:
    if may_have_gpu():
        number, available = config.device.partition(":")[2], num_gpus()
        if number and available is not None and int(number) >= available:
            raise ConfigError(
                "--device", f"{config.device} is not there; this machine has {available} GPUs"
            )
        return
    if config.device.startswith("cuda"):
        raise ConfigError("--device", "this machine has no GPU; accepted here: auto, cpu")
    if config.dtype == "float16":
        raise ConfigError(
            "--dtype",
            "Petals has no float16 on a CPU, and this machine has no GPU; accepted here: float32, "
            "bfloat16",
        )


def _check_space(plan: Plan) -> None:
    config = plan.config
    folder = temporary_folder()
    free_disk = shutil.disk_usage(folder).free
    if plan.weights_bytes > free_disk:
        raise ConfigError(
            "--prefix",
            f"the weights of {config.shape.name} take {format_bytes(plan.weights_bytes)}, and "
            f"{folder} has {format_bytes(free_disk)} free; choose a smaller model, or another "
            "folder by setting TMPDIR (to a path of at most 45 characters)",
        )
    memory = memory_bytes()
    needed = plan.weights_bytes + config.num_processes * plan.client_bytes
    if memory is not None and needed > memory and not _computes_on_gpu(config):
        raise ConfigError(
            "--prefix",
            f"an embedded swarm of {config.shape.name} and {config.num_processes} clients need "
            f"{format_bytes(needed)} for weights, and this machine has {format_bytes(memory)}; "
            "choose a smaller model, fewer clients, or a running swarm with --initial-peers",
        )
