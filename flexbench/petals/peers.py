"""The peers of a swarm that run in worker processes: bootstrap peer, server, and one that looks.

The functions at the top are worker functions; `flexbench.petals.swarm` starts them and reads what
they report.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbench.core.processes import WorkerChannel
from flexbench.petals.model import SwarmModel, dtype_name, resolve_device, resolve_dtype
from flexbench.petals_runtime.watching import end_on_error, watch

if TYPE_CHECKING:
    from flexbench.petals_runtime.imports import DHT

LOOPBACK_ADDRESS = "/ip4/127.0.0.1/tcp/0"
# A private swarm needs none of what helps peers behind routers to be found.
_LOOPBACK_NETWORK = {
    "host_maddrs": [LOOPBACK_ADDRESS],
    "auto_nat": False,
    "nat_port_map": False,
    "use_relay": False,
    "use_auto_relay": False,
    "startup_timeout": 60.0,  # p2pd's 15 s are little where many processes start at once
}


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One server of a swarm, or of a request's route, with its blocks: `start` to before `end`."""

    peer_id: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class SwarmView:
    """What a peer sees of a swarm: its servers, and where and how the clients will compute."""

    servers: tuple[Hop, ...]
    device: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class SwarmEntry:
    """Where to join an embedded swarm, and where and how its peers compute."""

    addresses: tuple[str, ...]
    device: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """How one server of the embedded swarm is run."""

    blocks: range
    num_threads: int
    num_handlers: int
    attn_cache_tokens: int
    max_batch_size: int
    inference_max_length: int


def run_bootstrap_peer(channel: WorkerChannel, model: SwarmModel) -> None:
    """Be the DHT peer that the others join, and write the part of the model that clients read.

    Reports its SwarmEntry, then Ready; runs until it is ended.
    """
    from flexbench.petals.weights import write_client_shard, write_config
    from flexbench.petals_runtime.imports import DHT

    assert model.weights_folder is not None
    folder = Path(model.weights_folder)
    dht = DHT(start=True, **_LOOPBACK_NETWORK)
    config = model.to_bloom_config()
    device = resolve_device(model.device)
    dtype = resolve_dtype(model.dtype, device)
    write_config(folder, config, dtype)
    channel.queue.put(
        SwarmEntry(
            addresses=tuple(str(address) for address in dht.get_visible_maddrs()),
            device=device.type,
            dtype=dtype_name(dtype),
        )
    )
    write_client_shard(folder, config, dtype, model.seed)
    channel.ready.set()
    watch(dht.is_alive, "its DHT process ended")


def run_server(channel: WorkerChannel, model: SwarmModel, index: int, spec: ServerSpec) -> None:
    """Be one Petals server. Is released with the bootstrap peer's addresses.

    Reports its Hop, then Ready once the swarm sees its blocks online; runs until it is ended.
    """
    from flexbench.petals.weights import write_blocks
    from flexbench.petals_runtime.imports import Server, torch

    assert model.weights_folder is not None
    folder = Path(model.weights_folder)
    torch.set_num_threads(spec.num_threads)
    device = resolve_device(model.device, index)
    dtype = resolve_dtype(model.dtype, device)
    write_blocks(folder, model.to_bloom_config(), dtype, model.seed, spec.blocks)
    channel.release.wait()
    server = Server(
        initial_peers=list(channel.release.payload),
        dht_prefix=model.dht_prefix,
        converted_model_name_or_path=str(folder),
        throughput=1.0,  # only decides the choice of blocks, and ours are fixed
        block_indices=f"{spec.blocks.start}:{spec.blocks.stop}",
        num_handlers=spec.num_handlers,
        attn_cache_tokens=spec.attn_cache_tokens,
        max_batch_size=spec.max_batch_size,
        inference_max_length=spec.inference_max_length,
        torch_dtype=dtype_name(dtype),
        device=device,
        reachable_via_relay=False,
        skip_reachability_check=True,
        **_LOOPBACK_NETWORK,
    )
    threading.Thread(
        target=_announce_and_watch, args=(channel, server, spec.blocks), daemon=True
    ).start()
    server.run()


def inspect_swarm(channel: WorkerChannel, model: SwarmModel) -> None:
    """Join the DHT as a client and report the SwarmView: who serves which blocks of the model."""
    from flexbench.petals_runtime.imports import DHT

    dht = DHT(
        initial_peers=list(model.initial_peers),
        client_mode=True,
        startup_timeout=model.connect_timeout_s,
        start=True,
    )
    device = resolve_device(model.device)
    dtype = resolve_dtype(model.dtype, device)
    servers = _online_servers(dht, model.dht_prefix, range(model.shape.num_hidden_layers))
    channel.queue.put(SwarmView(servers=servers, device=device.type, dtype=dtype_name(dtype)))


def _online_servers(dht: DHT, dht_prefix: str, blocks: range) -> tuple[Hop, ...]:
    from flexbench.petals_runtime.imports import ServerState, compute_spans, get_remote_module_infos

    infos = get_remote_module_infos(dht, [f"{dht_prefix}.{block}" for block in blocks], latest=True)
    spans = compute_spans(infos, min_state=ServerState.ONLINE)
    hops = [
        Hop(peer_id=str(peer_id), start=blocks.start + span.start, end=blocks.start + span.end)
        for peer_id, span in spans.items()
    ]
    return tuple(sorted(hops, key=lambda hop: (hop.start, hop.end, hop.peer_id)))


@end_on_error
def _announce_and_watch(channel: WorkerChannel, server: Any, blocks: range) -> None:
    """Report when the swarm sees the server online; end the process when a part of it dies."""
    peer_id = str(server.dht.peer_id)

    def is_serving() -> bool:
        # Petals announces the blocks as online a little before it can serve them.
        container = server.module_container
        if container is None or not container.ready.is_set():
            return False
        hops = _online_servers(server.dht, server.dht_prefix, blocks)
        return any(hop.peer_id == peer_id for hop in hops)

    while not is_serving():
        if not server.dht.is_alive():
            raise RuntimeError("the server's DHT process ended")
        time.sleep(0.05)
    channel.queue.put(Hop(peer_id=peer_id, start=blocks.start, end=blocks.stop))
    channel.ready.set()
    # A server would restart its container by itself, which takes minutes and spoils every figure.
    watch(
        lambda: server.dht.is_alive() and server.module_container.is_healthy(),
        "one of the server's processes ended",
    )
