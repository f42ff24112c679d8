"""Attention on a CPU against the formula in double precision."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist import attention  # noqa: E402
from flexbench.dist.attention import (  # noqa: E402
    decode_attention,
    decode_values,
    decode_weights,
    prefill_attention,
)
from flexbench.dist.kernels import decode_attention as compiled  # noqa: E402
from flexbench.dist.kernels import prefill_attention as prefill  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]


def random_tensor(*shape: int, dtype: Any, seed: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounding(dtype: Any) -> float:
    """Scores up to 8 or so and weights are rounded to the type: some roundings of their size."""
    return float(8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 12, 24, 25, 36, 64])
@pytest.mark.parametrize(("num_positions", "length"), [(1, 1), (9, 9), (9, 64), (130, 192)])
@pytest.mark.parametrize("width", [16, 20, 64, 80, 128])
def test_one_new_position(
    dtype: Any, num_rows: int, num_positions: int, length: int, width: int
) -> None:
    q = random_tensor(num_rows, width, dtype=dtype, seed=1)
    k = random_tensor(length, num_rows, width, dtype=dtype, seed=2)
    v = random_tensor(length, num_rows, width, dtype=dtype, seed=3)
    v[num_positions:] = 0
    is_real = torch.ones(num_rows, num_positions, dtype=torch.bool)
    is_real[::2, : num_positions // 2] = False

    for mask in (None, is_real):
        weights = decode_weights(q, k, num_positions, mask)
        values = decode_values(weights, v)

        scores = torch.einsum("rd,lrd->rl", q.double(), k[:num_positions].double()) / width**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        expected = scores.softmax(-1)
        assert weights.dtype == torch.float32
        assert (weights[:, num_positions:] == 0).all()
        assert torch.allclose(
            weights[:, :num_positions].double(), expected, rtol=4 * rounding(dtype), atol=1e-6
        )
        result = torch.einsum("rl,lrd->rd", expected, v[:num_positions].double())
        assert values.shape == (num_rows, width)
        assert torch.allclose(values.double(), result, atol=4 * rounding(dtype))
        both = decode_attention(q, k, v, num_positions, mask)
        assert both.dtype == dtype
        if compiled.is_available(dtype):
            # Sums are float32. The result is rounded to its type, and so are weights of bfloat16:
            # by half an eps each, after which they and their sum change by as much at most.
            half = torch.finfo(dtype).eps / 2
            size = torch.einsum("rl,lrd->rd", expected, v[:num_positions].double().abs())
            bound = half * result.abs() + (2.1 * half * size if dtype == torch.bfloat16 else 0)
            assert ((both.double() - result).abs() <= bound + 2e-6).all()
        else:
            assert torch.equal(both, values)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 5, 8, 9, 23, 32, 33, 64, 100])
@pytest.mark.parametrize("width", [2, 16, 20, 64, 80, 128])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_prompt_over_itself(
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    length: int,
    width: int,
    is_compiled: bool,
    is_padded: bool,
) -> None:
    """By torch in blocks of 8, where it is done in blocks: the last one may be shorter."""
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 8)
    if not is_compiled:
        monkeypatch.setattr(prefill, "fits", lambda *_: False)
    num_pad = torch.tensor([length // 3, 0, length - 1, length]) * is_padded
    qkv = random_tensor(4, length, 3, 4, width, dtype=dtype, seed=4)
    q, k, v = qkv.unbind(2)

    found = prefill_attention(q, k, v, num_pad if is_padded else None)

    is_padding = torch.arange(length) < num_pad[:, None]
    assert found.isfinite().all()
    if prefill.fits(dtype, width):
        assert (found[is_padding] == 0).all()
        poisoned = qkv.masked_fill(is_padding[..., None, None, None], float("nan")).unbind(2)
        again = prefill_attention(*poisoned, num_pad if is_padded else None)
        assert torch.equal(again, found), "nobody looks at padding"
    found = found.masked_fill(is_padding[..., None, None], 0)
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) / width**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future | is_padding[:, None, None], float("-inf"))
    weights = scores.softmax(-1).masked_fill(is_padding[:, None, :, None], 0)
    expected = torch.einsum("bhsl,blhd->bshd", weights, v.double())
    assert found.shape == q.shape
    assert found.dtype == dtype
    if prefill.fits(dtype, width):
        # Weights and result are rounded to bfloat16, sums are float32.
        half = torch.finfo(dtype).eps / 2
        size = torch.einsum("bhsl,blhd->bshd", weights, v.double().abs())
        bound = half * expected.abs() + (2.1 * half * size if dtype == torch.bfloat16 else 0)
        assert ((found.double() - expected).abs() <= bound + 3e-6).all()
    else:
        assert torch.allclose(found.double(), expected, atol=4 * rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_padded", [False, True])
def test_the_last_position_of_a_prompt_by_itself(dtype: Any, is_padded: bool) -> None:
    """The same as among all others. A prompt that is nothing but padding gives something finite."""
    length = 13
    num_pad = torch.tensor([4, 0, length - 1, length]) if is_padded else None
    q, k, v = random_tensor(4, length, 3, 4, 16, dtype=dtype, seed=7).unbind(2)

    found = prefill_attention(q[:, -1:], k, v, num_pad)

    assert found.shape == (4, 1, 4, 16)
    assert found.isfinite().all()
    of_all = prefill_attention(q, k, v, num_pad)[:, -1:]
    real = slice(3 if is_padded else 4)
    assert torch.allclose(found[real], of_all[real], atol=4 * rounding(dtype))


def test_a_prompt_whose_heads_lie_otherwise() -> None:
    """Queries, keys and values of other strides, and of heads that are not contiguous."""
    q = random_tensor(2, 5, 3, 16, dtype=torch.float32, seed=1)
    k = random_tensor(2, 3, 5, 16, dtype=torch.float32, seed=2).transpose(1, 2)
    v = random_tensor(2, 5, 16, 3, dtype=torch.float32, seed=3).transpose(2, 3)
    found = prefill_attention(q, k, v, None)
    expected = prefill_attention(*(x.contiguous() for x in (q, k, v)), None)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_prompt_with_large_scores() -> None:
    """Weights of all but one position are 0, and that of a later one, which is larger, too."""
    q = torch.full((1, 3, 1, 64), 10.0)
    k = torch.zeros(1, 3, 1, 64)
    k[0, 0], k[0, 1], k[0, 2] = 99.0, -100.0, 100.0
    v = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 1, 64).contiguous()
    for dtype in DTYPES:
        found = prefill_attention(q.to(dtype), k.to(dtype), v.to(dtype), None)
        assert found[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.0, 2.0])


def test_a_prompt_that_is_not_a_number() -> None:
    for dtype in DTYPES:
        q, v = torch.ones(1, 40, 2, 64, dtype=dtype), torch.ones(1, 40, 2, 64, dtype=dtype)
        k = torch.ones(1, 40, 2, 64, dtype=dtype)
        k[0, 20, 1] = float("nan")
        found = prefill_attention(q, k, v, None)
        assert (found[:, :, 0] == 1).all()
        assert (found[:, :20, 1] == 1).all()
        assert found[:, 20:, 1].isnan().all()


def test_large_scores() -> None:
    """One position outweighs all others by far; exp of the rest must be 0, not infinite."""
    q = torch.full((2, 64), 10.0)
    k = torch.zeros(3, 2, 64)
    k[0], k[1], k[2] = 100.0, -100.0, 99.0
    v = torch.arange(6.0).view(3, 2, 1).expand(3, 2, 64).contiguous()
    for dtype in DTYPES:
        found = decode_attention(q.to(dtype), k.to(dtype), v.to(dtype), 3, None)
        assert torch.allclose(found.float(), v[0].float())


def test_what_is_not_a_number_stays_so() -> None:
    q, v = torch.ones(1, 64), torch.ones(2, 1, 64)
    k = torch.ones(2, 1, 64)
    k[1] = float("nan")
    assert decode_attention(q, k, v, 2, None).isnan().all()
