"""Where a server listens and what it announces: run_server's rules, and loopback by default."""

from __future__ import annotations

import socket

import pytest

from flexbench.core.errors import ConfigError
from flexbench.server_config.addresses import (
    announced,
    check_ports,
    hold_ports,
    listening_addresses,
    resolve_entrance,
)
from flexbench.server_config.run_server import SwarmEntrance

PEER_ID = "12D3KooWKMPJ2wZhc7VM7hfSDJmEwAExV3bgf2hYShyANcfvJxUA"
PEER = f"/ip4/10.1.2.3/tcp/31337/p2p/{PEER_ID}"


def resolve(*, listens: bool = True, **fields) -> SwarmEntrance:
    return resolve_entrance(SwarmEntrance(**fields), listens=listens)


def test_a_server_listens_on_loopback_unless_told_otherwise():
    assert listening_addresses(resolve()) == ("/ip4/127.0.0.1/tcp/0",)
    assert listening_addresses(resolve(port=31337)) == (
        "/ip4/0.0.0.0/tcp/31337",
        "/ip6/::/tcp/31337",
    )
    mine = ("/ip4/10.0.0.1/tcp/0", "/ip6/::1/udp/5/quic")
    assert listening_addresses(resolve(host_maddrs=mine)) == mine


def test_a_server_that_is_only_calculated_keeps_run_servers_defaults():
    assert resolve(listens=False) == SwarmEntrance()
    assert listening_addresses(SwarmEntrance()) == ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")


def test_what_is_announced():
    assert announced(resolve()) == ()
    assert announced(resolve(port=31337, public_ip="1.2.3.4")) == ("/ip4/1.2.3.4/tcp/31337",)
    mine = ("/dns4/a.example.org/tcp/31337",)
    assert announced(resolve(announce_maddrs=mine)) == mine


@pytest.mark.parametrize(
    ("fields", "option", "reason"),
    [
        (
            {"port": 1, "host_maddrs": ("/ip4/127.0.0.1/tcp/0",)},
            "--host-maddrs",
            "at the same time",
        ),
        (
            {"port": 1, "public_ip": "1.2.3.4", "announce_maddrs": ("/ip4/1.2.3.4/tcp/1",)},
            "--public-ip",
            "at the same time",
        ),
        ({"public_ip": "1.2.3.4"}, "--public-ip", "specify a fixed non-zero --port"),
        (
            {"public_ip": "1.2.3.4", "host_maddrs": ("/ip4/0.0.0.0/tcp/5",)},
            "--public-ip",
            "specify a fixed non-zero --port",
        ),
        ({"new_swarm": True, "initial_peers": (PEER,)}, "--new-swarm", "at the same time"),
        ({"initial_peers": ("public", PEER)}, "--initial-peers", "give it alone"),
        ({"port": 0}, "--port", "at least 1"),
        ({"port": 65536}, "--port", "at most 65535"),
        ({"port": 5, "public_ip": "example.org"}, "--public-ip", "not an IPv4 address"),
        ({"port": 5, "public_ip": "::1"}, "--public-ip", "not an IPv4 address"),
        ({"host_maddrs": ("127.0.0.1:31337",)}, "--host-maddrs", "no multiaddress"),
        ({"host_maddrs": ("/ip4/127.0.0.1",)}, "--host-maddrs", "no multiaddress"),
        ({"host_maddrs": ("/ip4/127.0.0.256/tcp/1",)}, "--host-maddrs", "not an IPv4 address"),
        ({"host_maddrs": ("/ip6/127.0.0.1/tcp/1",)}, "--host-maddrs", "not an IPv6 address"),
        ({"host_maddrs": ("/ip4/127.0.0.1/tcp/65536",)}, "--host-maddrs", "port above 65535"),
        ({"announce_maddrs": ("/ip4/1.2.3.4/tcp/0",)}, "--announce-maddrs", "explicit port"),
        ({"announce_maddrs": ("/tcp/1",)}, "--announce-maddrs", "no multiaddress"),
        ({"initial_peers": ("/ip4/1.2.3.4/tcp/1",)}, "--initial-peers", "not a peer's address"),
        ({"initial_peers": (f"/p2p/{PEER_ID}",)}, "--initial-peers", "no multiaddress"),
        (
            {"initial_peers": (PEER.replace("10.1", "10.300"),)},
            "--initial-peers",
            "not an IPv4 address",
        ),
        ({"dht_prefix": "llama-3.1"}, "--dht-prefix", "should not contain"),
        ({"dht_prefix": ""}, "--dht-prefix", "must not be empty"),
    ],
)
@pytest.mark.parametrize("listens", [True, False])
def test_what_run_server_would_refuse_is_refused(fields, option, reason, listens):
    with pytest.raises(ConfigError, match=reason) as caught:
        resolve(listens=listens, **fields)
    assert caught.value.option == option
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "peer",
    [
        PEER,
        f"/dns/bootstrap1.petals.dev/tcp/31337/p2p/{PEER_ID}",
        f"/dnsaddr/bootstrap.example.org/p2p/{PEER_ID}",
        f"/ip6/fd00::2/udp/4001/quic-v1/p2p/{PEER_ID}",
        f"{PEER}/p2p-circuit/p2p/{PEER_ID}",
    ],
)
def test_forms_of_peers(peer):
    assert resolve(initial_peers=(peer,)).initial_peers == (peer,)


def test_the_public_swarm_is_what_run_server_joins_if_no_peers_are_named():
    entrance = resolve(initial_peers=("public",))
    assert entrance.is_public
    assert entrance.named_peers == ()
    private = resolve(initial_peers=(PEER,))
    assert not private.is_public
    assert private.named_peers == private.initial_peers


def test_the_identity_needs_a_folder(tmp_path):
    path = tmp_path / "missing" / "identity"
    assert resolve(identity_path=str(path), listens=False).identity_path == str(path)
    with pytest.raises(ConfigError, match="does not exist") as caught:
        resolve(identity_path=str(path))
    assert caught.value.option == "--identity-path"
    with pytest.raises(ConfigError, match="is not a file"):
        resolve(identity_path=str(tmp_path))
    resolve(identity_path=str(tmp_path / "identity"))


def test_an_identity_that_is_there_holds_a_key(tmp_path, monkeypatch):
    path = tmp_path / "identity"
    path.touch()
    with pytest.raises(ConfigError, match="is empty; name a file that does not exist"):
        resolve(identity_path=str(path))
    path.write_bytes(b"key")
    resolve(identity_path=str(path))

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read everything
    with pytest.raises(ConfigError, match="cannot be read: Permission denied") as caught:
        resolve(identity_path=str(path))
    assert caught.value.option == "--identity-path"


@pytest.mark.parametrize("peer_id", ["Q1", PEER_ID[:-15], PEER_ID.replace("K", "0"), "1" * 121])
def test_ids_that_no_peer_has_are_refused_where_peers_are_asked(peer_id):
    for peer in (PEER.replace(PEER_ID, peer_id), f"{PEER}/p2p-circuit/p2p/{peer_id}"):
        assert resolve(initial_peers=(peer,), listens=False).initial_peers == (peer,)
        with pytest.raises(ConfigError, match="is no peer id") as caught:
            resolve(initial_peers=(peer,))
        assert caught.value.option == "--initial-peers"
    resolve(
        initial_peers=(PEER.replace(PEER_ID, "QmcTayUJ36w5TMeTwSFy2VUGbTFmBdBYYyYBSnPy3bvZbK"),)
    )


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        check_ports(resolve())
        with pytest.raises(ConfigError, match=rf"port {port} of 0\.0\.0\.0 is in use") as caught:
            check_ports(resolve(port=port))
        assert caught.value.option == "--port"
        address = f"/ip4/127.0.0.1/tcp/{port}"
        with pytest.raises(ConfigError, match=rf"port {port} of 127\.0\.0\.1 is in use") as caught:
            check_ports(resolve(host_maddrs=(address,)))
        assert caught.value.option == "--host-maddrs"
    check_ports(resolve(port=port))


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="the system shares no ports")
def test_a_port_that_is_held_is_for_the_own_server_only():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}"
    with hold_ports(resolve(port=port)):
        for another in (resolve(port=port), resolve(host_maddrs=(address,))):
            with pytest.raises(ConfigError, match=f"port {port} of .* is in use"):
                check_ports(another)
            with pytest.raises(ConfigError, match="is in use"), hold_ports(another):
                pass
        with socket.socket() as server:  # as libp2p listens
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.bind(("0.0.0.0", port))
            server.listen()
            # The connection comes to who listens.
            with socket.create_connection(("127.0.0.1", port), 5) as caller:
                accepted, address_of_caller = server.accept()
                accepted.close()
                assert address_of_caller == caller.getsockname()
    with hold_ports(resolve(host_maddrs=(address, address))):
        pass
    with hold_ports(resolve()):  # any free one: nothing to hold
        pass


def test_addresses_of_other_machines_cannot_be_listened_on():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.200 is not an address of this machine"):
        check_ports(resolve(host_maddrs=("/ip4/192.0.2.200/tcp/31337",)))


def test_names_and_udp_ports_are_left_to_the_server():
    check_ports(resolve(host_maddrs=("/dns4/localhost/tcp/1", "/ip4/127.0.0.1/udp/1/quic")))
