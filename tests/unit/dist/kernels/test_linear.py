"""Linear maps against the product written out in double precision."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist.kernels import panel_product  # noqa: E402
from flexbench.dist.kernels.epilogue import Epilogue  # noqa: E402
from flexbench.dist.kernels.linear import DenseMap, PackedMap, can_be_packed, has_onednn  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_tensor(*shape: int, dtype: Any, seed: int = 0) -> Any:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).sub_(0.5).to(dtype)


def by_hand(x: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """The product, and how far sums in another order and one rounding may be from it."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact = exact + bias.double()
        size = size + bias.double().abs()
    terms = weight.shape[1] + 1
    return exact, terms * 2**-24 * size + torch.finfo(x.dtype).eps * (exact.abs() + size / terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 48), (3, 70, 50), (130, 33, 7)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", [DenseMap, PackedMap])
def test_products(dtype: Any, shape: tuple[int, int, int], has_bias: bool, kind: Any) -> None:
    rows, width, outputs = shape
    weight = random_tensor(outputs, width, dtype=dtype, seed=1)
    if kind is PackedMap and not can_be_packed(weight):
        pytest.skip(f"{dtype} is not packed here")
    x = random_tensor(rows, width, dtype=dtype, seed=2)
    bias = random_tensor(outputs, dtype=dtype, seed=3) if has_bias else None

    matrix = kind(weight)
    expected, tolerance = by_hand(x, weight, bias)
    for _ in range(3):  # packed the second time
        y = matrix.apply(x, Epilogue(bias))
        assert y.dtype == dtype
        assert ((y.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("kind", [DenseMap, PackedMap])
def test_any_number_of_dimensions(kind: Any) -> None:
    weight = random_tensor(5, 8, dtype=torch.float32)
    x = random_tensor(2, 3, 8, dtype=torch.float32)
    y = kind(weight).apply(x)
    assert y.shape == (2, 3, 5)
    assert torch.allclose(y, x @ weight.T, atol=1e-6)


@pytest.mark.parametrize("kind", [DenseMap, PackedMap])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_packed_can_be_unpacked(kind: Any, dtype: Any) -> None:
    weight = random_tensor(50, 70, dtype=dtype)
    index = torch.tensor([[3, 49], [0, 3]])
    matrix = kind(weight)
    for _ in range(3):
        assert torch.equal(matrix.dense(), weight)
        assert torch.equal(matrix.rows(index), weight[index])
        matrix.apply(torch.ones(1, 70, dtype=dtype))


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_matrix_of_several_pieces(has_bias: bool) -> None:
    pieces = [random_tensor(5, 8, dtype=torch.float32, seed=seed) for seed in range(3)]
    x = random_tensor(2, 3, 8, dtype=torch.float32, seed=4)
    bias = random_tensor(15, dtype=torch.float32, seed=5) if has_bias else None
    matrix = PackedMap(*pieces)
    expected, tolerance = by_hand(x, torch.cat(pieces), bias)
    for _ in range(3):
        assert ((matrix.apply(x, Epilogue(bias)).double() - expected).abs() <= tolerance).all()
        assert torch.equal(matrix.dense(), torch.cat(pieces))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [DenseMap, PackedMap])
def test_what_comes_after_the_product(
    monkeypatch: pytest.MonkeyPatch, kind: Any, dtype: Any, is_compiled: bool
) -> None:
    """relu(x W^T + b) + r, rounded up to three times where torch does it in steps."""
    if not is_compiled:
        monkeypatch.setattr(panel_product, "fits", lambda *_: False)
    weight = random_tensor(50, 70, dtype=dtype, seed=1)
    if kind is PackedMap and not can_be_packed(weight):
        pytest.skip("there is no order for this type on this CPU but that of the compiled product")
    x = random_tensor(3, 70, dtype=dtype, seed=2)
    bias = random_tensor(50, dtype=dtype, seed=3)
    residual = random_tensor(3, 50, dtype=dtype, seed=4)
    before = residual.clone()
    exact, tolerance = by_hand(x, weight, bias)
    exact = exact.relu() + residual.double()
    tolerance = tolerance + torch.finfo(dtype).eps * exact.abs()
    matrix = kind(weight)
    for _ in range(3):
        y = matrix.apply(x, Epilogue(bias, True, residual))
        assert ((y.double() - exact).abs() <= tolerance).all()
        assert torch.equal(residual, before)


@pytest.mark.parametrize("rows", [1, 15, 16, 40])
@pytest.mark.parametrize("kind", [DenseMap, PackedMap])
def test_where_only_our_product_is_fast(
    monkeypatch: pytest.MonkeyPatch, kind: Any, rows: int
) -> None:
    """As on a CPU without instructions for bfloat16: it is packed for the first product, too."""
    dtype = torch.bfloat16
    if not panel_product.fits(dtype, 70):
        pytest.skip("there is no compiled product of bfloat16 on this machine")
    monkeypatch.setattr(panel_product, "is_widened", lambda _: True)
    weight = random_tensor(2500, 70, dtype=dtype, seed=1)
    x = random_tensor(rows, 70, dtype=dtype, seed=2)
    bias = random_tensor(2500, dtype=dtype, seed=3)
    residual = random_tensor(rows, 2500, dtype=dtype, seed=4)
    exact, tolerance = by_hand(x, weight, bias)
    exact = exact.relu() + residual.double()
    matrix = kind(weight)
    y = matrix.apply(x, Epilogue(bias, True, residual))
    assert ((y.double() - exact).abs() <= tolerance + torch.finfo(dtype).eps * exact.abs()).all()
    assert torch.equal(matrix.dense(), weight)
    assert (matrix.in_panels() is not None) is (kind is PackedMap)


def test_what_is_packed_is_let_go() -> None:
    weight = random_tensor(16, 16, dtype=torch.float32)
    packed, before, x = PackedMap(weight), weight.clone(), torch.eye(16)
    packed.apply(x)
    packed.apply(x)
    weight.zero_()
    assert torch.equal(packed.dense(), before)


def test_other_types_are_left_to_torch() -> None:
    assert not has_onednn(torch.zeros(2, 2, dtype=torch.float64))
    assert not has_onednn(torch.zeros(2, 2, dtype=torch.float32, device="meta"))
