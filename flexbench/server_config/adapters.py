"""The size of LoRA adapters, from the headers of their safetensors files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.core.folders import local_path
from flexbench.models.families import DTYPE_BYTES

_WEIGHTS = "adapter_model.safetensors"
_LARGEST_HEADER_BYTES = 100 * 2**20
# Petals looks at the adapter's tensors for block 0 (petals/utils/peft.py).
_FIRST_BLOCK = re.compile(r"\.(?:layers|h|blocks?|layer)\.0\.")


def adapter_bytes_per_block(folder: str, dtype: str) -> int:
    """Bytes that the LoRA adapter in `folder` adds to a block, in the server's type.

    Raises ConfigError for a name that is no folder: its size cannot be known without a network.
    """
    path = local_path(folder)
    if path is None or not path.is_dir():
        raise ConfigError(
            "--adapters",
            f"{folder!r} is not a local folder, so its size is not known here; give it with "
            "--adapter-memory, in bytes per block",
        )
    shapes = _read_shapes(path / _WEIGHTS)
    in_first_block = [shape for name, shape in shapes.items() if _FIRST_BLOCK.search(name)]
    if not in_first_block:
        raise InputFileError(path / _WEIGHTS, "has no tensors for the first block")
    return sum(math.prod(shape) for shape in in_first_block) * DTYPE_BYTES[dtype]


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors. The file begins with its header's size and that, as JSON."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= _LARGEST_HEADER_BYTES:
                raise InputFileError(path, "is not a safetensors file")
            header = json.loads(file.read(size))
        return {
            name: [int(extent) for extent in tensor["shape"]]
            for name, tensor in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputFileError(path, f"is not a safetensors file: {error}") from error
