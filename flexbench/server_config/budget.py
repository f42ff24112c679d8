"""The memory of a Petals server, line by line, and how many blocks fit.

Sources: petals/server/block_utils.py (get_block_size) and petals/server/server.py
(Server.__init__, Server._choose_num_blocks) of Petals 2.2, the same in 2.3.0.dev2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexbench.models.families import DTYPE_BYTES, DecoderSpec

GIB = 2**30
# "Bitness of NF4 measured empirically" in get_block_size: 4 bits, and scales on top.
_QUANTIZED_BYTES = {"int8": 1, "nf4": 4.25 / 8}
QUANT_TYPES = ("none", "int8", "nf4")
# What get_block_size adds for descriptions of tensors, quantization tables and the like.
_OVERHEAD = 0.01
# rpc_backward takes 2 GiB with BLOOM-176B, and in proportion to the hidden size with others.
_AUTOGRAD_BYTES = 2 * GIB
_AUTOGRAD_HIDDEN_SIZE = 14336
# GPUs of one server: the largest memory may be this many times the smallest.
MAX_UNEVENNESS = 1.5
TOO_LITTLE_MEMORY = "Your GPU does not have enough memory to serve at least one block"


def block_bytes(spec: DecoderSpec, dtype: str, quant_type: str) -> int:
    """Bytes of one block's weights in memory; `dtype` counts only without quantization."""
    bytes_per_value = _QUANTIZED_BYTES.get(quant_type, DTYPE_BYTES[dtype])
    return round(spec.block_parameters * bytes_per_value * (1 + _OVERHEAD))


def disk_bytes(spec: DecoderSpec) -> int:
    """Bytes of one block's weights as they are downloaded: in their own type, not quantized."""
    return block_bytes(spec, resolve_dtype(spec, "auto"), "none")


def resolve_dtype(spec: DecoderSpec, torch_dtype: str) -> str:
    """'auto' becomes the configuration's type, and bfloat16 where that says none or float32."""
    if torch_dtype != "auto":
        return torch_dtype
    return "bfloat16" if spec.torch_dtype in (None, "float32") else spec.torch_dtype


def petals_key_value_groups(spec: DecoderSpec) -> int:
    """Heads that share one key/value head, as Petals counts them: for Mixtral, always 1."""
    return 1 if spec.family == "mixtral" else spec.num_key_value_groups


@dataclass(frozen=True, kw_only=True)
class ServerDefaults:
    """What a Petals server uses where its operator says nothing."""

    attn_cache_tokens: int
    inference_max_length: int
    max_batch_size: int


def server_defaults(spec: DecoderSpec) -> ServerDefaults:
    """More of everything where key/value heads are shared: a token then takes less memory."""
    if petals_key_value_groups(spec) > 1:
        return ServerDefaults(
            attn_cache_tokens=16384, inference_max_length=8192, max_batch_size=8192
        )
    return ServerDefaults(attn_cache_tokens=4096, inference_max_length=2048, max_batch_size=2048)


def cache_bytes_per_block(
    spec: DecoderSpec, dtype: str, attn_cache_tokens: int, *, groups: int | None = None
) -> int:
    """Keys and values of `attn_cache_tokens` tokens in one block; they are never quantized.

    `groups` defaults to what Petals counts with.
    """
    groups = petals_key_value_groups(spec) if groups is None else groups
    return 2 * spec.hidden_size * attn_cache_tokens // groups * DTYPE_BYTES[dtype]


def autograd_bytes(spec: DecoderSpec, num_devices: int) -> float:
    """What Petals keeps free for backward passes, on all devices together. Not a whole number."""
    return _AUTOGRAD_BYTES * num_devices / _AUTOGRAD_HIDDEN_SIZE * spec.hidden_size


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """What a server pays for each block, and once. All in bytes."""

    block_bytes: int
    cache_bytes_per_block: int
    adapter_bytes_per_block: int
    autograd_bytes: float

    @property
    def bytes_per_block(self) -> int:
        """Weights, cache and adapters of one block."""
        return self.block_bytes + self.cache_bytes_per_block + self.adapter_bytes_per_block

    def blocks_in(self, memory_bytes: int, num_hidden_layers: int) -> int:
        """How many blocks Petals chooses for this much memory: 0 where none fits."""
        num_blocks = math.floor((memory_bytes - self.autograd_bytes) / self.bytes_per_block)
        return max(0, min(num_blocks, num_hidden_layers))

    def memory_for(self, num_blocks: int) -> int:
        """The least memory in which Petals chooses `num_blocks` blocks, in bytes."""
        return math.ceil(self.autograd_bytes + num_blocks * self.bytes_per_block)


def block_costs(
    spec: DecoderSpec,
    *,
    dtype: str,
    quant_type: str,
    attn_cache_tokens: int,
    adapter_bytes_per_block: int = 0,
    num_devices: int = 1,
    groups: int | None = None,
) -> BlockCosts:
    """What a block of `spec` costs a server of `num_devices` GPUs."""
    return BlockCosts(
        block_bytes=block_bytes(spec, dtype, quant_type),
        cache_bytes_per_block=cache_bytes_per_block(spec, dtype, attn_cache_tokens, groups=groups),
        adapter_bytes_per_block=adapter_bytes_per_block,
        autograd_bytes=autograd_bytes(spec, num_devices),
    )


def announced_cache_tokens(
    spec: DecoderSpec, dtype: str, costs: BlockCosts, num_blocks: int
) -> int:
    """`cache_tokens_left` of an idle server's announcement.

    Keys and values of all blocks count apart, so it is about 2 x num_blocks x attn_cache_tokens.
    Source: ModuleAnnouncerThread in petals/server/server.py.
    """
    bytes_per_token = spec.hidden_size * DTYPE_BYTES[dtype] // petals_key_value_groups(spec)
    return costs.cache_bytes_per_block * num_blocks // bytes_per_token


def seed_num_blocks(
    spec: DecoderSpec, dtype: str, quant_type: str, attn_cache_tokens: int, memory_bytes: int
) -> int:
    """The simpler formula in circulation: nine tenths of the memory, minus the cache of all layers.

    usable = 0.9 * total; cache = 2 * layers * hidden * bytes * tokens; (usable - cache) // block.
    It counts neither shared key/value heads nor a reserve for backward passes.
    """
    cache = 2 * spec.num_hidden_layers * spec.hidden_size * DTYPE_BYTES[dtype] * attn_cache_tokens
    num_blocks = int((memory_bytes * 0.9 - cache) // block_bytes(spec, dtype, quant_type))
    return max(0, min(num_blocks, spec.num_hidden_layers))
