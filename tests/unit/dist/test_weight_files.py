"""Weights from folders in Hugging Face's format, and random ones."""

from __future__ import annotations

import json
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")
safetensors = pytest.importorskip("safetensors", reason="flexbench dist needs safetensors")

import numpy as np  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from flexbench.core.errors import ConfigError, InputFileError  # noqa: E402
from flexbench.dist import weight_files  # noqa: E402
from flexbench.dist.homes import ExecutionEnv  # noqa: E402
from flexbench.dist.layers import WeightSpec, layers_of  # noqa: E402
from flexbench.dist.model import OptLM  # noqa: E402
from flexbench.dist.opt_config import OptConfig  # noqa: E402
from flexbench.dist.partition import split_layers  # noqa: E402
from flexbench.dist.pipeline import DistOptLM  # noqa: E402
from flexbench.dist.policy import Policy  # noqa: E402
from flexbench.dist.weight_files import (  # noqa: E402
    BinSource,
    DummySource,
    SafetensorsSource,
    check_weights,
    find_model,
    open_folder,
)

CONFIG = OptConfig(
    name="tiny",
    hidden_size=8,
    num_attention_heads=2,
    num_hidden_layers=4,
    ffn_dim=12,
    vocab_size=20,
    max_position_embeddings=16,
    word_embed_proj_dim=6,
    tie_word_embeddings=False,
    dtype="float32",
)
IN_MEMORY = Policy(1, 1, 100, 0, 100, 0, 100, 0, False, False, False, False, 1.0, False, None, False, None)  # fmt: skip

Tensors = dict[str, Any]


def specs_of(config: OptConfig = CONFIG, rank: int = 0, num_stages: int = 1) -> list[WeightSpec]:
    stage = split_layers(config, num_stages)[rank]
    return [spec for layer in layers_of(config, stage, sep_layer=False) for spec in layer.specs]


def tensors_of(config: OptConfig = CONFIG) -> Tensors:
    """A model's tensors, named as in transformers' OPTModel, but for the output embedding."""
    random = np.random.RandomState(0)
    return {
        name: torch.from_numpy(random.standard_normal(spec.source_shape).astype("float32"))
        for spec in specs_of(config)
        for name in spec.sources
    }


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {n if n.startswith("lm_head") else prefix + n: t for n, t in tensors.items()}


# --- the formats ---


def shards_of(tensors: Tensors) -> list[Tensors]:
    """The embeddings first, then each layer in a file of its own."""
    shards: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        key = name.partition("layers.")[2].partition(".")[0] or "rest"
        shards.setdefault(key, {})[name] = tensor
    return list(shards.values())


def write_index(path: Path, shards: list[Tensors], names: list[str]) -> None:
    weight_map = {n: file for shard, file in zip(shards, names, strict=True) for n in shard}
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def write_safetensors(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_sharded_safetensors(folder: Path, tensors: Tensors) -> None:
    shards = shards_of(tensors)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    write_index(folder / "model.safetensors.index.json", shards, names)


def write_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def write_sharded_bin(folder: Path, tensors: Tensors) -> None:
    shards = shards_of(tensors)
    names = [f"pytorch_model-{i + 1:05}-of-{len(shards):05}.bin" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        torch.save(shard, folder / name)
    write_index(folder / "pytorch_model.bin.index.json", shards, names)


def write_legacy_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[Path, Tensors], None]] = {
    "safetensors": write_safetensors,
    "sharded-safetensors": write_sharded_safetensors,
    "bin": write_bin,
    "sharded-bin": write_sharded_bin,
    "legacy-bin": write_legacy_bin,
}
with_every_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


@with_every_format
@pytest.mark.parametrize("prefix", ["model.", ""], ids=["model.decoder", "decoder"])
def test_reads_every_format(tmp_path: Path, write: Any, prefix: str) -> None:
    tensors = tensors_of()
    write(tmp_path, prefixed(tensors, prefix))

    source = open_folder(tmp_path)

    check_weights(source, specs_of(), "here")
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name), tensor)
    assert source.shape("decoder.layers.4.fc1.weight") is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_weights_take_the_type_of_the_model(tmp_path: Path, write: Any, dtype: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of().items()}
    write(folder, prefixed(tensors, "model."))

    model = OptLM(CONFIG, ExecutionEnv.create(tmp_path), str(folder), IN_MEMORY)

    table = model._weights[0].ready(torch.empty(0, dtype=torch.uint8)).get("tokens")
    assert torch.equal(table, tensors["decoder.embed_tokens.weight"].float())
    model.close()


def test_prefers_safetensors(tmp_path: Path) -> None:
    write_bin(tmp_path, tensors_of())
    assert isinstance(open_folder(tmp_path), BinSource)
    write_safetensors(tmp_path, tensors_of())
    assert isinstance(open_folder(tmp_path), SafetensorsSource)


def test_a_tied_output_embedding_need_not_be_there(tmp_path: Path) -> None:
    tied = replace(CONFIG, tie_word_embeddings=True)
    write_safetensors(tmp_path, prefixed(tensors_of(tied), "model."))

    source = open_folder(tmp_path)
    check_weights(source, specs_of(tied), "here")
    with pytest.raises(InputFileError, match=r"here: lm_head\.weight is missing"):
        check_weights(source, specs_of(), "here")


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=8,
            num_attention_heads=2,
            num_hidden_layers=4,
            ffn_dim=12,
            vocab_size=20,
            max_position_embeddings=16,
            word_embed_proj_dim=6,
        )
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model.save_pretrained(whole)
    model.save_pretrained(parts, max_shard_size="2KB")
    assert len(list(parts.glob("*00002-of-*"))) == 1
    specs = specs_of(replace(CONFIG, tie_word_embeddings=True))
    expected = model.model.state_dict()
    for folder in (whole, parts):
        source = open_folder(folder)
        check_weights(source, specs, "here")
        for name in (name for spec in specs for name in spec.sources):
            assert torch.equal(source.read(name), expected[name])


# --- what does not fit ---


@with_every_format
def test_a_missing_tensor_is_named(tmp_path: Path, write: Any) -> None:
    tensors = prefixed(tensors_of(), "model.")
    del tensors["model.decoder.layers.2.fc1.bias"]
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, tensors)

    with pytest.raises(InputFileError, match=r"layers\.2\.fc1\.bias is missing") as caught:
        OptLM(CONFIG, ExecutionEnv.create(tmp_path), str(folder), IN_MEMORY)
    assert caught.value.exit_code == 2
    assert str(folder) in caught.value.message


@with_every_format
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, write: Any) -> None:
    tensors = prefixed(tensors_of(), "model.")
    tensors["model.decoder.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 9)
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, tensors)

    with pytest.raises(InputFileError, match=r"k_proj\.weight is \[8, 9\], not \[8, 8\]") as caught:
        OptLM(CONFIG, ExecutionEnv.create(tmp_path), str(folder), IN_MEMORY)
    assert caught.value.exit_code == 2


def test_a_few_problems_stand_for_many(tmp_path: Path) -> None:
    write_safetensors(tmp_path, {"decoder.embed_tokens.weight": torch.zeros(20, 6)})
    specs = specs_of()
    missing = sum(len(spec.sources) for spec in specs) - 1

    with pytest.raises(InputFileError, match=f"; and {missing - 5} more$") as caught:
        check_weights(open_folder(tmp_path), specs, "here")
    assert caught.value.message.count("is missing") == 5


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(InputFileError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        open_folder(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    for write, index in (
        (write_sharded_safetensors, "model.safetensors.index.json"),
        (write_sharded_bin, "pytorch_model.bin.index.json"),
    ):
        folder = tmp_path / index
        folder.mkdir()
        write(folder, tensors_of())
        path = folder / index
        values = json.loads(path.read_text())
        some_file = values["weight_map"]["decoder.embed_tokens.weight"]
        values["weight_map"]["decoder.layers.3.fc1.weight"] = some_file
        path.write_text(json.dumps(values))

        with pytest.raises(InputFileError, match=rf"{some_file}: has no tensor decoder\.layers\.3"):
            check_weights(open_folder(folder), specs_of(), "here")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": null}', "\udcff"],
)
def test_an_index_that_is_none(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(InputFileError, match="is no index of shards") as caught:
        open_folder(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("outside", ["../{}", "sub/../../{}", "{absolute}"])
@pytest.mark.parametrize("is_link", [False, True])
def test_an_index_that_points_outside_of_its_folder_is_refused(
    tmp_path: Path, outside: str, is_link: bool
) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    stolen = tmp_path / "stolen.safetensors"
    save_file(tensors_of(), stolen)
    if is_link:
        # The cache of the hub is full of links; but they stand in the model's own folder.
        (tmp_path / "link.safetensors").symlink_to(stolen)
        stolen = tmp_path / "link.safetensors"
    file = outside.format(stolen.name, absolute=stolen)
    weight_map = dict.fromkeys(tensors_of(), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(InputFileError, match="names a file outside of its folder") as caught:
        open_folder(folder)
    assert caught.value.exit_code == 2


def test_links_in_the_folder_may_lead_anywhere(tmp_path: Path) -> None:
    """The cache of the hub keeps the files elsewhere."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    folder.mkdir()
    write_sharded_safetensors(blobs, tensors_of())
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)

    check_weights(open_folder(folder), specs_of(), "here")


# --- damaged files, and bad intentions ---


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_pickle_is_not_executed(tmp_path: Path, is_legacy: bool, is_sharded: bool) -> None:
    trap = tmp_path / "trap"
    name = "pytorch_model-00001-of-00001.bin" if is_sharded else "pytorch_model.bin"
    torch.save(
        {**tensors_of(), "decoder.extra": Malicious(trap)},
        tmp_path / name,
        _use_new_zipfile_serialization=not is_legacy,
    )
    if is_sharded:
        write_index(tmp_path / "pytorch_model.bin.index.json", [tensors_of()], [name])

    with pytest.raises(InputFileError, match="cannot be read as weights") as caught:
        check_weights(open_folder(tmp_path), specs_of(), "here")
    assert caught.value.exit_code == 2
    assert not trap.exists()


def test_a_bare_pickle_is_not_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Malicious(trap), file, protocol=2)  # as torch.save

    with pytest.raises(InputFileError, match="cannot be read as weights"):
        open_folder(tmp_path)
    assert not trap.exists()
    # The trap does work.
    with pytest.warns(ResourceWarning), (tmp_path / "pytorch_model.bin").open("rb") as file:
        pickle.load(file)  # noqa: S301
    assert trap.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 5])
def test_a_bin_file_without_names(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")

    with pytest.raises(InputFileError, match="holds no tensors by name, but a"):
        open_folder(tmp_path)


def test_a_bin_file_with_something_else_among_the_tensors(tmp_path: Path) -> None:
    torch.save({**tensors_of(), "decoder.layers.0.fc1.bias": 5}, tmp_path / "pytorch_model.bin")

    with pytest.raises(InputFileError, match=r"has no tensor decoder\.layers\.0\.fc1\.bias"):
        check_weights(open_folder(tmp_path), specs_of(), "here")


def read_all(folder: Path) -> None:
    source = open_folder(folder)
    check_weights(source, specs_of(), str(folder))
    for spec in specs_of():
        for name in spec.sources:
            source.read(name)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_safetensors, "model.safetensors"),
        (write_sharded_safetensors, "model-00003-of-00005.safetensors"),
        (write_bin, "pytorch_model.bin"),
        (write_sharded_bin, "pytorch_model-00003-of-00005.bin"),
        (write_legacy_bin, "pytorch_model.bin"),
    ],
    ids=WRITERS.keys(),
)
def test_a_damaged_file_is_named(tmp_path: Path, write: Any, name: str) -> None:
    write(tmp_path, tensors_of())
    whole = (tmp_path / name).read_bytes()
    random = np.random.RandomState(0)
    damaged = [whole[:size] for size in (0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1)]
    damaged += [random.bytes(size) for size in (1, 10, 200)]
    for data in damaged:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputFileError, match="cannot be read") as caught:
            read_all(tmp_path)
        assert name in caught.value.message
        assert caught.value.exit_code == 2
    (tmp_path / name).unlink()
    with pytest.raises(
        InputFileError, match="cannot be read" if "0" in name else "has no"
    ) as caught:
        read_all(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.filterwarnings("ignore")  # of a pickle's version, which is flipped, too
@pytest.mark.parametrize("write", [write_bin, write_legacy_bin])
def test_flipped_bytes_are_no_crash(tmp_path: Path, write: Any) -> None:
    """torch's unpickler answers garbage with all kinds of exceptions."""
    write(tmp_path, {"decoder.embed_tokens.weight": torch.zeros(2, 3), "b": torch.zeros(2)})
    path = tmp_path / "pytorch_model.bin"
    whole = path.read_bytes()
    random = np.random.RandomState(1)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for place in random.randint(0, min(len(data), 700), size=random.randint(1, 5)):
            data[place] = random.randint(256)
        path.write_bytes(data)
        try:
            source = open_folder(tmp_path)
            if source.shape("b") is not None:
                source.read("b")
            outcomes.add("read")
        except InputFileError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# --- a stage and its own layers ---


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_bin])
def test_a_stage_touches_only_what_is_its_own(tmp_path: Path, write: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, prefixed(tensors_of(), "model."))
    (index,) = folder.glob("*.index.json")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    # The third of four stages has the layer of this number, and no embedding.
    own = {file for name, file in weight_map.items() if "layers.2." in name}
    assert len(own) == 1
    for file in set(weight_map.values()) - own:
        path = folder / file
        if "-00001-of" in file:
            path.write_bytes(b"damaged")
        else:
            path.unlink()

    def load(rank: int) -> DistOptLM:
        env = ExecutionEnv.create(tmp_path)
        return DistOptLM(CONFIG, env, str(folder), IN_MEMORY, rank, 4, "cpu")

    stage = load(2)
    weights = stage._weights[0].ready(torch.empty(0, dtype=torch.uint8))
    assert torch.equal(weights.get("fc1.weight"), tensors_of()["decoder.layers.2.fc1.weight"])
    stage.close()
    for rank in (0, 1, 3):
        with pytest.raises(InputFileError, match="cannot be read"):
            load(rank)


def test_only_the_files_of_a_stage_are_opened(tmp_path: Path, monkeypatch: Any) -> None:
    write_sharded_safetensors(tmp_path, tensors_of())
    opened: list[str] = []
    original = weight_files._open_safetensors
    monkeypatch.setattr(
        weight_files,
        "_open_safetensors",
        lambda path: opened.append(path.name) or original(path),
    )

    for rank, expected in enumerate(({0, 1}, {2}, {3}, {0, 4})):
        opened.clear()
        source = open_folder(tmp_path)
        check_weights(source, specs_of(rank=rank, num_stages=4), "here")
        numbers = [int(name[6:11]) - 1 for name in opened]
        assert sorted(numbers) == sorted(set(numbers)), "each once"
        # All that is no layer's is in the first file.
        assert set(numbers) == expected


# --- random weights ---


def dummy(seed: int = 0, **stage: int) -> Tensors:
    specs = specs_of(**stage)
    source = DummySource(specs, seed=seed)
    check_weights(source, specs, "here")
    return {name: source.read(name) for spec in specs for name in spec.sources}


def test_dummy_weights_are_the_same_for_any_number_of_stages() -> None:
    whole = dummy()
    for num_stages in (2, 3, 4):
        parts: Tensors = {}
        for rank in range(num_stages):
            parts |= dummy(rank=rank, num_stages=num_stages)
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_dummy_weights_depend_on_the_seed_and_the_name() -> None:
    first, again, other = dummy(1), dummy(1), dummy(2)

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    flat = [tensor.flatten()[:8].tolist() for tensor in first.values()]
    assert len({tuple(values) for values in flat}) == len(flat)


def test_dummy_weights_are_like_those_of_a_fresh_model() -> None:
    for name, tensor in dummy().items():
        centre = 1 if name.endswith("norm.weight") else 0
        assert tensor.dtype == torch.float32
        assert len(tensor.unique()) > tensor.numel() * 0.9, "neither ones nor zeros"
        assert float((tensor - centre).abs().max()) <= 0.02 * 3**0.5 + 1e-6
    source = DummySource([WeightSpec("w", (300, 300), ("w",))])
    assert float(source.read("w").std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(source.read("w").mean())) < 0.001
    assert source.shape("v") is None


# --- where a model is ---


def test_a_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert find_model(str(tmp_path)) == tmp_path
    # A folder comes before a name on the hub.
    assert find_model("owner/name") == Path("owner/name")
    assert find_model("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "path",
    [
        *("nothing", "no/such/folder", "/no/such", "./nothing", "../nothing", "~/nothing"),
        *("~nobody-of-this-name/opt", "nothing/", "n" * 300, "a\0b"),
    ],
)
def test_neither_a_folder_nor_a_name(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--path: there is no folder") as caught:
        find_model(path)
    assert caught.value.exit_code == 2


def stand_in_for_the_hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise OSError(f"no connection for {name}\nand many more lines")

    stand_in_for_the_hub(monkeypatch, fail)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError) as caught:
        find_model("facebook/opt-125m")
    assert caught.value.message == (
        "--path: there is no folder facebook/opt-125m, and the hub did not give it: "
        "no connection for facebook/opt-125m"
    )


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_bin_files_are_downloaded_where_there_is_nothing_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_safetensors: bool
) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        asked.append(allow_patterns)
        if has_safetensors:
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    stand_in_for_the_hub(monkeypatch, download)

    assert find_model("owner/name") == tmp_path
    assert len(asked) == (1 if has_safetensors else 2)
    assert all("config.json" in patterns for patterns in asked)
    assert not any(".bin" in pattern for pattern in asked[0])
    if not has_safetensors:
        assert "pytorch_model*.bin" in asked[1]
