"""How a matrix lies in memory for kernels that multiply with it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class InPanels(NamedTuple):
    """A matrix (N, K), a few outputs of all inputs after the other, on a CPU."""

    data: torch.Tensor
    """As panel_product.c has it, of the model's type, or four_bit_product.c, uint8."""
    num_outputs: int
    num_inputs: int
    group_size: int = 0
    """Of 4-bit levels; 0: it is no matrix of 4 bits."""
