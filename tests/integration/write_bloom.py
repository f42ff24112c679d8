"""A small BLOOM with random weights in a folder, as Petals' servers and clients read it."""

from __future__ import annotations

from pathlib import Path

from flexbench.core.processes import WorkerChannel
from flexbench.models.shapes import ModelShape
from flexbench.petals.model import SwarmModel
from flexbench.petals.weights import write_blocks, write_client_shard, write_config


def write_bloom(channel: WorkerChannel, folder: Path, shape: ModelShape) -> None:
    """Write it in float32, and report that it is there."""
    from flexbench.petals_runtime.imports import torch

    config = SwarmModel(shape=shape, dht_prefix="bloom", initial_peers=()).to_bloom_config()
    write_config(folder, config, torch.float32)
    write_client_shard(folder, config, torch.float32, 0)
    write_blocks(folder, config, torch.float32, 0, range(shape.num_hidden_layers))
    channel.ready.set()
