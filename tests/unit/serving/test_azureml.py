"""The azureml client: its options, its requests, and how answers are read."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flexbench.core.endpoint import Exchange, FailureKind, GenerationRequest, ServiceContext
from flexbench.core.errors import ConfigError
from flexbench.core.progress import Silence
from flexbench.serving.clients.azureml import AzureMLClient, AzureMLConfig

URL = "https://here.region.example/score"
REQUEST = GenerationRequest(
    index=0, prompt="Hi", prompt_tokens=2, max_new_tokens=9, is_streaming=False
)


def config(**values: Any) -> AzureMLConfig:
    return AzureMLConfig(**{"api_url": URL, "deployment_name": "blue-1"} | values)


def context(*, streaming: bool) -> ServiceContext:
    return ServiceContext(
        progress=Silence(),
        log_folder=Path("/nowhere"),
        scratch_folder=Path("/nowhere"),
        timeout_s=1,
        raise_if_stopped=lambda: None,
        streaming=streaming,
        max_prompt_tokens=1,
        max_new_tokens=1,
        max_in_flight=1,
    )


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"api_url": "here"}, "--api-url"),
        ({"deployment_name": ""}, "--deployment-name"),
        ({"deployment_name": "a\r\nb: c"}, "--deployment-name"),
        ({"api_key_env": "no name"}, "--api-key-env"),
        ({"api_key": "hunter2\n"}, "--api-key"),
    ],
)
def test_refused(values: dict[str, str], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**values)
    assert caught.value.option == option
    assert "hunter2" not in caught.value.message


def test_the_key_is_a_secret() -> None:
    made = config(api_key="hunter2")
    assert "hunter2" not in repr(made)
    assert [entry.name for entry in fields(made) if entry.metadata.get("secret")] == ["api_key"]
    assert all(entry.metadata.get("help") for entry in fields(made))
    assert "hunter2" not in repr(AzureMLClient(made).describe_service())


@pytest.mark.parametrize(("given", "expected"), [(None, "from-env"), ("given", "given")])
def test_a_request(monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str) -> None:
    monkeypatch.setenv("AZUREML_API_KEY", "from-env")
    whole = AzureMLClient(config(api_key=given)).prepare_request(REQUEST)
    head, _, body = whole.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[:2] == ["POST /score HTTP/1.1", "Host: here.region.example"]
    assert f"Authorization: Bearer {expected}" in lines
    assert "azureml-model-deployment: blue-1" in lines
    assert json.loads(body) == {
        "input_data": {
            "input_string": ["Hi"],
            "parameters": {"max_new_tokens": 9, "do_sample": False, "return_full_text": False},
        }
    }


@pytest.mark.parametrize(
    ("status", "body", "text", "kind"),
    [
        (200, b'[{"0": "text"}]', "text", None),
        (200, b'["text"]', "text", None),
        (200, b'{"output": "text"}', "text", None),
        (200, b'[{"0": {"generated_text": "text"}}]', "text", None),
        (200, b'[{"generated_text": "text"}]', "text", None),
        (200, b'[{"0": ""}]', None, FailureKind.EMPTY),
        (200, b"[]", None, FailureKind.MALFORMED),
        (200, b'{"other": "text"}', None, FailureKind.MALFORMED),
        (200, b"[[[[[[[1]]]]]]]", None, FailureKind.MALFORMED),
        (200, b"text", None, FailureKind.MALFORMED),
        (401, b'{"message": "no"}', None, FailureKind.UNAUTHORIZED),
        (424, b"model failed", None, FailureKind.HTTP_CLIENT_ERROR),
        (429, b"", None, FailureKind.RATE_LIMITED),
        (503, b"", None, FailureKind.HTTP_SERVER_ERROR),
    ],
)
def test_answers(status: int, body: bytes, text: str | None, kind: FailureKind | None) -> None:
    exchange = Exchange()
    exchange.status, exchange.pieces, exchange.arrivals, exchange.ended_at = status, [body], [5], 7
    response = AzureMLClient(config(api_key="k")).process_response(exchange)
    assert (response.failure.kind if response.failure is not None else None) == kind
    assert response.texts == ([text] if text is not None else [])
    assert response.content_times == ([7] if text is not None else [])
    assert response.output_tokens is None


def test_an_exchange_that_was_cut_off() -> None:
    exchange = Exchange()
    exchange.status, exchange.pieces, exchange.arrivals = 200, [b'[{"0": "te'], [5]
    response = AzureMLClient(config(api_key="k")).process_response(exchange)
    assert (response.failure, response.texts) == (None, [])


def test_no_streams() -> None:
    with pytest.raises(ConfigError, match=r"--streaming: .*--api openai"):
        AzureMLClient(config(api_key="k")).start_service(context(streaming=True))


def test_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZUREML_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="AZUREML_API_KEY is not set"):
        AzureMLClient(config()).start_service(context(streaming=False))
