"""FlexGen's engine, and its distributed form: OPT inference with offloading, as a pipeline.

The names are those of FlexGen's modules flex_opt, dist_flex_opt, opt_config and pytorch_backend.
They are loaded on first use, so that `flexbench --help` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexbench.dist.flexgen import add_distributed_parser_arguments, run_flexllmgen_dist
    from flexbench.dist.homes import ExecutionEnv, TorchDevice, TorchDisk, TorchMixedDevice
    from flexbench.dist.model import OptLM
    from flexbench.dist.opt_config import OptConfig, get_opt_config
    from flexbench.dist.pipeline import DistOptLM
    from flexbench.dist.policy import CompressionConfig, Policy
    from flexbench.dist.process_group import initialize_distributed

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
    "add_distributed_parser_arguments",
    "get_opt_config",
    "initialize_distributed",
    "run_flexllmgen_dist",
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
    "add_distributed_parser_arguments": "flexgen",
    "get_opt_config": "opt_config",
    "initialize_distributed": "process_group",
    "run_flexllmgen_dist": "flexgen",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"flexbench.dist.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
