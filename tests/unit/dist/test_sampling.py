"""The next token: the likeliest, or one drawn in a way that anybody can repeat."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

import numpy as np  # noqa: E402

from flexbench.dist import sampling  # noqa: E402
from flexbench.dist.sampling import greedy, sample  # noqa: E402


def logits(rows: int, vocab_size: int = 30, seed: int = 0) -> Any:
    values = np.random.RandomState(seed).standard_normal((rows, vocab_size)) * 2
    return torch.from_numpy(values.astype("float32"))


def draw(values: Any, prompts: range | None = None, **changed: Any) -> list[int]:
    options = {"temperature": 1.0, "seed": 0, "position": 0, **changed}
    tokens = sample(values, prompts=prompts or range(len(values)), **options)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(values),)
    result: list[int] = tokens.tolist()
    return result


def test_greedy_takes_the_likeliest() -> None:
    tokens, logits = greedy(torch.tensor([[0.0, 3.0, 1.0], [-1.0, -2.0, -0.5]]))
    assert tokens.tolist() == [1, 2]
    assert logits.tolist() == [3.0, -0.5]


@pytest.mark.parametrize("vocabulary", [1, 2, 64, 97, 640, 50272])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_is_argmax_for_any_vocabulary(vocabulary: int, dtype: torch.dtype) -> None:
    """Half types round many logits to the same: the first of equals counts."""
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens, highest = greedy(logits)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert tokens.tolist() == expected
    assert highest.tolist() == [max(row) for row in logits.tolist()]


def test_greedy_shows_what_is_not_a_number() -> None:
    logits = torch.zeros(3, 96)
    logits[1, 70] = float("nan")
    logits[2, 5] = float("inf")
    assert torch.isfinite(greedy(logits)[1]).tolist() == [True, False, False]


# --- what a draw depends on ---


def test_the_same_seed_gives_the_same_tokens() -> None:
    for seed in (0, 1, 2**32 - 1):
        assert draw(logits(50), seed=seed) == draw(logits(50), seed=seed)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"position": 1}, {"prompts": range(50, 100)}], ids=str
)
def test_other_draws_give_other_tokens(other: dict[str, Any]) -> None:
    first, second = draw(logits(50)), draw(logits(50), **other)

    # A third of the draws may well agree by chance.
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 25


def test_no_state_outside_of_the_arguments() -> None:
    expected = draw(logits(20))

    torch.manual_seed(1)
    np.random.seed(1)
    draw(logits(20), seed=7)
    assert draw(logits(20)) == expected
    before = torch.random.get_rng_state()
    draw(logits(20))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 2, 5, 10])
def test_batches_make_no_difference(size: int) -> None:
    whole = logits(20)
    expected = draw(whole)

    parts = [draw(whole[i : i + size], range(i, i + size)) for i in range(0, 20, size)]

    assert [token for part in parts for token in part] == expected


def test_a_token_does_not_depend_on_the_others_of_its_batch() -> None:
    beside = logits(20)
    beside[1:] = logits(19, seed=1)

    assert draw(beside)[0] == draw(logits(20))[0]


# --- the distribution ---


def chi_square(counts: Any, probabilities: Any) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("over", ["prompts", "positions", "seeds"])
def test_tokens_come_as_often_as_they_should(over: str, temperature: float) -> None:
    row = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.2])
    number = 3000
    if over == "prompts":
        tokens = draw(row.expand(number, -1), temperature=temperature)
    else:
        name = over.removesuffix("s")
        tokens = [draw(row[None], temperature=temperature, **{name: i})[0] for i in range(number)]
    counts = np.bincount(tokens, minlength=len(row))

    weights = np.exp(row.double().numpy() / temperature)
    # 5 degrees of freedom: beyond 20.5 once in a thousand; the draws are the same each time.
    assert chi_square(counts, weights / weights.sum()) < 20.5
    # The bound does refuse what is not right: another temperature.
    wrong = np.exp(row.double().numpy() / (temperature * 2))
    assert chi_square(counts, wrong / wrong.sum()) > 20.5


def test_one_draw_says_nothing_about_the_next() -> None:
    number = 4000
    even = torch.zeros(number, 2)
    for other in ({"position": 1}, {"seed": 1}, {"prompts": range(1, number + 1)}):
        first, second = np.array(draw(even)), np.array(draw(even, **other))
        # 1 / sqrt(4000) is one standard deviation of what chance gives.
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(number)


# --- the limits ---


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-300, 5e-324])
def test_a_low_temperature_is_greedy(temperature: float) -> None:
    values = logits(100)

    assert draw(values, temperature=temperature) == greedy(values)[0].tolist()
    assert draw(values * 1e30, temperature=temperature) == greedy(values)[0].tolist()


def test_a_high_temperature_forgets_the_logits() -> None:
    row = torch.tensor([[-50.0, 50.0, 0.0, 3.0]]).expand(4000, -1)

    for temperature in (1e6, 1e300):
        counts = np.bincount(draw(row, temperature=temperature), minlength=4)
        assert chi_square(counts, np.full(4, 0.25)) < 16.3  # 3 degrees of freedom


def test_what_is_impossible_never_comes() -> None:
    row = torch.full((2000, 5), -1e4)
    row[:, 2:4] = 1.0

    assert set(draw(row)) == {2, 3}


@pytest.mark.parametrize("number", [0.0, math.nextafter(1, 0)])
def test_the_ends_of_the_range_of_draws(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    monkeypatch.setattr(sampling, "_draw", lambda *_: number)
    row = torch.full((1, 7), -1e4)
    row[:, 2:5] = torch.tensor([0.1, 0.3, 0.2])

    assert draw(row) == [2 if number == 0 else 4]


@pytest.mark.parametrize("vocab_size", [1, 2, 50_272])
def test_tokens_are_in_the_vocabulary(vocab_size: int) -> None:
    flat = torch.zeros(1, vocab_size).expand(200, -1)
    tokens = draw(flat)

    assert min(tokens) >= 0
    assert max(tokens) < vocab_size
    assert len(set(tokens)) >= min(vocab_size, 190)


def test_half_precision_logits() -> None:
    values = logits(200)
    same = sum(a == b for a, b in zip(draw(values), draw(values.half()), strict=True))

    assert same > 190
