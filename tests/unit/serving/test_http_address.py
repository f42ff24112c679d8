"""Addresses of servers: what is understood, what is refused, and what is never shown."""

from __future__ import annotations

import pytest

from flexbench.core.errors import ConfigError
from flexbench.http_endpoint.address import parse_url


@pytest.mark.parametrize(
    ("text", "host", "port", "authority", "target"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, "127.0.0.1:8000", "/"),
        ("http://example.org", "example.org", 80, "example.org", "/"),
        ("https://example.org/v1/", "example.org", 443, "example.org", "/v1"),
        ("https://example.org:8443/a/b?x=1&y=%20", "example.org", 8443, "example.org:8443", "/a/b?x=1&y=%20"),
        ("http://[::1]:8000/v1", "::1", 8000, "[::1]:8000", "/v1"),
        ("http://[::1]", "::1", 80, "[::1]", "/"),
        ("HTTP://Example.ORG/A", "example.org", 80, "example.org", "/A"),
        ("http://bücher.example/größe", "xn--bcher-kva.example", 80, "xn--bcher-kva.example", "/gr%C3%B6%C3%9Fe"),
        ("http://my_pod-1.svc:80", "my_pod-1.svc", 80, "my_pod-1.svc", "/"),
    ],
)  # fmt: skip
def test_understood(text: str, host: str, port: int, authority: str, target: str) -> None:
    url = parse_url("--api-url", text)
    assert (url.host, url.port, url.authority, url.target) == (host, port, authority, target)
    assert url.is_tls == text.lower().startswith("https")
    assert parse_url("--api-url", str(url)) == url


@pytest.mark.parametrize(
    "text",
    [
        "", "127.0.0.1:8000", "example.org", "ftp://example.org", "http://", "http:///v1", "http://a b",
        "http://a\nb", "http://a:port", "http://a:99999", "http://a:0", "http://[::1", "http://[abc:]/",
        "http://a..b", "http://-a", "http://" + "a" * 64, "http://a\x7f", "http://a/\r\nX: y",
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-url: .*http://127\.0\.0\.1:8000"):
        parse_url("--api-url", text)


@pytest.mark.parametrize(
    "text",
    [
        "http://user:hunter2@example.org",
        "https://hunter2@example.org/v1",
        "https://example.org/v1?api_key=hunter2",
        "https://example.org/v1?sig=hunter2&a=1",
        "https://example.org/v1?x-api-key=hunter2",
        "https://example.org?access_token=hunter2",
        "https://example.org?code=hunter2",
        "http://user:hunter2@[::1",
        "http://hunter2 @example.org",
        "user:hunter2@example.org",
    ],
)
def test_secrets_are_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url("--api-url", text)
    assert "hunter2" not in caught.value.message


def test_loopback() -> None:
    assert parse_url("", "http://localhost:1").is_loopback
    assert parse_url("", "http://127.3.2.1:1").is_loopback
    assert parse_url("", "http://[::1]:1").is_loopback
    assert not parse_url("", "http://192.168.0.1:1").is_loopback
