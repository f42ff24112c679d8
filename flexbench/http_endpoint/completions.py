"""OpenAI's completions and chat completions: what is sent, and how to read what comes back.

The formats are those of OpenAI's API reference, with what other servers add to them: reasoning in
fields of its own (vLLM, SGLang, DeepSeek), a usage that runs along with every chunk, errors as
events of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from flexbench.core.endpoint import Exchange, Failure, FailureKind, GenerationRequest, Response
from flexbench.http_endpoint.failures import status_failed
from flexbench.http_endpoint.head import with_body
from flexbench.http_endpoint.sse import EventStream

_DONE = b"[DONE]"
# A stream as nearly all servers write it: every piece that arrives is one of these.
_BEGIN, _END, _DONE_EVENT = b"data: {", b"}\n\n", b"data: [DONE]\n\n"
_USUAL_DELTA = frozenset(("role", "content"))
_SPACE = b" \t\r\n"
# Text that a model has generated, wherever a server puts it. vLLM has called its reasoning by
# either name, and for a while by both: it counts once.
_REASONING = ("reasoning_content", "reasoning")


class RequestWriter:
    """Writes requests for completions, or for chat completions."""

    def __init__(
        self,
        head: bytes,
        *,
        is_chat: bool,
        common: Mapping[str, Any],
        length_field: str,
        has_usage_in_stream: bool,
        ignores_eos: bool,
    ) -> None:
        """`head` is what `posting` made, `common` what every body has; None leaves a field out."""
        self._head = head
        self._is_chat = is_chat
        self._common = {name: value for name, value in common.items() if value is not None}
        self._length_field = length_field
        self._has_usage_in_stream = has_usage_in_stream
        self._ignores_eos = ignores_eos

    def write(self, request: GenerationRequest) -> bytes:
        """The request as it goes over the network."""
        body = dict(self._common)
        if self._is_chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        body[self._length_field] = request.max_new_tokens
        if self._ignores_eos:
            body["ignore_eos"] = True
        body["stream"] = request.is_streaming
        if request.is_streaming and self._has_usage_in_stream:
            body["stream_options"] = {"include_usage": True}
        return with_body(self._head, orjson.dumps(body))


class _UnreadableError(Exception):
    """An answer that is not what it should be; says how."""


class AnswerReader:
    """Reads answers, be they streams or not."""

    def __init__(self, quote: Callable[[object], str]) -> None:
        """`quote` makes one line without secrets of what a server says."""
        self._quote = quote

    def read(self, exchange: Exchange) -> Response:
        """What an exchange says; of one that was cut off, what had arrived until then."""
        if not 200 <= exchange.status < 300:
            return Response(failure=self._read_refusal(exchange))
        response = Response()
        try:
            if _is_json(exchange.pieces):
                self._read_whole(exchange, response)
            else:
                self._read_stream(exchange, response)
        except _UnreadableError as error:
            response.failure = Failure(FailureKind.MALFORMED, f"{error}")
        # What the server has said of it tells more than that it then closed the connection.
        response.failure = response.failure or exchange.failure
        if response.failure is None and exchange.ended_at and _is_empty(response):
            response.failure = Failure(FailureKind.EMPTY, "the answer has no token in it")
        return response

    # --- errors ---

    def _read_refusal(self, exchange: Exchange) -> Failure | None:
        if exchange.failure is not None or not exchange.ended_at:
            return exchange.failure
        body = b"".join(exchange.pieces)
        return status_failed(exchange.status, error_message(body), self._quote)

    def _reported(self, value: dict[str, Any]) -> Failure | None:
        """The failure that an object of JSON tells of, if it does."""
        error = value.get("error")
        if error is None and value.get("object") == "error":
            error = value
        if error is None:
            return None
        message = self._quote(_message_of(error))
        return Failure(FailureKind.SERVER_REPORTED, message or "an error without a message")

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise _UnreadableError(f"not JSON: {self._quote(data)!r}") from None
        if not isinstance(value, dict):
            raise _UnreadableError(f"not a JSON object: {self._quote(data)!r}")
        return value

    # --- an answer that comes at once ---

    def _read_whole(self, exchange: Exchange, response: Response) -> None:
        if not exchange.ended_at:
            return
        body = b"".join(exchange.pieces)
        value = self._parse(body)
        response.failure = self._reported(value)
        if response.failure is not None:
            return
        choices = value.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _UnreadableError(f"no choices in the answer: {self._quote(body)!r}")
        text, finish_reason = _read_choice(choices[0], "message")
        _read_usage(value.get("usage"), response)
        response.finish_reason = finish_reason
        if text or response.output_tokens:
            response.content_times.append(exchange.ended_at)
            response.texts.append(text)

    # --- a stream ---

    def _read_stream(self, exchange: Exchange, response: Response) -> None:
        if not _read_usual_stream(exchange, response):
            self._read_any_stream(exchange, response)

    def _read_any_stream(self, exchange: Exchange, response: Response) -> None:
        stream = EventStream()
        is_done = has_events = False
        for arrived_at, piece in zip(exchange.arrivals, exchange.pieces, strict=True):
            for data in stream.feed(piece):
                if data == _DONE:
                    is_done = True
                elif data and not is_done and response.failure is None:
                    self._read_event(data, arrived_at, response)
                has_events = True
        if response.failure is not None or not exchange.ended_at:
            return
        if not has_events and any(exchange.pieces):
            body = b"".join(exchange.pieces)
            raise _UnreadableError(f"neither JSON nor a stream of events: {self._quote(body)!r}")
        if not is_done and response.finish_reason is None and exchange.pieces:
            problem = "the stream ended without [DONE] and without a finish_reason"
            response.failure = Failure(FailureKind.CLOSED, problem)

    def _read_event(self, data: bytes, arrived_at: int, response: Response) -> None:
        value = self._parse(data)
        choices = value.get("choices")
        if not choices or "error" in value:
            response.failure = self._reported(value)
            if response.failure is None and choices is None and "usage" not in value:
                raise _UnreadableError(f"no choices in an event: {self._quote(data)!r}")
        if choices:
            if type(choices) is not list or type(choices[0]) is not dict:
                raise _UnreadableError(f"no choices in an event: {self._quote(data)!r}")
            text, finish_reason = _read_choice(choices[0], "delta")
            if text:
                response.content_times.append(arrived_at)
                response.texts.append(text)
            if finish_reason is not None:
                response.finish_reason = finish_reason
        if "usage" in value:
            _read_usage(value["usage"], response)


def _read_usual_stream(exchange: Exchange, response: Response) -> bool:
    """Read a whole stream of which each piece is one event; False, and nothing done, for any other.

    Most streams are like that, and reading one this way takes half of the time: JSON is parsed
    once, as one list. What is in any way unusual is left to who reads it with all care.
    """
    pieces = exchange.pieces
    if not exchange.ended_at or len(pieces) < 2 or pieces[-1] != _DONE_EVENT:
        return False
    events = [piece[6:-2] for piece in pieces if piece[:7] == _BEGIN and piece[-3:] == _END]
    text = b",".join(events)
    # JSON has no line ends: with one in it, a piece is of several lines, or events.
    if len(events) != len(pieces) - 1 or b"\n" in text or b"\r" in text:
        return False
    try:
        values = orjson.loads(b"[" + text + b"]")
        chunks = [_read_usual_event(value) for value in values]
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError):
        return False
    if len(chunks) != len(events):
        return False
    for arrived_at, (words, finish_reason) in zip(exchange.arrivals, chunks, strict=False):
        if words:
            response.content_times.append(arrived_at)
            response.texts.append(words)
        if finish_reason is not None:
            response.finish_reason = finish_reason
    for value in values:
        if "usage" in value:
            _read_usage(value["usage"], response)
    return True


def _read_usual_event(value: dict[str, Any]) -> tuple[str, str | None]:
    """Text and finish_reason of a chunk of the usual form.

    Raises LookupError, TypeError or ValueError for any other.
    """
    choices = value["choices"]
    if "error" in value or (not choices and value.get("object") == "error"):
        raise LookupError("an error")
    if type(choices) is not list:
        raise TypeError("choices that are no list")
    if not choices:
        return "", None
    (choice,) = choices
    text = choice["text"] if "text" in choice else _usual_delta(choice["delta"])
    if type(text) is not str:
        raise TypeError("a text that is not a string")
    finish_reason = choice.get("finish_reason")
    return text, finish_reason if type(finish_reason) is str else None


def _usual_delta(delta: Any) -> Any:
    if type(delta) is dict and delta.keys() <= _USUAL_DELTA:
        return delta.get("content") or ""
    raise LookupError("more than content")


def error_message(body: bytes) -> object:
    """The message in the body of an error, in any of the forms that servers give it."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if isinstance(value, dict):
        return _message_of(value.get("error") or value)
    return body


def _message_of(error: Any) -> object:
    if isinstance(error, dict):
        for name in ("message", "detail", "error"):
            if error.get(name):
                return error[name]
    return error


def _is_json(pieces: list[bytes]) -> bool:
    """Whether it is one object; no line of an event stream that matters begins so."""
    for piece in pieces:
        stripped = piece.lstrip(_SPACE)
        if stripped:
            return stripped.startswith(b"{")
    return False


def _is_empty(response: Response) -> bool:
    if response.output_tokens is not None:
        return response.output_tokens == 0
    return not response.texts


def _read_choice(choice: dict[str, Any], message_field: str) -> tuple[str, str | None]:
    """A choice's text, '' for none, and its finish_reason; raises _UnreadableError."""
    finish_reason = choice.get("finish_reason")
    if finish_reason is not None and type(finish_reason) is not str:
        finish_reason = None
    text = choice.get("text")
    if type(text) is str:
        return text, finish_reason
    if text is not None:
        raise _UnreadableError("a text that is not a string")
    message = choice.get(message_field)
    return _read_message(message) if isinstance(message, dict) else "", finish_reason


def _read_message(message: dict[str, Any]) -> str:
    content = message.get("content")
    if len(message) == 1 and isinstance(content, str):
        return content  # most chunks of most streams
    reasoning = next((message[name] for name in _REASONING if message.get(name)), None)
    parts = [reasoning, content, message.get("refusal")]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            parts += [function.get("name"), function.get("arguments")]
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise _UnreadableError("a text that is not a string")
    return "".join(part for part in parts if part)


def _read_usage(usage: Any, response: Response) -> None:
    """The last usage counts: some servers send one with every chunk, which grows."""
    if not isinstance(usage, dict):
        return
    output_tokens, prompt_tokens = usage.get("completion_tokens"), usage.get("prompt_tokens")
    if type(output_tokens) is int and output_tokens >= 0:
        response.output_tokens = output_tokens
    if type(prompt_tokens) is int and prompt_tokens >= 0:
        response.prompt_tokens = prompt_tokens
