"""The size of LoRA adapters, from the headers of their safetensors files."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.core.folders import local_path
from flexbench.models.families import DTYPE_BYTES

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_LARGEST_HEADER_BYTES = 100 * 2**20
_LARGEST_CONFIG_BYTES = 2**20
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**40
# Petals looks at the adapter's tensors for block 0 (petals/utils/peft.py).
_FIRST_BLOCK = re.compile(r"\.(?:layers|h|blocks?|layer)\.0\.")


def adapter_bytes_per_block(folder: str, dtype: str) -> int:
    """Bytes that the LoRA adapter in `folder` adds to a block, in the server's type.

    Raises ConfigError for a name that is no folder: its size cannot be known without a network, and
    InputFileError for files that Petals could not use.
    """
    path = local_path(folder)
    if path is None or not path.is_dir():
        raise ConfigError(
            "--adapters",
            f"{folder!r} is not a local folder, so its size is not known here; give it with "
            "--adapter-memory, in bytes per block",
        )
    _check_kind(path / _CONFIG)
    shapes = _read_shapes(path / _WEIGHTS)
    in_first_block = [shape for name, shape in shapes.items() if _FIRST_BLOCK.search(name)]
    if not in_first_block:
        raise InputFileError(path / _WEIGHTS, "has no tensors for the first block")
    return sum(math.prod(shape) for shape in in_first_block) * DTYPE_BYTES[dtype]


def _check_kind(path: Path) -> None:
    """Refuse what Petals refuses, if there is a configuration that tells."""
    if not os.path.exists(path):
        return
    try:
        with _opened(path) as file:
            config = json.loads(file.read(_LARGEST_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputFileError(path, f"is not JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise InputFileError(path, "is not an adapter's configuration: peft_type is missing")
    if kind.upper() != "LORA":
        raise InputFileError(
            path, f"only LoRA adapters are supported, and peft_type is {kind[:50]!r}"
        )


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors. The file begins with its header's size and that, as JSON."""
    try:
        with _opened(path) as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if size <= _LARGEST_HEADER_BYTES else b""
        header = json.loads(text) if len(text) == size else None
    except (ValueError, RecursionError) as error:
        raise InputFileError(path, "is not a safetensors file") from error
    if not isinstance(header, dict):
        raise InputFileError(path, "is not a safetensors file")
    return {
        name: _shape(path, name, tensor)
        for name, tensor in header.items()
        if name != "__metadata__"
    }


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        # Opening a pipe would wait for ever, and a device may have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputFileError(path, "is not a regular file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error


def _shape(path: Path, name: str, tensor: Any) -> list[int]:
    shape = tensor.get("shape") if isinstance(tensor, dict) else None
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise InputFileError(path, f"is not a safetensors file: {name!r} has no shape")
    # bool is a kind of int.
    are_counts = all(type(extent) is int and 1 <= extent <= _MAX_ELEMENTS for extent in shape)
    if not are_counts or math.prod(shape) > _MAX_ELEMENTS:
        raise InputFileError(path, f"the shape of {name!r} is not one of whole numbers above 0")
    return shape
