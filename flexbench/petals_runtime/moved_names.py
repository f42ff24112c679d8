"""Names that petals 2.2 imports from hivemind's top level, put back where it looks for them.

Petals 2.2 was written for hivemind 1.1.10, which offered them there; 1.1.12 has them in its
submodules only.
"""

from __future__ import annotations

import importlib
from importlib import metadata

_MOVED_NAMES = {
    "hivemind.compression": (
        "deserialize_tensor_stream",
        "deserialize_torch_tensor",
        "serialize_torch_tensor",
    ),
    "hivemind.p2p": ("P2P", "P2PContext", "PeerID"),
    "hivemind.utils": (
        "MAX_DHT_TIME_DISCREPANCY_SECONDS",
        "MSGPackSerializer",
        "TensorDescriptor",
        "TimedStorage",
        "get_dht_time",
        "get_logger",
        "nested_flatten",
        "nested_pack",
    ),
    "hivemind.utils.asyncio": ("anext",),
    "hivemind.utils.nested": ("nested_compare",),
    "hivemind.utils.tensor_descr": ("BatchTensorDescriptor",),
}


def restore_moved_names() -> None:
    """Import hivemind, and set on it what petals 2.2 expects there."""
    import hivemind

    for home, names in _MOVED_NAMES.items():
        module = importlib.import_module(home)
        for name in names:
            if not hasattr(hivemind, name):
                setattr(hivemind, name, getattr(module, name))


def need_moved_names() -> bool:
    """Whether the petals installed here needs them; neither package is imported to find out."""
    try:
        petals, hivemind = metadata.version("petals"), metadata.version("hivemind")
    except metadata.PackageNotFoundError:
        return False
    return petals.startswith("2.2.") and not hivemind.startswith(("1.0.", "1.1.10"))
