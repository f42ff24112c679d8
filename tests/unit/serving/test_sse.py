"""The parser of server-sent events, against a plain reading of the standard."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexbench.http_endpoint.sse import EventStream


def feed_all(pieces: list[bytes]) -> list[bytes]:
    stream = EventStream()
    return [data for piece in pieces for data in stream.feed(piece)]


def read_whole(text: bytes) -> list[bytes]:
    """The standard's steps, on the whole stream at once."""
    events: list[bytes] = []
    data: list[bytes] | None = None
    *lines, _unfinished = re.split(rb"\r\n|\n|\r", text.removeprefix(b"\xef\xbb\xbf"))
    for line in lines:
        if line == b"":
            if data is not None:
                events.append(b"\n".join(data))
            data = None
        elif not line.startswith(b":"):
            name, value = re.fullmatch(rb"([^:]*)(?:: ?(.*))?", line, re.DOTALL).groups()
            if name == b"data":
                data = [*(data or []), value or b""]
    return events


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"data: one\n\n", [b"one"]),
        (b"data:one\n\n", [b"one"]),
        (b"data:  one\n\n", [b" one"]),
        (b"data: one\r\n\r\n", [b"one"]),
        (b"data: one\r\r", [b"one"]),
        (b"data: one\n\ndata: two\n\n", [b"one", b"two"]),
        (b"data: one\ndata: two\n\n", [b"one\ntwo"]),
        (b"data\n\n", [b""]),
        (b"data: \n\n", [b""]),
        (b"data\ndata\n\n", [b"\n"]),
        (b": comment\n\ndata: one\n\n", [b"one"]),
        (b"event: error\ndata: one\nid: 7\nretry: 10\n\n", [b"one"]),
        (b"event: nothing\n\n", []),
        (b"dat: one\n\ndata2: two\n\n", []),
        (b"\xef\xbb\xbfdata: one\n\n", [b"one"]),
        (b"data: one\n\n\xef\xbb\xbfdata: two\n\n", [b"one"]),
        (b"data: no end\n", []),
        (b"data: one\n\ndata: no end", [b"one"]),
        (b"\n\n\n", []),
        (b"data: a:b: c\n\n", [b"a:b: c"]),
        ("data: größer\n\n".encode(), ["größer".encode()]),
        (b"", []),
    ],
)
def test_events(text: bytes, expected: list[bytes]) -> None:
    assert feed_all([text]) == expected
    assert read_whole(text) == expected
    assert feed_all([text[i : i + 1] for i in range(len(text))]) == expected
    for cut in range(len(text) + 1):
        assert feed_all([text[:cut], text[cut:]]) == expected


STREAM_PARTS = st.sampled_from(
    [
        b"data: ",
        b"data",
        b":",
        b" ",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"x",
        b"\xef\xbb\xbf",
        b"\xc3\xa4",
        b'{"a": 1}',
        b"data: {}\n\n",
        b"data: {}\r\n\r\n",
        b"event: e\n",
        b"[DONE]",
    ]
)


@given(
    parts=st.lists(STREAM_PARTS, max_size=25),
    cuts=st.lists(st.integers(min_value=0, max_value=120), max_size=8),
)
@example(parts=[b"data: ", b"x", b"\r\n", b"\r", b"\n"], cuts=[8, 9, 10])
def test_cuts_change_nothing(parts: list[bytes], cuts: list[int]) -> None:
    text = b"".join(parts)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    expected = read_whole(text)
    assert feed_all([text]) == expected
    assert feed_all(pieces) == expected
    assert feed_all([bytes([byte]) for byte in text]) == expected
    # Piece by piece as it was sent: most of them whole events.
    assert feed_all(parts) == expected


def test_an_event_belongs_to_the_piece_that_ends_it() -> None:
    stream = EventStream()
    assert stream.feed(b"data: one\n\ndata: tw") == [b"one"]
    assert stream.feed(b"o\n") == []
    assert stream.feed(b"\ndata: three\n\ndata: four\n\n") == [b"two", b"three", b"four"]
    # A carriage return is an end by itself: the event need not wait for a line feed.
    assert stream.feed(b"data: five\r\n\r") == [b"five"]
    assert stream.feed(b"\ndata: six\n\n") == [b"six"]
