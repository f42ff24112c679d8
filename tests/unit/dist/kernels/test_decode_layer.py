"""A decoder layer's halves for one new position, against the layers' own formulas."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

import numpy as np  # noqa: E402

from flexbench.dist.attention import decode_attention  # noqa: E402
from flexbench.dist.homes import ExecutionEnv  # noqa: E402
from flexbench.dist.kernels import decode_layer, four_bit_layouts  # noqa: E402
from flexbench.dist.kernels.decode_layer import (  # noqa: E402
    AttentionHalf,
    Decoder,
    KeysValues,
    MlpHalf,
)
from flexbench.dist.layers import MLP, SelfAttention, TransformerLayer  # noqa: E402
from flexbench.dist.model import OptLM  # noqa: E402
from flexbench.dist.opt_config import OptConfig  # noqa: E402
from flexbench.dist.policy import CompressionConfig  # noqa: E402
from flexbench.dist.weight_files import DummySource  # noqa: E402
from flexbench.dist.weights import LayerWeights, ReadyWeights  # noqa: E402
from tests.integration.dist.stage import policy  # noqa: E402

DTYPES = ["float32", "bfloat16"]
HIDDEN, HEADS, FFN = 96, 3, 224
LAYERS = {"attention": SelfAttention, "mlp": MLP, "both": TransformerLayer}


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    if not decode_layer.fits(getattr(torch, request.param), HIDDEN):
        pytest.skip(f"there is no compiled layer of {request.param} on this machine")
    return str(request.param)


@pytest.fixture
def env() -> Iterator[ExecutionEnv]:
    with tempfile.TemporaryDirectory() as folder:
        yield ExecutionEnv.create(folder)


def config(dtype: str, **changes: Any) -> OptConfig:
    shape = {
        "name": "small",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "ffn_dim": FFN,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "dtype": dtype,
    }
    return OptConfig(**{**shape, **changes})


def random_tensor(*shape: int, dtype: str, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
        getattr(torch, dtype)
    )


def used_weights(layer: Any, dtype: str, env: ExecutionEnv, **policy_changes: Any) -> ReadyWeights:
    """A layer's weights after a prompt; those of OPT's deviation would hardly change anything."""
    weights = LayerWeights(layer.specs, policy(**policy_changes), env, getattr(torch, dtype))
    source = DummySource(layer.specs)
    read = source.read
    source.read = lambda name: read(name) * (1 if "norm" in name else 5)  # type: ignore[method-assign]
    weights.fill(source)
    ready = weights.ready(torch.empty(0, dtype=torch.uint8))
    forward(layer, ready, random_tensor(1, 2, HIDDEN, dtype=dtype, seed=9), lambda q, k, v: q)
    return ready


def forward(layer: Any, weights: ReadyWeights, hidden: torch.Tensor, attend: Any) -> torch.Tensor:
    output = (
        layer.forward(weights, hidden)
        if isinstance(layer, MLP)
        else layer.forward(weights, hidden, attend)
    )
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.parametrize("is_norm_first", [True, False])
@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 5, 13, 100, 200])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_what_the_layer_computes(
    kind: str, batch: int, is_compressed: bool, is_norm_first: bool, dtype: str, env: ExecutionEnv
) -> None:
    if is_compressed and not four_bit_layouts.Panels.is_available():
        pytest.skip("there is no product with 4-bit weights of ours on this machine")
    layer = LAYERS[kind](config(dtype, do_layer_norm_before=is_norm_first), 0)
    groups = CompressionConfig(group_size=32) if is_compressed else None
    weights = used_weights(
        layer, dtype, env, compress_weight=is_compressed, comp_weight_config=groups
    )
    halves = layer.compiled(weights)
    assert halves is not None
    num_rows, length, places = batch * HEADS, 7, 12
    hidden = random_tensor(batch, 1, HIDDEN, dtype=dtype, seed=1)
    k, v = random_tensor(2, places, num_rows, HIDDEN // HEADS, dtype=dtype, seed=2)
    mask = torch.ones(num_rows, length, dtype=torch.bool)
    mask[: num_rows // 2, :3] = False
    for is_real in (None, mask):
        own_k, own_v = k.clone(), v.clone()

        def attend(
            q: torch.Tensor,
            new_k: torch.Tensor,
            new_v: torch.Tensor,
            k: torch.Tensor = own_k,
            v: torch.Tensor = own_v,
            is_real: torch.Tensor | None = is_real,
        ) -> torch.Tensor:
            query, k[length - 1], v[length - 1] = (x.flatten(0, 2) for x in (q, new_k, new_v))
            return decode_attention(query, k, v, length, is_real).view(q.shape)

        expected = forward(layer, weights, hidden, attend)
        cache = KeysValues(k.clone(), v.clone())
        given = hidden.clone()
        found = Decoder(halves, [cache][: layer.num_caches]).forward(given, length, is_real)
        assert torch.equal(given, hidden)
        # The same sums in another order, rounded to the type at the same places; those of a norm
        # may be rounded the other way, half an eps of inputs that are then multiplied and added.
        # Products with 4 bits round them to bfloat16. Sums are of up to 224 terms in float32.
        eps = max(
            torch.finfo(torch.bfloat16 if is_compressed else hidden.dtype).eps,
            FFN**0.5 / 4 * torch.finfo(torch.float32).eps,
        )
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        bound = 4 * eps * expected.double().abs().amax(-1, keepdim=True)
        assert ((found.double() - expected.double()).abs() <= bound).all()
        if kind != "mlp":
            for kept, own in zip(cache, (own_k, own_v), strict=True):
                assert torch.equal(kept[: length - 1], own[: length - 1])
                assert torch.equal(kept[length:], own[length:])
                new, expected_new = kept[length - 1].double(), own[length - 1].double()
                assert ((new - expected_new).abs() <= 4 * eps * expected_new.abs().max()).all()


@pytest.mark.parametrize("batch", [5, 13, 200, 400])
def test_a_wide_mlp(dtype: str, batch: int, env: ExecutionEnv) -> None:
    """From more than 1024 inputs on a product needs room for sums, too."""
    layer = MLP(config(dtype, ffn_dim=2100), 0)
    weights = used_weights(layer, dtype, env)
    decoder = Decoder(layer.compiled(weights) or [], [])
    hidden = random_tensor(batch, 1, HIDDEN, dtype=dtype, seed=1)
    expected = layer.forward(weights, hidden)
    eps = max(torch.finfo(hidden.dtype).eps, 2100**0.5 / 4 * torch.finfo(torch.float32).eps)
    bound = 4 * eps * expected.double().abs().amax(-1, keepdim=True)
    assert ((decoder.forward(hidden).double() - expected.double()).abs() <= bound).all()


def test_weights_that_do_not_lie_so_have_none(dtype: str, env: ExecutionEnv) -> None:
    for kind in LAYERS.values():
        layer = kind(config(dtype), 0)
        # Before they are used they are not packed.
        fresh = LayerWeights(layer.specs, policy(), env, getattr(torch, dtype))
        fresh.fill(DummySource(layer.specs))
        assert layer.compiled(fresh.ready(torch.empty(0, dtype=torch.uint8))) is None
    gelu = MLP(config(dtype, activation_function="gelu"), 0)
    assert gelu.compiled(used_weights(gelu, dtype, env)) is None


HOMES = {
    "all in memory": {},
    "attention and MLP apart": {"sep_layer": True},
    "overlap": {"overlap": True, "sep_layer": True},
    "two batches": {"num_batches": 2, "overlap": True},
    "cache computed on the cpu": {"cache": (0, 100), "cpu_cache_compute": True},
    "hidden states elsewhere": {"activations": (0, 100), "overlap": True},
    "weights loaded": {"weights": (0, 100)},
    "some weights loaded": {"weights": (40, 30), "sep_layer": True, "overlap": True},
    "weights on disk, two batches": {"weights": (0, 0), "num_batches": 2, "overlap": True},
}
COMPRESSED = {
    "compress_weight": True,
    "comp_weight_config": CompressionConfig(group_size=32),
    "overlap": True,
}
if four_bit_layouts.Panels.is_available():
    HOMES |= {
        "compressed weights": COMPRESSED,
        "compressed weights loaded": {**COMPRESSED, "weights": (30, 20)},
    }
# Nothing is moved between their layers.
AT_ONCE = ("all in memory", "attention and MLP apart", "overlap", "compressed weights")
ELSEWHERE = {
    "cache in two homes": {"cache": (50, 50)},
    "cache on disk": {"cache": (0, 0)},
    "sparse attention": {"attn_sparsity": 0.5},
    "compressed cache": {"compress_cache": True},
}


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[type]]:
    """Of each call from now on, the halves."""
    calls: list[list[type]] = []
    forward = Decoder.forward

    def counted(self: Decoder, *arguments: Any) -> torch.Tensor:
        calls.append([type(half) for half in self.halves])
        return forward(self, *arguments)

    monkeypatch.setattr(Decoder, "forward", counted)
    return calls


@pytest.mark.parametrize("where", [*HOMES, *ELSEWHERE])
def test_a_model_decodes_with_them_where_it_can(
    where: str, dtype: str, env: ExecutionEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = HOMES.get(where) or ELSEWHERE.get(where) or {}
    calls = count_calls(monkeypatch)
    how = policy(3, **{"sep_layer": where in ELSEWHERE, **changes})
    model = OptLM(config(dtype), env, "_DUMMY_", how)
    batches = how.num_gpu_batches
    # One prompt is shorter: padding is not attended to.
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16]] * batches
    try:
        tokens = model.generate(prompts, 6)
        with monkeypatch.context() as patch:
            for kind in (SelfAttention, MLP, TransformerLayer):
                patch.setattr(kind, "compiled", lambda self, weights: None)
            counted = len(calls)
            expected = model.generate(prompts, 6)
    finally:
        model.close()
    assert counted == len(calls)
    # Two layers, five tokens after the first.
    halves = [half for call in calls for half in call]
    assert halves.count(AttentionHalf) == (0 if where in ELSEWHERE else 10 * batches)
    assert halves.count(MlpHalf) == 10 * batches
    if where in AT_ONCE:
        assert calls == 5 * [2 * [AttentionHalf, MlpHalf]]
    else:
        assert len(calls) >= 10 * batches
    if dtype == "float32":  # in bfloat16 two tokens may be equally likely but for rounding
        assert np.array_equal(tokens, expected)


def test_a_layer_without_a_kernel_leaves_the_others_theirs(
    dtype: str, env: ExecutionEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none for gelu: attention is compiled nevertheless, layer by layer."""
    calls = count_calls(monkeypatch)
    gelu = config(dtype, activation_function="gelu")
    model = OptLM(gelu, env, "_DUMMY_", policy(2, sep_layer=True))
    try:
        model.generate([[5, 6, 7, 8], [10, 11]], 3)
    finally:
        model.close()
    # Two layers, two tokens after the first.
    assert calls == 2 * 2 * [[AttentionHalf]]


def test_no_memory_is_an_error(dtype: str, env: ExecutionEnv) -> None:
    layer = MLP(config(dtype), 0)
    (half,) = layer.compiled(used_weights(layer, dtype, env)) or []
    assert isinstance(half, MlpHalf)
    half.layer.fc1.num_outputs = 2**50  # of which the room for results is made
    with pytest.raises(MemoryError, match=r"no memory.*decode_halves"):
        Decoder([half], []).forward(random_tensor(1, 1, HIDDEN, dtype=dtype, seed=0))


def test_other_types_have_none(env: ExecutionEnv) -> None:
    half = SelfAttention(config("float16"), 0)
    assert half.compiled(used_weights(half, "float16", env)) is None
