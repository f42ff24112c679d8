"""The memory of a server, by numbers computed by hand and by what must hold for all models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.models.families import DTYPE_BYTES, DecoderSpec, decoder_spec
from flexbench.models.published import PUBLISHED_NAMES, published_spec
from flexbench.server_config.budget import (
    GIB,
    MAX_UNEVENNESS,
    QUANT_TYPES,
    BlockCosts,
    announced_cache_tokens,
    autograd_bytes,
    block_bytes,
    block_costs,
    cache_bytes_per_block,
    disk_bytes,
    petals_key_value_groups,
    resolve_dtype,
    seed_num_blocks,
    server_defaults,
)

GROUPED = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
}


def costs_of(spec: DecoderSpec, quant_type: str, dtype: str = "bfloat16", **more) -> BlockCosts:
    """A block's costs with the number of cache tokens that Petals takes by itself."""
    tokens = more.pop("attn_cache_tokens", server_defaults(spec).attn_cache_tokens)
    return block_costs(spec, dtype=dtype, quant_type=quant_type, attn_cache_tokens=tokens, **more)


# --- by hand ---


@pytest.mark.parametrize(
    ("name", "layers", "nf4", "int8", "bf16"),
    [
        ("bloom-176b", 70, 15, 8, 4),
        ("bloom-7b1", 30, 30, 30, 30),
        ("opt-30b", 48, 48, 33, 18),
        ("opt-175b", 96, 20, 11, 6),
        ("llama-3.1-8b", 32, 32, 32, 32),
    ],
)
def test_blocks_in_24_gib(name, layers, nf4, int8, bf16):
    spec = published_spec(name)
    blocks = {q: costs_of(spec, q).blocks_in(24 * GIB, layers) for q in QUANT_TYPES}
    assert blocks == {"nf4": nf4, "int8": int8, "none": bf16}
    assert spec.num_hidden_layers == layers


@pytest.mark.parametrize(
    ("quant_type", "dtype", "blocks"),
    # (4 GiB - 613566756.57) over 184139584, 287401984, 507695104 and 1015390208 bytes
    [("nf4", "bfloat16", 19), ("int8", "float16", 12), ("none", "float16", 7), ("none", "float32", 3)],
)  # fmt: skip
def test_blocks_of_llama_in_4_gib(quant_type, dtype, blocks):
    assert (
        costs_of(published_spec("llama-3.1-8b"), quant_type, dtype).blocks_in(4 * GIB, 32) == blocks
    )


@pytest.mark.parametrize(("memory_gib", "blocks"), [(80, 27), (48, 16), (40, 13)])
def test_the_blocks_that_petals_pull_request_149_names(memory_gib, blocks):
    # BLOOM-176B in int8, with a cache of 0.5 GiB per block, and 2 GiB for rpc_backward.
    costs = BlockCosts(
        block_bytes=block_bytes(published_spec("bloom-176b"), "bfloat16", "int8"),
        cache_bytes_per_block=GIB // 2,
        adapter_bytes_per_block=0,
        autograd_bytes=2 * GIB,
    )
    assert costs.blocks_in(memory_gib * GIB, 70) == blocks


@pytest.mark.parametrize(
    ("name", "dtype", "quant_type", "expected"),
    [
        # 2466437120 x 4.25 / 8 x 1.01 = 1323397667.2, and so on
        ("bloom-176b", "bfloat16", "nf4", 1_323_397_667),
        ("bloom-176b", "float32", "nf4", 1_323_397_667),
        ("bloom-176b", "bfloat16", "int8", 2_491_101_491),
        ("bloom-176b", "float16", "none", 4_982_202_982),
        ("bloom-176b", "bfloat16", "none", 4_982_202_982),
        ("bloom-176b", "float32", "none", 9_964_405_965),
        ("llama-3.1-8b", "bfloat16", "nf4", 117_030_720),
        ("llama-3.1-8b", "bfloat16", "int8", 220_293_120),
        ("llama-3.1-8b", "bfloat16", "none", 440_586_240),
        ("falcon-7b", "bfloat16", "none", 418_281_562),
        ("mixtral-8x7b", "bfloat16", "nf4", 778_697_137),
    ],
)
def test_bytes_of_a_block(name, dtype, quant_type, expected):
    assert block_bytes(published_spec(name), dtype, quant_type) == expected


@pytest.mark.parametrize(
    ("name", "dtype", "tokens", "expected"),
    [
        # 2 x 14336 x 4096 values of 2 bytes
        ("bloom-176b", "bfloat16", 4096, 234_881_024),
        ("bloom-176b", "float32", 4096, 469_762_048),
        ("bloom-176b", "bfloat16", 1, 57_344),
        # 2 x 4096 x 16384 / 4 values
        ("llama-3.1-8b", "bfloat16", 16384, 67_108_864),
        # 2 x 4544 x 16384 / 71 values
        ("falcon-7b", "bfloat16", 16384, 4_194_304),
        # 2 x 8192 x 16384 / 16 values
        ("falcon-40b", "float16", 16384, 33_554_432),
        # 2 x 4096 x 4096 values: Petals counts Mixtral as if nothing was shared.
        ("mixtral-8x7b", "bfloat16", 4096, 67_108_864),
    ],
)
def test_bytes_of_the_cache(name, dtype, tokens, expected):
    assert cache_bytes_per_block(published_spec(name), dtype, tokens) == expected


def test_bytes_of_the_cache_if_petals_knew_of_mixtrals_groups():
    spec = published_spec("mixtral-8x7b")
    assert cache_bytes_per_block(spec, "bfloat16", 4096, groups=4) == 16_777_216
    assert costs_of(spec, "nf4", groups=4).cache_bytes_per_block == 16_777_216


def test_values_of_the_cache_are_whole_before_they_become_bytes():
    # 2 x 64 x 1 / 3 = 42.67 values
    assert cache_bytes_per_block(decoder_spec("x", GROUPED), "float32", 1, groups=3) == 168


@pytest.mark.parametrize(
    ("name", "groups", "tokens", "length"),
    [
        ("bloom-176b", 1, 4096, 2048),
        ("opt-175b", 1, 4096, 2048),
        ("llama-2-7b", 1, 4096, 2048),
        ("llama-2-70b", 8, 16384, 8192),
        ("llama-3.2-3b", 3, 16384, 8192),
        ("falcon-rw-1b", 1, 4096, 2048),
        ("falcon-7b", 71, 16384, 8192),
        ("falcon-180b", 29, 16384, 8192),
        ("mixtral-8x7b", 1, 4096, 2048),
        ("mixtral-8x22b", 1, 4096, 2048),
    ],
)
def test_groups_decide_the_defaults(name, groups, tokens, length):
    spec = published_spec(name)
    assert petals_key_value_groups(spec) == groups
    defaults = server_defaults(spec)
    assert defaults.attn_cache_tokens == tokens
    assert (defaults.inference_max_length, defaults.max_batch_size) == (length, length)


@pytest.mark.parametrize("torch_dtype", ["float32", "float16", "bfloat16", "auto", None])
def test_an_explicit_type_wins(torch_dtype):
    spec = decoder_spec("x", {**GROUPED, "torch_dtype": torch_dtype})
    for chosen in DTYPE_BYTES:
        assert resolve_dtype(spec, chosen) == chosen


@pytest.mark.parametrize(
    ("torch_dtype", "resolved", "size"),
    [
        # h 64, 8 heads, 2 of keys and values, f 100: 29568 parameters of 2 bytes, and 1 % more
        ("float16", "float16", 59_727),
        ("bfloat16", "bfloat16", 59_727),
        ("float32", "bfloat16", 59_727),
        ("auto", "bfloat16", 59_727),
        (None, "bfloat16", 59_727),
    ],
)
def test_the_type_of_the_configuration_and_the_download(torch_dtype, resolved, size):
    spec = decoder_spec("x", {**GROUPED, "torch_dtype": torch_dtype})
    assert resolve_dtype(spec, "auto") == resolved
    assert disk_bytes(spec) == size


@pytest.mark.parametrize(
    ("name", "num_devices", "expected"),
    [
        ("bloom-176b", 1, 2 * GIB),
        ("bloom-176b", 4, 8 * GIB),
        ("llama-3.1-8b", 1, 2 * GIB * 4096 / 14336),
        ("llama-3.1-8b", 2, 1_227_133_513.142857),
        ("opt-30b", 1, GIB),
    ],
)
def test_the_reserve_for_backward_passes(name, num_devices, expected):
    spec = published_spec(name)
    assert autograd_bytes(spec, num_devices) == pytest.approx(expected, rel=1e-15)
    assert costs_of(spec, "nf4", num_devices=num_devices).autograd_bytes == autograd_bytes(
        spec, num_devices
    )


def test_the_parts_of_a_block_add_up():
    costs = costs_of(published_spec("bloom-176b"), "int8", adapter_bytes_per_block=1000)
    assert costs == BlockCosts(
        block_bytes=2_491_101_491,
        cache_bytes_per_block=234_881_024,
        adapter_bytes_per_block=1000,
        autograd_bytes=2 * GIB,
    )
    assert costs.bytes_per_block == 2_725_983_515


@pytest.mark.parametrize(
    ("memory_bytes", "blocks"),
    # 100 bytes once, and 60 + 30 + 10 for each block, of which there are 5
    [(0, 0), (100, 0), (199, 0), (200, 1), (299, 1), (300, 2), (599, 4), (600, 5), (10**15, 5)],
)
def test_only_whole_blocks_of_the_model_count(memory_bytes, blocks):
    costs = BlockCosts(
        block_bytes=60, cache_bytes_per_block=30, adapter_bytes_per_block=10, autograd_bytes=100
    )
    assert costs.blocks_in(memory_bytes, 5) == blocks
    assert [costs.memory_for(n) for n in range(4)] == [100, 200, 300, 400]


def test_two_gpus_hold_more_than_twice_what_they_reserve():
    spec = published_spec("bloom-176b")
    # (48 GiB - 4 GiB) / (1323397667 + 234881024) bytes = 30.3
    assert costs_of(spec, "nf4", num_devices=2).blocks_in(48 * GIB, 70) == 30
    assert costs_of(spec, "nf4").blocks_in(48 * GIB, 70) == 31
    assert MAX_UNEVENNESS == 1.5


@pytest.mark.parametrize(
    ("name", "dtype", "num_blocks", "expected"),
    [
        # Keys and values count apart.
        ("bloom-176b", "bfloat16", 10, 2 * 10 * 4096),
        ("llama-3.1-8b", "bfloat16", 32, 2 * 32 * 16384),
        ("falcon-7b", "float32", 3, 2 * 3 * 16384),
        ("mixtral-8x7b", "bfloat16", 1, 2 * 4096),
        ("bloom-176b", "bfloat16", 0, 0),
    ],
)
def test_announced_cache_tokens(name, dtype, num_blocks, expected):
    spec = published_spec(name)
    costs = costs_of(spec, "nf4", dtype)
    assert announced_cache_tokens(spec, dtype, costs, num_blocks) == expected


@pytest.mark.parametrize(
    ("name", "tokens", "memory_gib", "blocks"),
    [
        # (0.9 x 24 GiB - 2 x 70 x 14336 x 2 x 4096) / 1323397667 = 5.1
        ("bloom-176b", 4096, 24, 5),
        # (0.9 x 24 GiB - 2 x 32 x 4096 x 2 x 16384) / 117030720 = 124.8
        ("llama-3.1-8b", 16384, 24, 32),
        # (0.9 x 12 GiB - 8 GiB) / 117030720 = 25.7
        ("llama-3.1-8b", 16384, 12, 25),
        # The cache alone is larger.
        ("llama-3.1-8b", 16384, 8, 0),
    ],
)
def test_the_simpler_formula_by_hand(name, tokens, memory_gib, blocks):
    assert (
        seed_num_blocks(published_spec(name), "bfloat16", "nf4", tokens, memory_gib * GIB) == blocks
    )


# --- for all models ---


@st.composite
def specs(draw: st.DrawFn) -> DecoderSpec:
    """A published model, or one of any dimensions."""
    if draw(st.booleans()):
        return published_spec(draw(st.sampled_from(PUBLISHED_NAMES)))
    family = draw(st.sampled_from(["bloom", "llama", "mixtral", "falcon", "opt"]))
    kv_heads = draw(st.integers(1, 16))
    heads = kv_heads * draw(st.integers(1, 16))
    hidden_size = heads * draw(st.integers(1, 256))
    values = {
        "model_type": family,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 200)),
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.integers(1, 4 * hidden_size)),
        "num_local_experts": draw(st.integers(1, 16)),
        "ffn_dim": draw(st.integers(1, 8 * hidden_size)),
        "new_decoder_architecture": draw(st.booleans()),
        "num_kv_heads": kv_heads,
        "multi_query": draw(st.booleans()),
        "torch_dtype": draw(st.sampled_from([None, *DTYPE_BYTES])),
    }
    return decoder_spec("a model", values)


dtypes = st.sampled_from(sorted(DTYPE_BYTES))
quant_types = st.sampled_from(QUANT_TYPES)
cache_tokens = st.integers(1, 2**17)
memories = st.integers(0, 2**40)
adapters = st.integers(0, 2**30)
device_counts = st.integers(1, 8)


@st.composite
def all_costs(draw: st.DrawFn) -> tuple[DecoderSpec, BlockCosts]:
    spec = draw(specs())
    costs = block_costs(
        spec,
        dtype=draw(dtypes),
        quant_type=draw(quant_types),
        attn_cache_tokens=draw(cache_tokens),
        adapter_bytes_per_block=draw(adapters),
        num_devices=draw(device_counts),
    )
    return spec, costs


@given(all_costs(), memories, memories)
def test_more_memory_never_holds_fewer_blocks(model, one, other):
    spec, costs = model
    less, more = sorted((one, other))
    layers = spec.num_hidden_layers
    assert 0 <= costs.blocks_in(less, layers) <= costs.blocks_in(more, layers) <= layers


@given(specs(), dtypes, cache_tokens, memories)
def test_fewer_bits_never_hold_fewer_blocks(spec, dtype, tokens, memory):
    nf4, int8, none = (
        costs_of(spec, q, dtype, attn_cache_tokens=tokens).blocks_in(memory, spec.num_hidden_layers)
        for q in ("nf4", "int8", "none")
    )
    assert nf4 >= int8 >= none


@given(specs(), dtypes, quant_types, cache_tokens, cache_tokens, memories)
def test_a_larger_cache_never_leaves_room_for_more_blocks(
    spec, dtype, quant_type, one, other, memory
):
    fewer, more = sorted((one, other))
    layers = spec.num_hidden_layers
    assert costs_of(spec, quant_type, dtype, attn_cache_tokens=fewer).blocks_in(
        memory, layers
    ) >= costs_of(spec, quant_type, dtype, attn_cache_tokens=more).blocks_in(memory, layers)


@given(all_costs(), st.data())
def test_memory_for_blocks_is_just_enough(model, data):
    spec, costs = model
    num_blocks = data.draw(st.integers(1, spec.num_hidden_layers))
    memory = costs.memory_for(num_blocks)
    assert costs.blocks_in(memory, spec.num_hidden_layers) == num_blocks
    assert costs.blocks_in(memory - 1, spec.num_hidden_layers) == num_blocks - 1


@given(all_costs(), memories)
def test_the_blocks_that_fit_are_paid_for_and_one_more_is_not(model, memory):
    spec, costs = model
    num_blocks = costs.blocks_in(memory, spec.num_hidden_layers)
    if num_blocks:
        assert costs.memory_for(num_blocks) <= memory
    if num_blocks < spec.num_hidden_layers:
        assert costs.memory_for(num_blocks + 1) > memory


@given(specs(), dtypes, quant_types, cache_tokens, memories)
def test_the_simpler_formula_literally(spec, dtype, quant_type, attn_cache_tokens, total):
    bytes_per_value = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    block = round(
        spec.block_parameters
        * {"none": bytes_per_value, "int8": 1, "nf4": 4.25 / 8}[quant_type]
        * 1.01
    )
    usable = total * 0.9
    cache = (
        2 * spec.num_hidden_layers * spec.hidden_size * bytes_per_value * attn_cache_tokens
    )  # fmt: skip
    expected = max(0, min((usable - cache) // block, spec.num_hidden_layers))
    assert seed_num_blocks(spec, dtype, quant_type, attn_cache_tokens, total) == expected


@given(specs(), dtypes, quant_types, st.integers(0, 200))
def test_an_idle_server_announces_twice_its_tokens_for_each_block(
    spec, dtype, quant_type, num_blocks
):
    # As many tokens as fit a block, keys and values apart, of which heads that share are one.
    tokens = server_defaults(spec).attn_cache_tokens
    costs = costs_of(spec, quant_type, dtype)
    assert announced_cache_tokens(spec, dtype, costs, num_blocks) == 2 * tokens * num_blocks
