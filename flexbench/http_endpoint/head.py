"""Heads of HTTP/1.1 requests and answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import httptools

from flexbench import __version__
from flexbench.http_endpoint.address import Url


def request_head(
    url: Url, method: str, *, key: str | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """The head of a request to `url` up to, not with, the empty line after it."""
    lines = [
        f"{method} {url.target} HTTP/1.1",
        f"Host: {url.authority}",
        f"User-Agent: flexbench/{__version__}",
        "Accept: */*",
        # What is compressed cannot be seen as it comes.
        "Accept-Encoding: identity",
    ]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "".join(f"{line}\r\n" for line in lines).encode("ascii")


def posting(url: Url, *, key: str | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    """The head of a request that posts JSON, up to the length: `with_body` makes it whole."""
    head = request_head(
        url, "POST", key=key, headers={**(headers or {}), "Content-Type": "application/json"}
    )
    return head + b"Content-Length: "


def with_body(head: bytes, body: bytes) -> bytes:
    """A whole request of what `posting` made, and a body."""
    return b"%s%d\r\n\r\n%s" % (head, len(body), body)


class AnswerHead:
    """Status and headers of an answer, read again from its bytes.

    Connections keep these bytes and look at them only where something is unusual: headers that
    nobody asks for are not worth a microsecond of every request.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.headers: dict[str, str] = {}
        """By name in lower case."""
        self._is_complete = False
        self._parser = httptools.HttpResponseParser(self)
        try:
            for piece in pieces:
                self._parser.feed_data(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            pass  # what follows the head is not read here

    @property
    def ends_with_connection(self) -> bool:
        """Whether only the end of the connection ends the body."""
        encodings = self.headers.get("transfer-encoding", "").lower()
        is_chunked = encodings.split(",")[-1].strip() == "chunked"
        return not is_chunked and (bool(encodings) or "content-length" not in self.headers)

    def on_message_begin(self) -> None:
        """Of several, an interim one and then the answer, the last counts."""
        if not self._is_complete:
            self.headers.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or with the name None one that went on in the trailers."""
        if not self._is_complete:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        """The end of a head, perhaps that of an interim answer."""
        self._is_complete = self._parser.get_status_code() >= 200
