"""The scripted server, against which the load generator is proven, does what it says."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.mock_server import Fault, FaultKind, in_flight, parse_head, percentile, take_chunked
from tests.integration.serving.conftest import LONG_S, MockServer

Start = Callable[..., MockServer]
TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


def body_of(path: str = TEXT, *, stream: bool = True, tokens: int = 4, **more: Any) -> bytes:
    prompt: dict[str, Any] = {"prompt": "abc"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "abc"}]}
    return json.dumps(
        {"model": "m", **prompt, "max_tokens": tokens, "stream": stream, **more}
    ).encode()


def post(server: MockServer, body: bytes, path: str = TEXT, **headers: str) -> tuple[int, bytes]:
    """Status and body of the answer, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def events(body: bytes) -> list[Any]:
    """The events of a stream, [DONE] as text."""
    found = []
    for event in body.decode().split("\n\n")[:-1]:
        assert event.startswith("data: ")
        data = event.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


def raw_request(body: bytes, *more: str, path: str = TEXT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def receive(connection: socket.socket, until: bytes) -> bytes:
    """All bytes up to `until`, or to the end of the connection."""
    received = b""
    connection.settimeout(LONG_S)
    while until not in received:
        data = connection.recv(65536)
        if not data:
            break
        received += data
    return received


def test_stream_has_one_event_a_token_then_the_counts_and_done(mock_server: Start) -> None:
    server = mock_server()
    status, body = post(server, body_of(stream_options={"include_usage": True}))
    *tokens, last, counts, done = events(body)
    assert status == 200
    assert [event["choices"][0]["text"] for event in tokens] == ["x", "x", "x", "x"]
    assert last["choices"][0] | {"text": ""} == last["choices"][0]
    assert last["choices"][0]["finish_reason"] == "length"
    assert counts["choices"] == []
    assert counts["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert done == "[DONE]"


def test_counts_are_told_only_if_they_are_asked_for_and_allowed(mock_server: Start) -> None:
    asked = {"stream_options": {"include_usage": True}}
    assert b"usage" not in post(mock_server(), body_of())[1]
    silent = mock_server("--no-usage")
    assert b"usage" not in post(silent, body_of(**asked))[1]
    assert b"usage" not in post(silent, body_of(stream=False))[1]


@pytest.mark.timing
def test_chat_stream_begins_with_the_role_at_once(mock_server: Start) -> None:
    server = mock_server("--ttft", "100ms")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_request(body_of(CHAT, tokens=2), path=CHAT))
        role = receive(connection, b"\n\n")
        role_at = time.monotonic_ns()
        rest = receive(connection, b"[DONE]")
    assert b'"delta": {"role": "assistant", "content": ""}' in role
    assert rest.count(b'"delta": {"content": "x"}') == 2
    (served,) = server.stop()["requests"]
    assert role_at < served["written_ns"][0]  # the first token is counted without the role


def test_answer_at_once_has_all_the_text(mock_server: Start) -> None:
    server = mock_server()
    _, text = post(server, body_of(stream=False))
    _, chat = post(server, body_of(CHAT, stream=False, tokens=2), CHAT)
    assert json.loads(text)["choices"][0]["text"] == "xxxx"
    assert json.loads(text)["usage"]["completion_tokens"] == 4
    assert json.loads(chat)["choices"][0]["message"] == {"role": "assistant", "content": "xx"}


def test_times_are_the_script_s_and_are_noted(mock_server: Start) -> None:
    server = mock_server("--ttft", "60ms", "--itl", "10ms")
    before = time.monotonic_ns()
    post(server, body_of(), **{"X-Request-Id": "one"})
    after = time.monotonic_ns()
    truth = server.stop()
    (served,) = truth["requests"]
    arrived = served["arrived_ns"]
    assert served["request_id"] == "one"
    # Never early. Late by what the machine is, which is why the server tells.
    for number, written in enumerate(served["written_ns"]):
        assert written - arrived >= (60 + 10 * number) * 1_000_000
    assert len(served["written_ns"]) == 4
    assert before < arrived < served["written_ns"][-1] <= served["ended_ns"] < after
    late = [
        (w - served["started_ns"]) / 1e6 - 60 - 10 * n for n, w in enumerate(served["written_ns"])
    ]
    assert truth["lateness_ms"]["max"] == pytest.approx(max(late), abs=1e-6)
    assert truth["lateness_ms"]["p50"] == pytest.approx(sorted(late)[1], abs=1e-6)


def test_several_tokens_in_a_chunk_take_as_long_as_one_by_one(mock_server: Start) -> None:
    server = mock_server("--itl", "10ms", "--tokens-per-chunk", "3", "--tokens", "8")
    _, body = post(server, body_of())  # it asks for 4
    texts = [event["choices"][0]["text"] for event in events(body)[:-2]]
    assert texts == ["xxx", "xxx", "xx"]
    (served,) = server.stop()["requests"]
    _, second, third = served["written_ns"]
    assert second - served["started_ns"] >= 30_000_000
    assert third - served["started_ns"] >= 60_000_000
    assert served["tokens"] == 8


def test_those_above_the_capacity_wait_in_line(mock_server: Start) -> None:
    server = mock_server("--capacity", "2", "--ttft", "50ms")
    connections = []
    for number in range(5):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(raw_request(body_of(tokens=1), f"X-Request-Id: {number}"))
        connections.append(connection)
        while len(server.truth()["requests"]) <= number:  # they arrive in this order
            time.sleep(0.001)
    for connection in connections:
        assert b"[DONE]" in receive(connection, b"[DONE]")
        connection.close()
    truth = server.stop()
    started = [served["started_ns"] for served in truth["requests"]]
    ended = [served["ended_ns"] for served in truth["requests"]]
    assert [served["request_id"] for served in truth["requests"]] == ["0", "1", "2", "3", "4"]
    assert ended[0] <= started[2] < ended[2] <= started[4]
    assert ended[1] <= started[3]
    spans = list(zip(started, ended, strict=True))
    assert in_flight(spans, started[0], ended[4])["max"] == 2
    assert truth["in_flight"]["max"] > 2  # who waits is in flight, too


def test_request_may_come_in_pieces_and_the_next_one_before_the_answer(mock_server: Start) -> None:
    server = mock_server("--ttft", "20ms")
    request = raw_request(body_of(tokens=1, stream=False))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request[:80]:
            connection.sendall(bytes([byte]))
        time.sleep(0.05)
        sent_at = time.monotonic_ns()
        connection.sendall(request[80:] + request)
        answers = b""
        while answers.count(b'"text": "x"') < 2:
            answers += connection.recv(65536)
    first, second = server.stop()["requests"]
    assert first["arrived_ns"] >= sent_at  # with its last byte
    assert second["arrived_ns"] >= first["ended_ns"]
    assert first["connection"] == second["connection"]


def test_client_that_leaves_frees_its_place(mock_server: Start) -> None:
    server = mock_server("--capacity", "1", "--ttft", "60s")
    with socket.create_connection(("127.0.0.1", server.port)) as waits:
        with socket.create_connection(("127.0.0.1", server.port)) as leaves:
            for number, connection in enumerate((leaves, waits)):
                connection.sendall(raw_request(body_of()))
                wait_for(server, lambda truth, count=number: len(truth["requests"]) > count)
            first, second = server.truth()["requests"]
            assert first["started_ns"] is not None
            assert second["started_ns"] is None
        wait_for_outcomes(server, {"closed by client": 1, "in flight": 1})
        wait_for(server, lambda truth: truth["requests"][1]["started_ns"] is not None)
        assert server.truth()["requests"][1]["started_ns"] >= first["started_ns"]


def test_key_is_asked_for(mock_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCK_KEY", "right")
    server = mock_server("--api-key-env", "MOCK_KEY")
    assert post(server, body_of(), Authorization="Bearer wrong")[0] == 401
    assert post(server, body_of(), Authorization="Bearer right")[0] == 200
    assert b"right" not in json.dumps(server.stop()).encode()


def test_tls(mock_server: Start, certificate: tuple[Path, Path]) -> None:
    server = mock_server("--certificate", certificate[0], "--key", certificate[1])
    assert server.url == f"https://127.0.0.1:{server.port}"
    context = ssl.create_default_context(cafile=str(certificate[0]))
    connection = http.client.HTTPSConnection(
        "127.0.0.1", server.port, timeout=LONG_S, context=context
    )
    for _ in range(2):  # on the same connection, and an answer of more than a TLS record
        connection.request("POST", TEXT, body_of(stream=False, tokens=50_000))
        assert len(json.loads(connection.getresponse().read())["choices"][0]["text"]) == 50_000
    connection.close()
    assert server.stop()["connections"]["opened"] == 1


def test_models_health_and_what_it_does_not_know(mock_server: Start) -> None:
    server = mock_server("--model", "tiny")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)
    answers = {}
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("GET", "/x"), ("GET", TEXT)):
        connection.request(method, path)
        response = connection.getresponse()
        answers[path] = response.status, response.read()
    connection.close()
    assert answers["/health"] == (200, b"")
    assert json.loads(answers["/v1/models"][1])["data"][0]["id"] == "tiny"
    assert answers["/x"][0] == 404
    assert answers[TEXT][0] == 405
    assert post(server, b"{")[0] == 400


# --- faults ---


END_OF_STREAM = b"[DONE]\n\n\r\n0\r\n\r\n"


def exchange(server: MockServer, until: bytes = END_OF_STREAM) -> bytes:
    """What comes for a request up to `until`, and then <end>, <reset> or <silence>."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_request(body_of()))
        received = b""
        try:
            received = receive(connection, until) if until else b""
            connection.settimeout(0.1)
            more = connection.recv(65536)
        except TimeoutError:
            return received + b"<silence>"
        except ConnectionResetError:
            return received + b"<reset>"
        return received + more + (b"" if more else b"<end>")


@pytest.mark.parametrize(
    ("kind", "beginning", "ending"),
    [
        ("slow", b"", b"<silence>"),
        ("close-before", b"", b"<end>"),
        ("reset", b"", b"<reset>"),
        ("close-head", b"HTTP/1.1 200 OK\r\nConte", b"<end>"),
        ("garbage-http", b"\x00\xff", b"<end>"),
        ("garbage-json", b"HTTP/1.1 200 OK\r\nContent-Type: text/html", b"/html><silence>"),
        ("429", b"HTTP/1.1 429 Too Many Requests", b"}}<silence>"),
        ("500", b"HTTP/1.1 500 Internal Server Error", b"}}<silence>"),
        ("503", b"HTTP/1.1 503 Service Unavailable", b"}}<silence>"),
        ("close-mid-stream", b"HTTP/1.1 200 OK", b'"finish_reason": null}]}\n\n\r\n<end>'),
        ("no-done", b"HTTP/1.1 200 OK", b'"finish_reason": "length"}]}\n\n\r\n0\r\n\r\n<silence>'),
    ],
)
def test_fault(mock_server: Start, kind: str, beginning: bytes, ending: bytes) -> None:
    server = mock_server("--fault", f"{kind}:from=1")
    assert exchange(server).endswith(END_OF_STREAM + b"<silence>")  # number 0 is well
    received = exchange(server, ending.partition(b"<")[0] if b"<silence>" in ending else b"no end")
    assert received.startswith(beginning)
    assert received.endswith(ending)
    if kind == "close-mid-stream":
        assert received.count(b'"text": "x"') == 2  # half of 4
    outcome = "closed by client" if kind == "slow" else kind
    wait_for_outcomes(server, {"complete": 1, outcome: 1})


def wait_for_outcomes(server: MockServer, expected: dict[str, int]) -> None:
    wait_for(server, lambda truth: truth["outcomes"] == expected)


def wait_for(server: MockServer, is_so: Callable[[dict[str, Any]], bool]) -> None:
    expires_at = time.monotonic() + LONG_S
    while not is_so(truth := server.truth()):
        assert time.monotonic() < expires_at, truth
        time.sleep(0.005)


def test_stream_that_stalls(mock_server: Start) -> None:
    server = mock_server("--fault", "stall-mid-stream")
    received = b""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_request(body_of()))
        while received.count(b'"text": "x"') < 2:  # half of 4
            received += connection.recv(65536)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert server.truth()["outcomes"] == {"in flight": 1}
    wait_for_outcomes(server, {"closed by client": 1})


def test_server_that_is_gone(mock_server: Start) -> None:
    server = mock_server("--fault", "refuse-after:from=1", "--ttft", "60s")
    with socket.create_connection(("127.0.0.1", server.port)) as waiting:
        waiting.sendall(raw_request(body_of()))
        while not server.truth()["requests"]:
            time.sleep(0.005)
        assert exchange(server) == b"<end>"
        assert receive(waiting, b"x") == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_events_that_are_garbage_errors_or_missing(mock_server: Start) -> None:
    garbage = post(mock_server("--fault", "garbage-event"), body_of())[1].split(b"\n\n")
    assert garbage[2] == b'data: {"choices": [{"te'
    assert len([event for event in garbage if b'"text": "x"' in event]) == 4
    *tokens, error, done = events(post(mock_server("--fault", "error-event"), body_of())[1])
    assert len(tokens) == 2
    assert error["error"]["message"] == "the engine died"
    assert done == "[DONE]"
    empty, done = events(post(mock_server("--fault", "empty"), body_of())[1])
    assert empty["choices"][0]["text"] == ""
    assert done == "[DONE]"


def test_characters_that_are_cut_are_whole_in_the_end(mock_server: Start) -> None:
    server = mock_server("--fault", "cut-utf8")
    received = exchange(server)
    _, _, body = received.removesuffix(b"<silence>").partition(b"\r\n\r\n")
    chunks = []
    while body:
        size, _, body = body.partition(b"\r\n")
        chunks.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    broken = [chunk for chunk in chunks if chunk.decode(errors="ignore").encode() != chunk]
    assert len(broken) == 8  # both sides of a cut in each of 4 characters
    texts = [event["choices"][0]["text"] for event in events(b"".join(chunks))[:-1]]
    assert texts == ["€", "€", "€", "€", ""]


def test_faults_come_every_so_often(mock_server: Start) -> None:
    server = mock_server("--fault", "429:every=3:from=1", "--fault", "500:every=2")
    statuses = [post(server, body_of())[0] for _ in range(8)]
    assert statuses == [500, 429, 500, 200, 429, 200, 500, 429]
    server.reset()
    assert server.truth()["requests"] == []


# --- its life ---


def test_ends_with_its_parent(tmp_path: Path) -> None:
    """Also when that was killed."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, time\n"
            "from tests.integration.serving.conftest import MockServer\n"
            "print(MockServer().process.pid, flush=True)\n"
            "time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait(LONG_S)
    child.wait(LONG_S)


@pytest.mark.parametrize("fault", ["late", "429:every=0", "429:every", "429:sometimes=1"])
def test_fault_that_does_not_exist_is_refused(fault: str) -> None:
    command = [sys.executable, "benchmarks/mock_server.py", "--fault", fault]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=LONG_S
    )
    assert done.returncode == 2
    assert "--fault" in done.stderr


# --- its parts ---


def test_in_flight_by_hand() -> None:
    # 0..10 and 5..15 overlap for half of the time; 20..30 is outside, 15..20 touches nothing.
    spans = [(0, 10), (5, 15), (15, 20), (20, 30)]
    assert in_flight(spans, 0, 20) == {"mean": 1.25, "max": 2}
    assert in_flight([], 0, 20) == {"mean": 0.0, "max": 0}


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 2), (0.51, 3), (0.99, 4), (1.0, 4)])
def test_percentile_is_the_nearest_rank(share: float, value: float) -> None:
    assert percentile([1, 2, 3, 4], share) == value


def test_fault_parts() -> None:
    fault = Fault.parse("close-head:from=2:every=3")
    assert fault == Fault(FaultKind.CLOSE_HEAD, every=3, first=2)
    assert [number for number in range(9) if fault.happens_to(number)] == [2, 5, 8]


def test_head_and_chunked_body() -> None:
    parsed = parse_head(b"POST /a?b=1 HTTP/1.1\r\nContent-length: 12\r\nCONNECTION: close")
    assert (parsed.method, parsed.path, parsed.query) == ("POST", "/a", "b=1")
    assert (parsed.content_length, parsed.keep_alive) == (12, False)
    with pytest.raises(ValueError, match="not enough values"):
        parse_head(b"hello")
    whole = b"3\r\nabc\r\n2;x=1\r\nde\r\n0\r\n\r\nGET"
    assert take_chunked(whole) == (b"abcde", len(whole) - 3)
    assert all(take_chunked(whole[:end]) is None for end in range(len(whole) - 3))
