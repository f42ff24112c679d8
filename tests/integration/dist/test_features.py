"""Compression and sparse attention, against a decoder that is written out in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")
pytest.importorskip("safetensors", reason="flexbench dist needs safetensors")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from torch.nn import functional  # noqa: E402

from flexbench.dist.cache import CacheShape, LayerCache  # noqa: E402
from flexbench.dist.homes import ExecutionEnv  # noqa: E402
from flexbench.dist.model import OptLM  # noqa: E402
from flexbench.dist.opt_config import load_opt_config  # noqa: E402
from flexbench.dist.policy import Policy  # noqa: E402
from tests.integration.dist.stage import HOMES, allocated, policy  # noqa: E402
from tests.integration.dist.test_equivalence import (  # noqa: E402
    LOOPS,
    continue_alone,
    make_prompts,
    padded,
    save,
    tiny_opt,
)
from tests.unit.dist.test_compression import quantize_by_hand  # noqa: E402

GEN_LEN = 6
SEED = 2
PROMPTS_SEED = 7
SPARSITIES = [0.05, 0.3, 0.5, 0.9]
# Heads and layers that are no multiple of 64 wide, so that groups have to be filled up; attention
# that is on several positions at once.
SHAPE: dict[str, Any] = {
    "scale": 0.12,
    "hidden_size": 160,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "ffn_dim": 200,
    "word_embed_proj_dim": 160,
}
Change = Callable[[Any], Any]


def keep(x: Any) -> Any:
    return x


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the reference ---


def sparse(weights: Any, sparsity: float, num_pad: int) -> Any:
    """Weights of the past that are not among the largest become 0; those left stay as they are.

    Padding counts as past, though it has no weight.
    """
    past = weights.shape[1] - 1
    kept = torch.zeros_like(weights)
    kept[:, past] = weights[:, past]
    count = min(past, int(sparsity * (past + num_pad)))
    for head, row in enumerate(weights[:, :past].tolist()):
        for position in sorted(range(past), key=row.__getitem__, reverse=True)[:count]:
            kept[head, position] = row[position]
    return kept


class Decoder:
    """A prompt and what comes after it, from the parameters of an OPTForCausalLM.

    `cached` is what keys and values become when they are put away; the newest ones are used as
    they are, and so are all those of the prompt while it is itself computed.
    """

    def __init__(
        self, model: Any, *, cached: Change = keep, sparsity: float = 1.0, num_pad: int = 0
    ) -> None:
        self.model = model
        self.decoder = model.model.decoder
        self.num_heads = model.config.num_attention_heads
        self.cached = cached
        self.sparsity = sparsity
        self.num_pad = num_pad
        self.past: list[tuple[Any, Any]] = []

    def logits(self, ids: list[int], start: int) -> Any:
        positions = torch.arange(start, start + len(ids)) + 2
        x = self.decoder.embed_tokens.weight[ids] + self.decoder.embed_positions.weight[positions]
        for index, layer in enumerate(self.decoder.layers):
            x = x + self.attention(index, layer.self_attn, layer.self_attn_layer_norm(x))
            inner = functional.relu(layer.fc1(layer.final_layer_norm(x)))
            x = x + layer.fc2(inner)
        return self.model.lm_head(self.decoder.final_layer_norm(x[-1]))

    def attention(self, index: int, block: Any, x: Any) -> Any:
        def heads(y: Any) -> Any:
            return y.view(len(x), self.num_heads, -1).transpose(0, 1)

        q, k, v = heads(block.q_proj(x)), heads(block.k_proj(x)), heads(block.v_proj(x))
        is_prefill = index == len(self.past)
        if is_prefill:
            all_k, all_v = k, v
            self.past.append((self.cached(k), self.cached(v)))
        else:
            past_k, past_v = self.past[index]
            all_k, all_v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
            self.past[index] = (
                torch.cat([past_k, self.cached(k)], 1),
                torch.cat([past_v, self.cached(v)], 1),
            )
        scores = q @ all_k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if is_prefill:
            scores += torch.full(scores.shape[1:], -math.inf).triu(1)
        weights = scores.softmax(-1)
        if not is_prefill and self.sparsity < 1:
            weights = sparse(weights[:, 0], self.sparsity, self.num_pad)[:, None]
        return block.out_proj((weights @ all_v).transpose(0, 1).reshape(len(x), -1))

    def continue_(self, prompt: list[int], gen_len: int, margin: float) -> list[int]:
        ids = list(prompt)
        with torch.no_grad():
            logits = self.logits(ids, 0)
            for number in range(gen_len):
                first, second = logits.topk(2).values.tolist()
                assert first - second > margin, "nobody could tell these tokens apart"
                ids.append(int(logits.argmax()))
                if number < gen_len - 1:
                    logits = self.logits(ids[-1:], len(ids) - 1)
        return ids[len(prompt) :]


class Given:
    """A model's folder and prompts."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_opt(SEED, **SHAPE)
        self.folder = save(self.model, folder)
        self.prompts = make_prompts(8, seed=PROMPTS_SEED)
        self.inputs = padded(self.prompts)
        self.prompt_len = self.inputs.shape[1]

    def expected(self, margin: float = 1e-3, **options: Any) -> list[list[int]]:
        """The new tokens that the reference gives."""
        return [
            Decoder(self.model, num_pad=self.prompt_len - len(prompt), **options).continue_(
                prompt, GEN_LEN, margin
            )
            for prompt in self.prompts
        ]

    def tokens(self, how: Policy, offload_dir: Path, dtype: str = "float32") -> list[list[int]]:
        """The new tokens that OptLM gives."""
        config = load_opt_config(self.folder, dtype=dtype)
        model = OptLM(config, ExecutionEnv.create(offload_dir), str(self.folder), how)
        try:
            result = model.generate(self.inputs, GEN_LEN)
        finally:
            model.close()
        assert allocated(model.env) == [0, 0, 0]
        new: list[list[int]] = result[:, self.prompt_len :].tolist()
        return new


@pytest.fixture(scope="module")
def given(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("features") / "model")


def every_home(given: Given, tmp_path: Path, expected: Any, **features: Any) -> list[Any]:
    """Which caches and loops give other tokens than expected."""
    wrong = []
    for home, loop, on_cpu in product(HOMES, LOOPS, (False, True)):
        how = policy(2, cache=HOMES[home], cpu_cache_compute=on_cpu, **LOOPS[loop], **features)
        if given.tokens(how, tmp_path) != expected:
            wrong.append((home, loop, on_cpu))
    return wrong


def test_the_reference_is_right(given: Given) -> None:
    assert given.expected() == [
        continue_alone(given.model, prompt, GEN_LEN) for prompt in given.prompts
    ]


def test_features_make_a_difference(given: Given) -> None:
    """Or the tests below could not fail."""
    plain = given.expected()
    for changed in (
        {"cached": quantize_by_hand},
        {"cached": lambda x: quantize_by_hand(x, group_size=32)},
        *({"sparsity": sparsity} for sparsity in SPARSITIES),
    ):
        assert given.expected(**changed) != plain, changed
    assert given.expected(cached=quantize_by_hand, sparsity=0.5) != given.expected(sparsity=0.5)


# --- weights ---


@pytest.mark.parametrize(
    "changed",
    [{}, {"word_embed_proj_dim": 70}, {"tie_word_embeddings": False}],
    ids=["plain", "projected", "untied"],
)
def test_compressed_weights(tmp_path: Path, changed: dict[str, Any]) -> None:
    model = tiny_opt(SEED, **{**SHAPE, **changed})
    folder = save(model, tmp_path / "model")
    prompts = make_prompts(4)
    plain = [continue_alone(model, prompt, GEN_LEN) for prompt in prompts]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(quantize_by_hand(parameter))
    expected = [continue_alone(model, prompt, GEN_LEN) for prompt in prompts]
    assert expected != plain

    config = load_opt_config(folder, dtype="float32")
    for home, loop, sep_layer in product(HOMES, LOOPS, (False, True)):
        how = policy(
            2, weights=HOMES[home], compress_weight=True, sep_layer=sep_layer, **LOOPS[loop]
        )
        compressed = OptLM(config, ExecutionEnv.create(tmp_path), str(folder), how)
        result = compressed.generate(prompts, GEN_LEN)
        # 4 bits and two numbers a group of 64, of which the last may be filled up.
        assert sum(allocated(compressed.env)) < 0.3 * config.model_bytes()
        compressed.close()
        assert result[:, -GEN_LEN:].tolist() == expected, (home, loop, sep_layer)


# --- the cache ---


def test_compressed_cache(given: Given, tmp_path: Path) -> None:
    expected = given.expected(cached=quantize_by_hand)

    assert every_home(given, tmp_path, expected, compress_cache=True) == []


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparse_attention(given: Given, tmp_path: Path, sparsity: float) -> None:
    expected = given.expected(sparsity=sparsity)

    assert every_home(given, tmp_path, expected, attn_sparsity=sparsity) == []


def test_sparse_attention_over_a_compressed_cache(given: Given, tmp_path: Path) -> None:
    expected = given.expected(cached=quantize_by_hand, sparsity=0.5)

    wrong = every_home(given, tmp_path, expected, attn_sparsity=0.5, compress_cache=True)
    assert wrong == []


def test_everything_at_once(given: Given, tmp_path: Path) -> None:
    model = tiny_opt(SEED, **SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(quantize_by_hand(parameter))
    expected = [
        Decoder(
            model,
            num_pad=given.prompt_len - len(prompt),
            cached=quantize_by_hand,
            sparsity=0.5,
        ).continue_(prompt, GEN_LEN, 1e-3)
        for prompt in given.prompts
    ]
    for on_cpu, sep_layer in product((False, True), (False, True)):
        how = policy(
            2,
            2,
            weights=HOMES["mixed"],
            cache=HOMES["mixed"],
            activations=HOMES["mixed"],
            overlap=True,
            sep_layer=sep_layer,
            cpu_cache_compute=on_cpu,
            compress_weight=True,
            compress_cache=True,
            attn_sparsity=0.5,
        )
        assert given.tokens(how, tmp_path) == expected


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("num_batches", [2, 4])
def test_batches_do_not_share_what_the_cpu_works_with(
    given: Given, tmp_path: Path, home: str, num_batches: int
) -> None:
    """In FlexGen they had one workspace, and the next batch was copied over the one in work."""
    how = policy(
        8 // num_batches // (2 if num_batches == 2 else 1),
        num_batches,
        cache=HOMES[home],
        cpu_cache_compute=True,
        overlap=True,
    )
    expected = given.expected()

    for _ in range(3):
        assert given.tokens(how, tmp_path) == expected


# --- the cache of one layer, with keys and values that are exactly those of the reference ---


@pytest.mark.parametrize("compress_cache", [False, True])
@pytest.mark.parametrize(
    ("dtype", "sparsity"),
    # In half precision, rounding decides which of two similar weights is the larger.
    [(torch.float32, 1.0), (torch.float32, 0.4), (torch.float16, 1.0), (torch.bfloat16, 1.0)],
    ids=str,
)
def test_attention_over_the_cache_of_a_layer(
    tmp_path: Path, dtype: Any, compress_cache: bool, sparsity: float
) -> None:
    batch, heads, width, prompt_len, new = 3, 2, 80, 7, 4
    num_pad = [0, 2, 5]
    random = np.random.RandomState(0)

    def draw(*shape: int) -> Any:
        return torch.from_numpy(random.standard_normal(shape)).to(dtype)

    k, v = (draw(batch, prompt_len + new, heads, width) for _ in range(2))
    q = draw(batch, prompt_len + new, heads, width)
    shape = CacheShape(
        batch_size=batch,
        num_heads=heads,
        head_dim=width,
        max_length=prompt_len + new,
        dtype=dtype,
    )
    cached: Change = quantize_by_hand if compress_cache else keep

    def expected(prompt: int, head: int, past: int) -> Any:
        first = num_pad[prompt]
        some_k, some_v = (x[prompt, first : past + 1, head] for x in (k, v))
        some_k, some_v = (
            torch.cat([cached(x[:-1].float()), x[-1:].float()]) for x in (some_k, some_v)
        )
        weights = (some_k @ q[prompt, past, head].float() / math.sqrt(width)).softmax(0)[None]
        if sparsity < 1:
            weights = sparse(weights, sparsity, first)
        return (weights @ some_v)[0]

    is_real = torch.arange(prompt_len + new)[None] >= torch.tensor(num_pad)[:, None]
    is_real = is_real.repeat_interleave(heads, dim=0)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for home, on_cpu in product((*HOMES.values(), (50, 17), (84, 16)), (False, True)):
        env = ExecutionEnv.create(tmp_path)
        how = policy(
            cache=home,
            cpu_cache_compute=on_cpu,
            compress_cache=compress_cache,
            attn_sparsity=sparsity,
        )
        cache = LayerCache(shape, how, env)
        cache.store(0, k[:, :prompt_len], v[:, :prompt_len])
        for past in range(prompt_len, prompt_len + new):
            buffers: dict[str, Any] = {}

            def buffer(name: str, shape: Any, dtype: Any, device: Any, kept: Any = buffers) -> Any:
                # Whatever is not loaded must not be used.
                assert name not in kept
                if not dtype.is_floating_point:
                    kept[name] = torch.full(shape, 255, dtype=dtype, device=device)
                else:
                    kept[name] = torch.full(shape, math.nan, dtype=dtype, device=device)
                return kept[name]

            segments = cache.load(past, buffer)
            assert sorted(row for s in segments for row in s.rows) == list(range(batch * heads))
            result = cache.attend(
                segments, q[:, past], k[:, past], v[:, past], is_real[:, : past + 1]
            )
            cache.store(past, k[:, past : past + 1], v[:, past : past + 1])
            assert result.shape == (batch, heads, width)
            assert result.dtype == dtype
            for prompt, head in product(range(batch), range(heads)):
                difference = result[prompt, head].float() - expected(prompt, head, past)
                # Of the mean: half way between two levels of 4 bits, rounding decides, too.
                assert float(difference.abs().mean()) < tolerance, (home, on_cpu, past)
        cache.close()
        assert allocated(env) == [0, 0, 0]


# --- half precision ---


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(given: Given, tmp_path: Path, dtype: str) -> None:
    model = tiny_opt(SEED, **SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    expected = [continue_alone(model, prompt, 1)[0] for prompt in given.prompts]

    first = given.tokens(policy(2), tmp_path, dtype)

    # A token that is nearly as likely may be taken now and then.
    same = sum(row[0] == token for row, token in zip(first, expected, strict=True))
    assert same >= len(expected) - 1
    for loop in LOOPS:
        for home, on_cpu in product(HOMES.values(), (False, True)):
            how = policy(
                2,
                weights=home,
                cache=home,
                activations=home,
                cpu_cache_compute=on_cpu,
                **LOOPS[loop],
            )
            found = given.tokens(how, tmp_path, dtype)
            # Weights that stay, and those that are loaded, are not computed with in the same order.
            changed = sum(one != other for one, other in zip(found, first, strict=True))
            assert changed <= 1, (loop, home, on_cpu)
