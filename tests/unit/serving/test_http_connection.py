"""One connection, fed with recorded answers that are cut anywhere."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httptools", reason="HTTP endpoints need the serving extra")

from flexbench.core.endpoint import Exchange, FailureKind
from flexbench.http_endpoint.address import parse_url
from flexbench.http_endpoint.connection import MAX_HEAD_BYTES, Connection
from flexbench.http_endpoint.head import AnswerHead, posting, request_head, with_body

URL = parse_url("", "http://example.org:8000/v1")

CHUNKED = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"b\r\ndata: one\n\n\r\n7;x=y\r\ndata: t\r\n4\r\nwo\n\n\r\n0\r\ntrailer: x\r\n\r\n"
)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + PLAIN
CLOSING = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
UNTIL_END = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello"
OLD = b"HTTP/1.0 200 OK\r\n\r\nhello"


class Waiter:
    """As much of a future as a connection needs."""

    is_set = False

    def done(self) -> bool:
        return self.is_set

    def set_result(self, _result: None) -> None:
        self.is_set = True


class Transport:
    """Takes what is written, and knows whether it was ended."""

    def __init__(self) -> None:
        self.written = b""
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True


class Talk:
    """A connection with a request on it."""

    def __init__(self) -> None:
        self.transport: Any = Transport()
        self.connection = Connection(URL)
        self.connection.connection_made(self.transport)
        self.send()

    def send(self) -> None:
        self.exchange, self.waiter = Exchange(), Waiter()
        waiter: Any = self.waiter
        self.connection.send(b"request", self.exchange, waiter)

    def receive(self, pieces: Iterable[bytes]) -> Talk:
        for piece in pieces:
            self.connection.data_received(piece)
        return self

    def end(self, error: Exception | None = None) -> Talk:
        if error is None:
            self.connection.eof_received()
        self.connection.connection_lost(error)
        return self

    @property
    def body(self) -> bytes:
        return b"".join(self.exchange.pieces)


def cut(text: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges) if a < b]


@pytest.mark.parametrize(
    ("answer", "body", "is_kept"),
    [
        (CHUNKED, b"data: one\n\ndata: two\n\n", True),
        (PLAIN, b"hello", True),
        (INTERIM, b"hello", True),
        (CLOSING, b"hello", False),
    ],
)
def test_answers_cut_at_every_byte(answer: bytes, body: bytes, is_kept: bool) -> None:
    everywhere = [bytes([byte]) for byte in answer]
    for pieces in (
        [answer],
        everywhere,
        *([answer[:i], answer[i:]] for i in range(1, len(answer))),
    ):
        talk = Talk()
        talk.receive(pieces[:-1])
        assert not talk.waiter.is_set
        assert talk.exchange.ended_at == 0
        talk.receive(pieces[-1:])
        assert talk.waiter.is_set
        assert talk.body == body
        assert (talk.exchange.status, talk.exchange.failure) == (200, None)
        assert talk.connection.is_reusable is is_kept
        assert len(talk.exchange.arrivals) == len(talk.exchange.pieces)
        assert sorted(talk.exchange.arrivals) == talk.exchange.arrivals
        assert talk.exchange.ended_at >= talk.exchange.arrivals[-1] > 0


@given(cuts=st.lists(st.integers(min_value=1, max_value=700), max_size=12))
def test_answers_one_after_another(cuts: list[int]) -> None:
    talk = Talk()
    for answer in (CHUNKED, INTERIM, PLAIN, CHUNKED):
        talk.receive(cut(answer, cuts))
        assert talk.waiter.is_set
        assert talk.exchange.failure is None
        assert talk.body in (b"hello", b"data: one\n\ndata: two\n\n")
        assert talk.connection.is_reusable
        talk.send()
    assert talk.transport.written == b"request" * 5


def test_pieces_are_chunks() -> None:
    talk = Talk().receive([CHUNKED])
    assert talk.exchange.pieces == [b"data: one\n\n", b"data: t", b"wo\n\n"]
    assert len(set(talk.exchange.arrivals)) == 1  # all came at once


@pytest.mark.parametrize("answer", [UNTIL_END, OLD, UNTIL_END.replace(b"Content-Type", b"Upgrade")])
def test_bodies_that_end_with_the_connection(answer: bytes) -> None:
    for pieces in ([answer], [bytes([byte]) for byte in answer]):
        talk = Talk().receive(pieces)
        assert not talk.waiter.is_set
        talk.end()
        assert talk.waiter.is_set
        assert (talk.body, talk.exchange.failure) == (b"hello", None)
        assert talk.exchange.ended_at > 0
        assert not talk.connection.is_reusable


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed the connection without an answer"),
        (b"HTTP/1.1 200 O", "within the head of its answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "within the head of its answer"),
        (PLAIN[:-1], "before the end of its answer, 42 bytes after its begin"),
        (CHUNKED[:-1], "before the end of its answer"),
        (CHUNKED[:90], "before the end of its answer"),
    ],
)
def test_connections_that_end_too_early(answer: bytes, words: str) -> None:
    for error in (None, ConnectionResetError()):
        talk = Talk().receive([answer] if answer else []).end(error)
        assert talk.waiter.is_set
        assert talk.exchange.failure is not None
        assert talk.exchange.failure.kind is FailureKind.CLOSED
        assert talk.exchange.failure.message.startswith("example.org:8000 closed the connection")
        assert words in talk.exchange.failure.message
        assert talk.exchange.ended_at == 0
        assert not talk.connection.is_reusable


def test_a_reset_does_not_end_a_body() -> None:
    failure = Talk().receive([UNTIL_END]).end(ConnectionResetError()).exchange.failure
    assert failure is not None
    assert failure.kind is FailureKind.CLOSED


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", FailureKind.MALFORMED, "example.org:8000 does not answer in HTTP/1.1"),
        (b"\x00\x01\x02", FailureKind.MALFORMED, "does not answer in HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", FailureKind.MALFORMED, "does not answer in HTTP/1.1"),
        (CHUNKED.replace(b"7;x=y", b"zz"), FailureKind.MALFORMED, "does not answer in HTTP/1.1"),
        (b"HTTP/1.1 101 Switch\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\nPRI", FailureKind.MALFORMED, "another protocol"),
        (b"\x15\x03\x03\x00\x02\x02\x46", FailureKind.TLS, "speaks TLS; does its address begin with https://"),
        (b"HTTP/1.1 302 Found\r\nLocation: https://u:p@other.example/x?key=k\r\nContent-Length: 0\r\n\r\n", FailureKind.MALFORMED, "HTTP 302: redirected to the host 'other.example'; not followed"),
        (b"HTTP/1.1 307 X\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n", FailureKind.MALFORMED, "redirected to the host 'example.org'"),
        (b"HTTP/1.1 307 X\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n", FailureKind.MALFORMED, "redirected to the host 'example.org'"),
    ],
)  # fmt: skip
def test_what_is_no_answer(answer: bytes, kind: FailureKind, words: str) -> None:
    for pieces in ([answer], [bytes([byte]) for byte in answer]):
        talk = Talk()
        for piece in pieces:
            talk.receive([piece])
            if talk.waiter.is_set:
                break
        assert talk.waiter.is_set
        assert talk.exchange.failure is not None
        assert talk.exchange.failure.kind is kind
        assert words in talk.exchange.failure.message
        if kind is FailureKind.TLS or "HTTP/1.1" in words:
            assert talk.transport.is_aborted


def test_a_head_without_end() -> None:
    talk = Talk().receive([b"HTTP/1.1 200 OK\r\n"])
    header = b"x-filler: " + b"a" * 1000 + b"\r\n"
    sent = 0
    while not talk.waiter.is_set:
        talk.receive([header])
        sent += len(header)
        assert sent < 2 * MAX_HEAD_BYTES
    assert talk.exchange.failure is not None
    assert talk.exchange.failure.kind is FailureKind.MALFORMED
    assert talk.exchange.failure.message == "the head of the answer is longer than 64 KiB"
    assert talk.transport.is_aborted


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexbench.http_endpoint.connection.MAX_ANSWER_BYTES", 1 << 20)
    talk = Talk().receive([UNTIL_END])
    for _ in range(16):
        assert not talk.waiter.is_set
        talk.receive([b"a" * (1 << 16)])
    assert talk.exchange.failure is not None
    assert talk.exchange.failure.message == "the answer is longer than 1 MiB"


@pytest.mark.parametrize("extra", [b"H", PLAIN, b"\x00"])
def test_what_nobody_asked_for(extra: bytes) -> None:
    """The answer counts; the connection is not used again."""
    at_once = Talk().receive([PLAIN + extra])
    assert at_once.body == b"hello"
    assert at_once.exchange.failure is None
    assert at_once.transport.is_aborted
    assert not at_once.connection.is_reusable
    later = Talk().receive([PLAIN])
    assert later.connection.is_reusable
    later.receive([extra])
    assert later.transport.is_aborted
    assert not later.connection.is_reusable


def test_the_end_of_an_idle_connection() -> None:
    talk = Talk().receive([PLAIN])
    talk.connection.eof_received()
    assert not talk.connection.is_reusable


def test_heads_of_requests() -> None:
    head = request_head(URL, "GET", key="sk-1").decode()
    assert head.startswith("GET /v1 HTTP/1.1\r\nHost: example.org:8000\r\n")
    assert "\r\nAuthorization: Bearer sk-1\r\n" in head
    assert "\r\nAccept-Encoding: identity\r\n" in head
    assert "Authorization" not in request_head(URL, "GET").decode()
    whole = with_body(posting(URL, headers={"X-A": "b"}), b"{}")
    assert whole.endswith(
        b"\r\nX-A: b\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )


def test_heads_of_answers() -> None:
    head = AnswerHead([INTERIM])
    assert head.headers == {"content-length": "5"}
    assert not head.ends_with_connection
    assert not AnswerHead([CHUNKED]).ends_with_connection
    assert AnswerHead([UNTIL_END]).ends_with_connection
    assert AnswerHead([OLD[:10], OLD[10:]]).ends_with_connection


def test_cancelled_waiters_are_left_alone() -> None:
    async def cancel() -> Exchange:
        connection, transport, exchange = Connection(URL), Transport(), Exchange()
        connection.connection_made(transport)  # type: ignore[arg-type]
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection.send(b"request", exchange, waiter)
        waiter.cancel()
        connection.data_received(PLAIN)
        return exchange

    assert asyncio.run(cancel()).ended_at > 0
