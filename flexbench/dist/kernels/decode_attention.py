"""Attention of one new position on a CPU, by decode_attention.c."""

from __future__ import annotations

import torch

from flexbench.dist.kernels.native import address, function, library

_FUNCTIONS = {torch.float32: "attend_float", torch.bfloat16: "attend_bfloat16"}


def is_available(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this type on this machine."""
    return dtype in _FUNCTIONS and library() is not None


def describe(dtype: torch.dtype, *, on_gpu: bool) -> str:
    """What computes the attention of a new token, in a word: 'compiled' or 'torch'."""
    return "torch" if on_gpu or not is_available(dtype) else "compiled"


def decode_attention(
    q_RD: torch.Tensor,
    k_LRD: torch.Tensor,
    v_LRD: torch.Tensor,
    is_real_RL: torch.Tensor | None,
) -> torch.Tensor:
    """Attention (R, D) of one new position over all that are real, on a CPU.

    `k_LRD` and `v_LRD` are contiguous, of the type of `q_RD`, for which `is_available` has to hold;
    `is_real_RL` is bool. The scale is D^-0.5.
    """
    (length, num_rows, width), dtype = k_LRD.shape, k_LRD.dtype
    assert k_LRD.is_contiguous()
    assert v_LRD.is_contiguous()
    assert v_LRD.dtype == q_RD.dtype == dtype
    q_RD = q_RD.contiguous()
    assert is_real_RL is None or is_real_RL.shape == (num_rows, length)
    mask = None if is_real_RL is None else is_real_RL.contiguous()
    out = torch.empty_like(q_RD)
    kernels, threads = library(), torch.get_num_threads()
    assert kernels is not None
    scratch = torch.empty(threads * (length + width) * int(kernels.attention_block()))
    attend = function(_FUNCTIONS[dtype], "pppppplllfi")
    addresses = map(address, (q_RD, k_LRD, v_LRD, mask, out, scratch))
    attend(*addresses, length, num_rows, width, width**-0.5, threads)
    return out
