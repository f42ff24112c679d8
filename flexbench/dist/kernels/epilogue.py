"""What comes after a product."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Epilogue(NamedTuple):
    """relu(y + bias) + residual, of which each may be left out.

    y and the residual are (..., N), the bias is (N,), all of one type.
    """

    bias: torch.Tensor | None = None
    is_relu: bool = False
    residual: torch.Tensor | None = None

    def after_bias(self, y: torch.Tensor) -> torch.Tensor:
        """The rest of it, for a product that has its bias, in the memory of `y`."""
        if self.is_relu:
            y.relu_()
        if self.residual is not None:
            y.add_(self.residual)
        return y


NOTHING = Epilogue()
