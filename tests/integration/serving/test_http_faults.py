"""The HTTP clients against a server that does exactly what a test wants of it, faults above all."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from flexbench.core.endpoint import (
    Exchange,
    FailureKind,
    GenerationRequest,
    Response,
    ServiceContext,
)
from flexbench.core.errors import ConfigError, Interrupted, RunError
from flexbench.core.progress import Silence
from flexbench.http_endpoint.address import parse_url
from flexbench.http_endpoint.openai import OpenAIClient, OpenAIConfig
from flexbench.http_endpoint.pool import ConnectionPool
from flexbench.http_endpoint.tls import TlsOptions
from flexbench.serving.clients.azureml import AzureMLClient, AzureMLConfig

KEY = "sk-hunter2"
# Nothing here takes that long; a test that reaches it has failed.
LONG_S = 10.0
REQUEST = GenerationRequest(
    index=0, prompt="Hi", prompt_tokens=2, max_new_tokens=2, is_streaming=True
)

Script = Callable[["Visit"], None]


class Visit:
    """A connection, as the server sees it."""

    def __init__(self, server: Server, connection: socket.socket, number: int) -> None:
        self.server = server
        self.connection = connection
        self.number = number
        """Of the connection, from 0."""
        self._buffer = b""

    def request(self) -> bytes:
        """Wait for a whole request; b'' when there is none any more."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._receive():
                return b""
        head, _, _ = self._buffer.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line[:15].lower() == b"content-length:"),
            0,
        )  # fmt: skip
        total = len(head) + 4 + length
        while len(self._buffer) < total:
            if not self._receive():
                return b""
        request, self._buffer = self._buffer[:total], self._buffer[total:]
        self.server.requests.append(request)
        return request

    def _receive(self) -> bool:
        data = self.connection.recv(65536)
        self._buffer += data
        return bool(data)

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def reset(self) -> None:
        """End the connection with a RST."""
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )

    def wait_for_end(self) -> None:
        """Until the client has ended the connection."""
        with suppress(OSError):
            while self.connection.recv(65536):
                pass
        self.server.ended.set()


class Server:
    """Follows `script` on each connection, in a thread of its own; then closes it."""

    def __init__(
        self, script: Script, *, context: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self._script = script
        self._context = context
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        scheme = "https" if context is not None else "http"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self.requests: list[bytes] = []
        self.ended = threading.Event()
        """A client has ended a connection;"""
        self.closed = threading.Event()
        """the script has, or both."""
        self._start(self._accept)

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.settimeout(LONG_S)
                self._connections.append(connection)
                self._start(self._serve, connection, len(self._connections) - 1)

    def _serve(self, connection: socket.socket, number: int) -> None:
        with suppress(OSError):
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
                self._connections.append(connection)
            with closing(connection):
                self._script(Visit(self, connection, number))
        connection.close()
        self.closed.set()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join(LONG_S)
            assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(script: Script, **values: Any) -> Server:
        servers.append(Server(script, **values))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


# --- what servers say ---

EVENT = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MODELS = b'{"data": [{"id": "small", "owned_by": "me"}, {"id": "large"}]}'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM = STREAM_HEAD + chunk(EVENT) + chunk(LAST) + chunk(DONE) + b"0\r\n\r\n"


def answer(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def always(data: bytes) -> Script:
    """Answer every request with `data`."""

    def script(visit: Visit) -> None:
        while visit.request():
            visit.send(data)

    return script


def once(data: bytes) -> Script:
    """Answer one request with `data`, and close the connection."""

    def script(visit: Visit) -> None:
        visit.request()
        visit.send(data)

    return script


# --- asking them ---


def run(coroutine: Coroutine[Any, Any, Any], loop: str = "uvloop") -> Any:
    made = uvloop.new_event_loop() if loop == "uvloop" else asyncio.new_event_loop()
    try:
        return made.run_until_complete(asyncio.wait_for(coroutine, LONG_S))
    finally:
        made.close()


def client_of(url: str, **values: Any) -> OpenAIClient:
    return OpenAIClient(OpenAIConfig(**{"api_url": url, "model": "m"} | values))


async def ask(
    client: OpenAIClient, request: GenerationRequest = REQUEST
) -> tuple[Exchange, Response]:
    exchange = Exchange()
    await client.send_request(client.prepare_request(request), exchange)
    response = client.process_response(exchange)
    assert KEY not in repr(response)
    return exchange, response


async def with_client(
    client: OpenAIClient, steps: Callable[[OpenAIClient], Awaitable[Any]], connections: int = 1
) -> Any:
    await client.open(connections)
    try:
        return await steps(client)
    finally:
        await client.close()


def ask_once(url: str, loop: str = "uvloop", **values: Any) -> tuple[Exchange, Response]:
    result: tuple[Exchange, Response] = run(with_client(client_of(url, **values), ask), loop)
    return result


def failure_of(url: str, **values: Any) -> tuple[FailureKind | None, str]:
    exchange, response = ask_once(url, **values)
    failure = response.failure
    if exchange.failure is not None:
        assert failure is not None
    return (failure.kind, failure.message) if failure is not None else (None, "")


def unused_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def context(**values: Any) -> ServiceContext:
    return ServiceContext(
        **{
            "progress": Silence(),
            "log_folder": Path("/nowhere"),
            "scratch_folder": Path("/nowhere"),
            "timeout_s": 2.0,
            "raise_if_stopped": lambda: None,
            "streaming": True,
            "max_prompt_tokens": 2,
            "max_new_tokens": 2,
            "max_in_flight": 1,
        }
        | values
    )


# --- when all is well ---


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_requests_share_a_connection(serve: Any, loop: str) -> None:
    server = serve(always(STREAM))

    async def steps(client: OpenAIClient) -> None:
        for _ in range(3):
            before = time.monotonic_ns()
            exchange, response = await ask(client)
            assert (response.failure, response.texts) == (None, ["a", "b"])
            times = [before, exchange.sent_at, *response.content_times, exchange.ended_at]
            assert sorted(times) == times
            assert exchange.connected_at == 0
        assert [connection.is_reusable for connection in client._pool._free] == [True]
        transport = client._pool._free[0]._transport
        plug = transport.get_extra_info("socket")
        assert plug.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(with_client(client_of(server.url), steps), loop)
    assert server.num_connections == 1
    assert len(server.requests) == 3
    assert all(f"Authorization: Bearer {KEY}\r\n".encode() in data for data in server.requests)


def test_as_many_connections_as_requests_in_flight(serve: Any) -> None:
    """Each used in its turn; those that are missing are opened, which the exchange tells."""
    together = threading.Barrier(4)

    def script(visit: Visit) -> None:
        while visit.request():
            with suppress(threading.BrokenBarrierError):
                together.wait(LONG_S)
            visit.send(STREAM)

    server = serve(script)

    async def steps(client: OpenAIClient) -> list[tuple[Exchange, Response]]:
        return await asyncio.gather(*(ask(client) for _ in range(4)))

    answers = run(with_client(client_of(server.url), steps, connections=3))
    assert [response.failure for _, response in answers] == [None] * 4
    assert [exchange.connected_at > exchange.sent_at for exchange, _ in answers] == [False] * 3 + [True]  # fmt: skip
    assert server.num_connections == 4


def test_connections_take_turns(serve: Any) -> None:
    places: list[int] = []

    def script(visit: Visit) -> None:
        while visit.request():
            places.append(visit.number)
            visit.send(STREAM)

    server = serve(script)

    async def steps(client: OpenAIClient) -> None:
        for _ in range(6):
            await ask(client)

    run(with_client(client_of(server.url), steps, connections=3))
    assert places[:3] == places[3:]
    assert sorted(places[:3]) == [0, 1, 2]


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n\r\n" + EVENT + LAST,
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + EVENT + LAST + DONE,
        b"HTTP/1.0 200 OK\r\n\r\n" + EVENT + LAST + DONE,
    ],
)
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_bodies_that_end_with_the_connection(serve: Any, data: bytes, loop: str) -> None:
    exchange, response = ask_once(serve(once(data)).url, loop)
    assert (response.failure, response.texts) == (None, ["a", "b"])
    assert exchange.ended_at >= response.content_times[-1]


def test_a_connection_that_is_to_be_closed_is_not_used_again(serve: Any) -> None:
    body = b'{"choices": [{"text": "a"}]}'
    server = serve(always(answer(200, body, "Connection: close")))

    async def steps(client: OpenAIClient) -> None:
        for _ in range(2):
            _, response = await ask(client)
            assert response.texts == ["a"]

    run(with_client(client_of(server.url), steps))
    assert server.num_connections == 2


def test_ipv6(serve: Any) -> None:
    try:
        server = serve(always(STREAM), host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    _, response = ask_once(server.url)
    assert response.failure is None
    assert f"\r\nHost: [::1]:{server.port}\r\n".encode() in server.requests[0]


def test_a_name_with_several_addresses(serve: Any) -> None:
    """Of those that `localhost` may have, the one is taken at which somebody listens."""
    server = serve(always(STREAM))
    _, response = ask_once(f"http://localhost:{server.port}")
    assert response.failure is None


def test_long_requests(serve: Any) -> None:
    server = serve(always(STREAM))
    prompt = "ä" * 1_000_000

    async def steps(client: OpenAIClient) -> Response:
        return (await ask(client, replace(REQUEST, prompt=prompt)))[1]

    response = run(with_client(client_of(server.url), steps))
    assert response.failure is None
    assert prompt.encode() in server.requests[0]


# --- faults ---


def test_nobody_listens() -> None:
    port = unused_port()
    exchange, response = ask_once(f"http://127.0.0.1:{port}")
    assert response.failure is not None
    assert response.failure.kind is FailureKind.REFUSED
    assert response.failure.message == f"nobody listens at 127.0.0.1:{port} (connection refused)"
    assert exchange.sent_at > 0
    assert exchange.connected_at == exchange.ended_at == 0


def test_no_such_host() -> None:
    kind, message = failure_of("http://no-such-host.invalid:8000")
    assert kind is FailureKind.REFUSED
    assert message.startswith("the host 'no-such-host.invalid' cannot be found: ")


@pytest.mark.parametrize(
    ("data", "words", "texts"),
    [
        (b"", "without an answer", []),
        (b"HTTP/1.1 200 OK\r\nContent-", "within the head", []),
        (STREAM_HEAD + chunk(EVENT) + b"50\r\ndata: {", "before the end", ["a"]),
        (STREAM_HEAD + chunk(EVENT), "before the end", ["a"]),
        (STREAM_HEAD + chunk(EVENT) + chunk(LAST) + chunk(DONE), "before the end", ["a", "b"]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + EVENT, "before the end", ["a"]),
    ],
)
@pytest.mark.parametrize("is_reset", [False, True])
def test_a_connection_that_ends(
    serve: Any, data: bytes, words: str, texts: list[str], is_reset: bool
) -> None:
    def script(visit: Visit) -> None:
        if visit.request():
            visit.send(data)
            if is_reset:
                visit.reset()

    server = serve(script)
    exchange, response = ask_once(server.url)
    assert response.failure is not None
    assert response.failure.kind is FailureKind.CLOSED
    if not is_reset:  # which takes with it what has not been read
        assert words in response.failure.message
        assert response.texts == texts
    assert exchange.ended_at == 0
    assert len(server.requests) == 1  # and never again


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"220 smtp.example ready\r\n", FailureKind.MALFORMED, "does not answer in HTTP/1.1"),
        (answer(200, b"{garbage"), FailureKind.MALFORMED, "not JSON: '{garbage'"),
        (answer(200, b"<html></html>"), FailureKind.MALFORMED, "neither JSON nor a stream"),
        (answer(204, b""), FailureKind.EMPTY, "no token"),
        (answer(302, b"", "Location: https://other.example/"), FailureKind.MALFORMED, "'other.example'"),
        (answer(400, b'{"error": {"message": "no such field"}}'), FailureKind.HTTP_CLIENT_ERROR, "HTTP 400: no such field"),
        (answer(401, b'{"error": {"message": "bad key ' + KEY.encode() + b'"}}'), FailureKind.UNAUTHORIZED, "HTTP 401: bad key ***"),
        (answer(403, b""), FailureKind.UNAUTHORIZED, "HTTP 403"),
        (answer(429, b"slow down"), FailureKind.RATE_LIMITED, "HTTP 429: slow down"),
        (answer(500, b"oh"), FailureKind.HTTP_SERVER_ERROR, "HTTP 500: oh"),
        (answer(503, b"", "Retry-After: 1"), FailureKind.HTTP_SERVER_ERROR, "HTTP 503"),
        (STREAM_HEAD + chunk(EVENT) + b"0\r\n\r\n", FailureKind.CLOSED, "without [DONE]"),
        (STREAM_HEAD + chunk(b'data: {"error": {"message": "no memory"}}\n\n') + b"0\r\n\r\n", FailureKind.SERVER_REPORTED, "no memory"),
        (answer(200, b'{"choices": [{"text": ""}]}'), FailureKind.EMPTY, "no token"),
    ],
)  # fmt: skip
def test_bad_answers(serve: Any, data: bytes, kind: FailureKind, words: str) -> None:
    server = serve(always(data))
    assert failure_of(server.url)[0] is kind
    assert words in failure_of(server.url)[1]
    assert len(server.requests) == 2  # never sent twice, a 503 neither


def test_after_a_refusal_the_connection_is_used_again(serve: Any) -> None:
    def script(visit: Visit) -> None:
        while visit.request():
            visit.send(answer(429, b"slow down") if len(visit.server.requests) == 1 else STREAM)

    server = serve(script)

    async def steps(client: OpenAIClient) -> list[FailureKind | None]:
        failures = [(await ask(client))[1].failure for _ in range(2)]
        return [failure.kind if failure is not None else None for failure in failures]

    assert run(with_client(client_of(server.url), steps)) == [FailureKind.RATE_LIMITED, None]
    assert server.num_connections == 1


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_request_that_takes_too_long(serve: Any, loop: str) -> None:
    """Its connection is ended at once and not used again; what had come is kept."""

    def script(visit: Visit) -> None:
        visit.request()
        if visit.number == 0:
            visit.send(STREAM_HEAD + chunk(EVENT))
            visit.wait_for_end()
        else:
            visit.send(STREAM)

    server = serve(script)

    async def steps(client: OpenAIClient) -> None:
        exchange = Exchange()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.send_request(client.prepare_request(REQUEST), exchange)
        cut = client.process_response(exchange)
        assert (cut.texts, cut.failure, exchange.ended_at) == (["a"], None, 0)
        assert await asyncio.to_thread(server.ended.wait, LONG_S)
        _, response = await ask(client)
        assert response.texts == ["a", "b"]

    run(with_client(client_of(server.url), steps), loop)
    assert server.num_connections == 2


@pytest.mark.parametrize("is_tls", [False, True])
def test_a_connection_that_cannot_be_opened_in_time(is_tls: bool) -> None:
    """Nobody accepts, or nobody answers the handshake: the time-out ends it."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as listener:
        place = listener.getsockname()
        plugs = [socket.socket() for _ in range(0 if is_tls else 4)]
        for plug in plugs:  # the backlog is full now
            plug.setblocking(False)
            plug.connect_ex(place)

        async def steps() -> Exchange:
            client = client_of(f"http{'s' * is_tls}://127.0.0.1:{place[1]}")
            await client.open(0)
            exchange = Exchange()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.send_request(client.prepare_request(REQUEST), exchange)
            await client.close()
            return exchange

        exchange = run(steps())
        for plug in plugs:
            plug.close()
    assert exchange.sent_at > 0
    assert exchange.connected_at == 0


def test_idle_connections_that_a_server_closes(serve: Any) -> None:
    server = serve(once(STREAM))

    async def steps(client: OpenAIClient) -> None:
        for _ in range(3):
            _, response = await ask(client)
            assert response.failure is None
            while client._pool._free[0].is_reusable:
                await asyncio.sleep(0.01)

    run(with_client(client_of(server.url), steps))
    assert server.num_connections == 3


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_close_that_the_loop_has_not_seen(serve: Any, loop: str) -> None:
    server = serve(once(STREAM))

    async def steps(client: OpenAIClient) -> None:
        await ask(client)
        # The connection ends while this loop does not look at the network.
        assert server.closed.wait(LONG_S)
        time.sleep(0.11)
        exchange, response = await ask(client)
        assert response.failure is None
        assert exchange.connected_at > exchange.sent_at

    run(with_client(client_of(server.url), steps), loop)


def test_surplus_connections_are_given_up(serve: Any) -> None:
    """A request gives up one of them, and takes the connection that was used last."""
    server = serve(always(STREAM))

    async def steps(client: OpenAIClient) -> list[int]:
        free = client._pool._free
        for connection in free:
            connection.idle_since -= 5_000_000_000
        sizes = []
        for _ in range(5):
            exchange, response = await ask(client)
            assert (response.failure, exchange.connected_at) == (None, 0)
            sizes.append(len(free))
        return sizes

    # At the first all have waited as long: that was a pause, and no surplus.
    assert run(with_client(client_of(server.url), steps, connections=4)) == [4, 3, 2, 1, 1]


def test_a_server_that_is_down_does_not_keep_open_waiting() -> None:
    async def steps() -> int:
        pool = ConnectionPool(parse_url("", f"http://127.0.0.1:{unused_port()}"), TlsOptions())
        await pool.open(100)
        return len(pool._free)

    assert run(steps()) == 0


# --- TLS ---


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that it has signed itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl program to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
         "-out", paths[0], "-keyout", paths[1]],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return paths


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(*certificate)
    return made


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_tls(serve: Any, tls: ssl.SSLContext, certificate: tuple[Path, Path], loop: str) -> None:
    server = serve(always(STREAM), context=tls)
    for trust in ({"ca_file": certificate[0]}, {"tls_insecure": True}):
        exchange, response = ask_once(server.url, loop, **trust)
        assert (response.failure, response.texts) == (None, ["a", "b"])
        assert exchange.connected_at == 0


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_self_signed_certificate(serve: Any, tls: ssl.SSLContext, loop: str) -> None:
    server = serve(always(STREAM), context=tls)
    _, response = ask_once(server.url, loop)
    assert response.failure is not None
    assert response.failure.kind is FailureKind.TLS
    assert response.failure.message == (
        f"the certificate of 127.0.0.1:{server.port} is not accepted: self-signed certificate; "
        "--ca-file names the certificate of a private authority, --tls-insecure accepts any"
    )
    assert server.requests == []


def test_a_certificate_of_another_host(
    serve: Any, tls: ssl.SSLContext, certificate: tuple[Path, Path]
) -> None:
    server = serve(always(STREAM), context=tls)
    kind, message = failure_of(f"https://localhost:{server.port}", ca_file=certificate[0])
    assert kind is FailureKind.TLS
    assert "Hostname mismatch" in message
    assert "localhost" in message


def test_tls_to_a_server_without(serve: Any) -> None:
    def script(visit: Visit) -> None:
        visit.connection.recv(65536)
        visit.send(answer(400, b""))
        visit.wait_for_end()

    kind, message = failure_of(serve(script).url.replace("http:", "https:"))
    assert kind is FailureKind.TLS
    assert "does not speak TLS; does its address begin with http://" in message


def test_a_handshake_that_the_server_breaks_off(serve: Any) -> None:
    def script(visit: Visit) -> None:
        visit.connection.recv(65536)

    kind, message = failure_of(serve(script).url.replace("http:", "https:"))
    assert kind is FailureKind.TLS
    assert "TLS" in message


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"\x15\x03\x01\x00\x02\x02\x46", FailureKind.TLS), (b"", FailureKind.CLOSED)],
)
def test_http_to_a_server_with_tls(serve: Any, data: bytes, kind: FailureKind) -> None:
    """Some send an alert, some only close."""
    found, message = failure_of(serve(once(data)).url)
    assert found is kind
    if data:
        assert "speaks TLS; does its address begin with https://" in message


def test_http_to_python_s_tls(serve: Any, tls: ssl.SSLContext) -> None:
    server = serve(always(STREAM), context=tls)
    kind, _ = failure_of(server.url.replace("https:", "http:"))
    assert kind in (FailureKind.TLS, FailureKind.CLOSED)


def test_a_ca_file_without_certificates(tmp_path: Path) -> None:
    path = tmp_path / "empty.pem"
    path.write_text("nothing")
    with pytest.raises(ConfigError, match=r"--ca-file: .*cannot be read as certificates"):
        run(client_of("https://127.0.0.1:1", ca_file=path).open(1))


# --- before the run ---


def test_the_model_is_found(serve: Any) -> None:
    server = serve(always(answer(200, MODELS, "Server: scripted/1")))
    for asked, found, owner in (("auto", "small", "me"), (None, "small", "me"), ("large", "large", None)):  # fmt: skip
        client = client_of(server.url, model=asked)
        client.start_service(context())
        assert client.config.model == found
        assert client.describe_service() == {
            "url": f"{server.url}/v1/completions",
            "model": found,
            "server": "scripted/1",
            "owned_by": owner,
        }
        client.stop_service()
    assert server.requests[0].startswith(b"GET /v1/models HTTP/1.1\r\n")


def test_a_model_that_the_server_does_not_name(serve: Any) -> None:
    notes: list[str] = []

    class Listener(Silence):
        def note(self, text: str) -> None:
            notes.append(text)

    client = client_of(serve(always(answer(200, MODELS))).url, model="huge")
    client.start_service(context(progress=Listener()))
    assert client.config.model == "huge"
    assert notes == ["The server does not name 'huge' among its models: small, large"]


@pytest.mark.parametrize("body", [b"{}", b"garbage", b'{"data": [7]}'])
def test_no_list_of_models(serve: Any, body: bytes) -> None:
    for status in (200, 404):
        server = serve(always(answer(status, body)))
        client_of(server.url).start_service(context())
        with pytest.raises(ConfigError, match="--model: is needed"):
            client_of(server.url, model="auto").start_service(context())


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_accepted(
    serve: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    body = b'{"error": {"message": "wrong: ' + KEY.encode() + b'"}}'
    server = serve(always(answer(status, body)))
    with pytest.raises(RunError) as caught:
        client_of(server.url).start_service(context())
    assert caught.value.message == (
        f"The server does not accept the API key in OPENAI_API_KEY (HTTP {status}: wrong: ***)"
    )
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RunError, match="wants an API key, and OPENAI_API_KEY is not set"):
        client_of(server.url).start_service(context())


def test_servers_that_are_not_ready(serve: Any, tls: ssl.SSLContext) -> None:
    with pytest.raises(RunError, match="cannot be used: nobody listens"):
        client_of(f"http://127.0.0.1:{unused_port()}").start_service(context())
    server = serve(always(answer(503, b'{"error": {"message": "Loading"}}')))
    with pytest.raises(RunError, match="is not ready: HTTP 503: Loading"):
        client_of(server.url).start_service(context())
    with pytest.raises(RunError, match=r"cannot be used: the certificate .* self-signed"):
        client_of(serve(always(b""), context=tls).url).start_service(context())
    server = serve(Visit.wait_for_end)
    with pytest.raises(RunError, match=r"has not answered within 0\.3 s"):
        client_of(server.url).start_service(context(timeout_s=0.3))
    assert server.ended.wait(LONG_S)


def test_ctrl_c_while_it_is_asked(serve: Any) -> None:
    def stop() -> None:
        raise Interrupted(2)

    server = serve(Visit.wait_for_end)
    started_at = time.monotonic()
    with pytest.raises(Interrupted):
        client_of(server.url).start_service(context(raise_if_stopped=stop, timeout_s=LONG_S))
    assert time.monotonic() - started_at < LONG_S / 2


def test_a_key_that_leaves_the_machine_unencrypted() -> None:
    notes: list[str] = []

    class Listener(Silence):
        def note(self, text: str) -> None:
            notes.append(text)

    client = client_of("http://no-such-host.invalid:8000")
    with pytest.raises(RunError):
        client.start_service(context(progress=Listener()))
    assert len(notes) == 1
    assert "OPENAI_API_KEY goes to no-such-host.invalid:8000 unencrypted" in notes[0]
    assert KEY not in notes[0]


# --- azureml ---


def azureml(url: str) -> AzureMLClient:
    values: dict[str, Any] = {"api_url": f"{url}/score", "deployment_name": "blue"}
    return AzureMLClient(AzureMLConfig(**values, api_key=KEY))


def test_azureml(serve: Any) -> None:
    server = serve(always(answer(200, b'[{"0": "text"}]')))
    client = azureml(server.url)
    client.start_service(context(streaming=False))

    async def steps() -> tuple[Exchange, Response]:
        await client.open(1)
        exchange = Exchange()
        prepared = client.prepare_request(replace(REQUEST, is_streaming=False))
        await client.send_request(prepared, exchange)
        await client.close()
        return exchange, client.process_response(exchange)

    exchange, response = run(steps())
    assert response == Response(content_times=[exchange.ended_at], texts=["text"])
    assert len(server.requests) == 2
    assert KEY not in repr(client.describe_service())


def test_azureml_that_fails_is_asked_once(serve: Any) -> None:
    server = serve(always(answer(401, b"no " + KEY.encode())))
    with pytest.raises(RunError) as caught:
        azureml(server.url).start_service(context(streaming=False))
    assert caught.value.message == (
        "The server does not accept the API key in --api-key (HTTP 401: no ***)"
    )
    server = serve(always(answer(500, b"oh")))
    with pytest.raises(RunError, match="The endpoint cannot be used: HTTP 500: oh"):
        azureml(server.url).start_service(context(streaming=False))
    assert len(server.requests) == 1
