"""Where a server listens, what it announces, and whom it asks for the swarm.

The rules are those of petals/cli/run_server.py, with one exception: a server that we start listens
on loopback until somebody says otherwise.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError
from flexbench.server_config.run_server import PUBLIC_SWARM, SwarmEntrance

LOOPBACK_ADDRESS = "/ip4/127.0.0.1/tcp/0"
_HIGHEST_PORT = 65535
_ADDRESS = re.compile(
    r"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/\s]+)"
    r"/(?P<transport>tcp|udp)/(?P<port>\d{1,5})(?P<rest>(?:/[^/\s]+)*)"
)
_PEER_ID = re.compile(r"/p2p/\w+$")
# Base58; those of today have 46 (Qm...) or 52 (12D3Koo...) characters.
_REAL_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{40,120}")


def resolve_entrance(entrance: SwarmEntrance, *, listens: bool) -> SwarmEntrance:
    """The entrance, checked; if the server really `listens`, on loopback where nothing is said.

    Raises ConfigError with run_server's reason for what it would refuse.
    """
    _check_combinations(entrance)
    _check_forms(entrance)
    if not listens:
        return entrance
    _check_identity(entrance)
    _check_peer_ids(entrance)
    if entrance.port is None and not entrance.host_maddrs:
        return replace(entrance, host_maddrs=(LOOPBACK_ADDRESS,))
    return entrance


def _check_combinations(entrance: SwarmEntrance) -> None:
    if entrance.port is not None and entrance.host_maddrs:
        raise ConfigError(
            "--host-maddrs", "You can't use --port and --host-maddrs at the same time"
        )
    if entrance.public_ip is not None:
        if entrance.announce_maddrs:
            raise ConfigError(
                "--public-ip", "You can't use --public-ip and --announce-maddrs at the same time"
            )
        if entrance.port is None:
            raise ConfigError(
                "--public-ip",
                "Please specify a fixed non-zero --port when you use --public-ip "
                "(e.g., --port 31337)",
            )
    if entrance.new_swarm and entrance.initial_peers:
        raise ConfigError(
            "--new-swarm", "You can't use --initial-peers and --new-swarm at the same time"
        )
    if PUBLIC_SWARM in entrance.initial_peers and len(entrance.initial_peers) > 1:
        raise ConfigError(
            "--initial-peers", f"{PUBLIC_SWARM!r} is all peers of the public swarm; give it alone"
        )


def _check_forms(entrance: SwarmEntrance) -> None:
    if entrance.port is not None:
        check_count("--port", entrance.port, minimum=1, maximum=_HIGHEST_PORT)
    if entrance.public_ip is not None:
        _check_ip("--public-ip", entrance.public_ip, kind="ip4")
    for address in entrance.host_maddrs:
        _check_address("--host-maddrs", address)
    for address in entrance.announce_maddrs:
        _check_announced(address)
    if not entrance.is_public:
        for address in entrance.initial_peers:
            _check_peer(address)
    if entrance.dht_prefix is not None and not re.fullmatch(r"[^.\s]+", entrance.dht_prefix):
        raise ConfigError(
            "--dht-prefix",
            f"{entrance.dht_prefix!r} must not be empty, and a DHT prefix should not contain '.' "
            "or ' '",
        )


def _check_address(option: str, address: str) -> re.Match[str]:
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise ConfigError(
            option, f"{address!r} is no multiaddress; accepted: /ip4/ADDRESS/tcp/PORT"
        )
    if parts["kind"].startswith("ip"):
        _check_ip(option, parts["host"], kind=parts["kind"])
    if int(parts["port"]) > _HIGHEST_PORT:
        raise ConfigError(option, f"{address!r} has a port above {_HIGHEST_PORT}")
    return parts


def _check_announced(address: str) -> None:
    parts = _check_address("--announce-maddrs", address)
    if int(parts["port"]) == 0:
        raise ConfigError(
            "--announce-maddrs",
            "Please specify an explicit port in announce_maddrs: port 0 is not supported",
        )


def _check_peer(address: str) -> None:
    if not _PEER_ID.search(address):
        raise ConfigError(
            "--initial-peers",
            f"{address!r} is not a peer's address; accepted: /ip4/ADDRESS/tcp/PORT/p2p/PEER_ID, "
            f"as a server or run_dht prints it, or {PUBLIC_SWARM!r}",
        )
    # dnsaddr has the port in the name server's answer.
    if not re.fullmatch(r"/dnsaddr/[^/\s]+/p2p/\w+", address):
        _check_address("--initial-peers", address)


def _check_ip(option: str, text: str, *, kind: str) -> None:
    try:
        version = ipaddress.ip_address(text).version
    except ValueError:
        version = None
    if version is None or f"ip{version}" != kind:
        raise ConfigError(option, f"{text!r} is not an IPv{kind[-1]} address")


def _check_identity(entrance: SwarmEntrance) -> None:
    if entrance.identity_path is None:
        return
    path = Path(entrance.identity_path)
    if not path.parent.is_dir():
        raise ConfigError(
            "--identity-path",
            f"The directory {str(path.parent)!r} for saving the identity does not exist",
        )
    if path.exists() and not path.is_file():
        raise ConfigError("--identity-path", f"{str(path)!r} is not a file")
    try:
        is_empty = path.exists() and not path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "--identity-path", f"{str(path)!r} cannot be read: {error.strerror}"
        ) from error
    if is_empty:
        raise ConfigError(
            "--identity-path",
            f"{str(path)!r} is empty; name a file that does not exist, and Petals makes a key",
        )


def _check_peer_ids(entrance: SwarmEntrance) -> None:
    if entrance.is_public:
        return
    for address in entrance.initial_peers:
        for peer_id in re.findall(r"/p2p/([^/]*)", address):
            if not _REAL_PEER_ID.fullmatch(peer_id):
                raise ConfigError(
                    "--initial-peers",
                    f"{peer_id!r} in {address!r} is no peer id: those have about 50 letters and "
                    "digits (Base58: without 0, O, I and l), and begin with 12D3Koo or Qm",
                )


def listening_addresses(entrance: SwarmEntrance) -> tuple[str, ...]:
    """The --host_maddrs that run_server uses: all interfaces where only a port, or none, is said.

    Port 0 is any free one.
    """
    if entrance.host_maddrs:
        return entrance.host_maddrs
    port = entrance.port or 0
    return (f"/ip4/0.0.0.0/tcp/{port}", f"/ip6/::/tcp/{port}")


def announced(entrance: SwarmEntrance) -> tuple[str, ...]:
    """The addresses that are announced instead of those of the interfaces; empty: the latter."""
    if entrance.public_ip is not None:
        return (f"/ip4/{entrance.public_ip}/tcp/{entrance.port}",)
    return entrance.announce_maddrs


def check_ports(entrance: SwarmEntrance) -> None:
    """Raise ConfigError for a fixed TCP port that cannot be listened on now."""
    for option, host, port in _fixed_ports(entrance):
        _check_port(option, host, port)


@contextmanager
def hold_ports(entrance: SwarmEntrance) -> Iterator[None]:
    """Check the ports, and keep them from other calls of flexbench until the block is left.

    A server takes seconds before it listens, and then shares its port with any other that does so,
    too. What is held here is shared in the same way: the server that is started in the block gets
    it, and `check_ports` of another call, which shares nothing, does not.
    """
    check_ports(entrance)
    with ExitStack() as held:
        for _, host, port in _fixed_ports(entrance):
            _hold(held, host, port)
        yield


def _fixed_ports(entrance: SwarmEntrance) -> Iterator[tuple[str, str, int]]:
    """Option, host and number of every TCP port that is not just any free one."""
    option = "--host-maddrs" if entrance.host_maddrs else "--port"
    for address in dict.fromkeys(listening_addresses(entrance)):
        parts = _ADDRESS.fullmatch(address)
        if parts is None or parts["transport"] != "tcp" or parts["kind"] not in ("ip4", "ip6"):
            continue
        if int(parts["port"]):
            yield option, parts["host"], int(parts["port"])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bind(bound: socket.socket, host: str, port: int) -> None:
    if bound.family == socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    bound.bind((host, port))


def _hold(held: ExitStack, host: str, port: int) -> None:
    """Bind without listening. Where it cannot be, the port is as free as `check_ports` found it."""
    if not hasattr(socket, "SO_REUSEPORT"):
        return
    with suppress(OSError):  # a machine without IPv6, say
        holder = held.enter_context(socket.socket(_family(host), socket.SOCK_STREAM))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(holder, host, port)


def _check_port(option: str, host: str, port: int) -> None:
    try:
        with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
            # As a server does: connections that were closed a moment ago are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(probe, host, port)
    except OSError as error:
        if host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return  # a machine without IPv6: the server does without it, too
        problem = {
            errno.EADDRINUSE: f"port {port} of {host} is in use",
            errno.EADDRNOTAVAIL: f"{host} is not an address of this machine",
            errno.EACCES: f"no permission to listen on port {port} of {host}",
        }.get(error.errno or 0, f"cannot listen on port {port} of {host}: {error.strerror}")
        raise ConfigError(option, problem) from error
