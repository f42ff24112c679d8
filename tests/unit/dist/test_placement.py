"""Where bytes lie, which stage has which layers, and what a model is made of. Nothing is allocated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from operator import le
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.dist.opt_config import OptConfig, get_opt_config, load_opt_config
from flexbench.dist.partition import Balance, split_layers
from flexbench.dist.placement import (
    HomeBytes,
    LayerLayout,
    TensorSpec,
    bytes_of_rows,
    lay_out,
    split_rows,
)
from flexbench.dist.policy import CompressionConfig, Percent, Policy
from flexbench.models.shapes import OPT_SHAPES

SIZES = ["125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b"]


@st.composite
def percents(draw: st.DrawFn) -> Percent:
    gpu = draw(st.floats(0, 100) | st.integers(0, 100))
    cpu = draw(st.just(100 - gpu) | st.floats(0, 100 - gpu))
    return Percent(gpu, cpu)


# --- rows of one tensor ---


@settings(deadline=None)
@given(st.integers(0, 10_000), percents())
def test_rows_are_split_as_asked_within_one_row(rows: int, percent: Percent) -> None:
    split = split_rows(rows, percent)

    assert min(split.gpu, split.cpu, split.disk) >= 0
    assert split.total == rows
    assert abs(split.gpu - rows * percent.gpu / 100) <= 0.5 + 1e-9
    # Both boundaries are rounded.
    assert abs(split.cpu - rows * percent.cpu / 100) <= 1 + 1e-9
    assert abs(split.disk - rows * percent.disk / 100) <= 0.5 + 1e-9
    assert [*split.ranges()[0], *split.ranges()[1], *split.ranges()[2]] == list(range(rows))
    assert [len(part) for part in split.ranges()] == [split.gpu, split.cpu, split.disk]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 1000])
def test_a_whole_tensor_stays_whole(rows: int) -> None:
    assert split_rows(rows, Percent(100, 0)).ranges()[0] == range(rows)
    assert split_rows(rows, Percent(0, 100)).ranges()[1] == range(rows)
    assert split_rows(rows, Percent(0, 0)).ranges()[2] == range(rows)


def test_halves_of_a_row_go_to_the_nearer_home() -> None:
    split = split_rows(5, Percent(10, 20))  # boundaries at 0.5 and 1.5

    assert (split.gpu, split.cpu, split.disk) == (1, 1, 3)


def test_activations_of_a_token_fit_where_those_of_the_prompt_are() -> None:
    pytest.importorskip("torch", reason="flexbench dist needs torch")
    from flexbench.dist.activations import most_rows

    shares = (0, 0.5, 10, 100 / 3, 50, 99.5, *(index * 61.8034 % 100 for index in range(20)))
    for gpu, part in product(shares, (0, 0.3, 0.77, 1)):
        percent = Percent(gpu, (100 - gpu) * part)
        for most in (1, 2, 3, 7, 40, 101):
            room, split = most_rows(most, percent), split_rows(most, percent)
            assert (room.gpu, room.disk) == (split.gpu, split.disk)
            assert room.cpu <= min(split.cpu + 1, most)
            for rows in range(most + 1):
                split = split_rows(rows, percent)
                needed = (split.gpu, split.cpu, split.disk)
                assert all(map(le, needed, (room.gpu, room.cpu, room.disk)))


# --- the tensors of a layer ---


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[TensorSpec]:
    sizes = draw(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 500)), min_size=1, max_size=8)
    )
    return [TensorSpec(f"w{index}", *size) for index, size in enumerate(sizes)]


def row_boundaries(layout: LayerLayout) -> Iterator[int]:
    """Where a row ends, or the first one begins."""
    yield 0
    for tensor, offset in zip(layout.tensors, layout.offsets, strict=True):
        yield from range(offset + tensor.row_bytes, offset + tensor.num_bytes + 1, tensor.row_bytes)


@settings(deadline=None)
@given(tensor_lists(), percents())
def test_a_layer_is_split_as_asked_within_one_row(
    tensors: list[TensorSpec], percent: Percent
) -> None:
    layout = lay_out(tensors, percent)
    homes = layout.home_bytes

    assert homes.total == layout.num_bytes
    assert min(homes.gpu, homes.cpu, homes.disk) >= 0
    assert (homes.gpu, homes.cpu) == (layout.gpu_end, layout.cpu_end - layout.gpu_end)
    # Tensors are apart by less than 64 bytes.
    one_row = max(*(tensor.row_bytes for tensor in tensors), 64)
    wanted = layout.num_bytes * percent.gpu / 100
    assert abs(layout.gpu_end - wanted) <= one_row / 2 + 64
    wanted = layout.num_bytes * (percent.gpu + percent.cpu) / 100
    assert abs(layout.cpu_end - wanted) <= one_row / 2 + 64
    assert {layout.gpu_end, layout.cpu_end} <= set(row_boundaries(layout))


@settings(deadline=None)
@given(tensor_lists(), percents())
def test_tensors_lie_one_after_the_other_and_aligned(
    tensors: list[TensorSpec], percent: Percent
) -> None:
    layout = lay_out(tensors, percent)

    assert layout.tensors == tuple(tensors)
    assert all(offset % 64 == 0 for offset in layout.offsets)
    ends = [offset + t.num_bytes for offset, t in zip(layout.offsets, tensors, strict=True)]
    for end, start in zip(ends, layout.offsets[1:], strict=False):
        assert end <= start < end + 64
    assert layout.offsets[0] == 0
    assert layout.num_bytes == ends[-1]


@settings(deadline=None)
@given(tensor_lists(), percents())
def test_what_is_wholly_on_the_gpu_is_not_loaded(
    tensors: list[TensorSpec], percent: Percent
) -> None:
    layout = lay_out(tensors, percent)

    for tensor, offset in zip(layout.tensors, layout.offsets, strict=True):
        is_resident = offset + tensor.num_bytes <= layout.gpu_end
        assert is_resident == (offset < layout.load_start)
    assert layout.load_start in (*layout.offsets, layout.num_bytes)


@settings(deadline=None)
@given(tensor_lists())
def test_a_layer_at_one_home_is_there_to_the_last_byte(tensors: list[TensorSpec]) -> None:
    for percent in (Percent(100, 0), Percent(0, 100), Percent(0, 0)):
        layout = lay_out(tensors, percent)
        whole = layout.num_bytes
        assert layout.home_bytes == HomeBytes(
            whole if percent.gpu else 0, whole if percent.cpu else 0, whole if percent.disk else 0
        )
        assert layout.load_start == (whole if percent.gpu else 0)


def test_bytes_add_up() -> None:
    rows = bytes_of_rows(split_rows(10, Percent(50, 30)), 7)

    assert rows == HomeBytes(35, 21, 14)
    assert rows.total == 70
    assert rows.percent == pytest.approx((50, 30, 20))
    assert rows + HomeBytes(1, 2, 3) * 2 == HomeBytes(37, 25, 20)
    assert HomeBytes().percent == (100, 0, 0)


# --- the policy ---


def policy(**changed: Any) -> Policy:
    values: dict[str, Any] = {
        "gpu_batch_size": 4,
        "num_gpu_batches": 2,
        "w_gpu_percent": 100,
        "w_cpu_percent": 0,
        "cache_gpu_percent": 50,
        "cache_cpu_percent": 50,
        "act_gpu_percent": 0,
        "act_cpu_percent": 30,
        "overlap": True,
        "sep_layer": True,
        "pin_weight": True,
        "cpu_cache_compute": False,
        "attn_sparsity": 1.0,
        "compress_weight": False,
        "comp_weight_config": None,
        "compress_cache": False,
        "comp_cache_config": None,
    }
    return Policy(**{**values, **changed})


def test_the_fields_are_those_of_flexgen_in_its_order() -> None:
    assert [field.name for field in fields(Policy)] == [
        *("gpu_batch_size", "num_gpu_batches"),
        *("w_gpu_percent", "w_cpu_percent", "cache_gpu_percent", "cache_cpu_percent"),
        *("act_gpu_percent", "act_cpu_percent"),
        *("overlap", "sep_layer", "pin_weight", "cpu_cache_compute", "attn_sparsity"),
        *("compress_weight", "comp_weight_config", "compress_cache", "comp_cache_config"),
    ]


def test_the_rest_is_on_disk() -> None:
    assert policy().weights == Percent(100, 0)
    assert policy().cache == Percent(50, 50)
    assert policy().activations == Percent(0, 30)
    percent = policy(w_gpu_percent=30, w_cpu_percent=45).weights
    assert (percent.gpu, percent.cpu, percent.disk) == (30, 45, 25)
    assert policy().block_size == 8


def test_compression_is_off_until_it_is_asked_for() -> None:
    config = CompressionConfig(num_bits=4, group_size=32)
    assert policy(comp_weight_config=config, comp_cache_config=config).weight_compression is None
    assert policy(comp_weight_config=config, comp_cache_config=config).cache_compression is None
    assert policy(compress_weight=True).weight_compression == CompressionConfig(4, 64)
    assert policy(compress_cache=True).cache_compression == CompressionConfig(4, 64)
    assert policy(compress_weight=True, comp_weight_config=config).weight_compression == config
    assert policy(compress_cache=True, comp_cache_config=config).cache_compression == config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gpu_batch_size": 0}, "--gpu-batch-size: .*at least 1, not 0"),
        ({"gpu_batch_size": -3}, "--gpu-batch-size: .*not -3"),
        ({"num_gpu_batches": 0}, "--num-gpu-batches: .*at least 1, not 0"),
        ({"w_gpu_percent": 101}, "--percent: weights on gpu .*not 101"),
        ({"w_gpu_percent": -1}, "--percent: weights on gpu .*not -1"),
        ({"w_cpu_percent": 0.5}, "--percent: weights: 100 on gpu and 0.5 on cpu .*over 100"),
        ({"cache_cpu_percent": -0.5}, "--percent: cache on cpu .*not -0.5"),
        ({"cache_cpu_percent": 51}, "--percent: cache: 50 on gpu and 51 on cpu"),
        ({"act_cpu_percent": 100.5}, "--percent: activations on cpu .*not 100.5"),
        ({"act_gpu_percent": 71}, "--percent: activations: 71 on gpu and 30 on cpu"),
        ({"act_gpu_percent": float("nan")}, "--percent: activations on gpu .*not nan"),
        ({"attn_sparsity": 0}, "--attn-sparsity: .*not 0"),
        ({"attn_sparsity": 1.01}, "--attn-sparsity: .*not 1.01"),
        ({"attn_sparsity": -0.1}, "--attn-sparsity: .*not -0.1"),
        ({"attn_sparsity": float("nan")}, "--attn-sparsity: .*not nan"),
    ],
)
def test_refuses_a_policy_that_cannot_work(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        policy(**changed)
    assert caught.value.exit_code == 2


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_decimals_that_add_up_to_100_are_not_over_100(hundredths: int) -> None:
    gpu, cpu = float(f"{hundredths / 100:.2f}"), float(f"{(10_000 - hundredths) / 100:.2f}")

    accepted = policy(w_gpu_percent=gpu, w_cpu_percent=cpu)

    assert lay_out([TensorSpec("w", 999, 3)], accepted.weights).home_bytes.disk == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_bits": 8}, "num_bits: must be 4, not 8"),
        ({"group_size": 63}, "group_size: must be even, not 63"),
        ({"group_size": 0}, "group_size: .*not 0"),
        ({"group_size": -2}, "group_size: .*not -2"),
    ],
)
def test_refuses_a_compression_that_cannot_be_packed(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(**values)


# --- stages ---


def counts(config: OptConfig, stages: int, balance: Balance = Balance.LAYERS) -> list[int]:
    return [len(stage.layers) for stage in split_layers(config, stages, balance)]


def test_layers_are_shared_as_in_flexgen() -> None:
    config = replace(get_opt_config("opt-125m"), num_hidden_layers=11)

    assert counts(config, 1) == [11]
    assert counts(config, 4) == [3, 3, 3, 2]
    assert counts(config, 5) == [3, 2, 2, 2, 2]
    assert counts(config, 11) == [1] * 11
    # DistOptLM's own words: n / S layers each, and one more for the first n % S stages.
    for stages in range(1, 12):
        sizes = [11 // stages + (1 if rank < 11 % stages else 0) for rank in range(stages)]
        assert counts(config, stages) == sizes


@settings(deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 96), st.sampled_from(list(Balance)))
def test_stages_are_contiguous_and_have_all_layers(
    size: str, stages: int, balance: Balance
) -> None:
    config = get_opt_config(f"opt-{size}")
    stages = min(stages, config.num_hidden_layers)

    split = split_layers(config, stages, balance)

    assert [layer for stage in split for layer in stage.layers] == [
        *range(config.num_hidden_layers)
    ]
    assert all(len(stage.layers) >= 1 for stage in split)
    assert [stage.rank for stage in split] == list(range(stages))
    assert {stage.num_stages for stage in split} == {stages}
    assert [stage.is_first for stage in split] == [True] + [False] * (stages - 1)
    assert [stage.is_last for stage in split] == [False] * (stages - 1) + [True]


def heaviest(
    config: OptConfig, layers: list[int], balance: Balance, positions: float = 1.0
) -> float:
    """The most of what a balance is about that any stage has, of `positions` for a new token."""
    h, f = config.hidden_size, config.ffn_dim
    # Multiplications of a token, and parameters: matrices, and for memory biases and norms.
    layer = 4 * h * h + 2 * h * f
    head = config.vocab_size * config.embed_dim
    first = 0
    if balance is Balance.MEMORY:
        layer += 9 * h + f
        first = head + (config.max_position_embeddings + 2) * h
    loads = [count * layer * positions for count in layers]
    loads[0] += first
    loads[-1] += head
    if balance is Balance.TIME:  # of the last layer, queries, keys and values only
        loads[-1] -= (positions - 1) * (layer - 3 * h * h)
    return max(loads)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("balance", [Balance.MEMORY, Balance.TIME])
def test_a_balance_is_at_least_as_good_as_the_even_split(size: str, balance: Balance) -> None:
    config = get_opt_config(f"opt-{size}")
    for stages in range(1, config.num_hidden_layers + 1):
        chosen = heaviest(config, counts(config, stages, balance), balance)
        # Biases and norms, which this measure of time leaves out, are less than a thousandth.
        assert chosen <= heaviest(config, counts(config, stages), balance) * 1.001
        if balance is Balance.TIME:
            for positions in (1.5, 5.0, 50.0):
                split = split_layers(config, stages, balance, positions_per_token=positions)
                chosen = heaviest(config, [len(s.layers) for s in split], balance, positions)
                even = heaviest(config, counts(config, stages), balance, positions)
                assert chosen <= even * 1.001


def test_a_balance_counts_the_embeddings() -> None:
    config = get_opt_config("opt-125m")  # 12 layers of 7.1 M parameters, 38.6 M in the table

    assert counts(config, 2, Balance.MEMORY) == [6, 6]  # as one table each
    assert counts(config, 3, Balance.MEMORY) == [2, 8, 2]
    assert counts(config, 2, Balance.TIME) == [9, 3]


def test_a_prompt_needs_the_output_embedding_once() -> None:
    """5.4 layers' worth of it for one position of those that the layers compute for a token.

    Of the last layer, three quarters are computed for one position, too.
    """
    config = get_opt_config("opt-125m")

    def layers(positions: float) -> list[int]:
        split = split_layers(config, 2, Balance.TIME, positions_per_token=positions)
        return [len(stage.layers) for stage in split]

    assert layers((128 + 31) / 32) == [6, 6]  # 1.1 layers more and 0.6 less: 6 and 6.5
    assert layers(2.0) == [7, 5]  # 2.7 more and 0.4 less: 7 and 7.3
    assert layers(512.0) == [6, 6]
    assert layers(1.0) == counts(config, 2, Balance.TIME)


@pytest.mark.parametrize("stages", [0, -1, 13, 1000])
@pytest.mark.parametrize("balance", list(Balance))
def test_refuses_more_stages_than_layers(stages: int, balance: Balance) -> None:
    with pytest.raises(ConfigError, match=r"--world-size.*accepted: 1 to 12") as caught:
        split_layers(get_opt_config("opt-125m"), stages, balance)
    assert caught.value.exit_code == 2


# --- published models ---


def test_all_published_models_are_there() -> None:
    assert set(OPT_SHAPES) == {f"facebook/opt-{size}" for size in SIZES}
    for size in SIZES:
        assert get_opt_config(f"opt-{size}") == get_opt_config(f"facebook/opt-{size}")
        assert get_opt_config(f"opt-{size}").name == f"facebook/opt-{size}"


@pytest.mark.parametrize(
    ("size", "parameters"),  # of the published checkpoints; of 66b to four digits
    [
        ("125m", 125_239_296),
        ("350m", 331_196_416),
        ("1.3b", 1_315_758_080),
        ("2.7b", 2_651_596_800),
        ("6.7b", 6_658_473_984),
        ("13b", 12_853_473_280),
        ("30b", 29_974_540_288),
        ("66b", 65_720_000_000),
    ],
)
def test_counts_the_parameters_of_published_models(size: str, parameters: int) -> None:
    in_half = get_opt_config(f"opt-{size}", dtype="float16").model_bytes()
    assert in_half == pytest.approx(2 * parameters, rel=1e-4)
    assert get_opt_config(f"opt-{size}", dtype="float32").model_bytes() == 2 * in_half


@pytest.mark.parametrize("size", SIZES)
def test_counts_the_parameters_that_transformers_counts(size: str) -> None:
    torch = pytest.importorskip("torch", reason="flexbench dist needs torch")
    transformers = pytest.importorskip("transformers")
    config = get_opt_config(f"opt-{size}", dtype="float16")
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                num_hidden_layers=config.num_hidden_layers,
                ffn_dim=config.ffn_dim,
                vocab_size=config.vocab_size,
                max_position_embeddings=config.max_position_embeddings,
                word_embed_proj_dim=config.embed_dim,
                do_layer_norm_before=config.do_layer_norm_before,
            )
        )
    shapes = {name: p.shape.numel() for name, p in model.named_parameters()}
    # On the meta device the output embedding may not be tied yet.
    shapes.pop("lm_head.weight", None)

    assert 2 * sum(shapes.values()) == config.model_bytes()


def test_opt_350m_is_the_odd_one() -> None:
    for size in SIZES:
        config = get_opt_config(f"opt-{size}")
        is_odd = size == "350m"
        assert config.embed_dim == (512 if is_odd else config.hidden_size)
        assert config.do_layer_norm_before is not is_odd
        assert config.has_final_layer_norm is not is_odd
        assert config.head_dim * config.num_attention_heads == config.hidden_size
        assert config.ffn_dim == 4 * config.hidden_size


def test_instruction_tuned_models_have_the_same_dimensions() -> None:
    plain = get_opt_config("opt-30b")
    assert get_opt_config("facebook/opt-iml-30b") == replace(plain, name="facebook/opt-iml-30b")
    assert get_opt_config("opt-iml-max-30b") == replace(plain, name="facebook/opt-iml-max-30b")
    assert get_opt_config("OPT-IML-30B") == get_opt_config("opt-iml-30b")


def test_cache_and_activations_of_a_batch() -> None:
    config = get_opt_config("opt-30b", dtype="float16")

    # Keys and values of 48 layers, 7168 wide, 2 bytes each.
    assert config.cache_bytes(3, 100) == 3 * 100 * 2 * 48 * 7168 * 2
    assert config.hidden_bytes(3, 100) == 3 * 100 * 7168 * 2


def test_auto_is_half_precision_on_a_gpu_only() -> None:
    auto = get_opt_config("opt-125m")

    assert auto.dtype == "auto"
    assert auto.resolve_dtype(on_gpu=True).dtype == "float16"
    assert auto.resolve_dtype(on_gpu=False).dtype == "float32"
    assert auto.dtype_bytes == 2
    chosen = get_opt_config("opt-125m", dtype="bfloat16")
    assert chosen.resolve_dtype(on_gpu=False) == chosen


@pytest.mark.parametrize(
    "name",
    ["", "opt", "opt-31b", "opt-30b ", "facebook/", "other/opt-30b", "gpt2", "opt-iml-", "_DUMMY_"],
)
def test_refuses_unknown_models_and_lists_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match="--model: unknown model") as caught:
        get_opt_config(name)
    assert caught.value.exit_code == 2
    assert repr(name) in caught.value.message
    assert all(known in caught.value.message for known in OPT_SHAPES)


def test_refuses_unknown_types() -> None:
    with pytest.raises(ConfigError, match=r"--dtype: .*'int8'.*auto, float32, float16, bfloat16"):
        get_opt_config("opt-125m", dtype="int8")


# --- config.json ---

TINY = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "ffn_dim": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 16,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "activation_function": "gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 3,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}


def write_config(folder: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    (folder / "config.json").write_bytes(data)
    return folder


def tiny(**changed: Any) -> str:
    return json.dumps({**TINY, **changed})


def test_reads_what_stands_in_config_json(tmp_path: Path) -> None:
    config = load_opt_config(write_config(tmp_path, tiny()), dtype="bfloat16")

    assert config == OptConfig(
        name=tmp_path.name,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=48,
        vocab_size=60,
        max_position_embeddings=40,
        word_embed_proj_dim=16,
        do_layer_norm_before=True,
        has_final_layer_norm=True,
        activation_function="gelu",
        tie_word_embeddings=False,
        pad_token_id=3,
        dtype="bfloat16",
    )


def test_what_config_json_leaves_out_is_as_in_transformers(tmp_path: Path) -> None:
    needed = ("model_type", "hidden_size", "num_attention_heads", "num_hidden_layers")
    values = {name: TINY[name] for name in (*needed, "ffn_dim", "vocab_size")}
    config = load_opt_config(write_config(tmp_path, json.dumps(values)))

    assert config.max_position_embeddings == 2048
    assert config.embed_dim == 32
    assert config.do_layer_norm_before
    assert config.has_final_layer_norm
    assert config.activation_function == "relu"
    assert config.tie_word_embeddings
    assert config.pad_token_id == 1
    assert config.dtype == "auto"


def test_a_final_layer_norm_can_be_left_out_in_two_ways(tmp_path: Path) -> None:
    removed = load_opt_config(write_config(tmp_path, tiny(_remove_final_layer_norm=True)))
    assert (removed.do_layer_norm_before, removed.has_final_layer_norm) == (True, False)
    after = load_opt_config(write_config(tmp_path, tiny(do_layer_norm_before=False)))
    assert (after.do_layer_norm_before, after.has_final_layer_norm) == (False, False)


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.OPTConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=48,
        vocab_size=60,
        max_position_embeddings=40,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ).save_pretrained(tmp_path)

    assert load_opt_config(tmp_path) == OptConfig(
        name=tmp_path.name,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=48,
        vocab_size=60,
        max_position_embeddings=40,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        has_final_layer_norm=False,
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("null", "model_type must be 'opt', not None"),
        ("[]", "model_type must be 'opt', not None"),
        ("{}", "model_type must be 'opt', not None"),
        (tiny(model_type="llama"), "model_type must be 'opt', not 'llama'"),
        (tiny(enable_bias=False), "enable_bias = False is not supported"),
        (tiny(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine = False is not"),
        (tiny(activation_function="silu"), "activation_function 'silu' is not one of relu, gelu"),
        (tiny(activation_function=["relu"]), "activation_function .* is not one of"),
        (tiny(num_attention_heads=5), "hidden_size 32 is no multiple of num_attention_heads 5"),
        (tiny(hidden_size=None), "hidden_size must be a whole number, not None"),
        (tiny(hidden_size=32.0), "hidden_size must be a whole number, not 32.0"),
        (tiny(hidden_size="32"), "hidden_size must be a whole number, not '32'"),
        (tiny(num_attention_heads=0), "num_attention_heads must be a whole number, not 0"),
        (tiny(num_hidden_layers=-1), "num_hidden_layers must be a whole number, not -1"),
        (tiny(ffn_dim=True), "ffn_dim must be a whole number, not True"),
        (tiny(vocab_size=[1]), "vocab_size must be a whole number"),
        (tiny(max_position_embeddings={}), "max_position_embeddings must be a whole number"),
        (tiny(word_embed_proj_dim=0), "word_embed_proj_dim must be a whole number, not 0"),
        (tiny(pad_token_id=-1), "pad_token_id must be a whole number, not -1"),
        (tiny(pad_token_id=60), "pad_token_id"),
        (tiny(do_layer_norm_before="false"), "do_layer_norm_before"),
        (tiny(_remove_final_layer_norm=0), "_remove_final_layer_norm"),
        (tiny(tie_word_embeddings=None), "tie_word_embeddings"),
        (json.dumps({n: v for n, v in TINY.items() if n != "ffn_dim"}), "ffn_dim must be"),
    ],
)
def test_refuses_a_config_json_that_it_cannot_compute(
    tmp_path: Path, text: str | bytes, problem: str
) -> None:
    write_config(tmp_path, text)

    with pytest.raises(InputFileError, match=problem) as caught:
        load_opt_config(tmp_path)
    assert caught.value.exit_code == 2
    assert str(tmp_path / "config.json") in caught.value.message


def test_refuses_a_folder_without_config_json(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"config\.json: cannot be read: No such file"):
        load_opt_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputFileError, match=r"config\.json: cannot be read: Is a directory"):
        load_opt_config(tmp_path)


def test_a_bad_type_is_the_options_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype: unknown type 'float8'"):
        load_opt_config(write_config(tmp_path, tiny()), dtype="float8")


def test_model_bytes_counts_an_output_embedding_of_its_own() -> None:
    tied = replace(get_opt_config("opt-125m"), dtype="float32")
    untied = replace(tied, tie_word_embeddings=False)

    assert untied.model_bytes() - tied.model_bytes() == 4 * tied.vocab_size * tied.hidden_size
