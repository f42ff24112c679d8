"""One connection to a server, which carries one request after another.

This is the path whose speed decides what load one core can make. While a request is in flight
nothing happens here but taking the time, finding the pieces of the body, and noting both.
"""

from __future__ import annotations

import asyncio
import select
from time import monotonic_ns
from typing import cast
from urllib.parse import urlsplit

import httptools

from flexbench.core.endpoint import Exchange, Failure, FailureKind
from flexbench.http_endpoint.address import Url
from flexbench.http_endpoint.head import AnswerHead

MAX_HEAD_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""No text is that long: a server that sends more will not come to an end."""
_TLS_ALERT = b"\x15"


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; with at most one request in flight."""

    __slots__ = (
        "_exchange",
        "_has_head",
        "_head",
        "_now",
        "_parser",
        "_received",
        "_transport",
        "_url",
        "_waiter",
        "idle_since",
        "is_reusable",
    )

    def __init__(self, url: Url) -> None:
        self._url = url
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._exchange: Exchange | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._now = 0
        self._has_head = False
        self._head: list[bytes] = []
        self._received = 0
        self.idle_since = 0
        """When the last answer ended; on time.monotonic_ns."""
        self.is_reusable = False
        """Whether another request can be sent: it is open, and nothing is in flight."""

    # --- for the pool ---

    def send(self, request: bytes, exchange: Exchange, waiter: asyncio.Future[None]) -> None:
        """Send `request`; when `waiter` is done, `exchange` has the whole answer, or a failure."""
        assert self._transport is not None
        self._exchange = exchange
        self._waiter = waiter
        self._has_head = False
        self._head.clear()
        self._received = 0
        self.is_reusable = False
        self._transport.write(request)

    def read_head(self) -> AnswerHead:
        """The head of the last answer."""
        return AnswerHead(self._head)

    def is_silent(self) -> bool:
        """Whether nothing has come since the last answer, not even the end of the connection.

        The loop tells that too, but only when it next looks at the network.
        """
        assert self._transport is not None
        if self._transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def abort(self) -> None:
        """End the connection at once, without a word."""
        self.is_reusable = False
        self._exchange = self._waiter = None
        if self._transport is not None:
            self._transport.abort()

    # --- for the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open, the handshake of TLS included. Event loops switch Nagle's delay off."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by type
        self._parser = httptools.HttpResponseParser(self)
        self.idle_since = monotonic_ns()
        self.is_reusable = True

    def data_received(self, data: bytes) -> None:
        """Take the time, and find what it is."""
        self._now = monotonic_ns()
        if self._exchange is None or self._parser is None:
            self.abort()  # nothing was asked
            return
        self._received += len(data)
        if not self._has_head:
            self._head.append(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break_off(error)
            return
        if self._received > MAX_HEAD_BYTES:
            self._check_size()

    def eof_received(self) -> None:
        """The server has said all it has to say; the connection will be lost next."""
        self._now = monotonic_ns()
        self.is_reusable = False

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, from either side; for some answers the regular one."""
        self.is_reusable = False
        if self._exchange is not None:
            if exc is None and self._has_head and AnswerHead(self._head).ends_with_connection:
                self._end(self._now)
            else:
                self._fail(FailureKind.CLOSED, self._describe_loss())
        # The parser knows the connection: without this, both would wait for the collector.
        self._parser = self._transport = None

    # --- for the parser ---

    def on_message_begin(self) -> None:
        """The first byte of an answer, or of what nobody asked for."""
        if self._exchange is None:
            raise ValueError("an answer without a request")

    def on_headers_complete(self) -> None:
        """A head is there; that of an interim answer (1xx) is no answer yet."""
        assert self._parser is not None
        assert self._exchange is not None
        status = self._parser.get_status_code()
        if status >= 200:
            self._exchange.status = status
            self._has_head = True

    def on_body(self, body: bytes) -> None:
        """A piece of the body; of a chunked one never more than a chunk."""
        exchange = self._exchange
        assert exchange is not None
        exchange.arrivals.append(self._now)
        exchange.pieces.append(body)

    def on_message_complete(self) -> None:
        """The end of an answer."""
        if not self._has_head:
            return
        assert self._parser is not None
        assert self._exchange is not None
        if 300 <= self._exchange.status < 400:
            self._exchange.failure = self._redirected()
        self.is_reusable = self._parser.should_keep_alive()
        self._end(self._now)

    # --- ends ---

    def _end(self, at: int) -> None:
        exchange, waiter = self._exchange, self._waiter
        assert exchange is not None
        assert waiter is not None
        exchange.ended_at = self.idle_since = at
        self._exchange = self._waiter = None
        if not waiter.done():
            waiter.set_result(None)

    def _fail(self, kind: FailureKind, problem: str) -> None:
        exchange, waiter = self._exchange, self._waiter
        assert exchange is not None
        assert waiter is not None
        exchange.failure = Failure(kind, problem)
        self.abort()
        if not waiter.done():
            waiter.set_result(None)

    def _break_off(self, error: Exception) -> None:
        """What came is not HTTP."""
        if self._exchange is None:
            self.abort()  # the answer had ended, and then there was more
        elif not self._has_head and self._head[0].startswith(_TLS_ALERT):
            problem = f"{self._url.place} speaks TLS; does its address begin with https:// ?"
            self._fail(FailureKind.TLS, problem)
        elif isinstance(error, httptools.HttpParserUpgrade):
            self._fail(FailureKind.MALFORMED, f"{self._url.place} changed to another protocol")
        else:
            problem = f"{self._url.place} does not answer in HTTP/1.1: {error}"
            self._fail(FailureKind.MALFORMED, problem)

    def _check_size(self) -> None:
        if self._exchange is None:
            return
        if not self._has_head:
            problem = f"the head of the answer is longer than {MAX_HEAD_BYTES >> 10} KiB"
            self._fail(FailureKind.MALFORMED, problem)
        elif self._received > MAX_ANSWER_BYTES:
            problem = f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB"
            self._fail(FailureKind.MALFORMED, problem)

    def _describe_loss(self) -> str:
        if not self._received:
            return f"{self._url.place} closed the connection without an answer"
        if not self._has_head:
            return f"{self._url.place} closed the connection within the head of its answer"
        return (
            f"{self._url.place} closed the connection before the end of its answer, "
            f"{self._received} bytes after its begin"
        )

    def _redirected(self) -> Failure:
        location = AnswerHead(self._head).headers.get("location", "")
        try:
            host = urlsplit(location).hostname or self._url.host
        except ValueError:
            host = self._url.host
        assert self._exchange is not None
        problem = f"HTTP {self._exchange.status}: redirected to the host {host!r}; not followed"
        return Failure(FailureKind.MALFORMED, problem)
