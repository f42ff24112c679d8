"""Halves of decoder layers for one new position of each prompt, by decode_layer.c.

As many as follow each other are one call, where norm, products and attention one by one are five
and more each, of which Python takes a large part when there are few prompts.

Letters in names of shapes: B prompts, h hidden size, H heads, D head size, R = B x H, L positions
until now with the new one, M positions at most.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
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


class KeysValues(NamedTuple):
    """The cache of one layer, contiguous, in which new positions have their places."""

    keys: torch.Tensor
    """(M, R, D)."""
    values: torch.Tensor
    """(M, R, D)."""


def fits(dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether there are kernels for this type and size on this machine."""
    return panel_product.fits(dtype, hidden_size)


class AttentionHalf:
    """Norm, query, key and value, attention over the past, output product and residual."""

    def __init__(self, norm: Norm, qkv: Affine, out: Affine, num_heads: int) -> None:
        """All of one type, for which `fits` has to hold."""
        self.dtype = norm.weight.dtype
        self.hidden_size = out.matrix.num_outputs
        self.layer = _Attention(_norm(norm), _matrix(qkv), _matrix(out), num_heads)
        self._kept = (norm, qkv, out)  # their addresses are in there


class MlpHalf:
    """Norm, both products with relu between them, and residual."""

    def __init__(self, norm: Norm, fc1: Affine, fc2: Affine) -> None:
        """All of one type, for which `fits` has to hold."""
        self.dtype = norm.weight.dtype
        self.hidden_size = fc2.matrix.num_outputs
        self.layer = _Mlp(_norm(norm), _matrix(fc1), _matrix(fc2))
        self._kept = (norm, fc1, fc2)


DecodeHalf = AttentionHalf | MlpHalf


class Decoder:
    """Halves of decoder layers, one after the other, for one new position of each prompt."""

    def __init__(self, halves: Sequence[DecodeHalf], caches: Sequence[KeysValues]) -> None:
        """All of one type and size; `caches` are those of attention halves, in their order."""
        self.halves = tuple(halves)
        self._caches = tuple(caches)
        self._dtype, self._hidden_size = halves[0].dtype, halves[0].hidden_size
        self._check_parts()
        remaining = iter(self._caches)
        parts = [_half(half, remaining) for half in self.halves]
        self._parts = (_Half * len(parts))(*parts)
        self._seconds = (ctypes.c_double * len(parts))()
        self._decode = checked(f"decode_halves_{_NAMES[self._dtype]}", "plppplli")

    def forward(
        self, hidden_B1h: torch.Tensor, length: int = 1, is_real_RL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states after all halves, of the same shape; new keys and values are in the caches.

        `length` is L. Of `is_real_RL`, bool, None stands for all: which positions are looked at.
        """
        out = hidden_B1h.clone(memory_format=torch.contiguous_format)
        mask = None if is_real_RL is None else is_real_RL.contiguous()
        self._check(out, length, mask)
        self._decode(
            ctypes.addressof(self._parts),
            len(self.halves),
            address(out),
            address(mask),
            ctypes.addressof(self._seconds),
            len(out),
            length,
            torch.get_num_threads(),
        )
        return out

    @property
    def seconds(self) -> list[float]:
        """How long each half took, the last time."""
        return list(self._seconds)

    # A mistake would be a write to somebody else's memory.

    def _check_parts(self) -> None:
        for half in self.halves:
            assert (half.dtype, half.hidden_size) == (self._dtype, self._hidden_size)
        with_cache = [half for half in self.halves if isinstance(half, AttentionHalf)]
        for half, cache in zip(with_cache, self._caches, strict=True):
            for tensor in cache:
                assert tensor.is_contiguous()
                assert tensor.dtype == self._dtype
                assert tensor.shape == self._caches[0].keys.shape
                assert tensor.shape[2] * half.layer.num_heads == self._hidden_size

    def _check(
        self, hidden_B1h: torch.Tensor, length: int, is_real_RL: torch.Tensor | None
    ) -> None:
        assert hidden_B1h.dtype == self._dtype
        assert hidden_B1h.shape[1:] == (1, self._hidden_size)
        if not self._caches:
            return
        most, num_rows, width = self._caches[0].keys.shape
        assert num_rows * width == hidden_B1h.numel()
        assert 0 < length <= most
        assert is_real_RL is None or is_real_RL.shape == (num_rows, length)


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


class _Half(ctypes.Structure):
    _fields_ = (
        ("attention", ctypes.c_void_p),
        ("mlp", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


def _half(half: DecodeHalf, caches: Iterator[KeysValues]) -> _Half:
    """Attention takes the next of the caches."""
    at = ctypes.addressof(half.layer)
    if isinstance(half, MlpHalf):
        return _Half(mlp=at)
    cache = next(caches)
    return _Half(attention=at, keys=address(cache.keys), values=address(cache.values))


def _matrix(affine: Affine) -> _Matrix:
    matrix = affine.matrix
    addresses = map(address, (matrix.data, affine.bias))
    return _Matrix(*addresses, matrix.num_outputs, matrix.num_inputs, matrix.group_size)


def _norm(norm: Norm) -> _Norm:
    return _Norm(address(norm.weight), address(norm.bias), norm.epsilon, norm.is_first)
