"""y = relu(x W^T + b) + r with weights in the model's type.

Letters in names of shapes: N outputs, K inputs; x is (..., K), y and the residual r are (..., N).

On a CPU the product is our own, or oneDNN's, also in float32, where torch itself would ask MKL,
which does not use all that CPUs of other makers have. Weights that stay in memory are packed once
into the order in which they are read, when they are used for the second time; those that do not
lie at their homes in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch.nn import functional

from flexbench.dist.kernels import panel_product
from flexbench.dist.kernels.epilogue import NOTHING, Epilogue
from flexbench.dist.kernels.panel_product import PanelMatrix
from flexbench.dist.kernels.panels import InPanels

# From so many rows of x on it is worth packing a matrix that is multiplied with once.
_PACKED_ROWS = 16
_OUTPUTS_AT_ONCE = 1024


class Product(Protocol):
    """What multiplies with a matrix (N, K)."""

    def apply(self, x: torch.Tensor, then: Epilogue = NOTHING) -> torch.Tensor:
        """x W^T and what comes then, in x's type: (..., K) to (..., N)."""

    def dense(self) -> torch.Tensor:
        """The matrix itself, in the model's type."""


class LinearMap(Product, Protocol):
    """A matrix (N, K) that is multiplied with, and of which rows are looked up."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K)."""

    def in_panels(self) -> InPanels | None:
        """The matrix as it lies for kernels that have more to do than this product, if it does."""


class DenseMap:
    """A matrix as it is, (N, K)."""

    def __init__(self, weight_NK: torch.Tensor) -> None:
        self._weight_NK = weight_NK
        self._is_onednn = has_onednn(weight_NK)

    def apply(self, x: torch.Tensor, then: Epilogue = NOTHING) -> torch.Tensor:
        """x W^T and what comes then, in x's type: (..., K) to (..., N)."""
        if x.numel() >= _PACKED_ROWS * x.shape[-1] and _is_only_ours_fast(self._weight_NK):
            # By the hundreds, outputs stay in the cache between packing and product.
            pieces = self._weight_NK.split(_OUTPUTS_AT_ONCE)
            return _apply_to_pieces(lambda piece: PanelMatrix.of([piece]), pieces, x, then)
        product = _onednn_linear if self._is_onednn else functional.linear
        return then.after_bias(product(x, self._weight_NK, then.bias))

    def dense(self) -> torch.Tensor:
        """The matrix itself."""
        return self._weight_NK

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K)."""
        return self._weight_NK[index]

    def in_panels(self) -> InPanels | None:
        """None: it lies otherwise."""
        return None


class PackedMap:
    """A matrix in the order in which it is read, which takes as much memory as the matrix.

    It is packed when it is used for the second time. The first product, a prompt's, is computed
    from the matrix as it is, perhaps mapped from a file, or from the pieces that make it up: so the
    first token need not wait for packing, unless that is sooner done than the other product.
    """

    def __init__(self, *pieces_NK: torch.Tensor) -> None:
        """Of matrices below each other, for which `can_be_packed` has to hold. They may be kept."""
        self._pieces: tuple[torch.Tensor, ...] = pieces_NK
        self._packed: PanelMatrix | OneDnnMatrix | None = None
        self._is_used = False

    def apply(self, x: torch.Tensor, then: Epilogue = NOTHING) -> torch.Tensor:
        """x W^T and what comes then, in x's type: (..., K) to (..., N)."""
        is_first, self._is_used = not self._is_used, True
        if is_first and not _is_only_ours_fast(self._pieces[0]):
            return _apply_to_pieces(DenseMap, self._pieces, x, then)
        return self._in_order().apply(x, then)

    def _in_order(self) -> PanelMatrix | OneDnnMatrix:
        if self._packed is None:
            is_panels = panel_product.fits(self._pieces[0].dtype, self._pieces[0].shape[1])
            if is_panels:
                self._packed = PanelMatrix.of(self._pieces)
            else:
                self._packed = OneDnnMatrix(self.dense())
            self._pieces = ()
        return self._packed

    def in_panels(self) -> InPanels | None:
        """The matrix in panels, once it has been used: that it is used again is known then."""
        packed = self._in_order() if self._is_used else None
        return packed.in_panels() if isinstance(packed, PanelMatrix) else None

    def dense(self) -> torch.Tensor:
        """The matrix itself, unpacked if need be."""
        if self._packed is not None:
            return self._packed.dense()
        pieces = self._pieces
        return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some of its rows: `index` of shape (...) gives (..., K). All are unpacked for it."""
        return self.dense()[index]


def _is_only_ours_fast(weight_NK: torch.Tensor) -> bool:
    """Whether others take far longer: of bfloat16, where a CPU has no instructions for it."""
    if weight_NK.device.type != "cpu" or weight_NK.dtype != torch.bfloat16:
        return False
    fits = panel_product.fits(weight_NK.dtype, weight_NK.shape[1])
    return fits and panel_product.is_widened(weight_NK.dtype)


def _apply_to_pieces(
    multiplier: Callable[[torch.Tensor], Product],
    pieces_NK: Sequence[torch.Tensor],
    x: torch.Tensor,
    then: Epilogue,
) -> torch.Tensor:
    """As `Product.apply` of the pieces below each other, with a product for each."""
    sizes = [len(piece) for piece in pieces_NK]
    biases = [None] * len(sizes) if then.bias is None else then.bias.split(sizes)
    outputs = [
        multiplier(piece).apply(x, Epilogue(bias, then.is_relu))
        for piece, bias in zip(pieces_NK, biases, strict=True)
    ]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return Epilogue(residual=then.residual).after_bias(y)


class OneDnnMatrix:
    """A matrix (N, K) in oneDNN's blocks, for which `has_onednn` has to hold."""

    def __init__(self, weight_NK: torch.Tensor) -> None:
        """It is copied."""
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, None)

    def apply(self, x: torch.Tensor, then: Epilogue = NOTHING) -> torch.Tensor:
        """x W^T and what comes then, in x's type: (..., K) to (..., N)."""
        return then.after_bias(_onednn_linear(x, self._packed, then.bias))

    def dense(self) -> torch.Tensor:
        """The matrix itself, unpacked."""
        weight_NK: torch.Tensor = self._packed.to_dense()
        return weight_NK


def can_be_packed(weight_NK: torch.Tensor) -> bool:
    """Whether there is a better order for a matrix of this type and width on this device."""
    if weight_NK.device.type != "cpu":
        return False
    return panel_product.fits(weight_NK.dtype, weight_NK.shape[1]) or has_onednn(weight_NK)


def describe(dtype: torch.dtype, *, on_gpu: bool) -> str:
    """What multiplies with weights that are not compressed: 'compiled', 'onednn' or 'torch'."""
    if on_gpu:
        return "torch"
    if panel_product.fits(dtype, 2):
        return "compiled"
    return "onednn" if _has_onednn(dtype) else "torch"


def has_onednn(weight_NK: torch.Tensor) -> bool:
    """Whether oneDNN multiplies with a matrix of this type on this device."""
    return weight_NK.device.type == "cpu" and _has_onednn(weight_NK.dtype)


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Tried once with small numbers: torch has no public way to ask, nor to call."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):  # another torch
        return False
    weight_NK = torch.arange(12.0).view(3, 4).to(dtype)
    x = torch.eye(4, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK, None)
        results = [_onednn_linear(x, weight, None) for weight in (packed, weight_NK)]
    except RuntimeError:  # another CPU
        return False
    return all(torch.equal(result, weight_NK.T) for result in results)


def _onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias_N, "none", [], "")
    return y
