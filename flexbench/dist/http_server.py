"""A small HTTP/1.1 server on asyncio's streams, for the service's few requests.

Requests have a Content-Length, or no body; connections stay open until a side wants them closed.
It listens where it is told to, and the service tells it 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 16 * 1024 * 1024
# For somebody to finish a request that was begun, or to read an answer.
_READ_S = 30.0
_WRITE_S = 60.0
_IDLE_S = 600.0
_LINGER_S = 1.0
_LOOK_EVERY_S = 0.1


class HttpError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        return error_body(self.message, self.kind, self.status)


def error_body(message: str, kind: str, status: int) -> dict[str, Any]:
    """What OpenAI's API answers with when something is wrong."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request, wholly read."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytes
    is_gone: Callable[[], bool]
    """Whether whoever sent it has closed the connection."""


Events = AsyncGenerator[bytes, None]
Handler = Callable[[Request], Awaitable[dict[str, Any] | Events]]
"""Answers with an object for JSON, or with the events of a stream; raises HttpError."""


class HttpServer:
    """Serves `handler` for as long as it is open."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port, a free one if it was 0. Raises OSError."""
        self._server = await asyncio.start_server(
            self._serve, host, port, limit=MAX_HEAD_BYTES, backlog=1024
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self, grace_s: float) -> None:
        """Listen no more, let answers come to their end for `grace_s`, then cut them off."""
        if self._server is not None:
            self._server.close()
        if self._connections:
            await asyncio.wait(set(self._connections), timeout=grace_s)
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, TimeoutError, asyncio.IncompleteReadError):
            pass  # whoever it was has gone
        finally:
            self._connections.discard(task)
            writer.close()
            with suppress(ConnectionError, TimeoutError):
                await writer.wait_closed()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read and answer one request; whether there may be another one."""
        keeps_open = False
        request = None
        try:
            request = await _read_request(reader, writer)
            if request is None:
                return False
            keeps_open = request.headers.get("connection", "").lower() != "close"
            answer = await self._handler(request)
        except HttpError as error:
            _write_json(writer, error.status, error.body, keeps_open, error.headers)
        else:
            if isinstance(answer, dict):
                _write_json(writer, HTTPStatus.OK, answer, keeps_open)
            else:
                await _write_events(writer, answer, keeps_open)
        async with asyncio.timeout(_WRITE_S):
            await writer.drain()
        if request is None:
            await _linger(reader, writer)
        return keeps_open


async def _read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Request | None:
    """The next request; None at the connection's end. Raises HttpError for what is none."""
    head = await _read_head(reader)
    if head is None:
        return None
    method, path, headers = _parse_head(head)
    length = _body_length(method, headers)
    if length and headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    async with asyncio.timeout(_READ_S):
        body = await reader.readexactly(length)
    return Request(
        method=method,
        path=path.partition("?")[0],
        headers=headers,
        body=body,
        is_gone=lambda: reader.at_eof() or writer.is_closing(),
    )


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read what else was sent: to close on it would take the answer back."""
    writer.write_eof()
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while await reader.read(MAX_HEAD_BYTES):
                pass


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    try:
        async with asyncio.timeout(_IDLE_S):
            return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial.strip():
            raise HttpError(HTTPStatus.BAD_REQUEST, "the request has no end") from error
        return None
    except asyncio.LimitOverrunError as error:
        raise HttpError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the headers are longer than {MAX_HEAD_BYTES} bytes",
        ) from error


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise HttpError(HTTPStatus.BAD_REQUEST, "this is no request of HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise HttpError(HTTPStatus.BAD_REQUEST, "a header is none")
        headers[name.lower()] = value.strip()
    if words[2] == "HTTP/1.0":
        headers["connection"] = "close"
    return words[0], words[1], headers


def _body_length(method: str, headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise HttpError(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length, not chunks")
    text = headers.get("content-length")
    if text is None:
        if method == "POST":
            raise HttpError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        return 0
    if not (text.isascii() and text.isdigit()):
        raise HttpError(HTTPStatus.BAD_REQUEST, "Content-Length is not a number")
    if len(text) > 12 or int(text) > MAX_BODY_BYTES:
        raise HttpError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is longer than {MAX_BODY_BYTES} bytes"
        )
    return int(text)


def _head(
    status: int, headers: Mapping[str, str], keeps_open: bool, more: Mapping[str, str] | None = None
) -> bytes:
    lines = [f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}"]
    connection = "keep-alive" if keeps_open else "close"
    for name, value in {**headers, **(more or {}), "Connection": connection}.items():
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _write_json(
    writer: asyncio.StreamWriter,
    status: int,
    value: dict[str, Any],
    keeps_open: bool,
    more: Mapping[str, str] | None = None,
) -> None:
    body = json.dumps(value).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    writer.write(_head(status, headers, keeps_open, more) + body)


async def _write_events(writer: asyncio.StreamWriter, events: Events, keeps_open: bool) -> None:
    headers = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "Transfer-Encoding": "chunked",
    }
    writer.write(_head(HTTPStatus.OK, headers, keeps_open))
    async with aclosing(events):
        async for event in events:
            data = b"data: " + event + b"\n\n"
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            async with asyncio.timeout(_WRITE_S):
                await writer.drain()
    writer.write(b"0\r\n\r\n")


@contextmanager
def watching(request: Request, on_gone: Callable[[], None]) -> Iterator[None]:
    """While open, `on_gone` is called as soon as whoever sent `request` has gone."""

    async def look() -> None:
        while not request.is_gone():
            await asyncio.sleep(_LOOK_EVERY_S)
        on_gone()

    task = asyncio.ensure_future(look())
    try:
        yield
    finally:
        task.cancel()
