"""How levels of 4 bits lie in memory, and what multiplies with them as they are, on a CPU.

Either way w = (level - 8) * scale + zero, of which scale and zero are bfloat16, and x is rounded to
bfloat16.

Letters in names of shapes: N outputs, K inputs, G groups of a row; x is (M, K), y is (M, N).
"""

from __future__ import annotations

from typing import Protocol

import torch

from flexbench.dist.kernels.epilogue import Epilogue
from flexbench.dist.kernels.linear import DenseMap
from flexbench.dist.kernels.native import address, function, library
from flexbench.dist.kernels.panels import InPanels

DTYPE = torch.bfloat16
BLOCK_ROWS = 64  # N is a multiple of this
# From how many rows of x on it pays to decompress first for torch's product. Its time grows with
# the rows; its rival's is 2 to 5 ms a million weights once, and then a tenth of that a row.
_DENSE_ROWS = 128


class Layout(Protocol):
    """A matrix (N, K) in its layout; some of the last rows may be there to fill it up only."""

    def multiply(self, x_MK: torch.Tensor, then: Epilogue, num_outputs: int) -> torch.Tensor:
        """x W^T and what comes then, in x's type, of the first `num_outputs` rows."""

    def levels_and_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels (N, K), uint8, and each group's scale and zero (N, G, 2)."""

    def in_panels(self) -> InPanels | None:
        """The matrix for kernels of ours, if they can read this layout."""


class Panels:
    """The layout of four_bit_product.c, which says what it is."""

    _OUTPUTS = 32

    def __init__(self, data: torch.Tensor, shape: tuple[int, int], group_size: int) -> None:
        """`data` is what `lay_out` made, uint8; `shape` is (N, K)."""
        rows, width = shape
        self._width, self._group_size = width, group_size
        self._records = data.view(rows // self._OUTPUTS, width // group_size, -1)

    @staticmethod
    def is_available() -> bool:
        """Whether there is such a product on this machine."""
        kernels = library()
        return kernels is not None and bool(kernels.has_four_bit_product())

    @classmethod
    def lay_out(cls, levels_NK: torch.Tensor, bounds_NG2: torch.Tensor) -> torch.Tensor:
        """Of levels, and each group's scale and zero: uint8, one-dimensional."""
        num_rows, groups = bounds_NG2.shape[:2]
        panels = num_rows // cls._OUTPUTS
        # Panel, half of it, output, group, step of four inputs, pair of these, input of a pair.
        levels = levels_NK.to(torch.uint8).view(panels, 2, 16, groups, -1, 2, 2)
        levels = levels[:, 0] | levels[:, 1] << 4
        levels = levels.permute(0, 2, 3, 1, 5, 4).reshape(panels, groups, -1)
        bounds = bounds_NG2.view(panels, cls._OUTPUTS, groups, 2).permute(0, 2, 3, 1)
        bounds = bounds.contiguous().view(torch.uint8).view(panels, groups, -1)
        return torch.cat([levels, bounds], dim=-1).flatten()

    def multiply(self, x_MK: torch.Tensor, then: Epilogue, num_outputs: int) -> torch.Tensor:
        """x W^T and what comes then, in x's type, of the first `num_outputs` rows."""
        inputs = x_MK.to(DTYPE).contiguous()
        dtype = DTYPE if x_MK.dtype == DTYPE else torch.float32
        bias, residual = (
            None if given is None else given.to(dtype).contiguous()
            for given in (then.bias, then.residual)
        )
        num_rows = len(inputs)
        out = torch.empty(num_rows, num_outputs, dtype=dtype)
        packed = torch.empty(num_rows, self._width)  # float32, where they are widened
        x_sums = torch.empty(num_rows, self._records.shape[1])
        sizes = (num_rows, num_outputs, self._width, self._group_size)
        multiply = function("multiply_four_bits", "ppppppplllliii")
        addresses = map(address, (inputs, self._records, bias, residual, out, packed, x_sums))
        is_float, threads = dtype == torch.float32, torch.get_num_threads()
        multiply(*addresses, *sizes, then.is_relu, is_float, threads)
        return out.to(x_MK.dtype)

    def levels_and_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels (N, K), uint8, and each group's scale and zero (N, G, 2)."""
        panels, groups, _ = self._records.shape
        size = self._group_size * self._OUTPUTS // 2
        both = self._records[..., :size].view(panels, groups, -1, 16, 2, 2)
        levels = torch.stack([both & 0xF, both >> 4], dim=1)
        levels = levels.permute(0, 1, 4, 2, 3, 6, 5).reshape(-1, self._width)
        bounds = self._records[..., size:].contiguous().view(DTYPE)
        bounds = bounds.view(panels, groups, 2, self._OUTPUTS).permute(0, 3, 1, 2)
        return levels, bounds.reshape(-1, groups, 2)

    def in_panels(self) -> InPanels:
        """The matrix as it lies."""
        num_outputs = len(self._records) * self._OUTPUTS
        return InPanels(self._records, num_outputs, self._width, self._group_size)


class Blocks:
    """The layout of torch's fused product on a CPU with AVX-512.

    Blocks of 64 rows have 32 bytes for each column; rows 0 to 31 are the low bits. After all blocks
    come the bounds, (G, N, 2).
    """

    def __init__(self, data: torch.Tensor, shape: tuple[int, int], group_size: int) -> None:
        """`data` is what `lay_out` made, uint8; `shape` is (N, K)."""
        rows, width = shape
        self._group_size = group_size
        size = rows * width // 2
        self._packed = data[:size].view(rows, width // 2)
        self._bounds_GN2 = data[size:].view(DTYPE).view(-1, rows, 2)

    @classmethod
    def lay_out(cls, levels_NK: torch.Tensor, bounds_NG2: torch.Tensor) -> torch.Tensor:
        """Of levels, and each group's scale and zero: uint8, one-dimensional."""
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels_NK.int(), 1)
        bounds_GN2 = bounds_NG2.transpose(0, 1).contiguous()
        return torch.cat([packed.flatten(), bounds_GN2.view(torch.uint8).flatten()])

    def multiply(self, x_MK: torch.Tensor, then: Epilogue, num_outputs: int) -> torch.Tensor:
        """x W^T and what comes then, in x's type, of the first `num_outputs` rows."""
        if len(x_MK) >= _DENSE_ROWS:
            weight_NK = dense(self, x_MK.dtype)[:num_outputs]
            return DenseMap(weight_NK).apply(x_MK, then)
        # What comes from such a product may be a part of its columns.
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_MK.to(DTYPE).contiguous(), self._packed, self._group_size, self._bounds_GN2
        )
        y = y[:, :num_outputs].to(x_MK.dtype)
        return then.after_bias(y if then.bias is None else y + then.bias)

    def levels_and_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels (N, K), uint8, and each group's scale and zero (N, G, 2)."""
        rows, width = self._packed.shape[0], self._packed.shape[1] * 2
        columns = self._packed.view(rows // BLOCK_ROWS, width, BLOCK_ROWS // 2)
        levels = torch.cat([columns & 0xF, columns >> 4], dim=-1).transpose(1, 2)
        return levels.reshape(rows, width), self._bounds_GN2.transpose(0, 1)

    def in_panels(self) -> None:
        """None: it lies otherwise."""


def dense(layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (N, K)."""
    levels_NK, bounds_NG2 = layout.levels_and_bounds()
    scale, zero = bounds_NG2.to(dtype)[..., None].unbind(2)
    x = levels_NK.to(dtype).view(*bounds_NG2.shape[:2], -1)
    return x.sub_(8).mul_(scale).add_(zero).view(levels_NK.shape)
