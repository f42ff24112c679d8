"""What is told of failures: kinds, words, no keys."""

from __future__ import annotations

import errno
import json
import socket
import ssl

import pytest

from flexbench.core.endpoint import FailureKind
from flexbench.core.errors import ConfigError
from flexbench.http_endpoint.address import parse_url
from flexbench.http_endpoint.failures import connecting_failed, status_failed
from flexbench.http_endpoint.keys import check_variable, quoting, read_key

HTTP = parse_url("", "http://example.org:8000")
HTTPS = parse_url("", "https://example.org:8443")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), FailureKind.REFUSED, "nobody listens at example.org:8000"),
        (socket.gaierror(-2, "Name or service not known"), FailureKind.REFUSED, "'example.org' cannot be found: Name or"),
        (TimeoutError(), FailureKind.REFUSED, "example.org:8000 cannot be reached: it does not answer"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), FailureKind.REFUSED, "No route to host"),
        (OSError(errno.EMFILE, "Too many open files"), FailureKind.CLIENT_ERROR, "ulimit -n"),
        (OSError(errno.EADDRNOTAVAIL, "x"), FailureKind.CLIENT_ERROR, "no free local port"),
    ],
)  # fmt: skip
def test_no_connection(error: Exception, kind: FailureKind, words: str) -> None:
    failure = connecting_failed(error, HTTP)
    assert failure.kind is kind
    assert words in failure.message


def test_handshake_that_ends() -> None:
    failure = connecting_failed(ConnectionResetError(errno.ECONNRESET, "x"), HTTPS)
    assert failure.kind is FailureKind.TLS
    assert failure.message == "example.org:8443 closed the connection during the TLS handshake"
    assert connecting_failed(ssl.SSLError(1, "[SSL] odd"), HTTPS).kind is FailureKind.TLS


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, FailureKind.UNAUTHORIZED),
        (403, FailureKind.UNAUTHORIZED),
        (429, FailureKind.RATE_LIMITED),
        (400, FailureKind.HTTP_CLIENT_ERROR),
        (404, FailureKind.HTTP_CLIENT_ERROR),
        (500, FailureKind.HTTP_SERVER_ERROR),
        (503, FailureKind.HTTP_SERVER_ERROR),
        (302, FailureKind.MALFORMED),
        (600, FailureKind.MALFORMED),
    ],
)
def test_statuses(status: int, kind: FailureKind) -> None:
    failure = status_failed(status, "too bad", quoting(None))
    assert failure is not None
    assert (failure.kind, failure.message) == (kind, f"HTTP {status}: too bad")


def test_success_is_no_failure() -> None:
    assert status_failed(200, "too bad", quoting(None)) is None


def test_what_a_server_says_is_one_short_line_without_the_key() -> None:
    quote = quoting("sk-123")
    assert quote(b"key sk-123 is\r\n\x1b[31m wrong\x00") == "key *** is [31m wrong"
    assert quote("a" * 200) == "a" * 200
    assert quote("a" * 201) == "a" * 197 + "..."
    # Cut only after the key is out: half a key is too much.
    assert "sk-" not in quote("a" * 196 + "sk-123")
    assert quote(b"\xff\xfe") == "\ufffd\ufffd"
    assert quote({"a": "sk-123"}) == "{'a': '***'}"


KEY = "ab/cd+ef'gh\"ij"


@pytest.mark.parametrize(
    "said",
    [
        KEY,
        {"key": KEY}["key"].encode(),
        json.dumps(KEY)[1:-1],
        json.dumps(KEY)[1:-1].replace("/", r"\/"),
        "ab%2Fcd%2Bef%27gh%22ij",
        "ab%2fcd%2bef%27gh%22ij",
        "ab/cd%2Bef%27gh%22ij",
        repr(KEY)[1:-1],
    ],
)
def test_keys_are_hidden_however_they_are_written(said: object) -> None:
    text = said.decode() if isinstance(said, bytes) else said
    assert quoting(KEY)(f"wrong: {text}.") == "wrong: ***."


def test_parts_of_a_key_are_hidden() -> None:
    quote = quoting("sk-0123456789abcdef")
    assert quote("wrong: sk-01234..., of 89abcdef") == "wrong: ***..., of ***"
    assert quote("wrong: sk-...cdef") == "wrong: sk-...cdef"


def test_of_what_a_server_says_only_the_beginning_is_read() -> None:
    assert quoting("sk-123")(" " * 20_000 + "sk-123") == ""


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", " sk-123\n")
    assert read_key("--api-key-env", "SOME_KEY") == "sk-123"
    monkeypatch.setenv("SOME_KEY", "")
    assert read_key("--api-key-env", "SOME_KEY") is None
    monkeypatch.delenv("SOME_KEY")
    assert read_key("--api-key-env", "SOME_KEY") is None


@pytest.mark.parametrize("key", ["hunter2\r\nX-Admin: yes", "hunter2 b", "hunter2ä"])
def test_keys_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ConfigError, match="--api-key-env: the value of SOME_KEY has") as caught:
        read_key("--api-key-env", "SOME_KEY")
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("name", ["sk-hunter2", "hunter2 x", "", "2hunter2", "hunter2" * 20])
def test_a_key_in_place_of_its_variable(name: str) -> None:
    with pytest.raises(ConfigError, match="must be the name of an environment variable") as caught:
        check_variable("--api-key-env", name)
    assert "hunter2" not in caught.value.message
