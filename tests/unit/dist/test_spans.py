"""Which layers are passed through at once, and that it changes nothing but the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

import numpy as np  # noqa: E402

from flexbench.dist import spans  # noqa: E402
from flexbench.dist.decoders import Decoders  # noqa: E402
from flexbench.dist.homes import ExecutionEnv  # noqa: E402
from flexbench.dist.layers import MLP, SelfAttention, TransformerLayer  # noqa: E402
from flexbench.dist.model import OptLM  # noqa: E402
from flexbench.dist.opt_config import OptConfig  # noqa: E402
from flexbench.dist.spans import MOST_BYTES, can_be_joined, find_spans  # noqa: E402
from tests.integration.dist.stage import policy  # noqa: E402

LAYERS = 3


@given(st.lists(st.none() | st.integers(0, 2 * MOST_BYTES), max_size=12))
def test_spans_are_as_long_as_they_may_be(sizes: list[int | None]) -> None:
    found = find_spans(sizes)

    assert [layer for span in found for layer in span] == list(range(len(sizes)))

    def size_of(span: range) -> float:
        return sum(float("inf") if (size := sizes[i]) is None else size for i in span)

    assert all(len(span) == 1 or size_of(span) <= MOST_BYTES for span in found)
    for span, following in pairwise(found):
        assert size_of(range(span.start, following.start + 1)) > MOST_BYTES


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"overlap": True, "sep_layer": True}, True),
        ({"attn_sparsity": 0.5}, True),
        ({"compress_weight": True}, True),
        ({"num_batches": 2}, False),
        ({"cache": (0, 100)}, False),
        ({"cache": (99, 1)}, False),
        ({"compress_cache": True}, False),
        ({"activations": (0, 100)}, False),
    ],
)
def test_only_what_stays_in_place_is_joined(changes: dict[str, Any], expected: bool) -> None:
    assert can_be_joined(policy(2, **changes)) is expected


@pytest.fixture
def env(tmp_path: Path) -> ExecutionEnv:
    return ExecutionEnv.create(str(tmp_path))


@pytest.fixture(params=[True, False], ids=["apart", "together"])
def model(request: pytest.FixtureRequest, env: ExecutionEnv) -> Iterator[OptLM]:
    made = OptLM(small(), env, "_DUMMY_", policy(2, sep_layer=request.param))
    yield made
    made.close()


def small(**changes: Any) -> OptConfig:
    shape = {
        "name": "small",
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": LAYERS,
        "ffn_dim": 128,
        "vocab_size": 90,
        "max_position_embeddings": 64,
        "dtype": "float32",
    }
    return OptConfig(**{**shape, **changes})


def spans_of(model: OptLM) -> list[tuple[int, int]]:
    """Of the last call."""
    return [(span.start, span.stop) for span in model._workload.spans]


PROMPTS = [[5, 6, 7, 8], [10, 11]]  # one is padded


def test_all_between_the_embeddings_is_one(model: OptLM) -> None:
    model.generate(PROMPTS, 5)
    last = len(model.layers) - 1
    assert spans_of(model) == [(0, 1), (1, last), (last, last + 1)]


def test_a_debug_mode_looks_at_layers_one_by_one(model: OptLM) -> None:
    model.generate(PROMPTS, 5, debug_mode="fewer_batch")
    assert all(stop - start == 1 for start, stop in spans_of(model))


@pytest.mark.parametrize(
    ("num_prompts", "prompt_len", "expected"), [(1, 4, 1), (64, 4, 2), (2, 40, 1), (64, 40, 3)]
)
def test_many_prompts_and_long_ones_make_spans_shorter(
    num_prompts: int,
    prompt_len: int,
    expected: int,
    env: ExecutionEnv,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer has 133 KB of weights, and 0.5 KB of keys and values for each token of a prompt."""
    monkeypatch.setattr(spans, "MOST_BYTES", 1_500_000)
    how = replace(policy(2), gpu_batch_size=num_prompts)
    model = OptLM(small(), env, "_DUMMY_", how)
    try:
        model.generate([[5] * prompt_len] * num_prompts, 2)
        assert len(spans_of(model)) - 2 == expected
    finally:
        model.close()


@pytest.mark.parametrize("most_bytes", [0, 100_000])
def test_short_spans_give_the_same_tokens(
    most_bytes: int, model: OptLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate(PROMPTS, 8)
    whole = spans_of(model)
    monkeypatch.setattr(spans, "MOST_BYTES", most_bytes)
    tokens = model.generate(PROMPTS, 8)
    assert len(spans_of(model)) > len(whole)
    assert np.array_equal(tokens, expected)


def test_each_layer_has_its_own_time(model: OptLM) -> None:
    model.generate(PROMPTS, 20)
    times = model.times
    layers = set(range(len(model.layers)))
    for is_prefill in (True, False):
        seconds = times.layer_seconds(is_prefill=is_prefill)
        assert set(seconds) == layers
        assert min(seconds.values()) > 0
    assert sum(times.layer_s.values()) <= times.wall_s
    assert times.compute_s <= times.wall_s


def test_what_a_layer_took_in_a_call_is_given_to_it(
    model: OptLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_s = 100.0

    def told(self: Decoders, span: range, decoder: object) -> list[tuple[int, float]]:
        return [(layer, told_s + layer) for layer in span]

    monkeypatch.setattr(Decoders, "layer_seconds", told)
    model.generate(PROMPTS, 5)
    ((start, stop),) = [span for span in spans_of(model) if span[1] - span[0] > 1]
    seconds = model.times.layer_seconds(is_prefill=False)
    if seconds[start] > 0:
        pytest.skip("there are no compiled layers on this machine")
    for layer in range(start + 1, stop):
        assert seconds[layer] == pytest.approx(4 * (told_s + layer))
    others = sum(seconds[layer] for layer in range(start + 1, stop))
    assert -others < seconds[start] < -others + model.times.wall_s


def test_laying_weights_out_counts_as_computing_of_their_layer(
    model: OptLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done when the first new token is computed with them."""
    slept_s = 0.05

    def slow(compiled: Any) -> Any:
        def sleeping(self: Any, weights: Any) -> Any:
            time.sleep(slept_s)
            return compiled(self, weights)

        return sleeping

    for kind in (SelfAttention, MLP, TransformerLayer):
        monkeypatch.setattr(kind, "compiled", slow(kind.compiled))
    model.generate(PROMPTS, 5)
    inner = range(1, len(model.layers) - 1)
    seconds = model.times.layer_seconds(is_prefill=False)
    assert min(seconds[layer] for layer in inner) >= slept_s
    assert model.times.decode_compute_s >= len(inner) * slept_s
