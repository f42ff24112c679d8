"""The size of adapters, from files as they should be, and as they should not."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.server_config.adapters import adapter_bytes_per_block

PREFIX = "base_model.model.transformer.h"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, shape: Any = (4, 64)) -> Path:
    header = {
        "__metadata__": {"format": "pt"},
        f"{PREFIX}.0.lora_A.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]},
        f"{PREFIX}.0.lora_B.weight": {"dtype": "F32", "shape": [64, 4], "data_offsets": [0, 0]},
        f"{PREFIX}.1.lora_A.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 0]},
    }
    return write_header(folder, json.dumps(header).encode())


def write_header(folder: Path, text: bytes) -> Path:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def problem(folder: Path) -> str:
    with pytest.raises(InputFileError) as error:
        adapter_bytes_per_block(str(folder), "bfloat16")
    return str(error.value)


def test_tensors_of_the_first_block_count_in_the_type_of_the_server(folder):
    write(folder)
    assert adapter_bytes_per_block(str(folder), "bfloat16") == 2 * 4 * 64 * 2
    assert adapter_bytes_per_block(str(folder), "float32") == 2 * 4 * 64 * 4


@pytest.mark.parametrize(
    "shape",
    [
        [-4, 64],
        [0, 64],
        [4.0, 64],
        ["4", 64],
        [True, 64],
        [10**300, 64],
        [2**30, 2**30],
        [None],
        [[4], 64],
        [1] * 9,
        "4x64",
        {"4": 64},
        None,
    ],
    ids=lambda shape: repr(shape)[:30],
)
def test_shapes_that_no_tensor_has(folder, shape):
    path = write(folder, shape)
    assert problem(folder).startswith(f"{path}: ")
    assert "lora_A" in problem(folder)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 5}', b'{"a": {}}'],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_header(folder, text):
    write_header(folder, text)
    assert "is not a safetensors file" in problem(folder)


def test_files_that_are_not_whole(folder):
    path = folder / "adapter_model.safetensors"
    for content in (b"", b"\1", struct.pack("<Q", 2**63), struct.pack("<Q", 1000) + b"{}"):
        path.write_bytes(content)
        assert problem(folder) == f"{path}: is not a safetensors file"
    path.unlink()
    assert "cannot be read: No such file" in problem(folder)


@pytest.mark.timeout(10)
def test_what_is_no_file_is_not_opened(folder):
    os.mkfifo(folder / "adapter_model.safetensors")
    assert "is not a regular file" in problem(folder)
    (folder / "adapter_config.json").symlink_to("/dev/zero")
    assert problem(folder) == f"{folder / 'adapter_config.json'}: is not a regular file"


@pytest.mark.parametrize("kind", ["LORA", "lora"])
def test_lora_is_accepted(folder, kind):
    write(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4}))
    assert adapter_bytes_per_block(str(folder), "float16") == 1024


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"peft_type": "IA3"}', "only LoRA adapters are supported, and peft_type is 'IA3'"),
        ('{"peft_type": 3}', "peft_type is missing"),
        ("{}", "peft_type is missing"),
        ("[]", "peft_type is missing"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=lambda text: text[:30],
)
def test_other_adapters_are_refused(folder, config, words):
    write(folder)
    (folder / "adapter_config.json").write_text(config)
    assert words in problem(folder)
    assert "adapter_config.json: " in problem(folder)


def test_a_name_on_a_hub_has_no_size_here():
    with pytest.raises(ConfigError, match="--adapter-memory"):
        adapter_bytes_per_block("somebody/lora", "bfloat16")
