"""Causal attention of prompts over themselves on a CPU, by prefill_attention.c."""

from __future__ import annotations

import torch

from flexbench.dist.kernels.native import address, function, library

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel for this type and size of heads on this machine."""
    kernels = library()
    if kernels is None or dtype not in _NAMES:
        return False
    return dtype == torch.float32 or (head_dim % 2 == 0 and bool(kernels.has_bfloat16_product()))


def prefill_attention(
    q_BSHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHD: torch.Tensor,
    num_pad_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention (B, S, H, D) of each position over itself and those before it, scaled by D^-0.5.

    All of one type, for which `fits` has to hold, on a CPU. The first `num_pad_B` positions, int64,
    at most S, are padding: nobody looks at them, and their results are 0.
    """
    kernels = library()
    assert kernels is not None
    tensors, dtype = (q_BSHD, k_BSHD, v_BSHD), q_BSHD.dtype
    assert k_BSHD.dtype == v_BSHD.dtype == dtype
    if len({x.stride() for x in tensors}) > 1 or q_BSHD.stride(3) != 1:
        q_BSHD, k_BSHD, v_BSHD = (x.contiguous() for x in tensors)
    batch, length, heads, width = q_BSHD.shape
    panel, rows = int(kernels.prefill_panel()), int(kernels.prefill_tile_rows())
    filled, filled_width = (-(-size // panel) * panel for size in (length, width))
    num_scratch = filled * (width + filled_width)
    num_scores = rows * (filled + max(filled, width))
    threads = torch.get_num_threads()
    out = torch.empty(batch, length, heads, width, dtype=dtype)
    scratch = torch.empty(threads * num_scratch, dtype=dtype)
    scores = torch.empty(threads * num_scores)
    padding = None if num_pad_B is None else num_pad_B.contiguous()
    assert padding is None or (padding.dtype == torch.int64 and len(padding) == batch)
    attend = function(f"attend_prompts_{_NAMES[dtype]}", "ppppppplllllllllfi")
    attend(
        *map(address, (q_BSHD, k_BSHD, v_BSHD, padding, out, scratch, scores)),
        *(num_scratch, num_scores),
        *(batch, length, heads, width),
        *q_BSHD.stride()[:3],
        *(width**-0.5, threads),
    )
    return out
