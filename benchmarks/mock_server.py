"""A scripted OpenAI-compatible HTTP server that knows the truth about what it did.

Its times to first token and between tokens, its capacity and its faults are options, and it notes
when each request was there and when each token was written. What a load generator reports can so be
held against what happened. It listens on 127.0.0.1 only, and prints one line of JSON with its port
as soon as it does.

    .venv/bin/python benchmarks/mock_server.py --port 8000 --ttft 50ms --itl 5ms --capacity 8
    .venv/bin/python benchmarks/mock_server.py --fault 429:every=3 --fault close-mid-stream:from=20

    GET  /mock/truth             JSON; with ?summary=1 without the single requests
    POST /mock/reset             forget everything noted so far
    SIGTERM                      print the truth, or write it to --truth FILE, and end

All times are time.monotonic_ns, which processes of one machine share. One process with a
loop of its own on epoll: uvloop's timers have milliseconds, and it writes later than it is told to.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import select
import signal
import socket
import ssl
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from flexbench.core.errors import ConfigError
from flexbench.core.units import parse_seconds

HOST = "127.0.0.1"
DEFAULT_TOKENS = 16
MAX_HEAD_BYTES = 64 * 1024
# Timers that are due within this are served together: fewer turns of the loop, lateness below it.
TICK_NS = 100_000
# How long the rest of an event that a fault cuts in two comes after its first part.
CUT_DELAY_NS = 1_000_000
_PARENT_CHECK_S = 0.5
_SECOND_NS = 1_000_000_000
_NO_LINGER = struct.pack("ii", 1, 0)
_GENERATION_PATHS = {"/v1/completions": False, "/v1/chat/completions": True}
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


# --- what it is told to do ---


class FaultKind(StrEnum):
    """What goes wrong with a request."""

    REFUSE_AFTER = "refuse-after"  # stops listening and closes all connections: killed
    SLOW = "slow"  # never answers
    CLOSE_BEFORE = "close-before"  # closes the connection instead of an answer
    RESET = "reset"  # the same, with a TCP reset
    CLOSE_HEAD = "close-head"  # closes it within the head of the response
    CLOSE_MID_STREAM = "close-mid-stream"  # closes it after half of the tokens
    STALL_MID_STREAM = "stall-mid-stream"  # sends nothing more after half of the tokens
    GARBAGE_HTTP = "garbage-http"  # bytes that are no HTTP
    GARBAGE_JSON = "garbage-json"  # status 200, and a body that is no JSON and no stream
    GARBAGE_EVENT = "garbage-event"  # one event of the stream is no JSON
    RATE_LIMITED = "429"
    INTERNAL = "500"
    UNAVAILABLE = "503"
    ERROR_EVENT = "error-event"  # an error is an event of the stream, after half of the tokens
    EMPTY = "empty"  # well-formed, without a token
    NO_DONE = "no-done"  # all tokens, and no [DONE]
    CUT_UTF8 = "cut-utf8"  # nothing wrong: chunks and writes end within a character


@dataclass(frozen=True)
class Fault:
    """A fault, and which requests it happens to: number `first`, and every `every`th from there."""

    kind: FaultKind
    every: int = 1
    first: int = 0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read KIND[:every=N][:from=N]."""
        kind, *settings = text.split(":")
        values = {"every": 1, "from": 0}
        for setting in settings:
            name, equals, value = setting.partition("=")
            if name not in values or not equals or not value.isdigit():
                raise argparse.ArgumentTypeError(f"'{setting}' is not every=N or from=N")
            values[name] = int(value)
        if kind not in list(FaultKind) or values["every"] < 1:
            kinds = ", ".join(FaultKind)
            raise argparse.ArgumentTypeError(f"'{text}' is not KIND[:every=N][:from=N], of {kinds}")
        return cls(FaultKind(kind), values["every"], values["from"])

    def happens_to(self, number: int) -> bool:
        """Whether it happens to the request of this number, counted from 0."""
        return number >= self.first and (number - self.first) % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Script:
    """How requests are answered. Times in nanoseconds."""

    ttft_ns: int = 0
    itl_ns: int = 0
    tokens: int | None = None
    """Of every answer; None: as many as the request asks for."""
    capacity: int | None = None
    """Requests that are served at once; the others wait in line. None: any number."""
    tokens_per_chunk: int = 1
    model: str = "m"
    usage: bool = True
    """Whether token counts are told, in a stream if it is asked for."""
    api_key: str | None = None
    faults: tuple[Fault, ...] = ()

    def fault_of(self, number: int) -> FaultKind | None:
        """What goes wrong with the request of this number."""
        for fault in self.faults:
            if fault.happens_to(number):
                return fault.kind
        return None


# --- the truth ---


class Served:
    """A request as the server saw it. Times are 0 for what has not happened."""

    __slots__ = (
        "arrived",
        "connection",
        "ended",
        "outcome",
        "prompt_bytes",
        "prompt_crc32",
        "request_id",
        "started",
        "status",
        "streaming",
        "times",
        "tokens",
    )

    def __init__(self, connection: int, arrived: int, request_id: str) -> None:
        self.connection = connection
        self.arrived = arrived
        self.request_id = request_id
        self.prompt_crc32 = 0
        self.prompt_bytes = 0
        self.started = 0
        self.ended = 0
        self.outcome = "in flight"
        self.status = 0
        self.streaming = False
        self.times: list[int] = []
        self.tokens = 0

    def row(self) -> dict[str, Any]:
        """As JSON: all times in nanoseconds of time.monotonic_ns, null for what did not happen."""
        return {
            "connection": self.connection,
            "request_id": self.request_id,
            "prompt_crc32": self.prompt_crc32,
            "prompt_bytes": self.prompt_bytes,
            "streaming": self.streaming,
            "arrived_ns": self.arrived,
            "started_ns": self.started or None,
            "written_ns": self.times,
            "ended_ns": self.ended or None,
            "tokens": self.tokens,
            "status": self.status or None,
            "outcome": self.outcome,
        }


def in_flight(spans: Sequence[tuple[int, int]], since: int, until: int) -> dict[str, float]:
    """How many of `spans` were open from `since` to `until`: the average over time, and the most.

    Spans are (begin, end); times are integers of one unit.
    """
    clipped = [(max(a, since), min(b, until)) for a, b in spans if a < until and b > since]
    # At the same instant, what ends goes before what begins.
    steps = sorted([(a, 1) for a, _ in clipped] + [(b, -1) for _, b in clipped])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    total = sum(b - a for a, b in clipped)
    return {"mean": total / (until - since) if until > since else 0.0, "max": most}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in order, the one that `share` of them do not exceed (nearest rank); nan: none."""
    if not ordered:
        return float("nan")
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


class Truth:
    """What the server did since the last reset."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.reset()

    def reset(self) -> None:
        """Forget what was noted."""
        self.requests: list[Served] = []
        self.num_connections = 0
        self.open_connections: set[int] = set()
        self.most_connections = 0
        self._since = time.monotonic_ns()
        self._cpu = time.process_time()

    def connected(self, number: int) -> None:
        """Note a connection that was opened."""
        self.num_connections += 1
        self.open_connections.add(number)
        self.most_connections = max(self.most_connections, len(self.open_connections))

    def lateness_ns(self) -> list[int]:
        """By how much writes came after their time, in order."""
        script = self._script
        late = []
        for served in self.requests:
            if not served.started or served.outcome == FaultKind.CUT_UTF8:
                continue
            for number, written in enumerate(served.times):
                last_token = (
                    number * script.tokens_per_chunk if served.streaming else served.tokens - 1
                )
                due = served.started + script.ttft_ns + last_token * script.itl_ns
                late.append(written - due)
        return sorted(late)

    def summary(self) -> dict[str, Any]:
        """Without the single requests. Lateness in milliseconds, times in ns, the rest in s."""
        now = time.monotonic_ns()
        late = self.lateness_ns()
        spans = [(served.arrived, served.ended or now) for served in self.requests]
        first = min((a for a, _ in spans), default=0)
        last = max((b for _, b in spans), default=0)
        outcomes: dict[str, int] = {}
        for served in self.requests:
            outcomes[served.outcome] = outcomes.get(served.outcome, 0) + 1
        return {
            "num_requests": len(self.requests),
            "outcomes": outcomes,
            "first_ns": first,
            "last_ns": last,
            "in_flight": in_flight(spans, first, last),
            "lateness_ms": {
                name: percentile(late, share) / 1e6 if late else None
                for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
            },
            "num_writes": len(late),
            "connections": {"opened": self.num_connections, "max_open": self.most_connections},
            "cpu_s": time.process_time() - self._cpu,
            "wall_s": (now - self._since) / 1e9,
        }

    def to_json(self, *, with_requests: bool) -> bytes:
        """Everything as JSON."""
        summary = self.summary()
        if with_requests:
            summary["requests"] = [served.row() for served in self.requests]
        return json.dumps(summary).encode()


# --- what it says ---


def head(status: int, content_type: str, length: int | None, extra: str = "") -> bytes:
    """The head of a response; without a length its body comes in chunks."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n{size}\r\n"
    return (lines + extra + "\r\n").encode()


def chunk(body: bytes) -> bytes:
    """One chunk of a body."""
    return b"%x\r\n%s\r\n" % (len(body), body)


def event(value: Any) -> bytes:
    """One server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def whole(status: int, value: Any, extra: str = "") -> bytes:
    """A response that is JSON."""
    body = json.dumps(value, ensure_ascii=False).encode()
    return head(status, "application/json", len(body), extra) + body


def error_response(status: int, message: str, extra: str = "") -> bytes:
    """A response that says what went wrong, as OpenAI's do."""
    kind = _REASONS[status].lower().replace(" ", "_")
    return whole(status, {"error": {"message": message, "type": kind, "code": status}}, extra)


STREAM_HEAD = head(200, "text/event-stream; charset=utf-8", None, "Cache-Control: no-cache\r\n")
DONE = chunk(event("[DONE]"))
LAST_CHUNK = b"0\r\n\r\n"
ERROR_VALUE = {"error": {"message": "the engine died", "type": "internal_error", "code": 500}}


class Wording:
    """The JSON of answers, with what is said often written once."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def _base(self, is_chat: bool, streaming: bool) -> dict[str, Any]:
        kind = "chat.completion" if is_chat else "text_completion"
        return {
            "id": "chatcmpl-1" if is_chat else "cmpl-1",
            "object": kind + ".chunk" * (is_chat and streaming),
            "created": 1,
            "model": self._script.model,
        }

    def event_of(self, is_chat: bool, text: str | None, finish: str | None = None) -> bytes:
        """An event with text; of a chat without text, it says the role."""
        choice: dict[str, Any] = {"index": 0}
        if not is_chat:
            choice["text"] = text or ""
        elif finish is not None and not text:
            choice["delta"] = {}
        else:
            role = {"role": "assistant"} if text is None else {}
            choice["delta"] = {**role, "content": text or ""}
        choice |= {"logprobs": None, "finish_reason": finish}
        return event({**self._base(is_chat, True), "choices": [choice]})

    @lru_cache(maxsize=256)  # noqa: B019 - there is one Wording a process
    def piece(self, is_chat: bool, text: str) -> bytes:
        """The chunk of an event with text."""
        return chunk(self.event_of(is_chat, text))

    @lru_cache(maxsize=1024)  # noqa: B019
    def ending(self, is_chat: bool, usage: tuple[int, int] | None, with_done: bool) -> bytes:
        """What comes after the last token: why it ends, counts if they are asked for, [DONE]."""
        finish = "stop" if usage is not None and usage[1] == 0 else "length"
        said = chunk(self.event_of(is_chat, "", finish))
        if usage is not None:
            value = {**self._base(is_chat, True), "choices": [], "usage": _usage(*usage)}
            said += chunk(event(value))
        return said + (DONE if with_done else b"") + LAST_CHUNK

    @lru_cache(maxsize=1024)  # noqa: B019
    def answer(self, is_chat: bool, text: str, usage: tuple[int, int] | None) -> bytes:
        """The answer at once."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None}
        if is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice["finish_reason"] = "length" if text else "stop"
        value = {**self._base(is_chat, False), "choices": [choice]}
        return whole(200, value | ({} if usage is None else {"usage": _usage(*usage)}))


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


# --- the loop ---


class Loop:
    """Readiness of sockets and timers, in one thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.is_running = True

    def watch(self, descriptor: int, handler: Callable[[int], None]) -> None:
        """Call `handler` with epoll's flags when something can be read."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, select.EPOLLIN)

    def want_write(self, descriptor: int, wanted: bool) -> None:
        """Call the handler as well when something can be written, or no longer."""
        flags = select.EPOLLIN | (select.EPOLLOUT if wanted else 0)
        self._epoll.modify(descriptor, flags)

    def forget(self, descriptor: int) -> None:
        """No longer watch it."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def at(self, due: int, action: Callable[[], None]) -> None:
        """Call `action` at a time of time.monotonic_ns, not before."""
        heapq.heappush(self._timers, (due, next(self._numbers), action))

    def run(self) -> None:
        """Until `is_running` is False."""
        epoll, handlers, timers = self._epoll, self._handlers, self._timers
        while self.is_running:
            wait_ns = self._wait_ns()
            if 0 < wait_ns < 10_000_000:
                # epoll_wait has milliseconds, select microseconds, and an epoll can be selected.
                select.select([epoll], (), (), wait_ns / _SECOND_NS)
                wait_ns = 0
            for descriptor, flags in epoll.poll(wait_ns / _SECOND_NS if wait_ns > 0 else 0):
                handler = handlers.get(descriptor)  # an earlier one may have closed it
                if handler is not None:
                    handler(flags)
            while timers and timers[0][0] <= time.monotonic_ns():
                heapq.heappop(timers)[2]()

    def _wait_ns(self) -> int:
        if not self._timers:
            return _SECOND_NS
        now = time.monotonic_ns()
        due = self._timers[0][0]
        if due <= now:
            return 0
        # Of a heap the first is the earliest; what comes up to a tick later goes with it.
        return min(-(-due // TICK_NS) * TICK_NS - now, _SECOND_NS)


# --- connections ---


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What is needed of the head of a request."""

    method: str
    path: str
    query: str
    content_length: int
    keep_alive: bool
    authorization: str
    request_id: str
    is_chunked: bool


@lru_cache(maxsize=1024)  # a client's heads are mostly the same
def parse_head(raw: bytes) -> RequestHead:
    """Read the head of a request, without the empty line. ValueError: it is none."""
    first, *lines = raw.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ValueError(line)
        headers[name.lower()] = value.strip()
    path, _, query = target.partition("?")
    connection = headers.get("connection", "").lower()
    return RequestHead(
        method=method,
        path=path,
        query=query,
        content_length=int(headers.get("content-length", "0")),
        keep_alive=connection != "close" if version == "HTTP/1.1" else connection == "keep-alive",
        authorization=headers.get("authorization", ""),
        request_id=headers.get("x-request-id", ""),
        is_chunked="chunked" in headers.get("transfer-encoding", "").lower(),
    )


def take_chunked(data: bytes) -> tuple[bytes, int] | None:
    """The body at the start of `data` and the bytes that it takes there; None: not all is there."""
    body, at = b"", 0
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        size = int(data[at:end].split(b";")[0], 16)
        at = end + 2 + size + 2
        if len(data) < at:
            return None
        if size == 0:
            return body, at
        body += data[end + 2 : end + 2 + size]


class Connection:
    """One client's connection: takes requests one after the other, and writes."""

    def __init__(self, server: Server, raw: socket.socket, number: int) -> None:
        self._server = server
        self._loop = server.loop
        self.number = number
        self._received = b""
        self._unsent = b""
        self._handshaking = server.tls is not None
        self._closing = False
        self.is_open = True
        self.keep_alive = True
        self.answer: Answer | None = None
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = raw
        if server.tls is not None:
            self._socket = server.tls.wrap_socket(
                raw, server_side=True, do_handshake_on_connect=False
            )
        self._descriptor = self._socket.fileno()
        self._loop.watch(self._descriptor, self._on_ready)

    def _on_ready(self, flags: int) -> None:
        if self._handshaking and not self._shake_hands():
            return
        if flags & select.EPOLLOUT:
            self._flush()
        if self.is_open and flags & ~select.EPOLLOUT:
            self._read()

    def _shake_hands(self) -> bool:
        assert isinstance(self._socket, ssl.SSLSocket)
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self._loop.want_write(self._descriptor, True)
            return False
        except OSError:  # SSLError is one
            self.close()
            return False
        self._handshaking = False
        self._loop.want_write(self._descriptor, False)
        return True

    def _read(self) -> None:
        try:
            data = self._socket.recv(262144)
            while isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
                data += self._socket.recv(262144)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._received = self._received + data if self._received else data
        self.take_requests()

    def take_requests(self) -> None:
        """Serve what has arrived completely, one request after the other."""
        while self._received and self.answer is None and self.is_open and not self._closing:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                if len(self._received) > MAX_HEAD_BYTES:
                    self._refuse()
                return
            try:
                parsed = parse_head(self._received[:end])
                taken = self._take_body(parsed, end + 4)
            except ValueError:
                self._refuse()
                return
            if taken is None:
                return
            self.keep_alive = parsed.keep_alive
            self._server.serve(self, parsed, taken)

    def _take_body(self, parsed: RequestHead, start: int) -> bytes | None:
        if parsed.is_chunked:
            found = take_chunked(self._received[start:])
            if found is None:
                return None
            body, size = found
        else:
            size = parsed.content_length
            if len(self._received) < start + size:
                return None
            body = self._received[start : start + size]
        self._received = self._received[start + size :]
        return body

    def _refuse(self) -> None:
        self.write(error_response(400, "this is no HTTP request"))
        self.close_after_writing()

    @property
    def has_more(self) -> bool:
        """Whether something was received that is not served yet."""
        return bool(self._received)

    def finish_answer(self) -> None:
        """The answer is written: go on with the next request."""
        self.answer = None
        if not self.keep_alive:
            self.close_after_writing()

    def write(self, data: bytes) -> None:
        """Write now; what does not fit is written when it does."""
        if not self.is_open:
            return
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self._unsent = data[sent:]
            self._loop.want_write(self._descriptor, True)

    def _flush(self) -> None:
        data, self._unsent = self._unsent, b""
        self._loop.want_write(self._descriptor, False)
        if data:
            self.write(data)
        if self._closing and not self._unsent:
            self.close()

    def close_after_writing(self) -> None:
        """Close as soon as everything is written."""
        if self._unsent:
            self._closing = True
        else:
            self.close()

    def close(self, *, reset: bool = False) -> None:
        """Close now; `reset`: the client gets a reset instead of an end."""
        if not self.is_open:
            return
        self.is_open = False
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._loop.forget(self._descriptor)
        self._socket.close()
        self._server.disconnected(self)
        if self.answer is not None:
            self.answer.end("closed by client")


class Answer:
    """The answer to one generation request, from its arrival to its end."""

    def __init__(
        self, server: Server, connection: Connection, served: Served, asked: dict[str, Any]
    ) -> None:
        script = server.script
        self._server = server
        self._connection = connection
        self._served = served
        self._is_chat: bool = asked["is_chat"]
        self.fault: FaultKind | None = asked["fault"]
        self._tokens: int = 0 if self.fault is FaultKind.EMPTY else asked["tokens"]
        self._k = script.tokens_per_chunk
        self._text = "€" if self.fault is FaultKind.CUT_UTF8 else "x"
        self._written = 0
        self._head: bytes = STREAM_HEAD
        self._rest: bytes | None = None
        self._usage = (served.prompt_bytes, self._tokens) if asked["usage"] else None
        self._has_ended = False

    def start(self) -> None:
        """Its turn has come."""
        served, loop = self._served, self._server.loop
        script = self._server.script
        served.started = time.monotonic_ns()
        if self.fault is FaultKind.SLOW:
            return
        if not served.streaming:
            due = served.started + script.ttft_ns + max(self._tokens - 1, 0) * script.itl_ns
            self._when(due, self._answer_at_once)
            return
        if self._is_chat:
            # As many servers do: who counts this as the first token is wrong by the whole TTFT.
            self._connection.write(STREAM_HEAD + chunk(self._server.wording.event_of(True, None)))
            self._head = b""
        if self._tokens == 0:
            self._when(served.started + script.ttft_ns, self._end_stream)
        else:
            loop.at(served.started + script.ttft_ns, self._next_token)

    def _when(self, due: int, action: Callable[[], None]) -> None:
        if due <= time.monotonic_ns():
            action()
        else:
            self._server.loop.at(due, action)

    def _answer_at_once(self) -> None:
        if self._has_ended:
            return
        wording = self._server.wording
        answer = wording.answer(self._is_chat, self._text * self._tokens, self._usage)
        outcome = "complete" if self.fault is None else str(self.fault)
        if self.fault is FaultKind.STALL_MID_STREAM:
            self._write(answer[: -len(answer) // 4])
            return
        if self.fault is FaultKind.CLOSE_MID_STREAM:
            ended = self._write(answer[: -len(answer) // 4])
            self._connection.keep_alive = False
        elif self.fault is FaultKind.ERROR_EVENT:
            ended = self._write(whole(200, ERROR_VALUE))
        else:
            ended = self._write(answer)
            self._served.tokens = self._tokens
        self.end(outcome, ended)

    def _write(self, data: bytes) -> int:
        """Returns when, as it is noted."""
        # Noted before: who reads it on another core may do so before `write` returns.
        now = time.monotonic_ns()
        self._served.times.append(now)
        self._connection.write(data)
        return now

    def _next_token(self) -> None:
        if self._has_ended:
            return
        served, script = self._served, self._server.script
        if self._rest is not None:
            rest, self._rest = self._rest, None
            self._write(rest)
        elif self.fault is not None and self._goes_wrong():
            return
        else:
            count = min(self._k, self._tokens - self._written)
            said = self._head + self._server.wording.piece(self._is_chat, self._text * count)
            self._head = b""
            self._written += count
            served.tokens = self._written
            if self.fault is FaultKind.CUT_UTF8:
                self._cut(said)
                return
            if self._written >= self._tokens:
                ended = self._write(said + self._ending())
                self.end("complete" if self.fault is None else str(self.fault), ended)
                return
            self._write(said)
        if self._written >= self._tokens:
            self._end_stream()
            return
        due = served.started + script.ttft_ns + self._written * script.itl_ns
        self._server.loop.at(due, self._next_token)

    def _cut(self, said: bytes) -> None:
        """Write an event in two, cut within its first character, in HTTP chunks of odd sizes."""
        start = said.rfind(b"data: ")
        body = said[start : said.rfind(b"\r\n")]
        at = body.index(self._text.encode()) + 1
        before = said[: said.rfind(b"\r\n", 0, start)]  # its chunk's size goes
        before = before[: before.rfind(b"\n") + 1]
        self._connection.write(before + chunk(body[:7]) + chunk(body[7:at]))
        self._rest = b"".join(chunk(body[i : i + 5]) for i in range(at, len(body), 5))
        self._server.loop.at(time.monotonic_ns() + CUT_DELAY_NS, self._next_token)

    def _goes_wrong(self) -> bool:
        """With half of the tokens out, let happen what is to. Whether the answer ends here."""
        if self._written < self._tokens // 2:
            return False
        if self.fault is FaultKind.CLOSE_MID_STREAM:
            self._connection.keep_alive = False
            self.end(self.fault)
        elif self.fault is FaultKind.STALL_MID_STREAM:
            pass
        elif self.fault is FaultKind.ERROR_EVENT:
            self._connection.write(self._head + chunk(event(ERROR_VALUE)) + DONE + LAST_CHUNK)
            self.end(self.fault)
        else:
            if self.fault is FaultKind.GARBAGE_EVENT:
                self._head += chunk(event('{"choices": [{"te'))
                self.fault = None  # once is enough
            return False
        return True

    def _ending(self) -> bytes:
        with_done = self.fault is not FaultKind.NO_DONE
        return self._server.wording.ending(self._is_chat, self._usage, with_done)

    def _end_stream(self) -> None:
        if self._has_ended:
            return
        ended = time.monotonic_ns()
        self._connection.write(self._head + self._ending())
        self.end("complete" if self.fault is None else str(self.fault), ended)

    def end(self, outcome: str, ended: int | None = None) -> None:
        """Note the end, now or when the last was written, and let the next one have the place."""
        if self._has_ended:
            return
        self._has_ended = True
        self._served.ended = time.monotonic_ns() if ended is None else ended
        self._served.outcome = outcome
        self._server.ended(self)
        if self._connection.is_open:
            self._connection.finish_answer()
            # Not called from here: many requests that are there already would nest as many calls.
            if self._connection.has_more:
                self._server.loop.at(0, self._connection.take_requests)


# --- the server ---


class Server:
    """Listens, decides which fault a request meets, and lets it wait for a place."""

    def __init__(self, script: Script, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.tls = tls
        self.loop = Loop()
        self.truth = Truth(script)
        self.wording = Wording(script)
        self._num_requests = 0
        self._serving: set[Answer] = set()
        self._waiting: deque[Answer] = deque()
        self._connections: dict[int, Connection] = {}
        self._numbers = itertools.count()
        self._listener = socket.create_server((HOST, port), backlog=4096)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.loop.watch(self._listener.fileno(), self._accept)

    def _accept(self, _flags: int) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            connection = Connection(self, accepted, next(self._numbers))
            self._connections[connection.number] = connection
            self.truth.connected(connection.number)

    def disconnected(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self._connections.pop(connection.number, None)
        self.truth.open_connections.discard(connection.number)

    def serve(self, connection: Connection, parsed: RequestHead, body: bytes) -> None:
        """Answer a request that is there completely."""
        arrived = time.monotonic_ns()
        is_chat = _GENERATION_PATHS.get(parsed.path)
        if is_chat is None or parsed.method != "POST":
            connection.write(self._other(parsed))
            connection.finish_answer()
            return
        if not self._is_authorized(parsed):
            connection.write(error_response(401, "Incorrect API key provided"))
            connection.finish_answer()
            return
        served = Served(connection.number, arrived, parsed.request_id)
        self.truth.requests.append(served)
        fault = self.script.fault_of(self._num_requests)
        self._num_requests += 1
        try:
            asked = self._read(body, is_chat, served)
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            self._answer_now(connection, served, 400, f"not understood: {type(problem).__name__}")
            return
        if fault is not None and self._fail_now(connection, served, fault):
            return
        asked["fault"] = fault
        answer = Answer(self, connection, served, asked)
        connection.answer = answer
        if self.script.capacity is None or len(self._serving) < self.script.capacity:
            self._serving.add(answer)
            answer.start()
        else:
            self._waiting.append(answer)

    def ended(self, answer: Answer) -> None:
        """Give the place of an answer to the next one in line."""
        if answer in self._serving:
            self._serving.discard(answer)
            if self._waiting:
                following = self._waiting.popleft()
                self._serving.add(following)
                following.start()
        else:
            with suppress(ValueError):
                self._waiting.remove(answer)

    def _is_authorized(self, parsed: RequestHead) -> bool:
        key = self.script.api_key
        return key is None or parsed.authorization == f"Bearer {key}"

    def _read(self, body: bytes, is_chat: bool, served: Served) -> dict[str, Any]:
        """What a body asks for."""
        asked = orjson.loads(body)
        if is_chat:
            prompt = "".join(str(message["content"]) for message in asked["messages"])
        else:
            prompt = asked["prompt"]
            prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        # A token is a byte of text; of a prompt in tokens it is one of these.
        text = prompt.encode() if isinstance(prompt, str) else bytes(str(prompt), "ascii")
        served.prompt_bytes = len(text) if isinstance(prompt, str) else len(prompt)
        served.prompt_crc32 = zlib.crc32(text)
        served.streaming = bool(asked.get("stream"))
        tokens = self.script.tokens
        if tokens is None:
            tokens = asked.get("max_completion_tokens") or asked.get("max_tokens") or DEFAULT_TOKENS
        options = asked.get("stream_options") or {}
        usage = self.script.usage and (not served.streaming or options.get("include_usage"))
        return {"is_chat": is_chat, "tokens": int(tokens), "usage": usage}

    def _other(self, parsed: RequestHead) -> bytes:
        """The answer to everything that does not ask for text."""
        match parsed.method, parsed.path:
            case ("GET", "/health"):
                return head(200, "text/plain", 0)
            case ("GET", "/v1/models"):
                model = {"id": self.script.model, "object": "model", "created": 1, "owned_by": "m"}
                return whole(200, {"object": "list", "data": [model]})
            case ("GET", "/mock/truth"):
                truth = self.truth.to_json(with_requests="summary" not in parsed.query)
                return head(200, "application/json", len(truth)) + truth
            case ("POST", "/mock/reset"):
                self.truth.reset()
                return whole(200, {})
            case (_, path) if path in _GENERATION_PATHS:
                return error_response(405, f"{path} wants POST")
            case _:
                return error_response(404, f"there is no {parsed.path}")

    def _answer_now(
        self, connection: Connection, served: Served, status: int, message: str, extra: str = ""
    ) -> None:
        served.status = status
        served.ended = time.monotonic_ns()
        connection.write(error_response(status, message, extra))
        served.outcome = str(status)
        connection.finish_answer()

    def _fail_now(self, connection: Connection, served: Served, fault: FaultKind) -> bool:
        """Let a fault happen that needs no answer. Whether it was one."""
        match fault:
            case FaultKind.RATE_LIMITED:
                self._answer_now(connection, served, 429, "slow down", "Retry-After: 1\r\n")
                return True
            case FaultKind.INTERNAL | FaultKind.UNAVAILABLE:
                self._answer_now(connection, served, int(fault), "the engine is not well")
                return True
            case FaultKind.REFUSE_AFTER:
                self._stop_listening()
            case FaultKind.CLOSE_BEFORE | FaultKind.RESET:
                connection.close(reset=fault is FaultKind.RESET)
            case FaultKind.CLOSE_HEAD:
                connection.write(STREAM_HEAD[:30])
                connection.close_after_writing()
            case FaultKind.GARBAGE_HTTP:
                connection.write(b"\x00\xff*** this is no HTTP ***\r\n\r\n")
                connection.close_after_writing()
            case FaultKind.GARBAGE_JSON:
                body = b"<html><body>Welcome</body></html>"
                connection.write(head(200, "text/html", len(body)) + body)
            case _:
                return False
        served.ended = time.monotonic_ns()
        served.outcome = str(fault)
        if connection.is_open:
            connection.finish_answer()
        return True

    def _stop_listening(self) -> None:
        self.loop.forget(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            connection.close()

    def run(self) -> None:
        """Until the loop is told to stop. What is in flight then stays so in the truth."""
        self.loop.run()
        self.loop.forget(self._listener.fileno())
        self._listener.close()


# --- the command ---


def nanoseconds(text: str) -> int:
    """Nanoseconds of '50ms', '2s' or '100us'."""
    try:
        return round(parse_seconds("time", text) * _SECOND_NS)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least_one(text: str) -> int:
    """An integer of 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer of 1 or more")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="KIND is one of: " + ", ".join(FaultKind),
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--ttft", type=nanoseconds, default="0s", help="time to first token: 50ms")
    parser.add_argument("--itl", type=nanoseconds, default="0s", help="between tokens: 5ms")
    parser.add_argument("--tokens", type=at_least_one, help="default: what the request asks for")
    parser.add_argument("--capacity", type=at_least_one, help="requests at once; default: any")
    parser.add_argument("--tokens-per-chunk", type=at_least_one, default=1)
    parser.add_argument("--model", default="m")
    parser.add_argument("--no-usage", action="store_true", help="never tell token counts")
    parser.add_argument("--api-key-env", metavar="NAME", help="variable with the key to ask for")
    parser.add_argument("--certificate", type=Path, help="TLS, with this PEM file and")
    parser.add_argument("--key", type=Path, help="this one")
    parser.add_argument(
        "--fault", type=Fault.parse, action="append", default=[], metavar="KIND[:every=N][:from=N]"
    )
    parser.add_argument("--truth", type=Path, help="where SIGTERM writes; default: standard output")
    parser.add_argument("--end-with-parent", action="store_true", help="end when the parent has")
    return parser


def make_script(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Script:
    """What the options say."""
    key = None
    if args.api_key_env is not None:
        key = os.environ.get(args.api_key_env)
        if not key:
            parser.error(f"--api-key-env: there is no variable {args.api_key_env}")
    return Script(
        ttft_ns=args.ttft,
        itl_ns=args.itl,
        tokens=args.tokens,
        capacity=args.capacity,
        tokens_per_chunk=args.tokens_per_chunk,
        model=args.model,
        usage=not args.no_usage,
        api_key=key,
        faults=tuple(args.fault),
    )


def end_with_parent(loop: Loop) -> None:
    """Look at every half second whether the parent is still the same."""
    parent = os.getppid()

    def look() -> None:
        if os.getppid() != parent or parent == 1:
            loop.is_running = False
        loop.at(time.monotonic_ns() + int(_PARENT_CHECK_S * _SECOND_NS), look)

    look()


def main() -> None:
    """Serve until SIGTERM or Ctrl-C, then tell the truth."""
    parser = make_parser()
    args = parser.parse_args()
    if (args.certificate is None) != (args.key is None):
        parser.error("--certificate and --key are given together")
    tls = None
    if args.certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(args.certificate, args.key)
    server = Server(make_script(parser, args), args.port, tls)

    # A signal does not interrupt select or poll for good: this wakes them.
    wake_reader, wake_writer = socket.socketpair()
    wake_writer.setblocking(False)
    signal.set_wakeup_fd(wake_writer.fileno())

    def stop(_signal: int, _frame: object) -> None:
        server.loop.is_running = False

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.loop.watch(wake_reader.fileno(), lambda _flags: None)
    if args.end_with_parent:
        end_with_parent(server.loop)
    scheme = "http" if tls is None else "https"
    ready = {"port": server.port, "url": f"{scheme}://{HOST}:{server.port}", "pid": os.getpid()}
    print(json.dumps(ready), flush=True)
    keep_garbage()
    server.run()
    truth = server.truth.to_json(with_requests=True)
    if args.truth is not None:
        args.truth.write_bytes(truth)
    else:
        with suppress(BrokenPipeError):
            sys.stdout.buffer.write(truth + b"\n")
            sys.stdout.buffer.flush()


def keep_garbage() -> None:
    """Collect no garbage: that would pause for milliseconds, and there is none to speak of."""
    import gc

    gc.collect()
    gc.freeze()
    gc.disable()


if __name__ == "__main__":
    main()
