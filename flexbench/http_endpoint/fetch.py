"""A single request, from code that has no event loop: before anything is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from flexbench.core.endpoint import Exchange, Failure, FailureKind
from flexbench.http_endpoint.address import Url
from flexbench.http_endpoint.failures import connecting_failed
from flexbench.http_endpoint.pool import ConnectionPool
from flexbench.http_endpoint.tls import TlsOptions

_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A whole answer, or in `exchange.failure` why there is none."""

    exchange: Exchange
    server: str | None
    """What the server calls itself."""

    @property
    def body(self) -> bytes:
        """All of the answer's body."""
        return b"".join(self.exchange.pieces)


def fetch(
    url: Url,
    tls: TlsOptions,
    request: bytes,
    *,
    timeout_s: float,
    raise_if_stopped: Callable[[], None],
) -> Fetched:
    """Send `request` to `url`'s server and wait for the answer, on a connection of its own.

    Raises ConfigError for TLS options that cannot work, and what `raise_if_stopped` raises.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(_fetch(url, tls, request, timeout_s, raise_if_stopped))
    finally:
        loop.close()


async def _fetch(
    url: Url,
    tls: TlsOptions,
    request: bytes,
    timeout_s: float,
    raise_if_stopped: Callable[[], None],
) -> Fetched:
    exchange = Exchange()
    task = asyncio.ensure_future(_exchange(ConnectionPool(url, tls), request, exchange))
    deadline = time.monotonic() + timeout_s
    try:
        while not task.done() and time.monotonic() < deadline:
            await asyncio.wait([task], timeout=_LOOK_EVERY_S)
            raise_if_stopped()
        if task.done():
            return Fetched(exchange=exchange, server=task.result())
    finally:
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)  # the loop closes the connection in its next turn
    problem = f"{url.place} has not answered within {timeout_s:g} s"
    exchange.failure = Failure(FailureKind.TIMEOUT, problem)
    return Fetched(exchange=exchange, server=None)


async def _exchange(pool: ConnectionPool, request: bytes, exchange: Exchange) -> str | None:
    try:
        connection = await pool.connect()
    except (OSError, UnicodeError) as error:
        exchange.failure = connecting_failed(error, pool.url)
        return None
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        connection.send(request, exchange, waiter)
        await waiter
        return connection.read_head().headers.get("server")
    finally:
        connection.abort()
