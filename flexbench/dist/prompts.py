"""The prompts of one call of `generate`: their tokens, padding and positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from flexbench.dist.schedule import Step, Unit
from flexbench.dist.task import IntArray, Task

OnTokens = Callable[[range, int, IntArray], None]
"""Is told of new tokens: the prompts they belong to, their number from 0, and their ids, (B,)."""


@dataclass(frozen=True)
class Blocks:
    """Which prompts belong together: batches within blocks, one block an inner iteration."""

    batch_size: int
    num_batches: int
    num_iterations: int

    def of_unit(self, unit: Unit) -> range:
        """The prompts of all batches of a unit."""
        size = self.batch_size * self.num_batches
        start = (unit.round * self.num_iterations + unit.iteration) * size
        return range(start, start + size)

    def of_step(self, step: Step) -> range:
        """The prompts of one batch."""
        start = self.of_unit(step.unit).start + step.batch * self.batch_size
        return range(start, start + self.batch_size)


class Tokens:
    """Tokens of all prompts, as far as this stage knows them."""

    def __init__(self, task: Task, pad_token_id: int, on_tokens: OnTokens | None = None) -> None:
        self._task = task
        self._pad = pad_token_id
        self._on_tokens = on_tokens
        shape = (task.num_prompts, task.prompt_len + task.gen_len)
        self.ids = np.full(shape, pad_token_id, dtype=np.int64)
        self.ids[:, : task.prompt_len] = task.input_ids
        self._finished = np.zeros(task.num_prompts, dtype=bool)

    def inputs(self, prompts: range, token: int) -> torch.Tensor:
        """What is fed in to get `token`: the prompt, or the token before; (B, S)."""
        end = self._task.prompt_len + token
        start = 0 if token == 0 else end - 1
        return torch.from_numpy(self.ids[prompts.start : prompts.stop, start:end].copy())

    def chosen(self, prompts: range, token: int) -> torch.Tensor:
        """The tokens that were chosen: (B,)."""
        column = self._task.prompt_len + token
        return torch.from_numpy(self.ids[prompts.start : prompts.stop, column].copy())

    def put(self, prompts: range, token: int, tokens: torch.Tensor) -> None:
        """Note the tokens that were chosen. A prompt that has had its stop token gets padding."""
        rows = slice(prompts.start, prompts.stop)
        chosen = tokens.numpy()
        if self._task.stop is not None:
            chosen = np.where(self._finished[rows], self._pad, chosen)
            self._finished[rows] |= chosen == self._task.stop
        self.ids[rows, self._task.prompt_len + token] = chosen
        if self._on_tokens is not None:
            self._on_tokens(prompts, token, chosen)

    def all_finished(self, prompts: range) -> bool:
        """Whether each of them has had its stop token."""
        return bool(self._finished[prompts.start : prompts.stop].all())


class Masks:
    """Where prompts have padding, and which positions their tokens are at."""

    def __init__(self, task: Task, blocks: Blocks, num_heads: int, device: torch.device) -> None:
        self._prompt_len = task.prompt_len
        self._num_heads = num_heads
        self._num_under_way = blocks.num_batches * blocks.num_iterations
        self._device = device
        self._num_pad = torch.from_numpy(task.num_pad).to(device)
        self._has_padding = task.num_pad.astype(bool)
        self._is_real: dict[range, torch.Tensor] = {}
        """By batch, of those under way, the last one: all layers need the same for a token."""

    def padding(self, prompts: range) -> torch.Tensor | None:
        """How many first positions are padding: (B,); None if there is none at all."""
        rows = slice(prompts.start, prompts.stop)
        return self._num_pad[rows] if self._has_padding[rows].any() else None

    def is_real(self, prompts: range, length: int) -> torch.Tensor | None:
        """Which of the first `length` positions hold no padding; None if all do.

        (R, L) for R = B x H pairs of prompt and head.
        """
        num_pad = self.padding(prompts)
        if num_pad is None:
            return None
        known = self._is_real.get(prompts)
        if known is None or known.shape[1] != length:
            known = torch.arange(length, device=self._device)[None] >= num_pad[:, None]
            known = known.repeat_interleave(self._num_heads, dim=0)
            if prompts not in self._is_real and len(self._is_real) == self._num_under_way:
                self._is_real.clear()  # another round's
            self._is_real[prompts] = known
        return known

    def positions(self, prompts: range, token: int) -> torch.Tensor:
        """The positions of what is fed in for `token`, from 0 at the first real one: (B, S)."""
        num_pad = self._num_pad[prompts.start : prompts.stop]
        end = self._prompt_len + token
        start = 0 if token == 0 else end - 1
        index = torch.arange(start, end, device=self._device)
        # Padding has no position of its own; any will do.
        return (index[None] - num_pad[:, None]).clamp_(min=0)
