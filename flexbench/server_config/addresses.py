"""Where a server listens, what it announces, and whom it asks for the swarm.

The rules are those of petals/cli/run_server.py, with one exception: a server that we start listens
on loopback until somebody says otherwise.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from dataclasses import replace
from pathlib import Path

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError
from flexbench.server_config.run_server import SwarmEntrance

PUBLIC_SWARM = "public"
LOOPBACK_ADDRESS = "/ip4/127.0.0.1/tcp/0"
_HIGHEST_PORT = 65535
_ADDRESS = re.compile(
    r"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/\s]+)"
    r"/(?P<transport>tcp|udp)/(?P<port>\d{1,5})(?P<rest>(?:/[^/\s]+)*)"
)
_PEER_ID = re.compile(r"/p2p/\w+$")


def resolve_entrance(entrance: SwarmEntrance, *, listens: bool) -> SwarmEntrance:
    """The entrance, checked; if the server really `listens`, on loopback where nothing is said.

    Raises ConfigError with run_server's reason for what it would refuse.
    """
    _check_combinations(entrance)
    _check_forms(entrance)
    if not listens:
        return entrance
    _check_identity(entrance)
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
    if not asks_public_swarm(entrance):
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


def asks_public_swarm(entrance: SwarmEntrance) -> bool:
    """Whether the server joins Petals' public swarm."""
    return entrance.initial_peers == (PUBLIC_SWARM,)


def for_run_server(entrance: SwarmEntrance) -> SwarmEntrance:
    """The entrance in run_server's own terms: it joins the public swarm if no peers are named."""
    return replace(entrance, initial_peers=()) if asks_public_swarm(entrance) else entrance


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
    option = "--host-maddrs" if entrance.host_maddrs else "--port"
    for address in listening_addresses(entrance):
        parts = _ADDRESS.fullmatch(address)
        if parts is not None and parts["transport"] == "tcp" and parts["kind"] in ("ip4", "ip6"):
            _check_port(option, parts["host"], int(parts["port"]))


def _check_port(option: str, host: str, port: int) -> None:
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As a server does: connections that were closed a moment ago are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, port))
    except OSError as error:
        if host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return  # a machine without IPv6: the server does without it, too
        problem = {
            errno.EADDRINUSE: f"port {port} of {host} is in use",
            errno.EADDRNOTAVAIL: f"{host} is not an address of this machine",
            errno.EACCES: f"no permission to listen on port {port} of {host}",
        }.get(error.errno or 0, f"cannot listen on port {port} of {host}: {error.strerror}")
        raise ConfigError(option, problem) from error
