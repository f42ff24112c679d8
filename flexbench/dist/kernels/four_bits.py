"""y = x W^T + b with weights of 4 bits, which the product reads as they are.

The grid is that of `flexbench.dist.compression`: in each group of a row, w ~ min + level * range /
15. Here it is w = (level - 8) * scale + zero, with scale = range / 15 and zero = min + 8 * scale,
both bfloat16. On a CPU the product is our own, or torch's where kernels cannot be compiled.

What is rounded: scale and zero, which are rounded before levels are chosen, so that the grid moves
by at most 2^-8 of itself and elements keep their nearest level; x to bfloat16, and by torch y, too,
2^-9 of its size each, if the model's type is wider. The step of the grid is 2^-4 of a group's
range.

Letters in names of shapes: N outputs, K inputs, G groups of a row; x is (..., K), y is (..., N).
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from flexbench.dist.kernels.epilogue import NOTHING, Epilogue
from flexbench.dist.kernels.four_bit_layouts import (
    BLOCK_ROWS,
    DTYPE,
    Blocks,
    Layout,
    Panels,
    dense,
)
from flexbench.dist.kernels.panels import InPanels
from flexbench.dist.policy import CompressionConfig

_GROUP_SIZES = (32, 64, 128, 256)  # that torch's product takes
_LEVELS = 15
_ROWS_AT_ONCE = 4096  # quantizing takes 12 bytes an element; a multiple of BLOCK_ROWS


def fits(shape: tuple[int, ...], config: CompressionConfig, device: str) -> bool:
    """Whether there is a product with a matrix of this shape (N, K) on this device."""
    if device != "cpu" or config.group_size not in _GROUP_SIZES:
        return False
    return shape[1] % config.group_size == 0 and (Panels.is_available() or _is_supported())


def filled_rows(num_rows: int) -> int:
    """N with the rows that fill up the last block."""
    return -(-num_rows // BLOCK_ROWS) * BLOCK_ROWS


def row_bytes(width: int, config: CompressionConfig) -> int:
    """Bytes of a row of `width` elements: levels, and two numbers a group."""
    return width // 2 + width // config.group_size * 2 * int(DTYPE.itemsize)


def pack(weight_NK: torch.Tensor, config: CompressionConfig) -> torch.Tensor:
    """Quantize: (N, K) of any float type to uint8 (filled_rows(N) * row_bytes(K),)."""
    quantized = [_quantize(rows, config) for rows in weight_NK.split(_ROWS_AT_ONCE)]
    # Rows that fill up the last block are all zero.
    missing = filled_rows(len(weight_NK)) - len(weight_NK)
    levels_NK = functional.pad(torch.cat([levels for levels, _ in quantized]), (0, 0, 0, missing))
    bounds_NG2 = torch.cat([bounds for _, bounds in quantized])
    bounds_NG2 = functional.pad(bounds_NG2, (0, 0, 0, 0, 0, missing))
    return _layout_kind().lay_out(levels_NK, bounds_NG2)


def _quantize(
    weight_RK: torch.Tensor, config: CompressionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels (R, K), uint8, and each group's scale and zero (R, G, 2), bfloat16."""
    grouped = weight_RK.float().view(len(weight_RK), -1, config.group_size)
    minimum, maximum = grouped.aminmax(dim=-1, keepdim=True)
    scale = ((maximum - minimum) / _LEVELS).to(DTYPE)
    zero = (minimum + 8 * scale.float()).to(DTYPE)
    divisor = scale.float()
    divisor.masked_fill_(divisor == 0, 1)  # all elements alike: any level gives zero
    levels = (grouped - zero.float()).div_(divisor).add_(8).round_().clamp_(0, _LEVELS)
    bounds = torch.cat([scale, zero], dim=-1)
    return levels.view(weight_RK.shape).to(torch.uint8), bounds


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
        whole = (filled_rows(self._num_rows), width)
        self._layout: Layout = _layout_kind()(data, whole, config.group_size)

    def apply(self, x: torch.Tensor, then: Epilogue = NOTHING) -> torch.Tensor:
        """x W^T and what comes then, in x's type: (..., K) to (..., N)."""
        if then.residual is not None:
            then = then._replace(residual=then.residual.reshape(-1, self._num_rows))
        y_MN = self._layout.multiply(x.reshape(-1, x.shape[-1]), then, self._num_rows)
        return y_MN.view(*x.shape[:-1], self._num_rows)

    def dense(self) -> torch.Tensor:
        """The matrix (N, K) in the model's type."""
        return dense(self._layout, self._dtype)[: self._num_rows]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K). All are decompressed for it."""
        return self.dense()[index]

    def in_panels(self) -> InPanels | None:
        """The matrix as it lies, if that is our own layout."""
        whole = self._layout.in_panels()
        return None if whole is None else whole._replace(num_outputs=self._num_rows)


def _layout_kind() -> type[Panels] | type[Blocks]:
    return Panels if Panels.is_available() else Blocks


@cache
def _is_supported() -> bool:
    """Whether torch's product and layout are as expected: it promises neither."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    if not all(hasattr(torch.ops.aten, name) for name in names):  # another torch
        return False
    config = CompressionConfig(group_size=32)
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.rand(BLOCK_ROWS, 64, generator=generator)
    identity = torch.eye(64)
    try:
        product = FourBitMap(pack(weight_NK, config), (BLOCK_ROWS, 64), config, torch.float32)
        found = product.apply(identity).T
    except RuntimeError:  # another CPU
        return False
    step = 1 / _LEVELS
    is_grid = bool((product.dense() - weight_NK).abs().max() < 0.6 * step)
    return is_grid and torch.allclose(found, product.dense(), rtol=2**-7, atol=2**-9)
