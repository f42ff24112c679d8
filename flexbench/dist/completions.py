"""The service's answers: a small part of OpenAI's API, so that any load generator can speak to it.

    GET  /health           whether it is ready
    GET  /v1/models        the one model there is
    POST /v1/completions   prompt (text, or token ids), max_tokens, stop, stream, stream_options

Tokens are chosen greedily, whatever temperature is asked for. There is no end-of-sequence token:
an answer has max_tokens tokens unless a `stop` comes first. `usage` counts tokens exactly, and a
stream has a chunk for every one.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from flexbench.dist.batching import Event, Failed, Job, JobQueue
from flexbench.dist.http_server import Events, HttpError, Request, error_body, watching
from flexbench.dist.text import Codec, RunningText

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_STOPS = 16
_SERVER_ERROR = "server_error"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model, and the memory that was planned for, can take."""

    vocab_size: int
    pad_token_id: int
    max_prompt_tokens: int
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What is asked for, checked."""

    prompt_ids: Sequence[int]
    max_tokens: int
    stops: tuple[str, ...]
    is_streaming: bool
    has_usage: bool
    """Whether a stream ends with the usage."""
    identity: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


def parse_completion(body: bytes, model_name: str, codec: Codec, limits: Limits) -> Completion:
    """Read the body of a request. Raises HttpError that says what is wrong."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _refused(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise _refused("the body is no JSON object")
    if values.get("model") not in (None, model_name):
        raise HttpError(
            HTTPStatus.NOT_FOUND, f"there is no model {values['model']!r}; this is {model_name!r}"
        )
    for name, only in (("n", 1), ("best_of", 1), ("echo", False), ("suffix", None)):
        if values.get(name, only) not in (None, only):
            raise _refused(f"{name} must be {json.dumps(only)}")
    if values.get("logprobs") not in (None, False):
        raise _refused("logprobs are not computed")
    options = values.get("stream_options") or {}
    return Completion(
        prompt_ids=_read_prompt(values.get("prompt"), codec, limits),
        max_tokens=_read_max_tokens(values.get("max_tokens"), limits),
        stops=_read_stops(values.get("stop")),
        is_streaming=_read_flag("stream", values.get("stream")),
        has_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _refused(message: str) -> HttpError:
    return HttpError(HTTPStatus.BAD_REQUEST, message)


def _read_prompt(prompt: Any, codec: Codec, limits: Limits) -> Sequence[int]:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise _refused("there may be one prompt in a request; send several at the same time")
        prompt = prompt[0]
    if isinstance(prompt, str):
        ids = codec.encode(prompt)
    elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
        ids = prompt
    else:
        raise _refused("prompt must be a text or a list of token ids")
    if not ids:
        raise _refused("the prompt has no tokens")
    if len(ids) > limits.max_prompt_tokens:
        raise _refused(
            f"the prompt has {len(ids)} tokens, and at most {limits.max_prompt_tokens} are "
            "accepted (--prompt-len)"
        )
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        raise _refused(f"token ids must be between 0 and {limits.vocab_size - 1}")
    if all(token == limits.pad_token_id for token in ids):
        raise _refused(f"the prompt holds only padding, token {limits.pad_token_id}")
    return ids


def _read_max_tokens(value: Any, limits: Limits) -> int:
    if value is None:
        return min(_DEFAULT_MAX_TOKENS, limits.max_new_tokens)
    if type(value) is not int or value < 1:
        raise _refused("max_tokens must be a whole number of at least 1")
    if value > limits.max_new_tokens:
        raise _refused(
            f"max_tokens is {value}, and at most {limits.max_new_tokens} are accepted (--gen-len)"
        )
    return value


def _read_stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _refused("stop must be a text, or a list of texts, none of them empty")
    if len(stops) > _MAX_STOPS:
        raise _refused(f"there may be {_MAX_STOPS} texts in stop")
    return tuple(stops)


def _read_flag(name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise _refused(f"{name} must be true or false")
    return bool(value)


@dataclass(frozen=True)
class _Piece:
    """New text of an answer; `finish_reason` with the last one."""

    text: str
    finish_reason: str | None


class CompletionsApp:
    """Answers requests with what comes out of the queue that it puts them into.

    Lives in the server's event loop; `deliver` and `fail` may be called from any thread.
    """

    def __init__(
        self,
        *,
        model_name: str,
        codec: Codec,
        limits: Limits,
        queue: JobQueue,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.is_ready = False
        """Whether the model is loaded: until then, requests are refused with 503."""
        self._model_name = model_name
        self._codec = codec
        self._limits = limits
        self._queue = queue
        self._loop = loop
        self._answers: dict[Job, asyncio.Queue[Event]] = {}
        self._ended_because: str | None = None

    def deliver(self, events: list[tuple[Job, Event]]) -> None:
        """Pass events on to those who wait for them."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def fail(self, reason: str) -> None:
        """All that have no answer yet get none, and nobody will; the first reason counts."""
        self._queue.close(reason)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail_all, reason)

    async def handle(self, request: Request) -> dict[str, Any] | Events:
        """Answer a request."""
        routes: dict[str, tuple[str, Callable[[Request], Any]]] = {
            "/health": ("GET", self._health),
            "/v1/models": ("GET", self._models),
            "/v1/completions": ("POST", self._complete),
        }
        if request.path not in routes:
            raise HttpError(HTTPStatus.NOT_FOUND, f"there is nothing at {request.path[:200]}")
        method, answer = routes[request.path]
        if request.method != method:
            error = HttpError(HTTPStatus.METHOD_NOT_ALLOWED, f"use {method}")
            error.headers["Allow"] = method
            raise error
        if not self.is_ready or self._ended_because is not None:
            reason = self._ended_because or "the model is being loaded"
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, reason, kind=_SERVER_ERROR)
        answered: dict[str, Any] | Events = await answer(request)
        return answered

    async def _health(self, request: Request) -> dict[str, Any]:  # noqa: ARG002
        return {"status": "ok"}

    async def _models(self, request: Request) -> dict[str, Any]:  # noqa: ARG002
        limits = self._limits
        model = {
            "id": self._model_name,
            "object": "model",
            "owned_by": "flexbench",
            "max_model_len": limits.max_prompt_tokens + limits.max_new_tokens,
            "tokenizer": self._codec.name,
        }
        return {"object": "list", "data": [model]}

    async def _complete(self, request: Request) -> dict[str, Any] | Events:
        completion = parse_completion(request.body, self._model_name, self._codec, self._limits)
        if completion.is_streaming:
            return self._stream(request, completion)
        pieces = [piece async for piece in self._pieces(request, completion)]
        last = pieces[-1]
        if isinstance(last, Failed):
            raise HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, last.message, kind=_SERVER_ERROR)
        text = "".join(piece.text for piece in pieces if isinstance(piece, _Piece))
        chunk = self._chunk(completion, _Piece(text, last.finish_reason))
        return {**chunk, "usage": _usage(completion, len(pieces))}

    async def _stream(self, request: Request, completion: Completion) -> Events:
        num_tokens = 0
        async with aclosing(self._pieces(request, completion)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Failed):
                    status = HTTPStatus.INTERNAL_SERVER_ERROR
                    yield _json(error_body(piece.message, _SERVER_ERROR, status))
                    return
                num_tokens += 1
                yield _json(self._chunk(completion, piece))
        if completion.has_usage:
            chunk = self._chunk(completion, None)
            yield _json({**chunk, "usage": _usage(completion, num_tokens)})
        yield b"[DONE]"

    async def _pieces(
        self, request: Request, completion: Completion
    ) -> AsyncGenerator[_Piece | Failed, None]:
        """A _Piece for every token, or a Failed as the last."""
        job = Job(completion.prompt_ids, completion.max_tokens)
        events: asyncio.Queue[Event] = asyncio.Queue()

        def give_up() -> None:
            job.is_abandoned = True
            events.put_nowait(Failed("nobody waits for it any more"))

        self._answers[job] = events
        try:
            if (reason := self._queue.put(job)) is not None:
                yield Failed(reason)
                return
            with watching(request, give_up):
                text = RunningText(self._codec, completion.stops)
                for number in range(1, completion.max_tokens + 1):
                    event = await events.get()
                    if isinstance(event, Failed):
                        yield event
                        return
                    is_last = number == completion.max_tokens
                    new = text.add(event.token_id, is_last=is_last)
                    finish_reason = "length" if is_last else None
                    yield _Piece(new, "stop" if text.has_stopped else finish_reason)
                    if text.has_stopped:
                        return
        finally:
            job.is_abandoned = True
            del self._answers[job]

    def _dispatch(self, events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            if job in self._answers:
                self._answers[job].put_nowait(event)

    def _fail_all(self, reason: str) -> None:
        if self._ended_because is not None:
            return
        self._ended_because = reason
        for events in self._answers.values():
            events.put_nowait(Failed(reason))

    def _chunk(self, completion: Completion, piece: _Piece | None) -> dict[str, Any]:
        choices = []
        if piece is not None:
            choices = [
                {
                    "index": 0,
                    "text": piece.text,
                    "logprobs": None,
                    "finish_reason": piece.finish_reason,
                }
            ]
        return {
            "id": completion.identity,
            "object": "text_completion",
            "created": completion.created,
            "model": self._model_name,
            "choices": choices,
        }


def _usage(completion: Completion, num_tokens: int) -> dict[str, int]:
    num_prompt_tokens = len(completion.prompt_ids)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
