"""Answers of OpenAI-like servers, read from what arrived when."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("orjson", reason="HTTP endpoints need the serving extra")

from flexbench.core.endpoint import Exchange, Failure, FailureKind, Response
from flexbench.http_endpoint.completions import AnswerReader, _read_usual_stream
from flexbench.http_endpoint.keys import quoting

READER = AnswerReader(quoting("sk-hunter2"))
ENDED_AT = 9000
DONE = b"data: [DONE]\n\n"


def exchange(pieces: list[bytes], *, status: int = 200, ended_at: int = ENDED_AT) -> Exchange:
    """Piece number i arrived at i + 1."""
    made = Exchange()
    made.status, made.ended_at = status, ended_at
    made.pieces, made.arrivals = pieces, list(range(1, len(pieces) + 1))
    return made


def read(pieces: list[bytes], **values: int) -> Response:
    return READER.read(exchange(pieces, **values))


def event(value: Any, line_end: str = "\n") -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}{line_end}{line_end}".encode()


def text(content: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": content, "finish_reason": finish_reason}]}


def delta(finish_reason: str | None = None, **content: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish_reason}]}


def usage(output_tokens: int, prompt_tokens: int = 5) -> dict[str, Any]:
    return {"completion_tokens": output_tokens, "prompt_tokens": prompt_tokens}


# --- streams ---


def test_a_stream_of_completions() -> None:
    response = read(
        [
            event(text("Grö")),
            event(text("")),
            event(text("ße") | {"usage": None}),
            event(text("", "length")),
            event({"choices": [], "usage": usage(3)}),
            DONE,
        ]
    )
    assert response == Response(
        content_times=[1, 3],
        texts=["Grö", "ße"],
        output_tokens=3,
        prompt_tokens=5,
        finish_reason="length",
    )


def test_a_stream_of_chat() -> None:
    call = {"index": 0, "id": "c1", "type": "function"}
    response = read(
        [
            event(delta(role="assistant", content="")),
            event(delta(role="assistant", content=None)),
            event(delta(reasoning_content="think")),
            event(delta(reasoning="more")),
            event(delta(reasoning="both", reasoning_content="both", content=None)),
            event(delta(content="text")),
            event(delta(tool_calls=[call | {"function": {"name": "f", "arguments": ""}}])),
            event(delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}])),
            event(delta(refusal="no")),
            event(delta("tool_calls")),
            DONE,
        ]
    )
    assert response.texts == ["think", "more", "both", "text", "f", '{"a":', "no"]
    assert response.content_times == [3, 4, 5, 6, 7, 8, 9]
    assert response.finish_reason == "tool_calls"
    assert response.failure is None
    assert response.output_tokens is None


def test_usage_that_runs_along() -> None:
    events = [event(text("a") | {"usage": usage(n)}) for n in (1, 2, 4)]
    response = read([*events, event(text("", "stop") | {"usage": usage(4)}), DONE])
    assert (response.output_tokens, response.prompt_tokens) == (4, 5)
    assert len(response.texts) == 3


@pytest.mark.parametrize(
    "odd", [{"completion_tokens": "3"}, {"completion_tokens": True}, [], "", {}]
)
def test_usage_that_cannot_be_read(odd: Any) -> None:
    response = read([event(text("a", "stop") | {"usage": odd}), DONE])
    assert response.output_tokens is None
    assert response.failure is None


def test_several_events_in_a_piece_and_an_event_in_several() -> None:
    first, second, last = event(text("a")), event(text("b")), event(text("c", "stop"))
    response = read([first + second, last[:20], last[20:-1], last[-1:] + DONE])
    assert response.texts == ["a", "b", "c"]
    assert response.content_times == [1, 1, 4]


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([event(text("a", "stop"))], None),  # no [DONE], but it says that it is finished
        ([event(text("a")), DONE], None),
        ([event(text("a")), DONE, b"data: {garbage\n\n"], None),
        ([event(text("a"))], FailureKind.CLOSED),
        ([event(text("a")), DONE[:-1]], FailureKind.CLOSED),
        ([b": ping\n\n"], FailureKind.MALFORMED),
        ([], FailureKind.EMPTY),
        ([DONE], FailureKind.EMPTY),
        ([event(text("", "stop")), DONE], FailureKind.EMPTY),
        ([event(text("a", "stop") | {"usage": usage(0)}), DONE], FailureKind.EMPTY),
        ([event(text("", "stop") | {"usage": usage(2)}), DONE], None),
        ([event(text("a")), b"data: {garbage\n\n", DONE], FailureKind.MALFORMED),
        ([event(text("a")), b"data: 7\n\n", DONE], FailureKind.MALFORMED),
        ([event(text("a")), event({"type": "ping"}), DONE], FailureKind.MALFORMED),
        ([event({"choices": {"text": "a"}}), DONE], FailureKind.MALFORMED),
        ([event({"choices": ["a"]}), DONE], FailureKind.MALFORMED),
        ([event({"choices": [{"text": 7}]}), DONE], FailureKind.MALFORMED),
        ([event(delta(content=[1])), DONE], FailureKind.MALFORMED),
        ([event(delta(tool_calls=7)), DONE], FailureKind.EMPTY),
        ([b"<html>busy</html>"], FailureKind.MALFORMED),
        ([event(text("a")), event({"error": {"message": "out of memory"}})], FailureKind.SERVER_REPORTED),
        ([event(text("a") | {"error": None}), DONE], None),
        ([event({"object": "error", "message": "m"}), DONE], FailureKind.SERVER_REPORTED),
        ([event(text("a") | {"error": {"message": "m"}}), DONE], FailureKind.SERVER_REPORTED),
        ([event({"usage": usage(1)}), event(text("a", "stop")), DONE], None),
    ],
)  # fmt: skip
def test_how_streams_end(pieces: list[bytes], kind: FailureKind | None) -> None:
    failure = read(pieces).failure
    assert (failure.kind if failure is not None else None) == kind
    bytewise = read([bytes([byte]) for byte in b"".join(pieces)]).failure
    assert bytewise == failure


def test_what_came_before_an_error_is_kept() -> None:
    error = {"error": {"message": "the key sk-hunter2\nis used up", "code": 500}}
    response = read([event(text("a")), event(error), event(text("b")), DONE])
    assert response.texts == ["a"]
    assert response.failure == Failure(FailureKind.SERVER_REPORTED, "the key *** is used up")


STREAM = (
    event(delta(role="assistant", content=""))
    + event(delta(content="Grö"), "\r\n")
    + b": ping\r\n\r\n"
    + event(delta(content="ße 🙂"), "\r")
    + b"event: message\nid: 3\n"
    + event(delta(reasoning_content="…"))
    + event(delta("stop"), "\r\n")
    + event({"choices": [], "usage": usage(4)})
    + DONE
)


def test_a_stream_cut_at_every_byte() -> None:
    whole = read([STREAM])
    assert whole.texts == ["Grö", "ße 🙂", "…"]
    assert (whole.failure, whole.output_tokens, whole.finish_reason) == (None, 4, "stop")
    for cut in range(1, len(STREAM)):
        halves = read([STREAM[:cut], STREAM[cut:]])
        assert halves.content_times == sorted(halves.content_times)
        halves.content_times = whole.content_times
        assert halves == whole


@given(cuts=st.sets(st.integers(min_value=1, max_value=len(STREAM) - 1), max_size=40))
def test_a_stream_cut_anywhere(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    response = read(pieces)
    assert response.texts == ["Grö", "ße 🙂", "…"]
    assert response.failure is None
    # A text's time is that of the piece with the byte that ends its event: the second line end's
    # first one.
    ends = [
        STREAM.index("Grö".encode()) + len('Grö"}, "finish_reason": null}]}'.encode()) + 2,
        STREAM.index(b"\r\r") + 1,
        STREAM.index(b"\n\n", STREAM.index("…".encode())) + 1,
    ]
    assert response.content_times == [
        next(number for number, edge in enumerate(edges[1:], 1) if end < edge) for end in ends
    ]


# --- answers that come at once ---


def whole(value: Any) -> list[bytes]:
    body = json.dumps(value).encode()
    return [body[:10], body[10:]]


def test_a_whole_completion() -> None:
    value = {"choices": [{"text": "ab", "finish_reason": "length"}], "usage": usage(2)}
    assert read(whole(value)) == Response(
        content_times=[ENDED_AT],
        texts=["ab"],
        output_tokens=2,
        prompt_tokens=5,
        finish_reason="length",
    )


def test_a_whole_chat() -> None:
    message = {"role": "assistant", "content": "b", "reasoning_content": "a", "tool_calls": None}
    response = read(whole({"choices": [{"message": message, "finish_reason": "stop"}]}))
    assert response.texts == ["ab"]
    assert response.content_times == [ENDED_AT]
    assert response.output_tokens is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"choices": [{"text": ""}]}, FailureKind.EMPTY),
        ({"choices": [{"text": ""}], "usage": usage(0)}, FailureKind.EMPTY),
        ({"choices": [{"text": ""}], "usage": usage(2)}, None),
        ({"choices": [{"message": {"content": None}}]}, FailureKind.EMPTY),
        ({"choices": []}, FailureKind.MALFORMED),
        ({"choices": ["a"]}, FailureKind.MALFORMED),
        ({"text": "a"}, FailureKind.MALFORMED),
        ({"error": "overloaded"}, FailureKind.SERVER_REPORTED),
        ({"error": {"message": "overloaded"}}, FailureKind.SERVER_REPORTED),
    ],
)
def test_how_whole_answers_fail(value: Any, kind: FailureKind | None) -> None:
    failure = read(whole(value)).failure
    assert (failure.kind if failure is not None else None) == kind


@pytest.mark.parametrize("body", [b"{", b'{"choices": [', b"[1]", b"null", b"\xff\xfe", b"{\xff}"])
def test_garbage(body: bytes) -> None:
    failure = read([body]).failure
    assert failure is not None
    assert failure.kind is FailureKind.MALFORMED


# --- statuses, and exchanges without an end ---


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "slow down, sk-hunter2"}}', "HTTP 429: slow down, ***"),
        (b'{"error": "slow down"}', "HTTP 429: slow down"),
        (b'{"object": "error", "message": "slow down"}', "HTTP 429: slow down"),
        (b'{"detail": "slow down"}', "HTTP 429: slow down"),
        (b'{"detail": [{"loc": ["body"]}]}', "HTTP 429: [{'loc': ['body']}]"),
        (b"<h1>slow\r\ndown</h1>", "HTTP 429: <h1>slow down</h1>"),
        (b'"slow down"', 'HTTP 429: "slow down"'),
        (b"", "HTTP 429"),
    ],
)
def test_a_refusal(body: bytes, message: str) -> None:
    assert read([body], status=429).failure == Failure(FailureKind.RATE_LIMITED, message)


def test_what_was_cut_off() -> None:
    """Not our failure to tell: the generator knows why."""
    response = read([event(text("a")), event(text("b"))[:9]], ended_at=0)
    assert (response.texts, response.content_times, response.failure) == (["a"], [1], None)
    assert read([b'{"choices"'], ended_at=0) == Response()
    assert read([], status=0, ended_at=0) == Response()
    assert read([b'{"error"'], status=500, ended_at=0) == Response()


def test_a_connection_that_was_lost() -> None:
    lost = exchange([event(text("a"))], ended_at=0)
    lost.failure = Failure(FailureKind.CLOSED, "closed")
    assert READER.read(lost) == Response(content_times=[1], texts=["a"], failure=lost.failure)
    lost.pieces.append(event({"error": "no memory"}))
    lost.arrivals.append(2)
    assert READER.read(lost).failure == Failure(FailureKind.SERVER_REPORTED, "no memory")


_EVENTS = st.sampled_from(
    [
        event(text("a")),
        event(text("")),
        event(text(None)),
        event(text("Grö", "stop")),
        event(text("b") | {"usage": usage(3)}),
        event({"choices": [], "usage": usage(4)}),
        event({"choices": [], "object": "error", "message": "m"}),
        event({"choices": []}),
        event({"usage": usage(2)}),
        event({"error": {"message": "m"}}),
        event(text("a") | {"error": None}),
        event(delta(content="c")),
        event(delta(role="assistant", content=None)),
        event(delta(content=7)),
        event(delta(content="d", reasoning_content="e")),
        event(delta("length")),
        event({"choices": {"text": "a"}}),
        event({"choices": [{"text": "a"}, {"text": "b"}]}),
        event({"choices": [{"delta": None}]}),
        event({"choices": [{"text": "x", "finish_reason": 7}]}),
        event([1]),
        event(text("a")) + event(text("b")),
        b'data: {"choices": [{"text": "a"\n\n',
        b'data: {"choices": [{"y": 1}\n\n',
        b'data: {"z": 2}]}\n\n',
        b"data: {}},{}\n\n",
        b": ping\n\n",
        DONE,
        b"",
    ]
)


@given(st.lists(_EVENTS, max_size=6), st.booleans())
def test_the_quick_way_reads_what_the_careful_one_reads(events: list[bytes], is_done: bool) -> None:
    pieces = [*events, DONE] if is_done else events
    careful = Response()
    sent = exchange(pieces)
    quick = Response()
    if not _read_usual_stream(sent, quick):
        assert quick == Response()  # nothing was done
        return
    READER._read_any_stream(sent, careful)
    assert quick == careful
