"""Memory that is used again and again: what is loaded is put there."""

from __future__ import annotations

from math import prod

import torch

from flexbench.dist.homes import aligned_empty


class ReusedMemory:
    """Buffers that stay allocated, by name."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, torch.device], torch.Tensor] = {}

    def get(
        self, name: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Memory of this shape, with anything in it."""
        num_bytes = prod(shape) * dtype.itemsize
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.nbytes < num_bytes:
            buffer = aligned_empty(num_bytes, device)
            self._buffers[name, device] = buffer
        return buffer[:num_bytes].view(dtype).view(shape)
