"""The door to petals and hivemind: nothing else in flexbench imports them.

Importing this module imports torch, transformers, hivemind and petals, which takes seconds. The
command checks with `requirement` first and leaves the import to worker processes.
"""

from __future__ import annotations

import copyreg
import importlib
import os
import tempfile
from typing import Any

# Nothing here needs a model hub; without this every look-up of a name would wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import hivemind
import torch

from flexbench.petals_runtime.moved_names import restore_moved_names

# Of the 107 characters that a Unix socket's path may have, hivemind uses 39.
_MAX_SOCKET_FOLDER_LENGTH = 68


restore_moved_names()


def _socket_folder() -> str:
    # A worker's scratch folder is made to be short enough.
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _MAX_SOCKET_FOLDER_LENGTH else "/tmp"  # noqa: S108


# Sockets between Python and p2pd belong with the other temporary files, not always into /tmp.
hivemind.P2P._UNIX_SOCKET_PREFIX = f"/unix{_socket_folder()}/hivemind-"

from hivemind.p2p import P2PHandlerError  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError  # noqa: E402
from petals.client.inference_session import _ServerInferenceSession  # noqa: E402
from petals.client.routing.sequence_manager import MissingBlocksError  # noqa: E402
from petals.constants import PUBLIC_INITIAL_PEERS  # noqa: E402
from petals.data_structures import ServerState  # noqa: E402
from petals.models.bloom import (  # noqa: E402
    DistributedBloomConfig,
    DistributedBloomForCausalLM,
)
from petals.server import reachability  # noqa: E402
from petals.server.block_selection import choose_best_blocks  # noqa: E402
from petals.server.server import Server  # noqa: E402
from petals.server.throughput import measure_compute_rps  # noqa: E402
from petals.utils.convert_block import QuantType  # noqa: E402
from petals.utils.dht import compute_spans, get_remote_module_infos  # noqa: E402
from transformers.models.bloom import BloomModel  # noqa: E402

# A session that could not be closed cleanly, because its server was quicker, is closed once more
# when it is collected. Where that happens on the thread of the event loop, it waits for itself, and
# the client hangs for ever (seen in one of about 100 short requests). Once is enough.
del _ServerInferenceSession.__del__


def _restore_config(state: dict[str, Any]) -> DistributedBloomConfig:
    config = DistributedBloomConfig.__new__(DistributedBloomConfig)
    config.__dict__.update(state)
    return config


def _reduce_config(config: DistributedBloomConfig) -> tuple[Any, ...]:
    return _restore_config, (config.__dict__,)


# A configuration that arrives in another process would import petals there, and fail; this way it
# imports this module, which knows how.
copyreg.pickle(DistributedBloomConfig, _reduce_config)

DHT = hivemind.DHT


def distributed_config_class(family: str) -> Any:
    """Petals' configuration of a family that it serves: DistributedLlamaConfig for 'llama'."""
    models = importlib.import_module(f"petals.models.{family}")
    return getattr(models, f"Distributed{family.capitalize()}Config")


__all__ = [
    "DHT",
    "BloomModel",
    "DistributedBloomConfig",
    "DistributedBloomForCausalLM",
    "MissingBlocksError",
    "P2PDaemonError",
    "P2PHandlerError",
    "PUBLIC_INITIAL_PEERS",
    "QuantType",
    "Server",
    "ServerState",
    "choose_best_blocks",
    "compute_spans",
    "distributed_config_class",
    "get_remote_module_infos",
    "measure_compute_rps",
    "reachability",
    "torch",
]
