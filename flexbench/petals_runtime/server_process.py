"""A Petals server as run_server starts it, in a worker process that reports what came of it."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from flexbench.core.processes import WorkerChannel
from flexbench.petals_runtime.watching import end_on_error, watch

_READY_CHECK_INTERVAL_S = 0.1
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class ServerStage:
    """What the server begins now, for messages: 'did not start, while <text>'.

    From the one that `is_announced` on, others know of the server.
    """

    text: str
    is_announced: bool = False


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """A server that serves: what it announced, as the DHT has it, and what its process holds.

    Sizes in bytes, rates in tokens/s. `memory_before_bytes` and `memory_after_bytes` are around the
    loading of its blocks: of the GPUs what torch has allocated there, else what the process has in
    the machine's memory.
    """

    peer_id: str
    visible_addresses: tuple[str, ...]
    start: int
    end: int
    torch_dtype: str
    quant_type: str
    weights_bytes: int
    cache_bytes: int
    cache_tokens_left: int
    throughput: float
    forward_rps: float | None
    inference_rps: float | None
    network_rps: float | None
    using_relay: bool
    memory_before_bytes: int
    memory_after_bytes: int

    @property
    def num_blocks(self) -> int:
        """How many blocks it serves."""
        return self.end - self.start

    @property
    def loaded_bytes(self) -> int:
        """What its memory has grown by while the blocks were loaded."""
        return self.memory_after_bytes - self.memory_before_bytes


def run_petals_server(channel: WorkerChannel, arguments: Sequence[str]) -> None:
    """Be the server of `run_server ARGUMENTS`; the first one is the model.

    Reports ServerStages, then its ServerFacts and Ready once the swarm sees its blocks online.
    Returns when it is released while it loads its blocks or serves them, once it has told the swarm
    that it goes.
    """
    _choose_hub(arguments)
    # Workers inherit that of their fork server; Petals counts on the system's own.
    multiprocessing.set_start_method(None, force=True)
    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
    channel.queue.put(ServerStage("loading Petals"))
    import_module("flexbench.petals_runtime.imports")  # before anything of petals
    from petals.cli import run_server

    run_server.Server = partial(_start_server, channel, run_server.Server)
    # It asks a package index for a newer version, for ever if there is no answer.
    run_server.validate_version = lambda: None
    sys.argv = ["run_server", *arguments]
    run_server.main()


def _choose_hub(arguments: Sequence[str]) -> None:
    """Let the server ask the model hub if it needs it, and never for the name of a local folder."""
    if not Path(arguments[0]).exists() or "--adapters" in arguments:
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The fork server has imported it already, with what was set by then.
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def _start_server(channel: WorkerChannel, server_class: Any, **options: Any) -> Any:
    """What run_server gets for a Server: one that is watched."""
    channel.queue.put(ServerStage("preparing the server, and measuring what is not known"))
    server = server_class(**options)
    _give_back_free_memory()
    memory_before_bytes = _memory_in_use(server)
    channel.queue.put(ServerStage("loading its blocks", is_announced=True))
    _load_until_stopped(server)
    reported = (channel, server, memory_before_bytes)
    threading.Thread(target=_report_and_watch, args=reported, daemon=True).start()
    threading.Thread(target=_stop_when_told, args=(channel, server), daemon=True).start()
    return server


def _load_until_stopped(server: Any) -> None:
    """Let the server look at its `stop` before each block, not only when all are loaded.

    It then tells the swarm that it goes, and run_server ends as it does for Ctrl-C.
    """
    petals_server: Any = import_module("petals.server.server")
    load = petals_server.load_pretrained_block

    def load_or_stop(*arguments: Any, **options: Any) -> Any:
        if server.stop.is_set():
            raise KeyboardInterrupt
        return load(*arguments, **options)

    petals_server.load_pretrained_block = load_or_stop


@end_on_error
def _stop_when_told(channel: WorkerChannel, server: Any) -> None:
    channel.release.wait()
    server.stop.set()


@end_on_error
def _report_and_watch(channel: WorkerChannel, server: Any, memory_before_bytes: int) -> None:
    """Report when the swarm sees the server online; end the process when its DHT node dies.

    Of its other parts Petals takes care: it starts them anew.
    """
    info = None
    # The container is there as soon as it can serve; it announces itself a little before.
    while server.module_container is None or info is None:
        if server.stop.is_set():
            return
        if not server.dht.is_alive():
            raise RuntimeError("the server's DHT process ended")
        time.sleep(_READY_CHECK_INTERVAL_S)
        if server.module_container is not None:
            info = _announcement(server)
    _read_weights(server)
    channel.queue.put(_facts(server, info, memory_before_bytes))
    channel.ready.set()
    watch(
        server.dht.is_alive,
        "the server's DHT process ended",
        has_stopped=server.stop.is_set,
    )


def _announcement(server: Any) -> Any:
    """The server's own entry in the DHT, looked up as others do; None if it is not online."""
    from flexbench.petals_runtime.imports import ServerState, compute_spans, get_remote_module_infos

    infos = get_remote_module_infos(server.dht, server.module_uids, latest=True)
    spans = compute_spans(infos, min_state=ServerState.ONLINE)
    span = spans.get(server.dht.peer_id)
    return None if span is None else span.server_info


def _facts(server: Any, info: Any, memory_before_bytes: int) -> ServerFacts:
    backends = server.module_container.module_backends.values()
    return ServerFacts(
        peer_id=str(server.dht.peer_id),
        visible_addresses=tuple(map(str, server.dht.get_visible_maddrs())),
        start=info.start_block,
        end=info.end_block,
        torch_dtype=info.torch_dtype,
        quant_type=info.quant_type,
        weights_bytes=sum(_tensor_bytes(backend.module) for backend in backends),
        cache_bytes=next(iter(backends)).memory_cache.max_size_bytes,
        cache_tokens_left=info.cache_tokens_left,
        throughput=info.throughput,
        forward_rps=info.forward_rps,
        inference_rps=info.inference_rps,
        network_rps=info.network_rps,
        using_relay=bool(info.using_relay),
        memory_before_bytes=memory_before_bytes,
        memory_after_bytes=_memory_in_use(server),
    )


def _give_back_free_memory() -> None:
    """Let the system have what the measurement of the throughput has freed, or it would hide what
    loading takes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _read_weights(server: Any) -> None:
    """Touch every page of the weights: those that are mapped from their files come into memory with
    the first request only.
    """
    if server.device.type != "cpu":
        return
    for backend in server.module_container.module_backends.values():
        for tensor in backend.module.parameters():
            tensor.flatten()[:: _PAGE_BYTES // tensor.element_size()].sum()


def _tensor_bytes(module: Any) -> int:
    """Bytes of all parameters and buffers, without the tables of quantized ones."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _memory_in_use(server: Any) -> int:
    """Bytes that torch has allocated on the server's GPUs, or that its process has resident."""
    import psutil

    from flexbench.petals_runtime.imports import torch

    if server.device.type == "cuda":
        devices = server.tensor_parallel_devices
        return sum(int(torch.cuda.memory_allocated(device)) for device in devices)
    return int(psutil.Process().memory_info().rss)
