"""Generation by many clients at once against a Petals swarm.

`client_process` and `run_bench` have the signatures of FlexGen's benchmark/petals script. They are
loaded on first use, so that `flexbench --help` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexbench.petals.bench import run_bench
    from flexbench.petals.client import client_process
    from flexbench.petals.model import _patch_bloom_config

__all__ = ["_patch_bloom_config", "client_process", "run_bench"]

_HOME = {
    "client_process": "flexbench.petals.client",
    "run_bench": "flexbench.petals.bench",
    "_patch_bloom_config": "flexbench.petals.model",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
