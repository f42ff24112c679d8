"""y = x W^T + b with weights in the model's type.

Letters in names of shapes: N outputs, K inputs; x is (..., K), y is (..., N).

On a CPU the product is oneDNN's, also in float32, where torch itself would ask MKL, which does not
use all that CPUs of other makers have. Weights that stay in memory are packed once into the blocks
that oneDNN works with, or it would do that again in every call.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch.nn import functional


class LinearMap(Protocol):
    """A matrix (N, K) that is multiplied with."""

    def apply(self, x: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """(..., K) to (..., N), in x's type."""

    def dense(self) -> torch.Tensor:
        """The matrix itself, in the model's type."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K)."""


class DenseMap:
    """A matrix as it is, (N, K)."""

    def __init__(self, weight_NK: torch.Tensor) -> None:
        self._weight_NK = weight_NK
        self._is_onednn = has_onednn(weight_NK)

    def apply(self, x: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """(..., K) to (..., N), in x's type."""
        if self._is_onednn:
            return _onednn_linear(x, self._weight_NK, bias_N)
        return functional.linear(x, self._weight_NK, bias_N)

    def dense(self) -> torch.Tensor:
        """The matrix itself."""
        return self._weight_NK

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K)."""
        return self._weight_NK[index]


class PackedMap:
    """A matrix in oneDNN's blocks, which take as much memory as the matrix.

    It is packed when it is used for the second time. The first product, a prompt's, is computed
    from the matrix as it is, perhaps mapped from a file, or from the pieces that make it up: so the
    first token need not wait for packing.
    """

    def __init__(self, *pieces_NK: torch.Tensor) -> None:
        """Of matrices below each other, for which `has_onednn` has to hold. They may be kept."""
        self._pieces: tuple[torch.Tensor, ...] = pieces_NK
        self._packed: torch.Tensor | None = None
        self._is_used = False

    def apply(self, x: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """(..., K) to (..., N), in x's type."""
        if not self._is_used:
            self._is_used = True
            return self._apply_pieces(x, bias_N)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.dense(), None)
            self._pieces = ()
        return _onednn_linear(x, self._packed, bias_N)

    def _apply_pieces(self, x: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        sizes = [len(piece) for piece in self._pieces]
        biases = [None] * len(sizes) if bias_N is None else bias_N.split(sizes)
        outputs = [
            _onednn_linear(x, piece, bias) for piece, bias in zip(self._pieces, biases, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def dense(self) -> torch.Tensor:
        """The matrix itself, unpacked if need be."""
        if self._packed is not None:
            weight_NK: torch.Tensor = self._packed.to_dense()
            return weight_NK
        pieces = self._pieces
        return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K). All are unpacked for it."""
        return self.dense()[index]


def has_onednn(weight_NK: torch.Tensor) -> bool:
    """Whether oneDNN multiplies with a matrix of this type on this device."""
    return weight_NK.device.type == "cpu" and _has_onednn(weight_NK.dtype)


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Tried once with small numbers: torch has no public way to ask, nor to call."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    weight_NK = torch.arange(12.0).view(3, 4).to(dtype)
    x = torch.eye(4, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK, None)
        results = [_onednn_linear(x, weight, None) for weight in (packed, weight_NK)]
    except (AttributeError, NotImplementedError, RuntimeError):  # another torch, or another CPU
        return False
    return all(torch.equal(result, weight_NK.T) for result in results)


def _onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias_N, "none", [], "")
    return y
