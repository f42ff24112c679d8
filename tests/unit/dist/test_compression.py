"""Group-wise 4-bit quantization, against one that is written out element by element."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

import numpy as np  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from flexbench.dist.compression import (  # noqa: E402
    compress,
    decompress,
    num_groups,
    packed_bytes,
    record_bytes,
)
from flexbench.dist.homes import ExecutionEnv  # noqa: E402
from flexbench.dist.layers import WeightSpec  # noqa: E402
from flexbench.dist.policy import CompressionConfig, Policy  # noqa: E402
from flexbench.dist.weights import LayerWeights, layout_of  # noqa: E402

CONFIG = CompressionConfig()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 2, 3, 63, 64, 65, 80, 127, 128, 130, 200]

with_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def quantize_row(row: list[float], group_size: int = 64) -> list[float]:
    """What is left of a row after 4 bits: each group's minimum, and 15 equal steps to its maximum.

    Written from the definition, in double precision, with nothing of the code that is tested.
    """
    result = []
    for start in range(0, len(row), group_size):
        group = row[start : start + group_size]
        low, high = min(group), max(group)
        for value in group:
            if high == low:
                result.append(low)
                continue
            level = round((value - low) / (high - low) * 15)
            result.append(low + level * (high - low) / 15)
    return result


def quantize_by_hand(x: Any, group_size: int = 64) -> Any:
    """`quantize_row` of every row of a tensor: a tensor of the same shape and type."""
    rows = [quantize_row(row, group_size) for row in x.double().reshape(-1, x.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(x.shape).to(x.dtype)


def groups_of(x: Any, group_size: int = 64) -> list[tuple[slice, Any, Any]]:
    """The columns of each group, with its minimum and maximum, (..., 1) in double precision."""
    found = []
    for start in range(0, x.shape[-1], group_size):
        columns = slice(start, min(start + group_size, x.shape[-1]))
        group = x[..., columns].double()
        found.append((columns, group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)))
    return found


def rounding_of(x: Any, group_size: int = 64) -> Any:
    """What the arithmetic in x's type may add to the error of quantization, for each element."""
    info = torch.finfo(x.dtype)
    # The range, its 15th, the product and the sum are each rounded once.
    parts = [
        (3 * info.eps * (high - low) + info.eps * torch.maximum(low.abs(), high.abs())).expand(
            *x.shape[:-1], columns.stop - columns.start
        )
        for columns, low, high in groups_of(x, group_size)
    ]
    return torch.cat(parts, dim=-1) + 16 * info.smallest_normal * info.eps


def there_and_back(x: Any, config: CompressionConfig = CONFIG) -> Any:
    return decompress(compress(x, config), x.shape[-1], config, x.dtype)


def random_tensor(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).to(dtype)


# --- the values ---


@with_every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_values_are_those_of_the_definition(dtype: Any, width: int) -> None:
    x = random_tensor(7, 3, width, dtype=dtype, seed=width)
    result, expected = there_and_back(x), quantize_by_hand(x.double())

    assert result.shape == x.shape
    assert result.dtype == dtype
    error = (result.double() - expected).abs()
    # Half way between two levels, the rounding of the range decides which of them is taken.
    distance = (x.double() - expected).abs()
    for columns, low, high in groups_of(x):
        step = (high - low) / 15
        half_way = (15 / 2 * torch.finfo(dtype).eps + 1e-5) * step
        is_half_way = (distance[..., columns] - step / 2).abs() < half_way
        allowed = rounding_of(x)[..., columns] + step * is_half_way
        assert bool((error[..., columns] <= allowed).all())


def test_values_half_way_are_few() -> None:
    """Or the test above would allow anything."""
    x = random_tensor(200, 64)
    is_equal = (there_and_back(x) - quantize_by_hand(x)).abs() < 1e-6

    assert float(is_equal.double().mean()) > 0.999


@with_every_dtype
@settings(deadline=None)
@given(
    scale=st.floats(-4, 4),
    shift=st.floats(-10, 10),
    width=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
def test_the_error_is_at_most_half_a_step(
    dtype: Any, scale: float, shift: float, width: int, seed: int
) -> None:
    x = (random_tensor(2, width, seed=seed) * 10**scale + shift).clamp(-3e4, 3e4).to(dtype)
    error = (there_and_back(x).double() - x.double()).abs()

    for columns, low, high in groups_of(x):
        bound = (high - low) / 30 + rounding_of(x)[..., columns]
        assert bool((error[..., columns] <= bound).all())


@with_every_dtype
def test_smallest_and_largest_stay(dtype: Any) -> None:
    x = random_tensor(50, 64, dtype=dtype, seed=1)
    result = there_and_back(x)

    assert torch.equal(result.amin(-1), x.amin(-1))
    # 15 / 15 of the range, and both are rounded.
    assert torch.allclose(
        result.amax(-1).double(), x.amax(-1).double(), atol=4 * torch.finfo(dtype).eps * 6
    )


@with_every_dtype
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 1e-7, 60_000.0])
@pytest.mark.parametrize("width", [1, 64, 70])
def test_constant_groups_are_exact(dtype: Any, value: float, width: int) -> None:
    x = torch.full((3, width), value, dtype=dtype)

    assert torch.equal(there_and_back(x), x)
    # Not only their values: nothing in them is left to chance.
    assert int(compress(x, CONFIG)[:, : packed_bytes(width, CONFIG)].max()) == 0


@pytest.mark.parametrize("spread", [1e-38, 3e-39, 1e-42])
def test_tiny_ranges_do_not_leave_the_range(spread: float) -> None:
    x = torch.linspace(0, spread, 64)
    result = there_and_back(x)

    assert bool(((result >= 0) & (result <= spread * 1.01)).all())
    assert float((result - x).abs().max()) <= spread / 30 + 16 * 1.5e-45


def test_groups_do_not_know_of_each_other() -> None:
    x = random_tensor(4, 192)
    alone = there_and_back(x)
    beside = x.clone()
    beside[:, 64:128] *= 1000

    result = there_and_back(beside)

    assert torch.equal(result[:, :64], alone[:, :64])
    assert torch.equal(result[:, 128:], alone[:, 128:])
    assert not torch.equal(result[:, 64:128], alone[:, 64:128])


def test_what_fills_the_last_group_does_not_change_its_range() -> None:
    x = random_tensor(4, 70) + 100  # a 0 would be the minimum

    assert float((there_and_back(x)[:, 64:] - x[:, 64:]).abs().max()) < 6 / 30


def test_memory_that_is_not_contiguous() -> None:
    x = random_tensor(70, 5, 3).permute(2, 1, 0)

    assert torch.equal(there_and_back(x), there_and_back(x.contiguous()))


# --- the records ---


@with_every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_records_have_the_size_that_was_announced(dtype: Any, width: int) -> None:
    records = compress(random_tensor(2, 5, width, dtype=dtype), CONFIG)

    groups = (width + 63) // 64
    assert num_groups(width, CONFIG) == groups
    assert packed_bytes(width, CONFIG) == 32 * groups
    assert record_bytes(width, CONFIG, dtype) == 32 * groups + 2 * groups * dtype.itemsize
    assert records.dtype == torch.uint8
    assert records.shape == (2, 5, record_bytes(width, CONFIG, dtype))


def test_a_compressed_matrix_is_less_than_a_third_of_one_in_half_precision() -> None:
    x = random_tensor(10, 4096, dtype=torch.float16)

    assert compress(x, CONFIG).nbytes == x.nbytes * (32 + 4) / 128


@with_every_dtype
@pytest.mark.parametrize("group_size", [2, 6, 16, 32, 128, 256])
@pytest.mark.parametrize("rows", [1, 3])
def test_other_group_sizes(dtype: Any, group_size: int, rows: int) -> None:
    config = CompressionConfig(num_bits=4, group_size=group_size)
    x = random_tensor(rows, 150, dtype=dtype, seed=group_size)

    result = there_and_back(x, config)

    assert compress(x, config).shape[-1] == record_bytes(150, config, dtype)
    error = (result.double() - x.double()).abs()
    for columns, low, high in groups_of(x, group_size):
        bound = (high - low) / 30 + rounding_of(x, group_size)[..., columns]
        assert bool((error[..., columns] <= bound).all())


@pytest.mark.parametrize("shape", [(2,), (1, 2), (1, 6), (1, 1, 2)])
@with_every_dtype
def test_a_single_small_record(shape: tuple[int, ...], dtype: Any) -> None:
    x = random_tensor(*shape, dtype=dtype)
    config = CompressionConfig(num_bits=4, group_size=2)

    # Groups of two keep both of their values.
    assert torch.allclose(there_and_back(x, config), x, atol=1e-2, rtol=1e-2)


# --- weights ---


class Given:
    """A source of weights."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Any:
        return self.tensors[name]


def policy(gpu: float, cpu: float) -> Policy:
    return Policy(
        1, 1, gpu, cpu, 100, 0, 100, 0, False, False, False, False, 1.0, True, None, False, None
    )


@pytest.mark.parametrize(("gpu", "cpu"), [(100, 0), (0, 100), (0, 0), (30, 40), (77, 11)])
@with_every_dtype
def test_compressed_weights_are_the_same_wherever_they_are(
    tmp_path: Any, gpu: float, cpu: float, dtype: Any
) -> None:
    specs = (
        WeightSpec("norm", (70,), ("norm",)),
        WeightSpec("table", (50, 70), ("table",)),
        WeightSpec("qkv", (96, 70), ("q", "k", "v")),
    )
    tensors = {
        "norm": random_tensor(70, seed=1),
        "table": random_tensor(50, 70, seed=2),
        **{name: random_tensor(32, 70, seed=3 + i) for i, name in enumerate("qkv")},
    }
    env = ExecutionEnv.create(tmp_path)
    weights = LayerWeights(specs, policy(gpu, cpu), env, dtype)
    weights.fill(Given(tensors))

    buffer = torch.empty(weights.load_bytes, dtype=torch.uint8)
    weights.load(buffer)
    ready = weights.ready(buffer)

    assert (weights.load_bytes == 0) == (gpu == 100)
    assert torch.equal(ready.get("norm"), tensors["norm"].to(dtype)), "a vector is not compressed"
    qkv = torch.cat([tensors[name] for name in "qkv"]).to(dtype)
    for name, whole in (("table", tensors["table"].to(dtype)), ("qkv", qkv)):
        expected = there_and_back(whole)
        assert torch.equal(ready.get(name), expected)
        assert ready.get(name) is ready.get(name), "decompressed once"
        index = torch.tensor([[3, 3, 0], [49, 17, 4]])
        assert torch.equal(ready.rows(name, index), expected[index])
        assert torch.equal(ready.rows(name, index), ready.get(name)[index])
    layout = layout_of(specs, policy(gpu, cpu), dtype)
    assert env.disk.ledger.allocated_bytes == layout.home_bytes.disk
    weights.close()
    assert env.disk.ledger.allocated_bytes == env.cpu.ledger.allocated_bytes == 0
