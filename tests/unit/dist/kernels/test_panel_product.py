"""The compiled product, against double precision."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist.kernels import panel_product  # noqa: E402
from flexbench.dist.kernels.epilogue import Epilogue  # noqa: E402
from flexbench.dist.kernels.panel_product import PanelMatrix  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 5, 6, 7, 11, 12, 13, 24, 25, 64, 96, 97, 128, 129, 500, 600]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not panel_product.fits(request.param, 64):
        pytest.skip(f"there is no compiled product of {request.param} on this machine")
    return request.param


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    is_relu: bool = False,
) -> None:
    """Sums are float32, and the result is rounded to its type once, after all of it."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    if is_relu:
        exact = exact.relu()
    if residual is not None:
        exact, size = exact + residual.double(), size + residual.double().abs()
    terms = weight.shape[1] + 2
    tolerance = terms * 2**-24 * size
    tolerance = tolerance + torch.finfo(y.dtype).eps / 2 * (exact.abs() + tolerance)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", [1, 31, 32, 33, 96, 200])
def test_products_of_any_size(dtype: torch.dtype, rows: int, outputs: int) -> None:
    weight = random_tensor(outputs, 74, dtype=dtype, seed=1)
    x = random_tensor(rows, 74, dtype=dtype, seed=2)
    assert_close(PanelMatrix.of([weight]).apply(x), x, weight)


@pytest.mark.parametrize("width", [2, 4, 30, 64, 768, 1024, 1026, 2050, 3072])
def test_any_width(dtype: torch.dtype, width: int) -> None:
    """Above 1024 inputs are in parts, from 13 rows on; from 513 each thread has rows of its own."""
    weight = random_tensor(40, width, dtype=dtype, seed=1)
    for rows in (1, 4, 13, 20, 200, 600):
        x = random_tensor(rows, width, dtype=dtype, seed=rows)
        assert_close(PanelMatrix.of([weight]).apply(x), x, weight)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 13, 200, 1000])
@pytest.mark.parametrize("width", [50, 1100])
def test_any_number_of_threads(dtype: torch.dtype, rows: int, threads: int, width: int) -> None:
    weight = random_tensor(70, width, dtype=dtype, seed=1)
    x = random_tensor(rows, width, dtype=dtype, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = PanelMatrix.of([weight]).apply(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, PanelMatrix.of([weight]).apply(x))
    assert_close(y, x, weight)


@pytest.mark.parametrize("rows", [1, 13, 300])
@pytest.mark.parametrize("outputs", [32, 45])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_relu", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("width", [24, 1100])
def test_what_comes_after_the_product(
    dtype: torch.dtype,
    rows: int,
    outputs: int,
    has_bias: bool,
    is_relu: bool,
    has_residual: bool,
    width: int,
) -> None:
    weight = random_tensor(outputs, width, dtype=dtype, seed=1)
    x = random_tensor(rows, width, dtype=dtype, seed=2)
    bias = random_tensor(outputs, dtype=dtype, seed=3) if has_bias else None
    residual = random_tensor(rows, outputs, dtype=dtype, seed=4) if has_residual else None
    y = PanelMatrix.of([weight]).apply(x, Epilogue(bias, is_relu, residual))
    assert_close(y, x, weight, bias, residual, is_relu=is_relu)


def test_pieces_lie_below_each_other(dtype: torch.dtype) -> None:
    """Also where a piece ends within a panel, and where its rows are apart from each other."""
    whole = random_tensor(90, 40, dtype=dtype)
    pieces = [whole[:7, :20], whole[7:8, :20], whole[8:70, :20], whole[70:, :20].contiguous()]
    matrix = PanelMatrix.of(pieces)
    weight = whole[:, :20].contiguous()
    assert torch.equal(matrix.dense(), weight)
    x = random_tensor(5, 20, dtype=dtype, seed=1)
    assert torch.equal(matrix.apply(x), PanelMatrix.of([weight]).apply(x))


def test_pieces_that_lie_the_other_way_round(dtype: torch.dtype) -> None:
    weight = random_tensor(20, 33, dtype=dtype).T
    assert torch.equal(PanelMatrix.of([weight]).dense(), weight)


def test_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    weight = random_tensor(33, 10, dtype=dtype)
    x = random_tensor(4, 3, 10, dtype=dtype)[:, -1]
    residual = random_tensor(33, 4, dtype=dtype).T
    bias = random_tensor(33, 2, dtype=dtype)[:, 0]
    y = PanelMatrix.of([weight]).apply(x, Epilogue(bias, residual=residual))
    assert_close(y, x, weight, bias, residual)


def test_no_rows_at_all(dtype: torch.dtype) -> None:
    weight = random_tensor(33, 10, dtype=dtype)
    assert PanelMatrix.of([weight]).apply(torch.empty(0, 10, dtype=dtype)).shape == (0, 33)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(dtype: torch.dtype, value: float) -> None:
    weight = random_tensor(64, 16, dtype=dtype).abs()
    x = torch.ones(14, 16, dtype=dtype)
    x[3, 5] = value
    y = PanelMatrix.of([weight]).apply(x, Epilogue(is_relu=True))
    expected = torch.full((64,), value, dtype=dtype)
    assert torch.equal(y[3].nan_to_num(), expected.nan_to_num())
    assert y[3].isnan().all() == expected.isnan().all()
    assert y[:3].isfinite().all()
    assert y[4:].isfinite().all()


def test_an_odd_width_has_no_pairs() -> None:
    assert not panel_product.fits(torch.bfloat16, 7)
