"""Attention over new positions, and over the past in the cache.

Letters in names of shapes: B batch, H heads, D head size, S new positions, L positions until now
with the new one, R rows = some of the B x H pairs of prompt and head.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def prefill_attention(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    num_pad_B: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of a prompt over itself; the first `num_pad_B` positions are padding.

    None stands for no padding at all. Returns (B, S, H, D). What it gives for
    padding is of no use to anyone, but finite.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
    if num_pad_B is None:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    positions = torch.arange(q.shape[2], device=q.device)
    is_real = positions[None, None, :] >= num_pad_B[:, None, None]
    is_past = positions[None, :, None] >= positions[None, None, :]
    # Padding sees itself, or its softmax would be over nothing: 0/0, which spreads to all others.
    is_itself = positions[:, None] == positions[None, :]
    mask = (is_real & is_past) | is_itself
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return out.transpose(1, 2)


def decode_weights(
    q_RD: torch.Tensor, k_LRD: torch.Tensor, is_real_RL: torch.Tensor | None
) -> torch.Tensor:
    """Attention weights (R, L) of one new position over all, or all that are real, in float32."""
    scale = q_RD.shape[-1] ** -0.5
    scores = torch.bmm((q_RD * scale)[:, None], k_LRD.permute(1, 2, 0))[:, 0].float()
    if is_real_RL is not None:
        scores.masked_fill_(~is_real_RL, float("-inf"))
    return scores.softmax(dim=-1)


def decode_values(weights_RL: torch.Tensor, v_LRD: torch.Tensor) -> torch.Tensor:
    """The weighted sum (R, D) of the values."""
    return torch.bmm(weights_RL.to(v_LRD.dtype)[:, None], v_LRD.transpose(0, 1))[:, 0]


def most_weight(weights_RL: torch.Tensor, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The past positions that enter a sparse attention: weights (R, C) and indices (R, C).

    They are the `sparsity` share of the past with most weight, C = int(sparsity * past), as in
    FlexGen. The last position is the new one, which is no past.
    """
    past = weights_RL.shape[1] - 1
    top = weights_RL[:, :past].topk(int(sparsity * past), dim=-1, sorted=False)
    return top.values, top.indices


def sparse_values(
    top_weights_RC: torch.Tensor,
    top_v_CRD: torch.Tensor,
    newest_weight_R: torch.Tensor,
    newest_v_RD: torch.Tensor,
) -> torch.Tensor:
    """The sum (R, D) over the chosen positions and the new one.

    The weights are those among all positions: they do not add up to 1 here, as in FlexGen.
    """
    weights = torch.cat([top_weights_RC, newest_weight_R[:, None]], dim=1)
    return decode_values(weights, torch.cat([top_v_CRD, newest_v_RD[None]]))


def gather_positions(v_LRD: torch.Tensor, index_RC: torch.Tensor) -> torch.Tensor:
    """Other positions of every row: (C, R, D)."""
    index = index_RC.T[:, :, None].expand(-1, -1, v_LRD.shape[2])
    return v_LRD.gather(0, index)
