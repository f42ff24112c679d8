"""y = x W^T + b on a CPU, by panel_product.c: from one row of x to thousands.

Letters in names of shapes: N outputs, K inputs; x is (..., K), y is (..., N).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexbench.dist.kernels.epilogue import NOTHING, Epilogue
from flexbench.dist.kernels.native import address, count, function, library
from flexbench.dist.kernels.panels import InPanels

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_STEPS = {torch.float32: 1, torch.bfloat16: 2}  # inputs that are multiplied at once


def fits(dtype: torch.dtype, num_inputs: int) -> bool:
    """Whether there is a product with matrices of this type and width on this machine."""
    kernels = library()
    if kernels is None or dtype not in _NAMES or num_inputs % _STEPS[dtype]:
        return False
    return dtype == torch.float32 or bool(kernels.has_bfloat16_product())


def is_widened(dtype: torch.dtype) -> bool:
    """Whether numbers of this type, for which `fits` holds, are multiplied as float32.

    The CPU has no instructions for them then, and oneDNN's product takes several times as long.
    """
    kernels = library()
    assert kernels is not None
    return dtype == torch.bfloat16 and not kernels.has_bfloat16_instructions()


def filled_rows(num_rows: int) -> int:
    """N with the rows that fill up the last panel, which has at most 32. There is a product."""
    panel = _panel_outputs()
    return -(-num_rows // panel) * panel


def pack(pieces_NK: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices below each other, for which `fits` has to hold, in panels: (filled_rows(N) * K,)."""
    num_inputs, dtype = pieces_NK[0].shape[1], pieces_NK[0].dtype
    num_rows = filled_rows(sum(len(piece) for piece in pieces_NK))
    panels = torch.empty(num_rows * num_inputs, dtype=dtype)
    put = function(f"pack_{_NAMES[dtype]}", "pplllli")
    first = 0
    for piece in pieces_NK:
        piece = piece if piece.stride(1) == 1 else piece.contiguous()
        sizes = (first, len(piece), num_inputs, piece.stride(0), torch.get_num_threads())
        put(*map(address, (piece, panels)), *sizes)
        first += len(piece)
    return panels


def _panel_outputs() -> int:
    kernels = library()
    assert kernels is not None
    return int(kernels.panel_outputs())


class PanelMatrix:
    """A matrix (N, K) in panels: a few outputs of all inputs, one after the other."""

    def __init__(self, panels: torch.Tensor, shape: tuple[int, ...]) -> None:
        """`panels` is what `pack` made, on a CPU; `shape` is (N, K)."""
        self._num_outputs, self._num_inputs = shape
        self._panel = _panel_outputs()
        self._count_memory = count("product_memory", "llli")
        self._panels = panels.view(-1, self._num_inputs * self._panel)
        self._multiply = function(f"multiply_{_NAMES[panels.dtype]}", "pppppplllii")

    @classmethod
    def of(cls, pieces_NK: Sequence[torch.Tensor]) -> PanelMatrix:
        """Of matrices below each other, which are copied."""
        shape = (sum(len(piece) for piece in pieces_NK), pieces_NK[0].shape[1])
        return cls(pack(pieces_NK), shape)

    def apply(self, x: torch.Tensor, then: Epilogue = NOTHING) -> torch.Tensor:
        """x W^T and what comes then: (..., K) to (..., N), rounded to x's type once."""
        x, dtype, threads = x.contiguous(), self._panels.dtype, torch.get_num_threads()
        assert x.dtype == dtype
        shape = (*x.shape[:-1], self._num_outputs)
        assert then.residual is None or then.residual.shape == shape
        bias, residual = (
            None if given is None else given.contiguous() for given in (then.bias, then.residual)
        )
        out = torch.empty(shape, dtype=dtype)
        num_rows = x.numel() // self._num_inputs
        sizes = (num_rows, self._num_outputs, self._num_inputs)
        scratch = torch.empty(self._count_memory(*sizes, threads))
        addresses = map(address, (x, self._panels, bias, residual, out, scratch))
        self._multiply(*addresses, *sizes, then.is_relu, threads)
        return out

    def in_panels(self) -> InPanels:
        """The matrix as it lies."""
        return InPanels(self._panels, self._num_outputs, self._num_inputs)

    def dense(self) -> torch.Tensor:
        """The matrix itself, (N, K)."""
        step = _STEPS[self._panels.dtype]
        panels = self._panels.view(len(self._panels), -1, self._panel, step)
        return panels.transpose(1, 2).reshape(-1, self._num_inputs)[: self._num_outputs]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K). All are unpacked for it."""
        return self.dense()[index]
