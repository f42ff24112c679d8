"""Connections to one server: one for each request in flight, kept open for the next."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections import deque
from contextlib import suppress
from time import monotonic_ns
from typing import Any

from flexbench.core.endpoint import Exchange
from flexbench.http_endpoint.address import Url
from flexbench.http_endpoint.connection import Connection
from flexbench.http_endpoint.failures import connecting_failed
from flexbench.http_endpoint.tls import TlsOptions, make_context

# More at once, and a server's backlog overflows: then some wait a second for their next try.
_OPENED_AT_ONCE = 32
_OPEN_TIMEOUT_S = 30.0
# A server with several addresses, of which the first may be a dead end.
_NEXT_ADDRESS_AFTER_S = 3.0
# After so long without a request we ask the system whether the connection is still there.
_DOUBTED_AFTER_NS = 100_000_000
# uvicorn, and so vLLM and most servers in Python, close what was idle for 5 s. A request that is
# sent just then is lost; so of connections that a burst has left over, those are given up before.
_SURPLUS_AFTER_NS = 4_000_000_000
_SPARE_FILES = 64

_AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]


class ConnectionPool:
    """Sends requests to a server, in the running event loop.

    Of the connections that are free, the one takes the next request that has waited longest: so all
    are used evenly, and with them the replicas behind a balancer of connections.
    """

    def __init__(self, url: Url, tls: TlsOptions) -> None:
        self.url = url
        self._context: ssl.SSLContext | None = make_context(tls) if url.is_tls else None
        self._free: deque[Connection] = deque()
        self._addresses: list[_AddressInfo] = []
        self._create_future = asyncio.get_running_loop().create_future

    async def open(self, num_connections: int) -> None:
        """Open connections before they are needed.

        What fails here is not told: the requests that need a connection will say why there is none.
        """
        if not num_connections:
            return
        _allow_open_files(num_connections)
        gate = asyncio.Semaphore(_OPENED_AT_ONCE)

        async def open_one() -> None:
            async with gate:
                with suppress(OSError, UnicodeError):
                    self._free.append(await self.connect())

        with suppress(OSError, UnicodeError):
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                # The first alone: it finds the address that works, or that there is none.
                self._free.append(await self.connect())
                await asyncio.gather(*(open_one() for _ in range(num_connections - 1)))

    async def close(self) -> None:
        """Close the connections that are free; there should be no others."""
        while self._free:
            self._free.pop().abort()
        await asyncio.sleep(0)  # the loop closes them in its next turn

    async def send(self, request: bytes, exchange: Exchange) -> None:
        """Send `request` once, and wait for the end of the answer, or of its connection."""
        connection = self._take()
        if connection is None:
            connection = await self._open_for(exchange)
            if connection is None:
                return
        else:
            exchange.sent_at = monotonic_ns()
        waiter = self._create_future()
        connection.send(request, exchange, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            connection.abort()
            raise
        if connection.is_reusable:
            self._free.append(connection)
        else:
            connection.abort()

    def _take(self) -> Connection | None:
        free = self._free
        now = monotonic_ns()
        while free:
            connection = free.popleft()
            idle_ns = now - connection.idle_since
            if idle_ns > _SURPLUS_AFTER_NS and free and now - free[-1].idle_since < idle_ns // 2:
                connection.abort()
                connection = free.pop()
                idle_ns = now - connection.idle_since
            if connection.is_reusable:
                if idle_ns < _DOUBTED_AFTER_NS or connection.is_silent():
                    return connection
                connection.abort()
        return None

    async def _open_for(self, exchange: Exchange) -> Connection | None:
        exchange.sent_at = monotonic_ns()
        try:
            connection = await self.connect()
        except (OSError, UnicodeError) as error:
            exchange.failure = connecting_failed(error, self.url)
            return None
        exchange.connected_at = monotonic_ns()
        return connection

    async def connect(self) -> Connection:
        """One more connection, which the pool knows nothing of.

        Raises OSError, of which ssl.SSLError, socket.gaierror and TimeoutError are some, and
        UnicodeError for a host that is no name.
        """
        addresses = self._addresses or await self._resolve()
        for number, address in enumerate(addresses):
            is_last = number == len(addresses) - 1
            try:
                async with asyncio.timeout(None if is_last else _NEXT_ADDRESS_AFTER_S):
                    connection = await self._connect_to(address)
            except ssl.SSLError:
                raise  # somebody is there
            except OSError:
                if is_last:
                    raise
            else:
                # What works is tried first from now on; it is not looked up again either.
                self._addresses = [address, *(other for other in addresses if other != address)]
                return connection
        raise OSError(f"{self.url.host!r} has no address")

    async def _connect_to(self, address: _AddressInfo) -> Connection:
        family, _, _, _, place = address
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self.url),
            str(place[0]),
            self.url.port,
            family=family,
            ssl=self._context,
            server_hostname=self.url.host if self._context is not None else None,
        )
        return connection

    async def _resolve(self) -> list[_AddressInfo]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.url.host, self.url.port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(found))


def _allow_open_files(num_connections: int) -> None:
    """Raise the limit of open files as far as it goes without asking anybody."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = hard if hard != resource.RLIM_INFINITY else max(wanted, soft)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
