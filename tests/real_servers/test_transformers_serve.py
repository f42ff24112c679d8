"""`transformers serve`, which somebody else has started, asked by OpenAIClient."""

from __future__ import annotations

import pytest

from flexbench.core.endpoint import FailureKind
from flexbench.http_endpoint.openai import OpenAIClient, OpenAIConfig
from tests.real_servers.conftest import ask, seconds_of
from tests.real_servers.tiny_model import recite

pytestmark = pytest.mark.timeout(300)
PROMPTS = ["hello", "12!"]


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_answers_are_read(transformers_serve, tiny_model, context, endpoint, is_streaming):
    config = OpenAIConfig(model=tiny_model, api_url=transformers_serve, endpoint=endpoint)
    command = OpenAIClient(config)
    command.start_service(context)
    answers = ask(lambda: OpenAIClient(command.config), PROMPTS, 8, is_streaming=is_streaming)
    for prompt, (exchange, response) in zip(PROMPTS, answers, strict=True):
        assert response.failure is None
        assert "".join(response.texts) == recite(prompt, 8)
        assert (response.prompt_tokens, response.output_tokens) == (len(prompt), 8)
        assert response.finish_reason == "length"
        to_first_s, whole_s = seconds_of(exchange, response)
        assert 0 < to_first_s <= whole_s
        if is_streaming:
            assert len(response.texts) == 8


def test_it_does_not_know_ignore_eos(transformers_serve, tiny_model):
    config = OpenAIConfig(model=tiny_model, api_url=transformers_serve, ignore_eos=True)
    ((_, response),) = ask(lambda: OpenAIClient(config), ["w"], 8, is_streaming=True)
    assert response.failure.kind is FailureKind.HTTP_CLIENT_ERROR
    assert "ignore_eos" in response.failure.message
