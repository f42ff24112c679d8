"""What the service makes of requests, and of tokens: text, limits, HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from flexbench.core.errors import ConfigError, InputFileError
from flexbench.dist.completions import Limits, parse_completion
from flexbench.dist.endpoint import DistEndpointConfig
from flexbench.dist.http_server import MAX_BODY_BYTES, HttpError, HttpServer, Request
from flexbench.dist.text import ByteCodec, RunningText, open_codec

LIMITS = Limits(vocab_size=300, pad_token_id=1, max_prompt_tokens=4, max_new_tokens=20)


def parse(**values: Any) -> Any:
    return parse_completion(
        json.dumps({"prompt": "abc", **values}).encode(), "m", ByteCodec(300), LIMITS
    )


# --- text ---


def test_bytes_are_moved_past_the_special_tokens():
    assert ByteCodec(300).encode("aé") == [4 + 97, 4 + 0xC3, 4 + 0xA9]
    # A vocabulary of 10 has 6 tokens that are not special.
    assert ByteCodec(10).encode("a") == [4 + 97 % 6]
    assert ByteCodec(300).decode([0, 89, 90]) == "!z!"


def test_a_text_is_told_a_token_at_a_time_and_ends_before_its_stop():
    running = RunningText(ByteCodec(300), ["DE"])
    # Of a stop of two characters, one is held back: D may be its beginning.
    assert [running.add(ord(one) - 33, is_last=False) for one in "ABDCDE"] == [
        "", "A", "B", "D", "C", "",
    ]  # fmt: skip
    assert running.has_stopped
    running = RunningText(ByteCodec(300), ["DE"])
    assert [running.add(32, is_last=False), running.add(35, is_last=True)] == ["", "AD"]
    assert not running.has_stopped


def test_a_folder_without_a_tokenizer_has_bytes_and_a_broken_one_is_named(tmp_path):
    assert open_codec(tmp_path, 300).name == "byte"
    (tmp_path / "tokenizer.json").write_text("{")
    pytest.importorskip("tokenizers")
    with pytest.raises(InputFileError, match=r"tokenizer\.json: is not a tokenizer"):
        open_codec(tmp_path, 300)


# --- requests ---


def test_what_is_asked_for():
    asked = parse(model="m", max_tokens=7, stop="x", stream=True, temperature=0.7)
    assert asked.prompt_ids == [101, 102, 103]
    assert (asked.max_tokens, asked.stops, asked.is_streaming) == (7, ("x",), True)
    assert not asked.has_usage
    assert parse(prompt=[[5, 6]]).prompt_ids == parse(prompt=[5, 6]).prompt_ids == [5, 6]
    assert parse(prompt=["a"]).prompt_ids == [101]
    assert parse().max_tokens == 16
    assert parse(stream=True, stream_options={"include_usage": True}).has_usage


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"prompt": "abcde"}, "5 tokens, and at most 4"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": None}, "must be a text or a list"),
        ({"prompt": [5, True]}, "must be a text or a list"),
        ({"prompt": ["a", "b"]}, "one prompt in a request"),
        ({"prompt": [300]}, "between 0 and 299"),
        ({"prompt": [1, 1]}, "only padding"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 21}, "at most 20"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"n": 2}, "n must be 1"),
        ({"echo": True}, "echo must be false"),
        ({"logprobs": 1}, "logprobs"),
    ],
)
def test_what_is_refused(values, problem):
    with pytest.raises(HttpError, match=problem) as raised:
        parse(**values)
    assert raised.value.status == 400
    assert raised.value.body["error"]["type"] == "invalid_request_error"


def test_bodies_that_are_none_and_models_that_are_not_there():
    for body in (b"{", b"[]", b"\xff"):
        with pytest.raises(HttpError, match="body"):
            parse_completion(body, "m", ByteCodec(300), LIMITS)
    with pytest.raises(HttpError, match="'other'") as raised:
        parse(model="other")
    assert raised.value.status == 404


# --- HTTP ---


async def answer(request: Request) -> Any:
    if request.path == "/stream":

        async def events() -> AsyncGenerator[bytes, None]:
            yield b"one"
            yield b"two"

        return events()
    return {"method": request.method, "path": request.path, "body": request.body.decode()}


def exchange(*parts: bytes) -> bytes:
    """What the server sends when it is sent these parts, until it closes."""

    async def talk() -> bytes:
        server = HttpServer(answer)
        port = await server.open("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0)
        writer.write_eof()
        received = await reader.read()
        writer.close()
        await writer.wait_closed()
        await server.close(0.1)
        return received

    return asyncio.run(asyncio.wait_for(talk(), 20))


def test_two_requests_on_one_connection():
    first = b"GET /a?b HTTP/1.1\r\nHost: x\r\n\r\n"
    second = b"POST /c HTTP/1.1\r\nContent-Length: 3\r\nConnection: close\r\n\r\nxyz"
    both = first + second
    expected = exchange(both)
    assert expected.count(b"HTTP/1.1 200 OK") == 2
    assert b'{"method": "GET", "path": "/a", "body": ""}' in expected
    assert b'{"method": "POST", "path": "/c", "body": "xyz"}' in expected
    assert exchange(*(both[i : i + 1] for i in range(len(both)))) == expected


def test_a_stream_is_sent_in_chunks():
    head, _, body = exchange(b"GET /stream HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    # "data: one\n\n" has 11 bytes, which is b.
    assert body == b"b\r\ndata: one\n\n\r\nb\r\ndata: two\n\n\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: cut off", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: ten\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\nabc" % (MAX_BODY_BYTES + 1), 413),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    ],
)
def test_what_is_no_request_is_answered_and_ends_the_connection(sent, status):
    head, _, body = exchange(sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close" in head
    assert json.loads(body)["error"]["code"] == status


# --- the configuration ---


def test_the_services_options_are_those_of_the_configuration():
    config = DistEndpointConfig(
        model="auto", port=4000, num_stages=2, num_gpu_batches=3, percent="20,80 0 100 0 100",
        overlap=False,
    )  # fmt: skip
    assert config.model == "facebook/opt-125m"
    assert config.block_size == 4 * 3 * 2
    arguments = config.arguments(prompt_len=10, gen_len=5)
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert options["--port"] == "4000"
    assert options["--prompt-len"] == "10"
    assert options["--gen-len"] == "5"
    assert options["--overlap"] == "false"
    assert "--path" not in options
    assert arguments[-7:] == ["--percent", "20", "80", "0", "100", "0", "100"]


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"num_stages": 0}, "--num-stages"),
        ({"port": 0}, "--port"),
        ({"percent": "100 0"}, "--percent"),
        ({"percent": "100 0 100 0 100 x"}, "--percent"),
        ({"percent": "90 20 100 0 100 0"}, "--percent"),
        ({"gpu_batch_size": 0}, "--gpu-batch-size"),
        ({"batch_wait": -1}, "--batch-wait"),
        ({"dtype": "int3"}, "--dtype"),
        ({"stage_timeout": 0}, "--stage-timeout"),
    ],
)
def test_values_that_cannot_work(values, option):
    with pytest.raises(ConfigError, match=option):
        DistEndpointConfig(**values)
