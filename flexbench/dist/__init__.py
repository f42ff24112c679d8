"""FlexGen's engine, and its distributed form: OPT inference with offloading, as a pipeline.

The names are those of FlexGen's modules flex_opt, dist_flex_opt, opt_config and pytorch_backend.
They are loaded on first use, so that `flexbench --help` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexbench.dist.homes import ExecutionEnv, TorchDevice, TorchDisk, TorchMixedDevice
    from flexbench.dist.model import OptLM
    from flexbench.dist.opt_config import OptConfig, get_opt_config
    from flexbench.dist.pipeline import DistOptLM
    from flexbench.dist.policy import CompressionConfig, Policy

__all__ = [
    "CompressionConfig",
    "DistOptLM",
    "ExecutionEnv",
    "OptConfig",
    "OptLM",
    "Policy",
    "TorchDevice",
    "TorchDisk",
    "TorchMixedDevice",
    "get_opt_config",
]

_HOME = {
    "CompressionConfig": "policy",
    "DistOptLM": "pipeline",
    "ExecutionEnv": "homes",
    "OptConfig": "opt_config",
    "OptLM": "model",
    "Policy": "policy",
    "TorchDevice": "homes",
    "TorchDisk": "homes",
    "TorchMixedDevice": "homes",
    "get_opt_config": "opt_config",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"flexbench.dist.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
