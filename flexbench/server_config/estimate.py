"""What a server of a given configuration will use, hold and give: `Estimate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexbench.core.errors import ConfigError
from flexbench.models.families import DecoderSpec
from flexbench.server_config.adapters import adapter_bytes_per_block
from flexbench.server_config.budget import (
    GIB,
    QUANT_TYPES,
    TOO_LITTLE_MEMORY,
    BlockCosts,
    announced_cache_tokens,
    block_costs,
    disk_bytes,
    seed_num_blocks,
    server_defaults,
)
from flexbench.server_config.compute_setup import ComputeSetup
from flexbench.server_config.config import Machine, ServerConfig
from flexbench.server_config.hardware import COMMON_CARD_GIB, GpuSet
from flexbench.server_config.placement import servers_for, swarm_throughput
from flexbench.server_config.speeds import (
    DEFAULT_INFERENCE_RPS,
    ComputeSpeed,
    Network,
    Throughput,
    client_step_s,
    server_throughput,
    sufficient_forward_rps,
)


@dataclass(frozen=True, kw_only=True)
class ClientEstimate:
    """One client that generates alone, through the fewest servers or as many as were asked for."""

    hops: int
    rtt_s: float | None
    inference_rps: float
    is_assumed_rps: bool
    """Whether inference_rps is what Petals' clients assume of servers that announce none."""
    fewest_hops: int
    steps_per_s: float


@dataclass(frozen=True, kw_only=True)
class SwarmEstimate:
    """A swarm of servers like this one. Throughput in tokens/s."""

    fewest_servers: int
    num_servers: int
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class SeedEstimate:
    """The simpler formula's answer; None where it needs what is not known."""

    num_blocks: int | None
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A server with a fixed number of blocks, on GPUs of a fixed size. All sizes in bytes."""

    model: DecoderSpec
    setup: ComputeSetup
    gpus: GpuSet | None
    attn_cache_tokens: int
    costs: BlockCosts
    num_blocks: int
    """0: not one block fits, and all that depends on it is None or 0."""
    max_num_blocks: int | None
    """What Petals would choose; None where the memory is not known."""
    blocks_by_quant_type: Mapping[str, int]
    """What Petals would choose with each quantization; empty where the memory is not known."""
    block_range: range | None
    cuda_context_bytes: int
    compute: ComputeSpeed
    network: Network
    relay: bool
    throughput: Throughput | None
    sufficient_forward_rps: float | None
    client: ClientEstimate | None
    swarm: SwarmEstimate | None
    seed: SeedEstimate

    @property
    def weights_bytes(self) -> int:
        """Weights of all blocks."""
        return self.costs.block_bytes * self.num_blocks

    @property
    def cache_bytes(self) -> int:
        """Attention cache of all blocks."""
        return self.costs.cache_bytes_per_block * self.num_blocks

    @property
    def adapter_bytes(self) -> int:
        """Adapters of all blocks."""
        return self.costs.adapter_bytes_per_block * self.num_blocks

    @property
    def total_bytes(self) -> int:
        """All that Petals counts: weights, cache, adapters and the reserve for backward passes."""
        return self.costs.memory_for(self.num_blocks)

    @property
    def free_bytes(self) -> int | None:
        """What stays of the GPUs' memory, negative if it is too little; None: not known.

        Of the memory that is free now, where that is known.
        """
        if self.gpus is None:
            return None
        free = self.gpus.free_bytes
        memory = self.gpus.memory_bytes if free is None else min(free, self.gpus.memory_bytes)
        return memory - self.total_bytes - self.cuda_context_bytes

    @property
    def smallest_card_bytes(self) -> int | None:
        """The smallest common card that takes all this, CUDA context included; None: none does."""
        needed = self.total_bytes + self.cuda_context_bytes
        if self.setup.device_type != "cuda" or len(self.setup.devices) > 1:
            return None
        return next((gib * GIB for gib in COMMON_CARD_GIB if gib * GIB >= needed), None)

    @property
    def announced_cache_tokens(self) -> int:
        """`cache_tokens_left` of the idle server's announcement."""
        dtype = self.setup.torch_dtype
        return announced_cache_tokens(self.model, dtype, self.costs, self.num_blocks)

    @property
    def network_rps(self) -> float:
        """Hidden states that the network carries in a second, without a relay."""
        return self.network.rps(self.model.hidden_size)

    @property
    def download_bytes(self) -> int:
        """Weights of all blocks as they come from a model hub, or lie on disk."""
        return disk_bytes(self.model) * self.num_blocks


def estimate(
    config: ServerConfig, machine: Machine, *, compute: ComputeSpeed, network: Network
) -> tuple[Estimate, ...]:
    """One estimate for each size of GPU. Raises ConfigError if none holds a block."""
    sets: tuple[GpuSet | None, ...] = machine.gpu_sets or (None,)
    estimates = tuple(_estimate(config, machine.setup, gpus, compute, network) for gpus in sets)
    if not any(one.num_blocks for one in estimates):
        raise ConfigError(
            "--gpu-memory",
            f"{TOO_LITTLE_MEMORY}: {config.model.name} in this format takes "
            f"{estimates[0].costs.memory_for(1) / GIB:.2f} GiB for one",
        )
    return estimates


def costs_of(config: ServerConfig, setup: ComputeSetup, *, groups: int | None = None) -> BlockCosts:
    """What a block costs in this configuration; `groups` replaces Petals' count of shared heads."""
    tokens = config.attn_cache_tokens or server_defaults(config.model).attn_cache_tokens
    adapters = config.adapter_memory_bytes
    if adapters is None:
        folders = config.adapters
        adapters = sum(adapter_bytes_per_block(name, setup.torch_dtype) for name in folders)
    return block_costs(
        config.model,
        dtype=setup.torch_dtype,
        quant_type=setup.quant_type,
        attn_cache_tokens=tokens,
        adapter_bytes_per_block=adapters,
        num_devices=len(setup.devices),
        groups=groups,
    )


def _estimate(
    config: ServerConfig,
    setup: ComputeSetup,
    gpus: GpuSet | None,
    compute: ComputeSpeed,
    network: Network,
) -> Estimate:
    model = config.model
    costs = costs_of(config, setup)
    tokens = config.attn_cache_tokens or server_defaults(model).attn_cache_tokens
    fitting = None if gpus is None else costs.blocks_in(gpus.memory_bytes, model.num_hidden_layers)
    num_blocks = config.chosen_num_blocks or fitting or 0
    network_rps = network.rps(model.hidden_size)
    throughput = sufficient = None
    if num_blocks:
        throughput = server_throughput(
            compute.forward_rps, network_rps, num_blocks, relay=config.relay
        )
        sufficient = sufficient_forward_rps(network_rps, num_blocks, relay=config.relay)
    return Estimate(
        model=model,
        setup=setup,
        gpus=gpus,
        attn_cache_tokens=tokens,
        costs=costs,
        num_blocks=num_blocks,
        max_num_blocks=fitting,
        blocks_by_quant_type=_blocks_by_quant_type(config, setup, gpus),
        block_range=config.block_range,
        cuda_context_bytes=_context_bytes(config, setup),
        compute=compute,
        network=network,
        relay=config.relay,
        throughput=throughput,
        sufficient_forward_rps=sufficient,
        client=_client(config, compute, num_blocks),
        swarm=_swarm(config, throughput, num_blocks),
        seed=_seed(config, setup, tokens, gpus, compute.forward_rps, network_rps),
    )


def _blocks_by_quant_type(
    config: ServerConfig, setup: ComputeSetup, gpus: GpuSet | None
) -> dict[str, int]:
    if gpus is None:
        return {}
    layers = config.model.num_hidden_layers
    return {
        quant_type: costs_of(config, replace(setup, quant_type=quant_type)).blocks_in(
            gpus.memory_bytes, layers
        )
        for quant_type in QUANT_TYPES
    }


def _context_bytes(config: ServerConfig, setup: ComputeSetup) -> int:
    is_cuda = setup.device_type == "cuda"
    return config.cuda_context_bytes * len(setup.devices) if is_cuda else 0


def _client(config: ServerConfig, compute: ComputeSpeed, num_blocks: int) -> ClientEstimate | None:
    if not num_blocks:
        return None
    layers = config.model.num_hidden_layers
    hops = config.hops or servers_for(layers, num_blocks)
    rps = compute.inference_rps or DEFAULT_INFERENCE_RPS
    return ClientEstimate(
        hops=hops,
        fewest_hops=servers_for(layers, num_blocks),
        rtt_s=config.rtt_s,
        inference_rps=rps,
        is_assumed_rps=compute.inference_rps is None,
        steps_per_s=1 / client_step_s(layers, hops, config.rtt_s, rps),
    )


def _swarm(
    config: ServerConfig, throughput: Throughput | None, num_blocks: int
) -> SwarmEstimate | None:
    if throughput is None:
        return None
    layers = config.model.num_hidden_layers
    fewest = servers_for(layers, num_blocks)
    num_servers = config.num_servers or fewest
    return SwarmEstimate(
        fewest_servers=fewest,
        num_servers=num_servers,
        tokens_per_s=swarm_throughput(layers, num_blocks, num_servers, throughput.tokens_per_s),
    )


def _seed(
    config: ServerConfig,
    setup: ComputeSetup,
    attn_cache_tokens: int,
    gpus: GpuSet | None,
    forward_rps: float | None,
    network_rps: float,
) -> SeedEstimate:
    num_blocks = None
    if gpus is not None:
        num_blocks = seed_num_blocks(
            config.model, setup.torch_dtype, setup.quant_type, attn_cache_tokens, gpus.memory_bytes
        )
    return SeedEstimate(
        num_blocks=num_blocks,
        tokens_per_s=network_rps if forward_rps is None else min(forward_rps, network_rps),
    )
