"""Messages between two ranks over a socket, and how to wait for them and end without losing any.

Nothing is pickled, every line has a greatest length, and who has not shown that it belongs to the
job gets little room.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

# A hello has about 250 bytes; who is no rank of ours gets no room for more.
_MAX_HELLO_BYTES = 4096
_MAX_LINE_BYTES = 4 * 2**20
_CHUNK_BYTES = 2**16
_GOODBYE_S = 0.5


class Channel:
    """JSON objects over a connected socket, one a line. It never blocks, but in `wait`."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        # Each line is short and wanted at once. Not every socket of a test is one of TCP.
        with suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connected
        self.is_closed = False
        """Nothing more comes: the other side has closed it, or sent what no rank sends."""
        self.heard_at = time.monotonic()
        self._max_line_bytes = _MAX_HELLO_BYTES
        self._inbox: deque[dict[str, Any]] = deque()
        self._received = bytearray()
        self._unsent = bytearray()

    def trust(self) -> None:
        """The other side has shown that it belongs to the job: take long lines from it."""
        self._max_line_bytes = _MAX_LINE_BYTES

    @property
    def has_unsent(self) -> bool:
        """Whether the system has not yet taken all that was sent."""
        return bool(self._unsent)

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`, as much as the system takes now; `flush` sends the rest."""
        self.send_line(encode(message))

    def send_line(self, line: bytes) -> None:
        """Send what `encode` made of a message."""
        self._unsent += line
        self.flush()

    def flush(self) -> None:
        """Send what is left of earlier messages, as much as the system takes now."""
        while self._unsent:
            try:
                del self._unsent[: self.socket.send(self._unsent)]
            except BlockingIOError:
                return
            except OSError:
                # The reason may lie in what was received before: `receive` is to find the end.
                self._unsent.clear()

    def receive(self) -> list[dict[str, Any]]:
        """All messages that are here. If `is_closed` then, they are the last ones."""
        self._read()
        messages = list(self._inbox)
        self._inbox.clear()
        return messages

    def wait(self, expires_at: float) -> dict[str, Any] | None:
        """The next message, or None if there is none until `expires_at`, or never will be."""
        while True:
            self._read()
            if self._inbox:
                return self._inbox.popleft()
            remaining = expires_at - time.monotonic()
            if self.is_closed or remaining <= 0:
                return None
            wait_for_sockets([self.socket], timeout_s=remaining)

    def close(self) -> None:
        """Close the socket, unread and unsent messages or not."""
        self.is_closed = True
        self.socket.close()

    def _read(self) -> None:
        num_bytes = 0
        # Who sends without end must not keep us here: the rest is for the next call.
        while not self.is_closed and num_bytes <= self._max_line_bytes:
            try:
                chunk = self.socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            if not chunk:
                self.is_closed = True
            num_bytes += len(chunk)
            self._received += chunk
        if num_bytes:
            self.heard_at = time.monotonic()
            self._parse()

    def _parse(self) -> None:
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        if len(rest) > self._max_line_bytes:
            self.is_closed = True
        for line in lines:
            message = self._decode(line)
            if message is None:
                self.is_closed = True
                return
            self._inbox.append(message)

    def _decode(self, line: bytearray) -> dict[str, Any] | None:
        if len(line) > self._max_line_bytes:
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):  # a thousand brackets are a message of nobody
            return None
        return message if isinstance(message, dict) else None


def encode(message: dict[str, Any]) -> bytes:
    """The line of `message`. Raises ValueError if the other side would not take it."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"a message of {len(line)} bytes; at most {_MAX_LINE_BYTES} are taken")
    return line


def wait_for_sockets(
    reading: Iterable[socket.socket], writing: Iterable[socket.socket] = (), *, timeout_s: float
) -> None:
    """Wait until one of the sockets can be read, or written, without blocking."""
    poll = select.poll()  # select() would not take the 1024th file of a large run
    for one in reading:
        poll.register(one, select.POLLIN)
    for one in writing:
        poll.register(one, select.POLLIN | select.POLLOUT)
    # Rounded up: a wait of less than a millisecond must not become a busy loop.
    poll.poll(int(min(max(timeout_s, 0), 3600) * 1000) + 1)


def close_politely(channels: Iterable[Channel]) -> None:
    """Close after all that was sent has arrived, or after half a second.

    A socket that is closed with something unread takes what it sent last with it: the other side
    would see a lost connection where we said goodbye.
    """
    expires_at = time.monotonic() + _GOODBYE_S
    open_ones = list(channels)
    try:
        for channel in open_ones:
            _end_sending(channel)
        while waiting := [channel for channel in open_ones if not channel.is_closed]:
            remaining = expires_at - time.monotonic()
            if remaining <= 0:
                break
            writing = [channel.socket for channel in waiting if channel.has_unsent]
            wait_for_sockets([c.socket for c in waiting], writing, timeout_s=remaining)
            for channel in waiting:
                if channel.has_unsent:
                    _end_sending(channel)
                channel.receive()
    finally:
        for channel in open_ones:
            channel.close()


def _end_sending(channel: Channel) -> None:
    channel.flush()
    if not channel.has_unsent:
        with suppress(OSError):  # the other side was quicker
            channel.socket.shutdown(socket.SHUT_WR)
