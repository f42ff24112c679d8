"""The next token from logits: the likeliest, or a random one."""

from __future__ import annotations

import numpy as np
import torch


def greedy(logits_BV: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each prompt: (B,)."""
    return logits_BV.argmax(dim=-1)


def sample(
    logits_BV: torch.Tensor, *, temperature: float, seed: int, prompts: range, position: int
) -> torch.Tensor:
    """A token of each prompt, drawn from softmax(logits / temperature): (B,).

    The draw depends on `seed`, the number of the prompt and the position alone: it is the same
    however prompts are batched, and however many stages share the model.
    """
    draws = torch.tensor([_draw(seed, prompt, position) for prompt in prompts], dtype=torch.float64)
    # Less the maximum, so that a low temperature gives no infinity.
    logits = logits_BV.double() - logits_BV.double().amax(dim=-1, keepdim=True)
    cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    # The sum may end a little beside 1.
    threshold = draws.to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(
        max=logits_BV.shape[1] - 1
    )


def _draw(seed: int, prompt: int, position: int) -> float:
    """A number in [0, 1) from a counter-based generator: no state to carry along."""
    generator = np.random.Philox(key=[seed, prompt], counter=[position, 0, 0, 0])
    return float(np.random.Generator(generator).random())
