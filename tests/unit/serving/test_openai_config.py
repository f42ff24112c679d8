"""The options of the openai client."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from flexbench.core.endpoint import GenerationRequest
from flexbench.core.errors import ConfigError
from flexbench.http_endpoint.openai import OpenAIClient, OpenAIConfig

REQUEST = GenerationRequest(
    index=0, prompt='say "ä"', prompt_tokens=3, max_new_tokens=7, is_streaming=True
)


@pytest.mark.parametrize(
    ("api_url", "endpoint", "target"),
    [
        ("http://h:1", None, "http://h:1/v1/completions"),
        ("http://h:1/", "chat", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1", None, "http://h:1/v1/completions"),
        ("http://h:1/v1/completions", None, "http://h:1/v1/completions"),
        ("http://h:1/v1/chat/completions", None, "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/chat/completions", "chat", "http://h:1/v1/chat/completions"),
        ("https://h/openai/v1", "chat", "https://h/openai/v1/chat/completions"),
        ("https://h/v1beta/openai/", "chat", "https://h/v1beta/openai/chat/completions"),
        ("https://h/gateway", None, "https://h/gateway/v1/completions"),
        ("https://h/odd/completions?api-version=2024-10-21", None, "https://h/odd/completions?api-version=2024-10-21"),
        ("http://[::1]:1", None, "http://[::1]:1/v1/completions"),
    ],
)  # fmt: skip
def test_where_requests_go(api_url: str, endpoint: str | None, target: str) -> None:
    config = OpenAIConfig(api_url=api_url, endpoint=endpoint)
    assert str(config.request_url()) == target
    # Once resolved, it stays what it is.
    assert str(replace(config, model="m").request_url()) == target


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"api_url": "h:1"}, "--api-url"),
        ({"api_url": "http://u:p@h"}, "--api-url"),
        ({"endpoint": "embeddings"}, "--endpoint"),
        ({"endpoint": "completions", "api_url": "http://h/v1/chat/completions"}, "--endpoint"),
        ({"api_key_env": "sk-abc"}, "--api-key-env"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"max_tokens_field": "length"}, "--max-tokens-field"),
        ({"extra_body": "{"}, "--extra-body"),
        ({"extra_body": "[1]"}, "--extra-body"),
        ({"extra_body": '{"stream": false}'}, "--extra-body"),
        ({"extra_body": '{"n": 2}'}, "--extra-body"),
        ({"ca_file": Path("/nowhere/ca.pem")}, "--ca-file"),
        ({"ca_file": Path(__file__), "tls_insecure": True}, "--tls-insecure"),
    ],
)
def test_refused(values: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAIConfig(**values)
    assert caught.value.option == option


def test_every_option_has_help() -> None:
    assert all(
        entry.metadata.get("help") for entry in fields(OpenAIConfig) if entry.name != "model"
    )


def sent(config: OpenAIConfig, request: GenerationRequest = REQUEST) -> tuple[str, dict[str, Any]]:
    head, _, body = OpenAIClient(config).prepare_request(request).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head.decode().split("\r\n")
    return head.decode(), json.loads(body)


def test_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    head, body = sent(OpenAIConfig(model="m", api_url="http://h:1"))
    assert head.startswith("POST /v1/completions HTTP/1.1\r\nHost: h:1\r\n")
    assert "Authorization" not in head
    assert body == {
        "model": "m",
        "prompt": 'say "ä"',
        "max_tokens": 7,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_chat_at_once_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-hunter2")
    config = OpenAIConfig(
        model="m",
        endpoint="chat",
        api_key_env="MY_KEY",
        ignore_eos=True,
        max_tokens_field="max_completion_tokens",
        extra_body='{"top_k": 5, "temperature": null}',
    )
    head, body = sent(config, replace(REQUEST, is_streaming=False))
    assert "\r\nAuthorization: Bearer sk-hunter2\r\n" in head
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": 'say "ä"'}],
        "max_completion_tokens": 7,
        "ignore_eos": True,
        "top_k": 5,
        "stream": False,
    }
    assert "hunter2" not in repr(config)


def test_a_stream_without_usage() -> None:
    _, body = sent(OpenAIConfig(model="m", usage_in_stream=False))
    assert body["stream"] is True
    assert "stream_options" not in body
