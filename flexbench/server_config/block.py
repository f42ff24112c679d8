"""Our own decoder block, for measurements where Petals is not installed: BLOOM's and OPT's.

It does what transformers' BLOOM block does, which is the one that Petals serves, in the same steps:
its speed is to stand for that one's. Letters in comments: B batch, S new tokens, L tokens until now
with the new ones, H hidden size, N heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from flexbench.models.families import DecoderSpec

FAMILIES = ("bloom", "opt")

Cache = tuple[torch.Tensor, torch.Tensor]
"""Keys (B x N, D, L) and values (B x N, L, D) of all tokens until now."""


class DecoderBlock(nn.Module):  # type: ignore[misc] # mypy does not look into torch
    """One block with random weights: layer norms first, biases everywhere, causal attention."""

    def __init__(self, spec: DecoderSpec) -> None:
        assert spec.family in FAMILIES
        super().__init__()
        h = spec.hidden_size
        f = spec.values.get("ffn_dim") or 4 * h
        self.is_bloom = spec.family == "bloom"
        self.num_heads = spec.num_attention_heads
        self.attention_norm = nn.LayerNorm(h)
        self.query_key_value = nn.Linear(h, 3 * h)
        self.dense = nn.Linear(h, h)
        self.mlp_norm = nn.LayerNorm(h)
        self.up = nn.Linear(h, f)
        self.down = nn.Linear(f, h)
        slopes = torch.tensor(alibi_slopes(self.num_heads) if self.is_bloom else ())
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, hidden: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache]:
        """Run the tokens `hidden` (B, S, H) that follow those in `cache`.

        Returns their new hidden states, and the cache with them in it.
        """
        attended, cache = self._attend(self.attention_norm(hidden), cache)
        hidden = hidden + attended
        wide = self.up(self.mlp_norm(hidden))
        wide = functional.gelu(wide, approximate="tanh") if self.is_bloom else wide.relu()
        return hidden + self.down(wide), cache

    def _attend(self, hidden: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache]:
        batch, num_new, _ = hidden.shape
        fused = self.query_key_value(hidden).view(batch, num_new, self.num_heads, 3, -1)
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in fused.unbind(3))
        key = key.transpose(1, 2)  # (B x N, D, S)
        if cache is not None:
            key = torch.cat((cache[0], key), dim=2)
            value = torch.cat((cache[1], value), dim=1)
        weights = self._weights(query, key).to(hidden.dtype)
        attended = torch.bmm(weights, value).unflatten(0, (batch, self.num_heads))
        return self.dense(attended.transpose(1, 2).flatten(2)), (key, value)

    def _weights(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Attention weights (B x N, S, L) in float32."""
        num_new, num_all = query.shape[1], key.shape[2]
        positions = torch.arange(num_all, device=query.device)
        scale = 1 / math.sqrt(query.shape[2])
        if self.is_bloom:
            # Distances from the first token instead of the query's: softmax cannot tell them apart.
            bias = (self.slopes[:, None] * positions).to(query.dtype)
            bias = bias.repeat(query.shape[0] // self.num_heads, 1)[:, None]
            scores = bias.baddbmm(query, key, alpha=scale)
        else:
            scores = torch.bmm(query * scale, key)
        is_future = positions > positions[num_all - num_new :, None]
        scores = scores.masked_fill(is_future, torch.finfo(scores.dtype).min)
        return functional.softmax(scores, dim=-1, dtype=torch.float32)


def alibi_slopes(num_heads: int) -> list[float]:
    """How much each head prefers what is near: a geometric sequence, halved where heads remain."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]
