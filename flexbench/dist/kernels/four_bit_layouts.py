"""How levels of 4 bits lie in memory, and what multiplies with them as they are, on a CPU.

Either way w = (level - 8) * scale + zero, of which scale and zero are bfloat16, and x is rounded to
bfloat16.

Letters in names of shapes: N outputs, K inputs, G groups of a row; x is (M, K), y is (M, N).
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple, Protocol

import torch

from flexbench.dist.kernels.epilogue import Epilogue
from flexbench.dist.kernels.linear import DenseMap
from flexbench.dist.kernels.native import address, count, function, library
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


class _Order(NamedTuple):
    """How four_bit_levels.h orders the levels of a line, of which two share a byte."""

    outputs: tuple[int, ...]
    """Of a panel, as axes."""
    inputs: tuple[int, ...]
    """Of a line, as axes."""
    axes: tuple[int, ...]
    """Panel, outputs, group, line and inputs, as they follow each other in memory: the last is
    within a byte, lower bits first."""

    def in_memory(self, levels_NK: torch.Tensor, groups: int) -> torch.Tensor:
        """With the axes in the order of memory: panel, group, ..., 2."""
        panels = len(levels_NK) // math.prod(self.outputs)
        shape = (panels, *self.outputs, groups, -1, *self.inputs)
        return levels_NK.view(shape).permute(self.axes)

    def as_matrix(self, levels: torch.Tensor, groups: int) -> torch.Tensor:
        """Levels (N, K) of what has the order of memory, whatever its shape."""
        inputs = math.prod(self.inputs)
        lines = levels.numel() // (len(levels) * groups * math.prod(self.outputs) * inputs)
        shape = (len(levels), *self.outputs, groups, lines, *self.inputs)
        levels = levels.reshape([shape[axis] for axis in self.axes])
        places = [self.axes.index(axis) for axis in range(len(self.axes))]
        return levels.permute(places).reshape(-1, groups * lines * inputs)


_ORDERS = {  # by the inputs of a line
    4: _Order((2, 16), (2, 2), (0, 3, 4, 2, 6, 5, 1)),
    8: _Order((16,), (4, 2), (0, 2, 3, 1, 4, 5)),
}


class Panels:
    """The layout of four_bit_product.c, which says what it is; there has to be a library."""

    def __init__(self, data: torch.Tensor, shape: tuple[int, int], group_size: int) -> None:
        """`data` is what `lay_out` made, uint8; `shape` is (N, K)."""
        rows, width = shape
        self._width, self._group_size = width, group_size
        self._order = self._own_order()
        self._outputs = math.prod(self._order.outputs)
        self._records = data.view(rows // self._outputs, width // group_size, -1)

    @staticmethod
    def is_available() -> bool:
        """Whether there is such a product on this machine."""
        return library() is not None and sys.byteorder == "little"

    @staticmethod
    def _own_order() -> _Order:
        return _ORDERS[count("four_bit_line_inputs", "")()]

    @classmethod
    def lay_out(cls, levels_NK: torch.Tensor, bounds_NG2: torch.Tensor) -> torch.Tensor:
        """Of levels, and each group's scale and zero: uint8, one-dimensional."""
        order, groups = cls._own_order(), bounds_NG2.shape[1]
        low, high = order.in_memory(levels_NK.to(torch.uint8), groups).unbind(-1)
        levels = (low | high << 4).flatten(2)
        bounds = bounds_NG2.view(len(levels), -1, groups, 2).permute(0, 2, 3, 1)
        bounds = bounds.flatten(2).view(torch.uint8)
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
        size = self._group_size * self._outputs // 2
        both = self._records[..., :size]
        levels = self._order.as_matrix(torch.stack([both & 0xF, both >> 4], dim=-1), groups)
        bounds = self._records[..., size:].contiguous().view(DTYPE)
        bounds = bounds.view(panels, groups, 2, self._outputs).permute(0, 3, 1, 2)
        return levels, bounds.reshape(-1, groups, 2)

    def in_panels(self) -> InPanels:
        """The matrix as it lies."""
        num_outputs = len(self._records) * self._outputs
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
