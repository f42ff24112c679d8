"""Attention over new positions, and over the past in the cache.

Letters in names of shapes: B batch, H heads, D head size, S new positions, L positions until now
with the new one, R rows = some of the B x H pairs of prompt and head.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from flexbench.dist.kernels import decode_attention as compiled
from flexbench.dist.kernels import prefill_attention as prefill

_QUERY_BLOCK = 128


def prefill_attention(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    num_pad_B: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of a prompt over itself; the first `num_pad_B` positions are padding.

    None stands for no padding at all. Queries are those of all positions, or of the last one:
    returns (B, S, H, D), or (B, 1, H, D). What it gives for padding is of no use to anyone, but
    finite.
    """
    if q_BSHD.shape[1] == 1 < k_BSHD.shape[1]:
        return _last_attention(q_BSHD, k_BSHD, v_BSHD, num_pad_B)
    is_on_cpu = q_BSHD.device.type == "cpu"
    if is_on_cpu and prefill.fits(q_BSHD.dtype, q_BSHD.shape[-1]):
        return prefill.prefill_attention(q_BSHD, k_BSHD, v_BSHD, num_pad_B)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
    if num_pad_B is None:
        if is_on_cpu and q.dtype == torch.bfloat16:
            return _blockwise_attention(q, k, v).transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    positions = torch.arange(q.shape[2], device=q.device)
    is_real = positions[None, None, :] >= num_pad_B[:, None, None]
    is_past = positions[None, :, None] >= positions[None, None, :]
    # Padding sees itself, or its softmax would be over nothing: 0/0, which spreads to all others.
    is_itself = positions[:, None] == positions[None, :]
    mask = (is_real & is_past) | is_itself
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return out.transpose(1, 2)


def _last_attention(
    q_B1HD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    num_pad_B: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a prompt's last position over all of it: (B, 1, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q_B1HD, k_BSHD, v_BSHD))
    mask = None
    if num_pad_B is not None:
        positions = torch.arange(k.shape[2], device=k.device)
        # The last one sees itself, even if it is padding: as above.
        mask = (positions >= num_pad_B[:, None].clamp(max=len(positions) - 1))[:, None, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _blockwise_attention(
    q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor
) -> torch.Tensor:
    """Causal attention, a block of queries at a time over what comes before its end: (B, H, S, D).

    On a CPU, torch's own takes 1.3 to 2 times as long for bfloat16, whose products it does in
    float32. Here scores and weights are bfloat16, as they are in transformers' eager attention.
    """
    size, length = q_BHSD.shape, q_BHSD.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q_BHSD * size[-1] ** -0.5, k_BHSD, v_BHSD))
    block = min(_QUERY_BLOCK, length)
    is_future = torch.ones(block, block, dtype=torch.bool).triu_(1)
    out = torch.empty_like(q)
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
        scores[:, :, start:].masked_fill_(is_future[: end - start, : end - start], float("-inf"))
        out[:, start:end] = torch.bmm(scores.softmax(dim=-1), v[:, :end])
    return out.view(size)


def decode_attention(
    q_RD: torch.Tensor,
    k_LRD: torch.Tensor,
    v_LRD: torch.Tensor,
    num_positions: int,
    is_real_RP: torch.Tensor | None,
) -> torch.Tensor:
    """Attention (R, D) of one new position over the first `num_positions`, its own included."""
    if k_LRD.device.type == "cpu" and compiled.is_available(k_LRD.dtype):
        seen = slice(num_positions)
        return compiled.decode_attention(q_RD, k_LRD[seen], v_LRD[seen], is_real_RP)
    return decode_values(decode_weights(q_RD, k_LRD, num_positions, is_real_RP), v_LRD)


def decode_weights(
    q_RD: torch.Tensor,
    k_LRD: torch.Tensor,
    num_positions: int,
    is_real_RP: torch.Tensor | None,
) -> torch.Tensor:
    """Attention weights (R, L) of one new position, float32.

    It looks at the first `num_positions`, the new one's own included, or those of them that are
    real; all others weigh nothing.
    """
    q_RD = q_RD * q_RD.shape[-1] ** -0.5
    if k_LRD.device.type == "cpu":
        scores = _grouped_scores(q_RD, k_LRD)
    else:
        scores = torch.bmm(q_RD[:, None], k_LRD.permute(1, 2, 0))[:, 0].float()
    if num_positions < k_LRD.shape[0]:
        scores[:, num_positions:] = float("-inf")
    if is_real_RP is not None:
        scores[:, :num_positions].masked_fill_(~is_real_RP, float("-inf"))
    return scores.softmax(dim=-1)


def decode_values(weights_RL: torch.Tensor, v_LRD: torch.Tensor) -> torch.Tensor:
    """The weighted sum (R, D) of the values."""
    weights_RL = weights_RL.to(v_LRD.dtype)
    if v_LRD.device.type == "cpu":
        return _grouped_values(weights_RL, v_LRD)
    return torch.bmm(weights_RL[:, None], v_LRD.transpose(0, 1))[:, 0]


def _group_size(num_rows: int, dtype: torch.dtype) -> int:
    """How many rows g are computed as one product, G = R / g of them.

    A product of one row is little work in a call. With g rows it is g times the work, of which only
    the diagonal is kept, and still faster: 12 were for bfloat16, 4 for float32, among 1 to 32.
    """
    most = 4 if dtype == torch.float32 else 12
    return max(size for size in range(1, most + 1) if num_rows % size == 0)


def _grouped_scores(q_RD: torch.Tensor, k_LRD: torch.Tensor) -> torch.Tensor:
    """Products of each row's query with its keys: (R, L), float32."""
    length, num_rows, width = k_LRD.shape
    g = _group_size(num_rows, k_LRD.dtype)
    diagonal = q_RD.new_zeros(num_rows // g, g, g, width)
    diagonal.diagonal(dim1=1, dim2=2).copy_(q_RD.view(-1, g, width).transpose(1, 2))
    queries = diagonal.view(-1, g, g * width)  # (G, g, gD)
    keys = k_LRD.view(length, -1, g * width).transpose(0, 1)  # (G, L, gD)
    if k_LRD.dtype == torch.float32:
        return torch.bmm(queries, keys.transpose(1, 2)).view(num_rows, length)
    # The other way round, keys need not be put into another order first.
    scores = torch.bmm(keys, queries.transpose(1, 2)).transpose(1, 2)
    return scores.to(torch.float32, memory_format=torch.contiguous_format).view(num_rows, length)


def _grouped_values(weights_RL: torch.Tensor, v_LRD: torch.Tensor) -> torch.Tensor:
    length, num_rows, width = v_LRD.shape
    g = _group_size(num_rows, v_LRD.dtype)
    values = v_LRD.view(length, -1, g * width).transpose(0, 1)  # (G, L, gD)
    products = torch.bmm(weights_RL.view(-1, g, length), values)  # (G, g, gD)
    own = products.view(-1, g, g, width).diagonal(dim1=1, dim2=2)  # (G, D, g)
    return own.transpose(1, 2).reshape(num_rows, width)


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
