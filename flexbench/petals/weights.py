"""Seeded random weights of a BLOOM, written as the sharded safetensors folder Petals reads.

One shard a block, so that every server writes and reads just its own, and one for what the clients
hold. Matrices are drawn from N(0, 0.02), BLOOM's initialization; layer norms start as identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_CLIENT_SHARD = "client.safetensors"
_INITIALIZER_RANGE = 0.02


def _block_shard(block: int) -> str:
    return f"block-{block:04d}.safetensors"


def write_config(folder: Path, config: Any, dtype: torch.dtype) -> None:
    """Write config.json and the index of all shards, which servers and clients read first.

    `config` is a BloomConfig.
    """
    skeleton = _skeleton(config)
    index = {
        "metadata": {"total_size": sum(t.numel() for t in skeleton.values()) * dtype.itemsize},
        "weight_map": {name: _shard_of(name) for name in skeleton},
    }
    config.architectures = ["BloomModel"]
    config.torch_dtype = dtype
    config.save_pretrained(folder)
    (folder / _INDEX).write_text(json.dumps(index, indent=1))


def write_client_shard(folder: Path, config: Any, dtype: torch.dtype, seed: int) -> None:
    """Write what every client holds: the embeddings, their layer norm and the last one."""
    _write_shard(folder, _CLIENT_SHARD, _skeleton(config), dtype, seed, stream=0)


def write_blocks(
    folder: Path, config: Any, dtype: torch.dtype, seed: int, blocks: Iterable[int]
) -> None:
    """Write the shards of these blocks. The same seed gives a block the same weights, always."""
    skeleton = _skeleton(config)
    for block in blocks:
        _write_shard(folder, _block_shard(block), skeleton, dtype, seed, stream=block + 1)


def _skeleton(config: Any) -> dict[str, torch.Tensor]:
    """All parameters of the model by name, without storage."""
    import torch

    from flexbench.petals_runtime.imports import BloomModel

    with torch.device("meta"):
        model = BloomModel(config)
    return dict(model.state_dict())


def _shard_of(name: str) -> str:
    parts = name.split(".")
    return _block_shard(int(parts[1])) if parts[0] == "h" else _CLIENT_SHARD


def _write_shard(
    folder: Path,
    shard: str,
    skeleton: dict[str, torch.Tensor],
    dtype: torch.dtype,
    seed: int,
    *,
    stream: int,
) -> None:
    import torch
    from safetensors.torch import save_file

    # One generator a shard: who writes which blocks does not change them.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + stream)
    tensors = {}
    for name, meta in skeleton.items():
        if _shard_of(name) != shard:
            continue
        if meta.ndim == 2:
            values = torch.empty(meta.shape, dtype=torch.float32)
            tensors[name] = values.normal_(0.0, _INITIALIZER_RANGE, generator=generator).to(dtype)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(meta.shape, dtype=dtype)
        else:
            tensors[name] = torch.ones(meta.shape, dtype=dtype)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
