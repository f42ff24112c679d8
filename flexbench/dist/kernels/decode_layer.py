"""The two halves of a decoder layer for one new position of each prompt, by decode_layer.c.

Each is one call, where norm, products and attention one by one are five and more, of which Python
takes a large part when there are few prompts.

Letters in names of shapes: B prompts, h hidden size, H heads, D head size, R = B x H, L positions
until now with the new one, M positions at most.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from flexbench.dist.kernels import panel_product
from flexbench.dist.kernels.native import address, checked
from flexbench.dist.kernels.panels import InPanels

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class Norm(NamedTuple):
    """A layer norm over h: weight and bias (h,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    epsilon: float
    is_first: bool
    """Whether it is before all else, or else after the residual is added."""


class Affine(NamedTuple):
    """A matrix and a bias (N,)."""

    matrix: InPanels
    bias: torch.Tensor


class Past(NamedTuple):
    """Keys and values of one layer, contiguous, in which the new position has its place."""

    keys: torch.Tensor
    """(M, R, D)."""
    values: torch.Tensor
    """(M, R, D)."""
    length: int
    """L."""
    is_real: torch.Tensor | None
    """(R, L), bool: which positions are looked at; None stands for all."""


def fits(dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether there are kernels for this type and size on this machine."""
    return panel_product.fits(dtype, hidden_size)


class AttentionHalf:
    """Norm, query, key and value, attention over the past, output product and residual."""

    def __init__(self, norm: Norm, qkv: Affine, out: Affine, num_heads: int) -> None:
        """All of one type, for which `fits` has to hold."""
        self._dtype = norm.weight.dtype
        self._layer = _Attention(_norm(norm), _matrix(qkv), _matrix(out), num_heads)
        self._decode = checked(f"decode_attention_half_{_NAMES[self._dtype]}", "pppppplli")
        self._kept = (norm, qkv, out)  # their addresses are in there
        self._at = ctypes.addressof(self._layer)

    def forward(self, hidden_B1h: torch.Tensor, past: Past | None) -> torch.Tensor:
        """Hidden states after it, of the same shape; the new keys and values are in the past."""
        assert past is not None
        hidden, mask = hidden_B1h.contiguous(), past.is_real
        mask = None if mask is None else mask.contiguous()
        self._check(hidden, past)
        out = torch.empty_like(hidden)
        tensors = (hidden, past.keys, past.values, mask, out)
        sizes = (len(hidden), past.length, torch.get_num_threads())
        self._decode(self._at, *map(address, tensors), *sizes)
        return out

    def _check(self, hidden_B1h: torch.Tensor, past: Past) -> None:
        """A mistake would be a write to somebody else's memory."""
        _check_hidden(hidden_B1h, self._dtype, self._layer.out.num_outputs)
        num_rows = len(hidden_B1h) * self._layer.num_heads
        for tensor in (past.keys, past.values):
            assert tensor.is_contiguous()
            assert tensor.dtype == self._dtype
            assert tensor.shape[1] * tensor.shape[2] == hidden_B1h.numel()
            assert 0 < past.length <= len(tensor)
        assert past.is_real is None or past.is_real.shape == (num_rows, past.length)


class MlpHalf:
    """Norm, both products with relu between them, and residual."""

    def __init__(self, norm: Norm, fc1: Affine, fc2: Affine) -> None:
        """All of one type, for which `fits` has to hold."""
        self._dtype = norm.weight.dtype
        self._layer = _Mlp(_norm(norm), _matrix(fc1), _matrix(fc2))
        self._decode = checked(f"decode_mlp_half_{_NAMES[self._dtype]}", "pppli")
        self._kept = (norm, fc1, fc2)
        self._at = ctypes.addressof(self._layer)

    def forward(self, hidden_B1h: torch.Tensor, past: Past | None = None) -> torch.Tensor:  # noqa: ARG002 - like the other half
        """Hidden states after it, of the same shape."""
        hidden = hidden_B1h.contiguous()
        _check_hidden(hidden, self._dtype, self._layer.fc2.num_outputs)
        out = torch.empty_like(hidden)
        sizes = (len(hidden), torch.get_num_threads())
        self._decode(self._at, *map(address, (hidden, out)), *sizes)
        return out


def _check_hidden(hidden_B1h: torch.Tensor, dtype: torch.dtype, hidden_size: int) -> None:
    assert hidden_B1h.dtype == dtype
    assert hidden_B1h.shape[1:] == (1, hidden_size)


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("is_first", ctypes.c_int32),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("norm", _Norm),
        ("qkv", _Matrix),
        ("out", _Matrix),
        ("num_heads", ctypes.c_int64),
    )


class _Mlp(ctypes.Structure):
    _fields_ = (("norm", _Norm), ("fc1", _Matrix), ("fc2", _Matrix))


def _matrix(affine: Affine) -> _Matrix:
    matrix = affine.matrix
    addresses = map(address, (matrix.data, affine.bias))
    return _Matrix(*addresses, matrix.num_outputs, matrix.num_inputs, matrix.group_size)


def _norm(norm: Norm) -> _Norm:
    return _Norm(address(norm.weight), address(norm.bias), norm.epsilon, norm.is_first)
