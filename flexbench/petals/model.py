"""The model that a swarm serves, as flexbench describes it, and its mapping onto Petals' BLOOM.

Petals' client of choice is BLOOM. Four dimensions decide what a decoder costs to run, so an OPT
model is measured as the BLOOM of the same four dimensions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from flexbench.core.errors import ConfigError
from flexbench.models.shapes import OPT_SHAPES, ModelShape, opt_shape

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_RETRIES = 5

# hivemind uses the dot to separate the blocks' numbers, so no DHT prefix may contain one. The first
# rule is the original script's; the others follow what Petals does with names from a hub.
_DHT_PREFIXES = {"facebook/opt-6.7b": "opt6b"}


class OptDimensions(Protocol):
    """What is read of an OPT configuration: a ModelShape, or transformers' OPTConfig."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of one block."""

    @property
    def num_hidden_layers(self) -> int:
        """Transformer blocks."""

    @property
    def vocab_size(self) -> int:
        """Entries of the token vocabulary."""


def shape_for_prefix(prefix: str) -> ModelShape:
    """The OPT shape that a --prefix names. Raises ConfigError with the accepted names."""
    try:
        return opt_shape(prefix)
    except KeyError:
        accepted = ", ".join(OPT_SHAPES)
        raise ConfigError("--prefix", f"unknown model {prefix!r}; accepted: {accepted}") from None


def dht_prefix_for(prefix: str) -> str:
    """The key under which a swarm announces the blocks of the model `prefix`."""
    return _DHT_PREFIXES.get(prefix, prefix.replace(".", "-"))


@dataclass(frozen=True, kw_only=True)
class SwarmModel:
    """All that a client has to know to generate with a swarm.

    `weights_folder` holds the embeddings of an embedded swarm's model; without it clients use
    random ones, which is enough to measure a swarm but gives meaningless tokens. `device` and
    `dtype` may be 'auto'. It travels to the worker processes, so it is plain data.
    """

    shape: ModelShape
    dht_prefix: str
    initial_peers: tuple[str, ...]
    weights_folder: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    connect_timeout_s: float = 60.0
    max_retries: int = DEFAULT_MAX_RETRIES

    @classmethod
    def of(cls, config: Any) -> SwarmModel:
        """A SwarmModel as it is, or the same facts read from Petals' DistributedBloomConfig.

        The embeddings are loaded where the configuration names a local folder.
        """
        if isinstance(config, SwarmModel):
            return config
        import_module("flexbench.petals_runtime.imports")  # teaches the configuration how to travel
        folder = config.name_or_path
        return cls(
            shape=ModelShape(
                name=config.dht_prefix,
                hidden_size=config.hidden_size,
                num_attention_heads=config.n_head,
                num_hidden_layers=config.n_layer,
                vocab_size=config.vocab_size,
            ),
            dht_prefix=config.dht_prefix,
            initial_peers=tuple(str(peer) for peer in config.initial_peers),
            weights_folder=folder if folder and os.path.isdir(folder) else None,
            max_retries=config.max_retries or DEFAULT_MAX_RETRIES,
        )

    def to_bloom_config(self) -> Any:
        """The DistributedBloomConfig of Petals for this model."""
        from flexbench.petals_runtime.imports import DistributedBloomConfig

        config = DistributedBloomConfig(
            name_or_path=self.weights_folder or "",
            initial_peers=list(self.initial_peers),
            dht_prefix=self.dht_prefix,
            daemon_startup_timeout=self.connect_timeout_s,
            max_retries=self.max_retries,
        )
        _patch_bloom_config(config, self.shape)
        return config


def _patch_bloom_config(bloom_config: Any, opt_config: OptDimensions) -> None:
    """Give a BLOOM configuration the four dimensions of an OPT model, in place."""
    bloom_config.hidden_size = opt_config.hidden_size
    bloom_config.n_head = opt_config.num_attention_heads
    bloom_config.n_layer = opt_config.num_hidden_layers
    bloom_config.vocab_size = opt_config.vocab_size


def resolve_device(device: str, index: int = 0) -> torch.device:
    """'auto' becomes the GPU `index` modulo the number of GPUs, or the CPU where there is none.

    Raises RuntimeError for a GPU that torch does not find.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    number = torch.device(device).index
    if number is None and num_gpus:
        number = index % num_gpus
    if number is None or number >= num_gpus:
        raise RuntimeError(f"--device {device}: torch finds {num_gpus} GPUs on this machine")
    return torch.device("cuda", number)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """'auto' becomes bfloat16 on a GPU, as in Petals, and float32 on a CPU."""
    import torch

    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> 'float32'."""
    return str(dtype).removeprefix("torch.")


def split_blocks(num_blocks: int, num_servers: int) -> list[range]:
    """Contiguous shares of the blocks, as even as possible, the larger ones first."""
    smaller, remainder = divmod(num_blocks, num_servers)
    shares: list[range] = []
    start = 0
    for index in range(num_servers):
        end = start + smaller + (1 if index < remainder else 0)
        shares.append(range(start, end))
        start = end
    return shares
