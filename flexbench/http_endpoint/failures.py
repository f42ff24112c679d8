"""What goes wrong between us and a server, as failures with words for people."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable

from flexbench.core.endpoint import Failure, FailureKind
from flexbench.http_endpoint.address import Url
from flexbench.http_endpoint.tls import describe_tls_error

# Not the server's doing: this machine has no more of something.
_OUR_LIMITS = {
    errno.EMFILE: "too many open files; `ulimit -n` raises the limit",
    errno.ENFILE: "this machine has too many open files",
    errno.EADDRNOTAVAIL: "this machine has no free local port or address for it",
    errno.ENOBUFS: "this machine has no buffers left",
    errno.ENOMEM: "this machine has no memory left",
}


def connecting_failed(error: Exception, url: Url) -> Failure:
    """Why there is no connection."""
    if isinstance(error, ssl.SSLError):
        return Failure(FailureKind.TLS, describe_tls_error(error, url))
    if isinstance(error, ConnectionRefusedError):
        return Failure(FailureKind.REFUSED, f"nobody listens at {url.place} (connection refused)")
    if isinstance(error, socket.gaierror):
        reason = error.strerror or error
        return Failure(FailureKind.REFUSED, f"the host {url.host!r} cannot be found: {reason}")
    # Once there is a connection, only a handshake can still fail.
    if url.is_tls and isinstance(error, ConnectionError):
        return Failure(FailureKind.TLS, describe_tls_error(error, url))
    number = error.errno if isinstance(error, OSError) else None
    if number in _OUR_LIMITS:
        problem = f"no connection to {url.place}: {_OUR_LIMITS[number]}"
        return Failure(FailureKind.CLIENT_ERROR, problem)
    reason = "it does not answer" if isinstance(error, TimeoutError) else f"{error}"
    return Failure(FailureKind.REFUSED, f"{url.place} cannot be reached: {reason}")


def status_failed(status: int, said: object, quote: Callable[[object], str]) -> Failure | None:
    """What an HTTP status means, with what the server `said` to it; None for success."""
    if 200 <= status < 300:
        return None
    if status in (401, 403):
        kind = FailureKind.UNAUTHORIZED
    elif status == 429:
        kind = FailureKind.RATE_LIMITED
    elif 400 <= status < 500:
        kind = FailureKind.HTTP_CLIENT_ERROR
    elif 500 <= status < 600:
        kind = FailureKind.HTTP_SERVER_ERROR
    else:
        kind = FailureKind.MALFORMED
    words = quote(said)
    return Failure(kind, f"HTTP {status}: {words}" if words else f"HTTP {status}")
