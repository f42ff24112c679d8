"""torch's process group, opened among ranks that watch each other.

torch by itself listens on all interfaces, picks the network's interface by the host's name, and
lets a rank wait half an hour for one that is dead. Here the store listens only where rank 0 does,
gloo and NCCL get the interface that rank 0 is reached by, and nothing times out: liveness is the
business of `PeerWatch`, since a stage may well compute for many minutes.
"""

from __future__ import annotations

import ipaddress
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch import distributed

from flexbench.core.errors import ConfigError, RunError
from flexbench.dist.transport import PeerError
from flexbench.ranks.launch import Launch, detect_launch
from flexbench.ranks.meeting_points import check_place, listen_at, own_address_towards, resolve
from flexbench.ranks.watch import PeerWatch
from flexbench.ranks.wording import name_address, summarize

# As good as never. More milliseconds than 31 bits hold would be asking for trouble.
_NEVER = timedelta(days=20)
_STORE_S = 300.0
# After a rank has died, the others may notice it by torch's connections before they are told.
_CAUSE_S = 2.0
_DESTROY_S = 5.0
_END = "the end of the process group"


@contextmanager
def open_process_group(watch: PeerWatch, launch: Launch, *, backend: str) -> Iterator[None]:
    """torch's default process group among all ranks; nothing at all for a single one.

    All ranks enter it, within the `with` block of `watch`. When one fails in it, the others are
    told why before its connections close. An error of torch that follows from the loss of another
    rank becomes a RunError that says so.

    A rank that waits for a lost one in a call of torch is not woken: that is for `on_lost` of the
    watch to do, which runs in another thread.
    """
    if distributed.is_initialized():  # by a program that calls us
        _check_opened(launch)
    if launch.world_size == 1 or distributed.is_initialized():
        yield
        return
    is_failed = True
    try:
        # Held here: rank 0 serves the store for as long as the group is open.
        store = _open_shared_store(watch, launch)
        with _interface_set(interface_of(watch.local_host or "")):
            distributed.init_process_group(
                backend,
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=_NEVER,
            )
            yield
        _await_end(watch, launch)
        is_failed = False
    except BaseException as error:
        _raise_cause(watch, error)
        watch.report(error)
        raise
    finally:
        _destroy(is_failed=is_failed)


def _check_opened(launch: Launch) -> None:
    """Raise ConfigError unless the default group that is open has the ranks that we know of."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if (rank, size) != (launch.rank, launch.world_size):
        raise ConfigError(
            "--world-size",
            f"this process is rank {launch.rank} of {launch.world_size}, but rank {rank} of {size} "
            "in the process group that the program has opened",
        )


def _open_shared_store(watch: PeerWatch, launch: Launch) -> Any:
    # The others may still be importing torch, which a slow disk makes long.
    timeout_s = max(watch.timeout_s, _STORE_S)
    host = watch.head_host
    assert host is not None, "the watch is not entered"
    store = None
    if launch.rank == 0:
        store = _serve_store(host, 0, launch.world_size, timeout_s)
    port = watch.share("the store's port", None if store is None else store.port, timeout_s)
    if store is None:
        store = _reach_store(host, port, launch.world_size, timeout_s)
    return store


def _serve_store(host: str, port: int, world_size: int, timeout_s: float) -> Any:
    """A store that listens at `host` and nowhere else."""
    listener = listen_at(host, port)
    try:
        store = distributed.TCPStore(
            host,
            listener.getsockname()[1],
            world_size,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
        )
    except BaseException:
        listener.close()
        raise
    listener.detach()  # it is the store's now
    return store


def _reach_store(host: str, port: int, world_size: int, timeout_s: float) -> Any:
    try:
        return distributed.TCPStore(
            host,
            port,
            world_size,
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except RuntimeError as error:  # all of the store's errors
        raise RunError(
            f"cannot reach rank 0's store at {name_address(host, port)}: {summarize(error)}"
        ) from error


def _await_end(watch: PeerWatch, launch: Launch) -> None:
    """Rank 0 keeps the store until no other needs it; a rank that is lost does not.

    NCCL looks into it again and again, and when two ranks first talk to each other.
    """
    watch.publish(_END, None)
    if launch.rank == 0:
        with suppress(RunError):
            watch.collect(_END, math.inf)


def _raise_cause(watch: PeerWatch, error: BaseException) -> None:
    """If `error` is of torch's connections, and another rank is lost, raise RunError saying so."""
    if not isinstance(error, RuntimeError | PeerError):
        return
    if (lost := watch.wait_for_loss(_CAUSE_S)) is not None:
        raise RunError(lost.message) from error


def _destroy(*, is_failed: bool) -> None:
    """End the process group. After a failure, NCCL may wait for ever for what will not come."""
    if not distributed.is_initialized():
        return
    if not is_failed:
        _destroy_now()
        return
    thread = threading.Thread(target=_destroy_now, name="end of the process group", daemon=True)
    thread.start()
    thread.join(_DESTROY_S)


def _destroy_now() -> None:
    with suppress(RuntimeError):  # a peer that has gone has nothing to say to it any more
        distributed.destroy_process_group()


def interface_of(address: str) -> str | None:
    """The network interface that has this numeric address, or None if none has.

    Every loopback address belongs to the loopback interface, though only one of them is listed.
    """
    wanted = _parse_address(address)
    if wanted is None:
        return None
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            found = _parse_address(entry.address)
            if found is not None and (
                found == wanted or (found.is_loopback and wanted.is_loopback)
            ):
                return str(name)
    return None


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:  # a hardware address
        return None


@contextmanager
def _interface_set(interface: str | None) -> Iterator[None]:
    """While open, gloo and NCCL use `interface`, unless the person has chosen one."""
    names = _set_interface(interface)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _set_interface(interface: str | None) -> list[str]:
    """Set the variables of gloo and NCCL that are not set; their names."""
    if interface is None:
        return []
    # Without the sign, NCCL would take all interfaces whose names begin so.
    values = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    names = [name for name in values if not os.environ.get(name)]
    os.environ.update({name: values[name] for name in names})
    return names


def initialize_distributed(
    head_ip: str, port: int, world_size: int, rank: int, local_rank: int, comm_device: str
) -> None:
    """Open torch's default process group at `head_ip`:`port`, for programs that call us.

    gloo for the communication device "cpu", and where there is no CUDA. With "gpu", GPU
    `local_rank` is this process's, and each tensor travels from where it is: hidden states, on the
    GPU, over NCCL, and tokens, on the CPU, over gloo.

    Nobody watches the ranks: `open_process_group` is for that.
    """
    if comm_device not in ("cpu", "gpu"):
        raise ConfigError("--comm-device", f"must be cpu or gpu, not {comm_device!r}")
    check_place(head_ip, port)
    resolve(head_ip, port)  # refuses a name of all interfaces on every rank
    detect_launch({}, rank=rank, world_size=world_size, local_rank=local_rank)
    backend = "gloo"
    if comm_device == "gpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    _set_interface(interface_of(own_address_towards(head_ip, port)))
    if rank == 0:
        store = _serve_store(head_ip, port, world_size, _STORE_S)
    else:
        store = _reach_store(head_ip, port, world_size, _STORE_S)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
