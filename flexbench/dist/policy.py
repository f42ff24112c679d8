"""How generation is batched, and where weights, cache and activations live."""

from __future__ import annotations

from dataclasses import dataclass

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError


@dataclass(frozen=True)
class CompressionConfig:
    """Group-wise asymmetric quantization: each group has its own smallest value and scale."""

    num_bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        """Raise ConfigError for what the packing cannot do."""
        if self.num_bits != 4:
            raise ConfigError("num_bits", f"must be 4, not {self.num_bits}")
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError("group_size", f"must be even, not {self.group_size}")


@dataclass(frozen=True)
class Percent:
    """Shares of the homes, in percent; what gpu and cpu leave lies on disk."""

    gpu: float
    cpu: float

    @property
    def disk(self) -> float:
        """What is left for the disk."""
        return 100.0 - self.gpu - self.cpu


@dataclass(frozen=True)
class Policy:
    """FlexGen's policy, field by field. Percentages are of bytes; the rest is on disk.

    Raises ConfigError, which names the option, for values that cannot work.
    """

    gpu_batch_size: int
    """Prompts that are computed at once."""
    num_gpu_batches: int
    """Batches that pass through a layer while its weights are loaded."""
    w_gpu_percent: float
    w_cpu_percent: float
    cache_gpu_percent: float
    cache_cpu_percent: float
    act_gpu_percent: float
    act_cpu_percent: float
    overlap: bool
    """Load and store while computing."""
    sep_layer: bool
    """Attention and MLP are loaded as layers of their own: half the buffer, twice the loads."""
    pin_weight: bool
    """Weights in host memory are page-locked, which CUDA copies faster."""
    cpu_cache_compute: bool
    """Attention over the part of the cache outside of the GPU is computed on the CPU."""
    attn_sparsity: float
    """Share of past values that enter the attention of a new token: those with most weight."""
    compress_weight: bool
    comp_weight_config: CompressionConfig | None
    compress_cache: bool
    comp_cache_config: CompressionConfig | None

    def __post_init__(self) -> None:
        """Check every field."""
        check_count("--gpu-batch-size", self.gpu_batch_size, minimum=1)
        check_count("--num-gpu-batches", self.num_gpu_batches, minimum=1)
        for name, percent in (
            ("weights", self.weights),
            ("cache", self.cache),
            ("activations", self.activations),
        ):
            _check_percent(name, percent)
        if not 0 < self.attn_sparsity <= 1:
            raise ConfigError(
                "--attn-sparsity", f"must be above 0 and at most 1, not {self.attn_sparsity:g}"
            )

    @property
    def weights(self) -> Percent:
        """Where the weights are."""
        return Percent(self.w_gpu_percent, self.w_cpu_percent)

    @property
    def cache(self) -> Percent:
        """Where keys and values are."""
        return Percent(self.cache_gpu_percent, self.cache_cpu_percent)

    @property
    def activations(self) -> Percent:
        """Where activations are between two layers."""
        return Percent(self.act_gpu_percent, self.act_cpu_percent)

    @property
    def weight_compression(self) -> CompressionConfig | None:
        """How weights are compressed; None: not at all."""
        return (self.comp_weight_config or CompressionConfig()) if self.compress_weight else None

    @property
    def cache_compression(self) -> CompressionConfig | None:
        """How keys and values are compressed; None: not at all."""
        return (self.comp_cache_config or CompressionConfig()) if self.compress_cache else None

    @property
    def block_size(self) -> int:
        """Prompts that pass through the layers together."""
        return self.gpu_batch_size * self.num_gpu_batches


def _check_percent(name: str, percent: Percent) -> None:
    for home, share in (("gpu", percent.gpu), ("cpu", percent.cpu)):
        if not 0 <= share <= 100:
            raise ConfigError(
                "--percent", f"{name} on {home} must be between 0 and 100, not {share:g}"
            )
    if percent.gpu + percent.cpu > 100:
        raise ConfigError(
            "--percent",
            f"{name}: {percent.gpu:g} on gpu and {percent.cpu:g} on cpu are together over 100",
        )
