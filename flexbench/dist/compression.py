"""Group-wise 4-bit quantization (FlexGen, arXiv 2303.06865, section 5).

The last dimension is cut into groups. A group keeps its smallest value and its range, and each
element as one of 16 levels between: x ~ min + level * range / 15. One row of n elements becomes
ceil(n / group_size) * group_size / 2 bytes of levels and two numbers a group.
"""

from __future__ import annotations

import torch

from flexbench.dist.kernels.epilogue import NOTHING, Epilogue
from flexbench.dist.kernels.linear import DenseMap
from flexbench.dist.kernels.panels import InPanels
from flexbench.dist.policy import CompressionConfig

_LEVELS = 15  # the highest of 4 bits


def num_groups(width: int, config: CompressionConfig) -> int:
    """Groups of a row of `width` elements; the last one may be filled up."""
    return -(-width // config.group_size)


def packed_bytes(width: int, config: CompressionConfig) -> int:
    """Bytes of the levels of a row of `width` elements."""
    return num_groups(width, config) * config.group_size // 2


def record_bytes(width: int, config: CompressionConfig, dtype: torch.dtype) -> int:
    """Bytes of a row of `width` elements: its levels, then its groups' minima and ranges."""
    return packed_bytes(width, config) + num_groups(width, config) * 2 * int(dtype.itemsize)


def compress(x: torch.Tensor, config: CompressionConfig) -> torch.Tensor:
    """Quantize along the last dimension: (..., n) to uint8 (..., record_bytes(n))."""
    width = x.shape[-1]
    groups = num_groups(width, config)
    filled = groups * config.group_size
    if filled > width:
        # With copies of the last element, which change neither minimum nor range.
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], filled - width)], dim=-1)
    grouped = x.reshape(*x.shape[:-1], groups, config.group_size)
    minimum = grouped.amin(dim=-1, keepdim=True)
    spread = grouped.amax(dim=-1, keepdim=True) - minimum
    # In float32: levels computed in a half type would be off where the range is large.
    levels = grouped.to(torch.float32, copy=True)
    # Divided first: 15 / range is infinite for the smallest ranges. A range of 0 has one level.
    levels.sub_(minimum).div_(spread.float().masked_fill_(spread == 0, 1)).mul_(_LEVELS)
    packed = levels.round_().clamp_(0, _LEVELS).to(torch.uint8).view(*x.shape[:-1], filled)
    packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    bounds = torch.cat([minimum, spread], dim=-1).flatten(-2).contiguous()
    return torch.cat([packed, bounds.view(torch.uint8)], dim=-1)


def decompress(
    records: torch.Tensor, width: int, config: CompressionConfig, dtype: torch.dtype
) -> torch.Tensor:
    """What `compress` was given, up to half a level: (..., record_bytes(n)) to (..., n)."""
    groups = num_groups(width, config)
    packed, bounds = records.split([packed_bytes(width, config), groups * 2 * dtype.itemsize], -1)
    bounds = (
        bounds.clone(memory_format=torch.contiguous_format)
        .view(dtype)
        .reshape(*records.shape[:-1], groups, 2)
    )
    minimum, spread = bounds[..., :1], bounds[..., 1:]
    # In place: weights are decompressed in every step.
    x = torch.empty((*packed.shape, 2), dtype=dtype, device=records.device)
    x[..., 0] = packed & 0xF
    x[..., 1] = packed >> 4
    x = x.view(*records.shape[:-1], groups, config.group_size)
    x.mul_(spread / _LEVELS).add_(minimum)
    return x.flatten(-2)[..., :width]


class CompressedMap:
    """A matrix (N, K) of compressed rows, which is decompressed when it is first asked for."""

    def __init__(
        self, records: torch.Tensor, width: int, config: CompressionConfig, dtype: torch.dtype
    ) -> None:
        self._records = records
        self._width = width
        self._config = config
        self._dtype = dtype
        self._dense: torch.Tensor | None = None

    def apply(self, x: torch.Tensor, then: Epilogue = NOTHING) -> torch.Tensor:
        """x W^T and what comes then, in x's type: (..., K) to (..., N)."""
        return DenseMap(self.dense()).apply(x, then)

    def dense(self) -> torch.Tensor:
        """The matrix itself; it is kept, for the batches that follow."""
        if self._dense is None:
            self._dense = self._decompress(self._records)
        return self._dense

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K). No others are decompressed."""
        return self._decompress(self._records[index])

    def in_panels(self) -> InPanels | None:
        """None: it lies otherwise."""
        return None

    def _decompress(self, records: torch.Tensor) -> torch.Tensor:
        return decompress(records, self._width, self._config, self._dtype)
