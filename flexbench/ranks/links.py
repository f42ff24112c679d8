"""Connections for data between rank 0 and every other rank, beside those of the watch.

The watch's are for heartbeats, which nothing large may delay. These carry frames of bytes: clock
exchanges, which have to be quick, and traces, which may be large. Who waits on one calls `check` at
least twice a second, which raises when there is nothing to wait for any more.
"""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from flexbench.core.errors import DeadlineError, RunError
from flexbench.ranks.channel import Channel, wait_for_sockets
from flexbench.ranks.launch import Launch
from flexbench.ranks.meeting_points import Address, connect, listen_at
from flexbench.ranks.watch import PeerWatch
from flexbench.ranks.wording import name_address, name_ranks, not_answered

_HEADER = struct.Struct(">HQ")  # bytes of the kind, and of the payload
_MAX_PAYLOAD_BYTES = 2**32
_CHUNK_BYTES = 2**20
_LOOK_EVERY_S = 0.4
_STEP_S = 5.0
_MAX_STRANGERS = 64
# A router may forget a connection on which nothing is said for minutes.
_KEEP_ALIVE_S = 30
_WELCOME = "welcome"


class LinkClosedError(Exception):
    """The other side has closed its end, or died."""


class Link:
    """Frames over a connected socket: a kind, which both sides have to agree on, and bytes."""

    def __init__(
        self, connected: socket.socket, *, peer: int, stall_s: float, check: Callable[[], None]
    ) -> None:
        """`peer` is the rank at the other end, which is lost if a frame stalls for `stall_s`."""
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_S)
        self.peer = peer
        self._socket = connected
        self._stall_s = stall_s
        self._check = check

    def send(self, kind: str, payload: bytes = b"") -> None:
        """Send a frame, however long the other side takes until it receives it.

        Raises LinkClosedError, ValueError for a payload that is too large, and what `check` does.
        """
        if len(payload) > _MAX_PAYLOAD_BYTES:
            raise ValueError(f"{len(payload)} bytes; at most {_MAX_PAYLOAD_BYTES} are taken")
        name = kind.encode()
        head = _HEADER.pack(len(name), len(payload)) + name
        if len(payload) < _CHUNK_BYTES:  # in one packet, if it is small enough
            self._send_all(head + payload)
        else:
            self._send_all(head)
            self._send_all(payload)

    def receive(self, kind: str, timeout_s: float) -> bytes:
        """The payload of the next frame, which begins within `timeout_s`.

        Raises LinkClosedError, DeadlineError, what `check` does, and RunError for another kind.
        """
        return self.receive_any((kind,), timeout_s)[1]

    def receive_any(self, kinds: Iterable[str], timeout_s: float) -> tuple[str, bytes]:
        """A frame of any of these kinds, see `receive`."""
        first = self._receive_exactly(1, timeout_s)
        rest = self._receive_exactly(_HEADER.size - 1, self._stall_s)
        name_bytes, num_bytes = _HEADER.unpack(first + rest)
        name = self._receive_exactly(name_bytes, self._stall_s).decode("utf-8", "replace")
        if name not in kinds or num_bytes > _MAX_PAYLOAD_BYTES:
            raise RunError(f"rank {self.peer} sent {name!r} where {' or '.join(kinds)} was due")
        return name, bytes(self._receive_exactly(num_bytes, self._stall_s))

    def close(self) -> None:
        """Close the socket. What was sent still arrives, if all that was received has been read."""
        self._socket.close()

    def _send_all(self, content: bytes) -> None:
        unsent = memoryview(content)
        while unsent:
            try:
                unsent = unsent[self._socket.send(unsent[:_CHUNK_BYTES]) :]
            except BlockingIOError:
                # Heartbeats tell whether the other side lives; it may be busy for long.
                self._wait(select.POLLOUT, _LOOK_EVERY_S)
            except OSError as error:
                raise LinkClosedError from error

    def _receive_exactly(self, num_bytes: int, timeout_s: float) -> bytearray:
        """So many bytes, each some of them within `timeout_s` of the last ones."""
        content = bytearray(num_bytes)
        missing = memoryview(content)
        expires_at = time.monotonic() + timeout_s
        while missing:
            try:
                received = self._socket.recv_into(missing[:_CHUNK_BYTES])
            except BlockingIOError:
                remaining = expires_at - time.monotonic()
                if remaining <= 0:
                    raise DeadlineError(f"rank {self.peer} {not_answered(timeout_s)}") from None
                self._wait(select.POLLIN, min(remaining, _LOOK_EVERY_S))
                continue
            except OSError as error:
                raise LinkClosedError from error
            if not received:
                raise LinkClosedError
            missing = missing[received:]
            expires_at = time.monotonic() + timeout_s
        return content

    def _wait(self, event: int, timeout_s: float) -> None:
        self._check()
        poll = select.poll()
        poll.register(self._socket, event)
        poll.poll(int(timeout_s * 1000) + 1)


def open_links(
    watch: PeerWatch, launch: Launch, *, identity: str, check: Callable[[], None]
) -> tuple[dict[int, Link], dict[int, str]]:
    """On rank 0 the links to all other ranks, and every rank's `identity`; on these that to rank 0.

    All ranks call it, within the `with` block of `watch`. Raises DeadlineError naming the ranks
    that have not come after the watch's time-out, LinkClosedError, and what `check` does.
    """
    if launch.rank == 0:
        host = watch.head_host
        assert host is not None, "the watch is not entered"
        with listen_at(host, 0) as listener:
            address = Address(host, listener.getsockname()[1], secrets.token_hex(16))
            watch.share("address for data", vars(address), watch.timeout_s)
            reception = _Reception(listener, address, launch.world_size, watch.timeout_s, check)
            return reception.receive_all(), reception.identities | {0: identity}
    address = Address(**watch.share("address for data", None, watch.timeout_s))
    return {0: _visit(address, launch.rank, identity, watch.timeout_s, check)}, {}


@dataclass
class _Reception:
    """Rank 0, until all others have opened their link."""

    listener: socket.socket
    address: Address
    world_size: int
    timeout_s: float
    check: Callable[[], None]
    links: dict[int, Link] = field(default_factory=dict)
    identities: dict[int, str] = field(default_factory=dict)
    guests: list[Channel] = field(default_factory=list)

    def receive_all(self) -> dict[int, Link]:
        expires_at = time.monotonic() + self.timeout_s
        try:
            while missing := set(range(1, self.world_size)) - set(self.links):
                remaining = expires_at - time.monotonic()
                if remaining <= 0:
                    raise DeadlineError(
                        f"{name_ranks(missing)} opened no connection for data to {self.address} "
                        f"within {self.timeout_s:g} s (--comm-timeout)"
                    )
                self.check()
                wait_for_sockets(
                    [self.listener, *(guest.socket for guest in self.guests)],
                    timeout_s=min(remaining, _LOOK_EVERY_S),
                )
                self._turn()
        except BaseException:
            for link in self.links.values():
                link.close()
            raise
        finally:
            for guest in self.guests:
                guest.close()
        return self.links

    def _turn(self) -> None:
        with suppress(OSError):  # nobody is there, or not any more
            self.guests.append(Channel(self.listener.accept()[0]))
        if len(self.guests) > max(_MAX_STRANGERS, self.world_size):
            self.guests.pop(0).close()
        for guest in list(self.guests):
            messages = guest.receive()
            if not messages and not guest.is_closed:
                continue
            self.guests.remove(guest)
            if not messages or not self._welcome(guest.socket, messages[0]):
                guest.close()

    def _welcome(self, connected: socket.socket, hello: dict[str, object]) -> bool:
        rank, token, identity = (hello.get(name) for name in ("rank", "token", "identity"))
        if not isinstance(token, str) or not isinstance(identity, str):
            return False
        given = token.encode("utf-8", "surrogatepass")
        if not hmac.compare_digest(given, self.address.token.encode()):
            return False
        if type(rank) is not int or not 0 < rank < self.world_size or rank in self.links:
            return False
        link = Link(connected, peer=rank, stall_s=self.timeout_s, check=self.check)
        self.links[rank], self.identities[rank] = link, identity
        with suppress(LinkClosedError):  # noticed by the first who needs it
            link.send(_WELCOME)
        return True


def _visit(
    address: Address, rank: int, identity: str, timeout_s: float, check: Callable[[], None]
) -> Link:
    expires_at = time.monotonic() + timeout_s
    while True:
        check()
        remaining = expires_at - time.monotonic()
        try:
            connected = connect(address, timeout_s=max(0.01, min(_STEP_S, remaining)))
            break
        except OSError as error:
            if remaining <= 0 or not isinstance(error, TimeoutError):
                raise RunError(
                    f"rank {rank} cannot reach rank 0 for data at "
                    f"{name_address(address.host, address.port)}: {error.strerror or 'no answer'}"
                ) from error
    try:
        link = Link(connected, peer=0, stall_s=timeout_s, check=check)
        hello = {"rank": rank, "token": address.token, "identity": identity}
        connected.sendall(json.dumps(hello).encode() + b"\n")
        link.receive(_WELCOME, timeout_s)
    except BaseException:
        connected.close()
        raise
    return link
