"""Products with 4-bit weights: what quantizing and rounding may change, and no more."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist.kernels import four_bit_layouts, four_bits  # noqa: E402
from flexbench.dist.kernels.epilogue import Epilogue  # noqa: E402
from flexbench.dist.kernels.four_bit_layouts import Blocks, Panels  # noqa: E402
from flexbench.dist.kernels.four_bits import FourBitMap  # noqa: E402
from flexbench.dist.policy import CompressionConfig  # noqa: E402

CONFIG = CompressionConfig(group_size=64)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(
    not four_bits.fits((64, 64), CONFIG, "cpu"), reason="torch has no fused 4-bit product here"
)


def random_tensor(*shape: int, dtype: Any, seed: int = 0, shift: float = 0.5) -> Any:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).sub_(shift).to(dtype)


def compressed(weight: Any, config: CompressionConfig = CONFIG) -> FourBitMap:
    data = four_bits.pack(weight, config)
    rows, width = weight.shape
    assert data.dtype == torch.uint8
    assert len(data) == four_bits.filled_rows(rows) * four_bits.row_bytes(width, config)
    return FourBitMap(data, tuple(weight.shape), config, weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shift", [0.5, 0.0, 5.0])
def test_elements_keep_their_nearest_level(dtype: Any, group_size: int, shift: float) -> None:
    """Half a step, and what rounding to bfloat16 moves the grid by: 2^-9 of zero and of scale."""
    config = CompressionConfig(group_size=group_size)
    weight = random_tensor(96, 256, dtype=dtype, seed=1, shift=shift)
    groups = weight.float().view(96, -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    largest = torch.maximum(low.abs(), high.abs()) + 8 * step
    bound = step / 2 + 2**-8 * largest + 2 * torch.finfo(dtype).eps * largest

    found = compressed(weight, config).dense()

    assert found.dtype == dtype
    error = (found.float().view_as(groups) - groups).abs()
    assert (error <= bound).all()
    assert error.max() > step.min() / 8, "nothing was quantized"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 5, 127, 128, 200])
@pytest.mark.parametrize("shape", [(64, 64), (100, 128), (192, 320)])
def test_the_product_is_that_of_its_own_matrix(
    dtype: Any, num_rows: int, shape: tuple[int, int]
) -> None:
    """But for x, y, and the matrix's elements, which are rounded to bfloat16."""
    matrix = compressed(random_tensor(*shape, dtype=dtype, seed=2))
    x = random_tensor(num_rows, shape[1], dtype=dtype, seed=3)
    bias = random_tensor(shape[0], dtype=dtype, seed=4)

    y = matrix.apply(x, Epilogue(bias))

    exact = x.double() @ matrix.dense().double().T + bias.double()
    size = x.double().abs() @ matrix.dense().double().abs().T + bias.double().abs()
    assert y.dtype == dtype
    assert y.shape == (num_rows, shape[0])
    assert ((y.double() - exact).abs() <= 3 * 2**-8 * size).all()
    # Errors have either sign: with so many terms they are far below the bound.
    assert (y.double() - exact).norm() <= 2**-7 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 200])
@pytest.mark.parametrize("layout", [Panels, Blocks])
def test_inputs_may_be_columns_of_a_wider_matrix(layout: Any, dtype: Any, num_rows: int) -> None:
    """As where a product's outputs do not fill its last block."""
    is_there = Panels.is_available() if layout is Panels else four_bits._is_supported()
    if not is_there:
        pytest.skip("there is no such product on this machine")
    levels = torch.randint(0, 16, (64, 128), generator=torch.Generator().manual_seed(1))
    bounds = random_tensor(64, 2, 2, dtype=torch.bfloat16, seed=2, shift=0.0)
    matrix = layout(layout.lay_out(levels, bounds), (64, 128), 64)
    columns = random_tensor(num_rows, 160, dtype=dtype, seed=3)[:, :128]

    y = matrix.multiply(columns, Epilogue(), 64)

    assert torch.equal(y, matrix.multiply(columns.contiguous(), Epilogue(), 64))


@pytest.mark.skipif(not Panels.is_available(), reason="there is no compiled library")
@pytest.mark.parametrize("line_inputs", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_levels_lie_as_the_kernel_reads_them(
    line_inputs: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As four_bit_levels.h says, for CPUs with AVX-512 and for others."""
    order = four_bit_layouts._ORDERS[line_inputs]
    monkeypatch.setattr(Panels, "_own_order", staticmethod(lambda: order))
    outputs, (rows, width) = 128 // line_inputs, (64, 256)
    groups = width // group_size
    levels = torch.randint(0, 16, (rows, width), generator=torch.Generator().manual_seed(1))
    bounds = random_tensor(rows, groups, 2, dtype=torch.bfloat16, seed=2)

    data = Panels.lay_out(levels, bounds)

    line_bytes = group_size // line_inputs * 64
    records = data.view(rows // outputs, groups, line_bytes + outputs * 4)
    lines = records[..., :line_bytes].reshape(-1, groups, group_size // line_inputs, 64)
    for row, column in ((0, 0), (21, 70), (50, 255), (63, 131)):
        output, (group, place) = row % outputs, divmod(column, group_size)
        line = lines[row // outputs, group, place // line_inputs]
        one = place % line_inputs
        if line_inputs == 8:
            number = int.from_bytes(bytes(line.tolist())[4 * output :][:4], "little")
            shift = 4 * one
        else:
            at = 2 * (2 * (output % 16) + one % 2)
            number = int.from_bytes(bytes(line.tolist())[at:][:2], "little")
            shift = 8 * (one // 2) + 4 * (output // 16)
        assert number >> shift & 15 == levels[row, column]
        found = records[row // outputs, group, line_bytes:].view(torch.bfloat16).view(2, -1)
        assert torch.equal(found[:, output], bounds[row, group])
    again, bounds_again = Panels(data, (rows, width), group_size).levels_and_bounds()
    assert torch.equal(again, levels)
    assert torch.equal(bounds_again, bounds)


@pytest.mark.parametrize("num_rows", [3, 200])
def test_what_comes_after_the_product(num_rows: int) -> None:
    matrix = compressed(random_tensor(64, 128, dtype=torch.float32, seed=2))
    x = random_tensor(num_rows, 128, dtype=torch.float32, seed=3)
    residual = random_tensor(num_rows, 64, dtype=torch.float32, seed=4)
    y = matrix.apply(x, Epilogue(is_relu=True, residual=residual))
    assert torch.allclose(y, matrix.apply(x).relu() + residual, atol=1e-5)


def test_groups_of_equal_elements() -> None:
    weight = torch.full((64, 128), 0.75)
    assert torch.equal(compressed(weight).dense(), weight)
    assert torch.equal(compressed(torch.zeros(64, 128)).dense(), torch.zeros(64, 128))


def test_it_takes_a_quarter_of_half_precision_and_a_little() -> None:
    weight = random_tensor(128, 640, dtype=torch.bfloat16)
    assert four_bits.pack(weight, CONFIG).nbytes == weight.nbytes * (32 + 4) / 128


@pytest.mark.parametrize(
    ("shape", "group_size", "device"),
    [((64, 100), 64, "cpu"), ((64, 128), 16, "cpu"), ((64, 128), 64, "cuda")],
)
def test_what_it_does_not_take(shape: tuple[int, int], group_size: int, device: str) -> None:
    assert not four_bits.fits(shape, CompressionConfig(group_size=group_size), device)
    assert four_bits.fits((64, 128), CONFIG, "cpu")


def test_many_rows_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_tensor(300, 128, dtype=torch.float32)
    whole = four_bits.pack(weight, CONFIG)
    monkeypatch.setattr(four_bits, "_ROWS_AT_ONCE", 128)
    assert torch.equal(four_bits.pack(weight, CONFIG), whole)


def test_rows() -> None:
    matrix = compressed(random_tensor(70, 64, dtype=torch.float32))
    index = torch.tensor([[69, 0], [7, 7]])
    assert torch.equal(matrix.rows(index), matrix.dense()[index])
