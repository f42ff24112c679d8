"""Hidden states between two layers, at their homes: rows are the positions of all prompts."""

from __future__ import annotations

import torch

from flexbench.dist.homes import ExecutionEnv, Part
from flexbench.dist.placement import most_rows, split_rows
from flexbench.dist.policy import Policy


class HiddenStore:
    """The hidden states of one batch, (B, S, h), between the layer that gives and that takes them.

    All on the gpu, they are just kept; else they are copied out and back.
    """

    def __init__(
        self, max_rows: int, width: int, dtype: torch.dtype, policy: Policy, env: ExecutionEnv
    ) -> None:
        self._percent = policy.activations
        self.is_kept = self._percent.gpu == 100
        """Whether storing is no copy, but a note of where they are."""
        self._kept: torch.Tensor | None = None
        if not self.is_kept:
            split = most_rows(max_rows, self._percent)
            gpu, cpu, disk = ((count, width) for count in (split.gpu, split.cpu, split.disk))
            self._parts = env.mixed.allocate((gpu, cpu, disk), dtype, pin=True)

    def store(self, hidden: torch.Tensor) -> None:
        """Put hidden states away."""
        if self.is_kept:
            self._kept = hidden
            return
        rows = hidden.flatten(0, 1)
        for part, span in self._spans(len(rows)):
            part.write(0, rows[span.start : span.stop])

    def load(self, out: torch.Tensor) -> None:
        """Copy them to `out`, (B, S, h) on the gpu."""
        rows = out.view(-1, out.shape[-1])
        for part, span in self._spans(len(rows)):
            part.read(0, rows[span.start : span.stop])

    @property
    def kept(self) -> torch.Tensor | None:
        """The hidden states themselves, where they need not be loaded."""
        return self._kept

    def close(self) -> None:
        """Give the memory back."""
        self._kept = None
        if not self.is_kept:
            self._parts.close()

    def _spans(self, num_rows: int) -> list[tuple[Part, range]]:
        ranges = split_rows(num_rows, self._percent).ranges()
        return [
            (part, span)
            for part, span in zip(self._parts.homes, ranges, strict=True)
            if part is not None and len(span)
        ]
