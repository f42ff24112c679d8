"""What a configuration says of a model, and what the published models are called."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.models.config_file import find_model
from flexbench.models.families import FAMILIES, DecoderSpec, SpecError, decoder_spec
from flexbench.models.published import PUBLISHED_NAMES, published_spec
from flexbench.models.shapes import OPT_SHAPES

# The smallest configuration of each family; tests change a value at a time.
BLOOM = {"model_type": "bloom", "hidden_size": 64, "n_layer": 3, "n_head": 8}
OPT = {
    "model_type": "opt",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "ffn_dim": 256,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
BY_FAMILY = {"bloom": BLOOM, "falcon": FALCON, "llama": LLAMA, "mixtral": MIXTRAL, "opt": OPT}


DIMENSIONS = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "block_parameters",
)


def spec(values: dict[str, Any], **changes: Any) -> DecoderSpec:
    return decoder_spec("a model", {**values, **changes})


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def write(folder: Path, content: object, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- parameters of a block ---


@pytest.mark.parametrize(
    ("name", "hidden_size", "heads", "kv_heads", "layers", "parameters"),
    [
        # 12 h^2 + 13 h
        ("bloom-176b", 14336, 112, 112, 70, 2_466_437_120),
        ("bloom-7b1", 4096, 32, 32, 30, 201_379_840),
        ("bloom-560m", 1024, 16, 16, 24, 12_596_224),
        ("opt-30b", 7168, 56, 56, 48, 616_655_872),
        ("opt-175b", 12288, 96, 96, 96, 1_812_099_072),
        # 2 h^2 + 2 h kv + 3 h f + 2 h, where kv is kv_heads x head_dim
        ("llama-7b", 4096, 32, 32, 32, 202_383_360),
        ("Llama-2-7b-hf", 4096, 32, 32, 32, 202_383_360),
        ("Llama-2-70b-hf", 8192, 64, 8, 80, 855_654_400),
        ("Llama-3.1-8B", 4096, 32, 8, 32, 218_112_000),
        ("Llama-3.1-405B", 16384, 128, 8, 126, 3_187_703_808),
        ("Llama-3.2-1B", 2048, 32, 8, 16, 60_821_504),
        # (h + 2 kv) h + 9 h^2 and one layer norm, or two
        ("falcon-7b", 4544, 71, 1, 32, 207_070_080),
        ("falcon-40b", 8192, 128, 8, 60, 679_510_016),
        ("falcon-180B", 14848, 232, 8, 80, 2_219_894_784),
        # 12 h^2, biases of 9 h, two layer norms
        ("falcon-rw-1b", 2048, 32, 32, 24, 50_358_272),
        # Attention as in Llama, 8 experts of 3 h f, the router of 8 h, 2 h
        ("Mixtral-8x7B-v0.1", 4096, 32, 8, 32, 1_451_270_144),
        ("Mixtral-8x22B-v0.1", 6144, 48, 8, 56, 2_504_060_928),
    ],
)
def test_dimensions_of_published_models(name, hidden_size, heads, kv_heads, layers, parameters):
    found = published_spec(name)
    assert (found.hidden_size, found.num_attention_heads, found.num_key_value_heads) == (
        hidden_size, heads, kv_heads,
    )  # fmt: skip
    assert found.num_hidden_layers == layers
    assert found.block_parameters == parameters
    assert found.num_key_value_groups == heads // kv_heads


@pytest.mark.parametrize(
    ("name", "outside_blocks", "whole_model"),
    [
        # The number of parameters that the publishers' files have, and what of it is embeddings,
        # the output layer where it is a matrix of its own, and layer norms outside of the blocks.
        ("bloom-176b", 250_880 * 14336 + 4 * 14336, 176_247_271_424),
        ("bloom-7b1", 250_880 * 4096 + 4 * 4096, 7_069_016_064),
        ("bloom-560m", 250_880 * 1024 + 4 * 1024, 559_214_592),
        ("bloom-1b1", 250_880 * 1536 + 4 * 1536, 1_065_314_304),
        ("bloom-1b7", 250_880 * 2048 + 4 * 2048, 1_722_408_960),
        ("bloom-3b", 250_880 * 2560 + 4 * 2560, 3_002_557_440),
        ("llama-13b", 2 * 32_000 * 5120 + 5120, 13_015_864_320),
        ("llama-30b", 2 * 32_000 * 6656 + 6656, 32_528_943_616),
        ("llama-65b", 2 * 32_000 * 8192 + 8192, 65_285_660_672),
        ("llama-2-7b", 2 * 32_000 * 4096 + 4096, 6_738_415_616),
        ("llama-2-70b", 2 * 32_000 * 8192 + 8192, 68_976_648_192),
        ("llama-3.1-8b", 2 * 128_256 * 4096 + 4096, 8_030_261_248),
        ("llama-3.1-70b", 2 * 128_256 * 8192 + 8192, 70_553_706_496),
        ("llama-3.1-405b", 2 * 128_256 * 16384 + 16384, 405_853_388_800),
        ("llama-3.2-1b", 128_256 * 2048 + 2048, 1_235_814_400),
        ("llama-3.2-3b", 128_256 * 3072 + 3072, 3_212_749_824),
        ("falcon-rw-1b", 50_304 * 2048 + 2 * 2048, 1_311_625_216),
        ("falcon-7b", 65_024 * 4544 + 2 * 4544, 6_921_720_704),
        ("falcon-40b", 65_024 * 8192 + 2 * 8192, 41_303_293_952),
        ("falcon-180b", 2 * 65_024 * 14848 + 2 * 14848, 179_522_565_120),
        ("mixtral-8x7b", 2 * 32_000 * 4096 + 4096, 46_702_792_704),
        ("mixtral-8x22b", 2 * 32_000 * 6144 + 6144, 140_620_634_112),
    ],
)
def test_blocks_and_embeddings_are_the_whole_model(name, outside_blocks, whole_model):
    found = published_spec(name)
    assert found.num_hidden_layers * found.block_parameters + outside_blocks == whole_model


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("bloom", ["bloomz"]),
        ("bloom-560m", ["bloomz-560m"]),
        ("bloom-1b1", ["bloomz-1b1"]),
        ("bloom-1b7", ["bloomz-1b7"]),
        ("bloom-3b", ["bloomz-3b"]),
        ("bloom-7b1", ["bloomz-7b1"]),
        ("llama-7b", ["llama-2-7b"]),
        ("llama-13b", ["llama-2-13b"]),
        ("llama-2-70b", ["StableBeluga2", "llama-3-70b", "llama-3.1-70b", "llama-3.3-70b"]),
        ("llama-3.1-8b", ["llama-3-8b"]),
    ],
)
def test_models_of_the_same_dimensions(name, others):
    for other in others:
        for field in DIMENSIONS:
            assert getattr(published_spec(other), field) == getattr(published_spec(name), field)


@pytest.mark.parametrize("shape", OPT_SHAPES.values(), ids=lambda shape: shape.name)
def test_opt_is_as_in_the_table_of_shapes(shape):
    found = published_spec(shape.name)
    assert found.block_parameters == shape.block_parameters
    assert (found.hidden_size, found.num_attention_heads, found.num_hidden_layers) == (
        shape.hidden_size, shape.num_attention_heads, shape.num_hidden_layers,
    )  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_every_published_model_can_be_read(name):
    found = published_spec(name)
    assert found.name == name
    assert found.family == found.values["model_type"]
    assert found.torch_dtype in (None, "float16", "bfloat16")
    # What makes a name of a model file: it can be written to one, and read back.
    again = decoder_spec(name, json.loads(json.dumps(found.values)))
    assert again == found


# h = 64, 8 heads of 8 values
@pytest.mark.parametrize(
    ("values", "changes", "kv_heads", "parameters"),
    [
        (BLOOM, {}, 8, 12 * 4096 + 13 * 64),
        (OPT, {}, 8, 12 * 4096 + 13 * 64),
        (OPT, {"ffn_dim": 100}, 8, (4 * 4096 + 256) + (2 * 6400 + 100 + 64) + 256),
        (OPT, {"ffn_dim": None}, 8, 12 * 4096 + 13 * 64),
        # q, o: 4096 each; k, v: 64 x 16 each; MLP: 3 x 6400; norms: 128
        (LLAMA, {}, 2, 8192 + 2048 + 19200 + 128),
        (LLAMA, {"num_key_value_heads": None}, 8, 4 * 4096 + 19200 + 128),
        (LLAMA, {"attention_bias": True}, 2, 8192 + 2048 + 19200 + 128 + (64 + 64 + 16 + 16)),
        (LLAMA, {"mlp_bias": True}, 2, 8192 + 2048 + 19200 + 128 + (100 + 100 + 64)),
        (LLAMA, {"attention_bias": False, "mlp_bias": False}, 2, 8192 + 2048 + 19200 + 128),
        (LLAMA, {"head_dim": 8}, 2, 8192 + 2048 + 19200 + 128),
        (MIXTRAL, {}, 2, 8192 + 2048 + 4 * (19200 + 64) + 128),
        (MIXTRAL, {"num_local_experts": 1}, 2, 8192 + 2048 + (19200 + 64) + 128),
        # query_key_value 64 x (64 + 16), dense 4096, MLP 8 x 4096, one layer norm
        (FALCON, {}, 1, 5120 + 9 * 4096 + 128),
        (FALCON, {"multi_query": True, "parallel_attn": True}, 1, 5120 + 9 * 4096 + 128),
        # Here the number of kv heads is not for Falcon to use.
        (FALCON, {"num_kv_heads": 4}, 1, 5120 + 9 * 4096 + 128),
        (FALCON, {"parallel_attn": False}, 1, 5120 + 9 * 4096 + 256),
        (FALCON, {"multi_query": False}, 8, 12 * 4096 + 128),
        (FALCON, {"multi_query": False, "num_kv_heads": 4}, 8, 12 * 4096 + 128),
        (FALCON, {"bias": True}, 1, 5120 + 9 * 4096 + 128 + (80 + 64 + 256 + 64)),
        (FALCON, {"alibi": True}, 1, 5120 + 9 * 4096 + 128),
        (
            FALCON,
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            2,
            64 * (64 + 32) + 9 * 4096 + 256,
        ),
        (FALCON, {"new_decoder_architecture": True}, 8, 12 * 4096 + 256),
        (
            FALCON,
            {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
            2,
            64 * (64 + 32) + 9 * 4096 + 256 + (96 + 64 + 256 + 64),
        ),
        # Its two layer norms do not depend on parallel_attn, and multi_query is ignored.
        (
            FALCON,
            {"new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": False},
            2,
            64 * (64 + 32) + 9 * 4096 + 256,
        ),
        (FALCON, {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}, 8, 12 * 4096 + 256),
        (FALCON, {"num_ln_in_parallel_attn": 1}, 1, 5120 + 9 * 4096 + 128),
        (FALCON, {"ffn_hidden_size": 256}, 1, 5120 + 9 * 4096 + 128),
    ],
)  # fmt: skip
def test_parameters_follow_what_the_configuration_switches(values, changes, kv_heads, parameters):
    found = spec(values, **changes)
    assert found.num_key_value_heads == kv_heads
    assert found.num_key_value_groups == 8 // kv_heads
    assert found.block_parameters == parameters


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    head_dim=st.integers(1, 256),
    heads=st.integers(1, 64),
    layers=st.integers(1, 200),
)
def test_blocks_grow_with_their_width_and_not_with_their_number(family, head_dim, heads, layers):
    values = {
        **BY_FAMILY[family],
        "ffn_dim": 256,
        "num_key_value_heads": 1,
        "n_head": heads,
        "num_attention_heads": heads,
    }
    few = spec(without(values, "n_layer"), hidden_size=head_dim * heads, num_hidden_layers=1)
    many = spec(without(values, "n_layer"), hidden_size=head_dim * heads, num_hidden_layers=layers)
    wide = spec(
        without(values, "n_layer"), hidden_size=2 * head_dim * heads, num_hidden_layers=layers
    )
    assert few.block_parameters == many.block_parameters < wide.block_parameters
    assert many.num_hidden_layers == layers
    assert many.hidden_size == head_dim * heads


# --- names of values ---


@pytest.mark.parametrize(
    ("values", "same"),
    [
        (BLOOM, {**without(BLOOM, "hidden_size"), "n_embed": 64}),
        (BLOOM, {**BLOOM, "n_embed": 64, "hidden_size": 7}),
        (BLOOM, {**BLOOM, "n_embed": None}),
        (BLOOM, {**without(BLOOM, "n_layer"), "num_hidden_layers": 3}),
        (BLOOM, {**without(BLOOM, "n_head"), "num_attention_heads": 8}),
        (BLOOM, {**BLOOM, "n_layer": None, "num_hidden_layers": 3}),
        (FALCON, {**without(FALCON, "hidden_size"), "n_embed": 64}),
        (FALCON, {**FALCON, "num_kv_heads": None, "ffn_hidden_size": None, "bias": None}),
        (FALCON, {**FALCON, "new_decoder_architecture": None}),
        (LLAMA, {**LLAMA, "head_dim": None, "attention_bias": None, "mlp_bias": None}),
        (LLAMA, {**LLAMA, "vocab_size": 32000, "architectures": ["X"], "rope_scaling": None}),
        (OPT, without(OPT, "ffn_dim")),
    ],
)
def test_other_names_and_null_mean_the_same(values, same):
    one, other = spec(values), spec(same)
    for field in DIMENSIONS:
        assert getattr(one, field) == getattr(other, field)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, None),
        ({"torch_dtype": None}, None),
        ({"torch_dtype": "auto"}, None),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16", "dtype": "float16"}, "bfloat16"),
    ],
)
def test_the_type_that_a_configuration_names(changes, dtype):
    assert spec(LLAMA, **changes).torch_dtype == dtype


# --- what cannot be read ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model_type is missing; accepted: bloom, falcon, llama, mixtral, opt"),
        ({"model_type": None}, "model_type is missing; accepted: bloom, falcon"),
        (
            {**LLAMA, "model_type": "gpt2"},
            "model_type 'gpt2' is not known here: a count of the parameters of its block is missing; "
            "accepted: bloom, falcon, llama, mixtral, opt",
        ),
        ({**LLAMA, "model_type": ["llama"]}, r"model_type ['llama'] is not known here"),
        ({**LLAMA, "model_type": 1}, "model_type 1 is not known here"),
        (without(OPT, "hidden_size"), "hidden_size is missing"),
        (without(OPT, "num_attention_heads"), "num_attention_heads is missing"),
        (without(OPT, "num_hidden_layers"), "num_hidden_layers is missing"),
        (without(LLAMA, "hidden_size"), "hidden_size is missing"),
        (without(LLAMA, "num_attention_heads"), "num_attention_heads is missing"),
        (without(LLAMA, "num_hidden_layers"), "num_hidden_layers is missing"),
        (without(LLAMA, "intermediate_size"), "intermediate_size is missing"),
        ({**LLAMA, "intermediate_size": None}, "intermediate_size is missing"),
        (without(MIXTRAL, "num_local_experts"), "num_local_experts is missing"),
        (without(MIXTRAL, "intermediate_size"), "intermediate_size is missing"),
        ({**LLAMA, "hidden_size": True}, "hidden_size must be a whole number of at least 1, not True"),
        ({**LLAMA, "hidden_size": "64"}, "hidden_size must be a whole number of at least 1, not '64'"),
        ({**LLAMA, "hidden_size": 64.0}, "hidden_size must be a whole number of at least 1, not 64.0"),
        ({**LLAMA, "hidden_size": -64}, "hidden_size must be a whole number of at least 1, not -64"),
        ({**LLAMA, "hidden_size": [64]}, "hidden_size must be a whole number of at least 1, not [64]"),
        ({**LLAMA, "hidden_size": 10**10}, "hidden_size must be a whole number of at least 1, not 10"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads must be a whole number of at"),
        ({**LLAMA, "num_key_value_heads": 0}, "num_key_value_heads must be a whole number of at"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1"),
        ({**LLAMA, "intermediate_size": -1}, "intermediate_size must be a whole number of at least"),
        ({**LLAMA, "attention_bias": "yes"}, "attention_bias must be true or false, not 'yes'"),
        ({**LLAMA, "attention_bias": 1}, "attention_bias must be true or false, not 1"),
        ({**LLAMA, "mlp_bias": 0}, "mlp_bias must be true or false, not 0"),
        ({**FALCON, "multi_query": "no"}, "multi_query must be true or false, not 'no'"),
        ({**FALCON, "n_embed": 0}, "n_embed must be a whole number of at least 1, not 0"),
        ({**MIXTRAL, "num_local_experts": 0}, "num_local_experts must be a whole number of at least"),
        ({**OPT, "ffn_dim": "x"}, "ffn_dim must be a whole number of at least 1, not 'x'"),
        (
            {**FALCON, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
            "num_ln_in_parallel_attn 1 (Falcon 2) is not what Petals' block computes",
        ),
        (
            {**FALCON, "ffn_hidden_size": 128},
            "ffn_hidden_size must be 4 x hidden_size: Petals computes no other blocks",
        ),
        (
            {**LLAMA, "head_dim": 16},
            "head_dim 16 x num_attention_heads 8 is not hidden_size 64: Petals computes only blocks",
        ),
        ({**MIXTRAL, "head_dim": 4}, "head_dim 4 x num_attention_heads 8 is not hidden_size 64"),
        (
            {**LLAMA, "num_key_value_heads": 3},
            "num_attention_heads 8 must be divisible by the number of key/value heads 3",
        ),
        (
            {**LLAMA, "num_key_value_heads": 16},
            "num_attention_heads 8 must be divisible by the number of key/value heads 16",
        ),
        (
            {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 5},
            "num_attention_heads 8 must be divisible by the number of key/value heads 5",
        ),
        ({**LLAMA, "torch_dtype": "int8"}, "torch_dtype 'int8' is not one of float32, float16, bfloat16"),
        ({**LLAMA, "torch_dtype": 16}, "torch_dtype 16 is not one of float32, float16, bfloat16"),
        ({**LLAMA, "dtype": ["float16"]}, "['float16'] is not one of float32, float16, bfloat16"),
    ],
)  # fmt: skip
def test_the_file_and_what_is_wrong_in_it_are_named(values, message, tmp_path):
    with pytest.raises(SpecError) as excinfo:
        decoder_spec("a model", values)
    assert message in str(excinfo.value)

    path = write(tmp_path, values)
    for given_path in (tmp_path, path):
        with pytest.raises(InputFileError) as file_error:
            find_model(str(given_path))
        assert file_error.value.exit_code == 2
        assert str(file_error.value) == f"{path}: {excinfo.value}"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (without(BLOOM, "hidden_size"), ("n_embed", "hidden_size")),
        (without(BLOOM, "n_head"), ("n_head", "num_attention_heads")),
        (without(BLOOM, "n_layer"), ("n_layer", "num_hidden_layers")),
        (without(FALCON, "hidden_size"), ("n_embed", "hidden_size")),
        (without(FALCON, "num_attention_heads"), ("num_attention_heads",)),
        (without(FALCON, "num_hidden_layers"), ("num_hidden_layers",)),
    ],
)
def test_a_missing_dimension_is_named_by_all_its_names(values, names):
    with pytest.raises(SpecError, match=r" is missing$") as excinfo:
        decoder_spec("a model", values)
    found = str(excinfo.value).removesuffix(" is missing").split(" or ")
    assert set(names) <= set(found)


@pytest.mark.parametrize("family", sorted(BY_FAMILY))
def test_heads_that_do_not_divide_are_refused_in_the_words_of_transformers(family):
    heads = {"n_head": 7} if family == "bloom" else {"num_attention_heads": 7}
    with pytest.raises(SpecError, match=r"^hidden_size must be divisible by num_heads") as excinfo:
        spec(BY_FAMILY[family], **heads)
    assert "(got hidden_size: 64 and num_heads: 7)" in str(excinfo.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON: Expecting value"),
        ("{'model_type': 'llama'}", "is not JSON: Expecting property name"),
        ('{"model_type": "llama"', "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        ("[]", "must be a JSON object, as in Hugging Face's config.json"),
        ('"llama"', "must be a JSON object"),
        ("null", "must be a JSON object"),
    ],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(InputFileError) as excinfo:
        find_model(str(tmp_path))
    assert str(excinfo.value).startswith(f"{path}: {message}")
    assert excinfo.value.exit_code == 2


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputFileError, match=r"config\.json: is not JSON: "):
        find_model(str(tmp_path))


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(InputFileError) as excinfo:
        find_model(str(tmp_path))
    assert str(excinfo.value) == f"{tmp_path}: is a folder without a config.json"
    assert excinfo.value.exit_code == 2


@pytest.mark.timeout(10)
def test_what_is_no_file_is_not_opened(tmp_path):
    path = tmp_path / "config.json"
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        make()
        for given_path in (tmp_path, path):
            with pytest.raises(InputFileError, match=r"is (not a regular file|a folder without)"):
                find_model(str(given_path))
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_file_that_is_too_large(tmp_path):
    path = write(tmp_path, json.dumps(LLAMA) + " " * 10 * 2**20)
    with pytest.raises(InputFileError) as excinfo:
        find_model(str(tmp_path))
    assert str(excinfo.value) == f"{path}: is larger than 10 MiB: no model's configuration is"


def test_a_byte_order_mark_is_fine(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert find_model(str(tmp_path)).hidden_size == 64


# --- from a folder, a file, a name ---


@pytest.mark.parametrize("values", BY_FAMILY.values(), ids=BY_FAMILY)
def test_a_model_is_read_from_its_folder_or_its_file(values, tmp_path):
    path = write(tmp_path, {**values, "torch_dtype": "float16", "vocab_size": 100})
    folder = find_model(str(tmp_path))
    assert folder == find_model(str(path))
    assert folder.name == str(tmp_path)
    assert folder.family == values["model_type"]
    assert folder.torch_dtype == "float16"
    assert folder.values["vocab_size"] == 100
    assert (folder.hidden_size, folder.num_attention_heads, folder.num_hidden_layers) == (64, 8, 3)


def test_a_file_of_another_name_is_named_by_itself(tmp_path):
    path = write(tmp_path, LLAMA, "llama-tiny.json")
    assert find_model(str(path)).name == str(path)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", LLAMA)
    assert find_model("~/model").hidden_size == 64


def test_a_folder_comes_before_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("bloom").hidden_size == 14336
    (tmp_path / "bloom").mkdir()
    write(tmp_path / "bloom", BLOOM)
    assert find_model("bloom").hidden_size == 64


@pytest.mark.parametrize("change", [str, str.lower, str.upper])
@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_names_are_found_without_organization_and_in_any_case(name, change):
    short = name.rpartition("/")[2]
    expected = published_spec(name)
    for written in (change(name), change(short)):
        assert published_spec(written) == expected
        assert find_model(written) == expected


@pytest.mark.parametrize(
    ("written", "name", "same_as"),
    [
        ("bloom-176b", "bigscience/bloom", "bigscience/bloom"),
        ("BLOOMZ-176B", "bigscience/bloomz", "bigscience/bloomz"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("Llama-2-70B", "meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-hf"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        # Tuned variants keep the name that was written, and get their organization.
        ("meta-llama/Llama-2-70b-chat-hf", "meta-llama/Llama-2-70b-chat-hf", "llama-2-70b"),
        ("Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("falcon-40b-instruct", "tiiuae/falcon-40b-instruct", "falcon-40b"),
        ("tiiuae/falcon-180B-chat", "tiiuae/falcon-180B-chat", "falcon-180b"),
        ("Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        (
            "mistralai/Mixtral-8x22B-Instruct-v0.1",
            "mistralai/Mixtral-8x22B-Instruct-v0.1",
            "mixtral-8x22b",
        ),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Meta-Llama-3-70B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct", "llama-3-70b"),
        # This one was published only tuned.
        ("llama-3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b"),
    ],
)
def test_other_names_and_tuned_variants(written, name, same_as):
    found, base = published_spec(written), published_spec(same_as)
    assert found.name == name
    assert found.values == base.values
    assert found.block_parameters == base.block_parameters


@pytest.mark.parametrize(
    "name", ["", "gpt2", "x/falcon-7b", "falcon", "falcon-7b-", "-chat", "facebook/bloom"]
)
def test_names_that_are_not_known(name):
    with pytest.raises(KeyError):
        published_spec(name)


@pytest.mark.parametrize(
    ("written", "suggestion"),
    [
        ("tiiuae/falcon-7", "tiiuae/falcon-7b"),
        ("falcon-7", "tiiuae/falcon-7b"),
        ("bigscience/bloom-7b", "bigscience/bloom-7b1"),
        ("lama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("Meta-Llama-3.1-8", "meta-llama/Llama-3.1-8B"),
        ("opt-30", "facebook/opt-30b"),
        # Too short to be near a name with its organization.
        ("opt-3", "facebook/opt-30b"),
    ],
)
def test_an_unknown_name_brings_suggestions(written, suggestion):
    with pytest.raises(ConfigError) as excinfo:
        find_model(written, option="--model")
    assert excinfo.value.option == "--model"
    assert excinfo.value.exit_code == 2
    assert str(excinfo.value).startswith(
        f"--model: {written!r} is neither a folder, nor a config.json, nor a built-in name; did you "
        "mean "
    )
    names = str(excinfo.value).partition("did you mean ")[2]
    assert suggestion in names.removesuffix("?").split(" or ")
    assert names.count("/") <= 3


@pytest.mark.parametrize(
    "written", ["Qqqq", "/no/such/folder", "a\0b", "~nobody-here/model", "x" * 300]
)
def test_what_resembles_nothing_is_refused_all_the_same(written):
    with pytest.raises(ConfigError, match="is neither a folder") as excinfo:
        find_model(written)
    assert "did you mean" not in str(excinfo.value)
    assert all(name in str(excinfo.value).partition("Built-in: ")[2] for name in PUBLISHED_NAMES)


@pytest.mark.parametrize(
    "written", ["8GiB:192GiB", "24", "GiB", "24GiB", "24 gb", "8GiB:192GiB:8GiB", "1.5T", "40g"]
)
def test_what_looks_like_a_size_is_told_to_belong_elsewhere(written):
    with pytest.raises(ConfigError, match="looks like a value of --gpu-memory") as excinfo:
        find_model(written)
    assert "Built-in" not in str(excinfo.value)


@pytest.mark.parametrize("written", ["7b", "", ":", "b", "g"])
def test_what_looks_like_no_size(written):
    with pytest.raises(ConfigError) as excinfo:
        find_model(written)
    assert "--gpu-memory" not in str(excinfo.value)


def test_a_suggested_name_is_found():
    with pytest.raises(ConfigError) as excinfo:
        find_model("lama-3.1-8b")
    names = str(excinfo.value).partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert names
    for name in names:
        assert find_model(name).hidden_size > 0


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("mixtral-8x7b-instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("LLAMA-3.3-70B", "meta-llama/Llama-3.3-70B-Instruct"),
    ],
)
def test_names_lead_to_what_there_is_on_a_hub(written, name):
    assert published_spec(written).name == name


def test_another_organization_is_another_model():
    with pytest.raises(KeyError):
        published_spec("somebody/bloom-7b1")
