"""Addresses of servers, as people give them: http://HOST[:PORT][/PATH][?QUERY]."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit

from flexbench.core.errors import ConfigError

_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
# Query parameters that are as good as a password; addresses are part of a record.
_SECRET_PARAMETER = re.compile(
    r"(key|token|secret|password|passwd|credentials?|sig|signature)$|^code$", re.IGNORECASE
)
_ACCEPTED = "must be an address like http://127.0.0.1:8000 or https://example.org/v1"
# What may stand in a path and a query as it is.
_PATH_CHARACTERS = "/%:@!$&'()*+,;=~-._"


@dataclass(frozen=True, kw_only=True)
class Url:
    """Where a server is, without anything secret."""

    is_tls: bool
    host: str
    """A name, or an IP address without brackets."""
    port: int
    path: str
    """'' or begins with a slash; as it is sent."""
    query: str
    """'' or begins with a question mark; as it is sent."""

    @property
    def place(self) -> str:
        """HOST:PORT, for people."""
        return f"{self._bracketed_host}:{self.port}"

    @property
    def authority(self) -> str:
        """What the Host header says."""
        scheme = "https" if self.is_tls else "http"
        host = self._bracketed_host
        return host if self.port == _DEFAULT_PORTS[scheme] else f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether what is sent there stays on this machine."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def target(self) -> str:
        """What the request line says."""
        return f"{self.path or '/'}{self.query}"

    def with_path(self, path: str) -> Url:
        """The same server and query with another path."""
        return replace(self, path=path)

    def __str__(self) -> str:
        return f"http{'s' * self.is_tls}://{self.authority}{self.path}{self.query}"

    @property
    def _bracketed_host(self) -> str:
        host = self.host.partition("%")[0]  # a zone is nobody else's business
        return f"[{host}]" if ":" in host else host


def parse_url(option: str, text: str) -> Url:
    """The server that `text` means.

    Raises ConfigError naming `option`; it never repeats `text`, which may have a password in it.
    """
    if any(character <= " " or character == "\x7f" for character in text):
        raise ConfigError(option, f"{_ACCEPTED}; it must not have spaces in it")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(option, f"{_ACCEPTED}; its host or port cannot be read") from error
    if parts.scheme not in _DEFAULT_PORTS or not parts.netloc:
        raise ConfigError(option, _ACCEPTED)
    _refuse_secrets(option, parts)
    if port == 0:
        raise ConfigError(option, f"{_ACCEPTED}; port 0 is no server's")
    query = quote(parts.query, safe=_PATH_CHARACTERS + "?")
    return Url(
        is_tls=parts.scheme == "https",
        host=_host(option, parts.hostname or ""),
        port=port or _DEFAULT_PORTS[parts.scheme],
        path=quote(parts.path, safe=_PATH_CHARACTERS).rstrip("/"),
        query=f"?{query}" if query else "",
    )


def _refuse_secrets(option: str, parts: SplitResult) -> None:
    if "@" in parts.netloc:
        raise ConfigError(
            option,
            "must not have a user or a password in it: records show the address. "
            "A key is taken from an environment variable, see --api-key-env",
        )
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if _SECRET_PARAMETER.search(name):
            raise ConfigError(
                option,
                f"must not have a secret like {name!r} in its query: records show the address. "
                "A key is taken from an environment variable, see --api-key-env",
            )


def _host(option: str, host: str) -> str:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError as error:
            raise ConfigError(option, f"{_ACCEPTED}; its host is not an IPv6 address") from error
        return host
    try:
        ascii_host = host.encode("idna").decode("ascii") if not host.isascii() else host
    except UnicodeError as error:
        raise ConfigError(option, f"{_ACCEPTED}; its host is no name") from error
    if not _HOST_NAME.fullmatch(ascii_host):
        raise ConfigError(option, f"{_ACCEPTED}; its host is no name")
    return ascii_host
