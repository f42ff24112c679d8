"""Whether a run can work, looked at on every host before anything is allocated."""

from __future__ import annotations

import shutil

import torch

from flexbench.core import environment
from flexbench.core.errors import ConfigError
from flexbench.core.units import format_bytes
from flexbench.dist.homes import TorchDisk
from flexbench.dist.hosts import HostShare
from flexbench.dist.layers import layers_of
from flexbench.dist.placement import HomeBytes
from flexbench.dist.plan import DistPlan
from flexbench.dist.weight_files import check_weights, open_folder
from flexbench.ranks.launch import Launch


def check_own_weights(plan: DistPlan, launch: Launch) -> None:
    """Raise InputFileError unless this rank's layers have their weights, in the right shapes."""
    if plan.is_dummy:
        return
    stage = plan.stages[launch.rank].stage
    layers = layers_of(plan.model, stage, sep_layer=plan.policy.sep_layer)
    specs = [spec for layer in layers for spec in layer.specs]
    check_weights(open_folder(plan.folder), specs, str(plan.folder))


def check_room(plan: DistPlan, launch: Launch, host: HostShare) -> None:
    """Raise ConfigError unless what the ranks will hold fits into what is free.

    Each rank looks at its GPU; the first on a host at memory and disk, for all of them there.
    """
    if plan.has_gpu:
        own = plan.stages[launch.rank].total
        free, _ = torch.cuda.mem_get_info(launch.local_rank % torch.cuda.device_count())
        _check_fits("the GPU", own.gpu, free)
    if launch.rank != host.ranks[0]:
        return
    needed = sum((plan.stages[rank].total for rank in host.ranks), HomeBytes())
    if needed.disk:
        folder = plan.config.offload_dir
        TorchDisk(folder).check()
        free = shutil.disk_usage(folder.expanduser()).free
        _check_fits(f"the disk of {folder}", needed.disk, free)
    on_host = needed.cpu if plan.has_gpu else needed.cpu + needed.gpu
    _check_fits("memory", on_host, environment.available_memory_bytes())


def _check_fits(where: str, needed: int, free: int | None) -> None:
    if free is not None and needed > free:
        raise ConfigError(
            "--percent",
            f"{where} has {format_bytes(free)} free, and the placement takes "
            f"{format_bytes(needed)}; choose other percentages, smaller batches, or start anyway "
            "with --allow-overcommit",
        )
