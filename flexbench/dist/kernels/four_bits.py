"""y = x W^T + b with weights of 4 bits, which the product reads as they are.

The grid is that of `flexbench.dist.compression`: in each group of a row, w ~ min + level * range /
15. Torch's fused product (bfloat16 and a CPU only) has it as w = (level - 8) * scale + zero, with
scale = range / 15 and zero = min + 8 * scale, both bfloat16.

What is rounded: scale and zero, which are rounded before levels are chosen, so that the grid moves
by at most 2^-8 of itself and elements keep their nearest level; x and y to bfloat16, 2^-9 each of
their size, if the model's type is wider. The step of the grid is 2^-4 of a group's range.

Letters in names of shapes: N outputs, K inputs, G groups of a row; x is (..., K), y is (..., N).
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from flexbench.dist.kernels.linear import DenseMap, finished
from flexbench.dist.policy import CompressionConfig

_DTYPE = torch.bfloat16
_BLOCK_ROWS = 64  # the product's layout is simple in whole blocks: rows are filled up to them
_GROUP_SIZES = (32, 64, 128, 256)  # that the product takes
_LEVELS = 15
_ROWS_AT_ONCE = 4096  # quantizing takes 12 bytes an element; a multiple of _BLOCK_ROWS
# From how many rows of x on it pays to decompress first. The fused product's time grows with the
# rows; its rival's is 2 to 5 ms a million weights once, and then a tenth of the fused one's a row.
_DENSE_ROWS = 128


def fits(shape: tuple[int, ...], config: CompressionConfig, device: str) -> bool:
    """Whether the fused product takes a matrix of this shape (N, K) on this device."""
    if device != "cpu" or config.group_size not in _GROUP_SIZES:
        return False
    return shape[1] % config.group_size == 0 and _is_supported()


def filled_rows(num_rows: int) -> int:
    """N with the rows that fill up the last block."""
    return -(-num_rows // _BLOCK_ROWS) * _BLOCK_ROWS


def row_bytes(width: int, config: CompressionConfig) -> int:
    """Bytes of a row of `width` elements: levels, and two numbers a group."""
    return width // 2 + width // config.group_size * 2 * int(_DTYPE.itemsize)


def pack(weight_NK: torch.Tensor, config: CompressionConfig) -> torch.Tensor:
    """Quantize: (N, K) of any float type to uint8 (filled_rows(N) * row_bytes(K),)."""
    packed, bounds = [], []
    for rows in weight_NK.split(_ROWS_AT_ONCE):
        levels, bounds_RG2 = _quantize(rows, config)
        # Rows that fill up the last block are all zero.
        missing = filled_rows(len(rows)) - len(rows)
        levels = functional.pad(levels, (0, 0, 0, missing))
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1).flatten())
        bounds.append(functional.pad(bounds_RG2, (0, 0, 0, 0, 0, missing)))
    bounds_GN2 = torch.cat(bounds).transpose(0, 1).contiguous()
    return torch.cat([*packed, bounds_GN2.view(torch.uint8).flatten()])


def _quantize(
    weight_RK: torch.Tensor, config: CompressionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels (R, K), int32, and each group's scale and zero (R, G, 2), bfloat16."""
    grouped = weight_RK.float().view(len(weight_RK), -1, config.group_size)
    minimum, maximum = grouped.aminmax(dim=-1, keepdim=True)
    scale = ((maximum - minimum) / _LEVELS).to(_DTYPE)
    zero = (minimum + 8 * scale.float()).to(_DTYPE)
    divisor = scale.float()
    divisor.masked_fill_(divisor == 0, 1)  # all elements alike: any level gives zero
    levels = (grouped - zero.float()).div_(divisor).add_(8).round_().clamp_(0, _LEVELS)
    return levels.view(weight_RK.shape).int(), torch.cat([scale, zero], dim=-1)


class FourBitMap:
    """A matrix of 4 bits, (N, K), of which `data` is what `pack` made."""

    def __init__(
        self,
        data: torch.Tensor,
        shape: tuple[int, ...],
        config: CompressionConfig,
        dtype: torch.dtype,
    ) -> None:
        self._num_rows, width = shape
        self._dtype = dtype
        self._group_size = config.group_size
        rows = filled_rows(self._num_rows)
        size = rows * width // 2
        self._packed = data[:size].view(rows, width // 2)
        self._bounds_GN2 = data[size:].view(_DTYPE).view(-1, rows, 2)

    def apply(
        self,
        x: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        *,
        is_relu: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """relu(x W^T + bias) + residual, in x's type: (..., K) to (..., N)."""
        if x.numel() >= _DENSE_ROWS * x.shape[-1]:
            return DenseMap(self.dense()).apply(x, bias_N, is_relu=is_relu, residual=residual)
        rows = x.reshape(-1, x.shape[-1]).to(_DTYPE)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._packed, self._group_size, self._bounds_GN2
        )
        y = y[:, : self._num_rows].to(x.dtype)
        if bias_N is not None:
            y = y + bias_N
        y = y.view(*x.shape[:-1], self._num_rows)
        return finished(y, is_relu=is_relu, residual=residual)

    def dense(self) -> torch.Tensor:
        """The matrix (N, K) in the model's type."""
        return _decompress(self._packed, self._bounds_GN2, self._group_size, self._dtype)[
            : self._num_rows
        ]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K). All are decompressed for it."""
        return self.dense()[index]


def _decompress(
    packed: torch.Tensor, bounds_GN2: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """The layout of AVX-512: 32 bytes for each column of a block; rows 0 to 31 are the low bits."""
    rows, width = packed.shape[0], packed.shape[1] * 2
    columns = packed.view(rows // _BLOCK_ROWS, width, _BLOCK_ROWS // 2)
    levels = torch.cat([columns & 0xF, columns >> 4], dim=-1).transpose(1, 2)
    scale, zero = bounds_GN2.to(dtype).transpose(0, 1)[..., None, :].unbind(-1)
    x = torch.empty(rows, width, dtype=dtype)
    x.view(rows // _BLOCK_ROWS, _BLOCK_ROWS, width).copy_(levels)
    x.view(rows, -1, group_size).sub_(8).mul_(scale).add_(zero)
    return x


@cache
def _is_supported() -> bool:
    """Whether product and layout are as expected: torch promises neither."""
    config = CompressionConfig(group_size=32)
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.rand(_BLOCK_ROWS, 64, generator=generator)
    identity = torch.eye(64)
    try:
        product = FourBitMap(pack(weight_NK, config), (_BLOCK_ROWS, 64), config, torch.float32)
        found = product.apply(identity, None).T
    except (AttributeError, NotImplementedError, RuntimeError):  # another torch, or another CPU
        return False
    step = 1 / _LEVELS
    is_grid = bool((product.dense() - weight_NK).abs().max() < 0.6 * step)
    return is_grid and torch.allclose(found, product.dense(), rtol=2**-7, atol=2**-9)
