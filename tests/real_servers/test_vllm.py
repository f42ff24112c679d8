"""vLLM's own server, started, asked and ended by VLLMClient."""

from __future__ import annotations

import re
import shlex
import socket
from dataclasses import replace

import psutil
import pytest

from flexbench.core.endpoint import FailureKind
from flexbench.core.errors import RunError
from flexbench.serving.clients.vllm import VLLMClient, VLLMConfig
from tests.real_servers.conftest import ask, seconds_of, service_context
from tests.real_servers.tiny_model import MAX_TOKENS, recite

pytestmark = pytest.mark.timeout(400)  # to import vLLM takes its processes ten seconds each
PROMPTS = ["hello", "w", "12!", "Hamburg"]


@pytest.fixture(scope="module")
def vllm(vllm_command, vllm_args, tiny_model, tmp_path_factory):
    """A client that has started its server. In the end, no process of it is left, nor its port."""
    config = VLLMConfig(model=tiny_model, vllm_command=vllm_command, vllm_args=vllm_args)
    client = VLLMClient(config)
    try:
        client.start_service(service_context(tmp_path_factory.mktemp("vllm")))
        first = psutil.Process(client._process.pid)
        family = [first, *first.children(recursive=True)]
        yield client
    finally:
        client.stop_service()
    assert len(family) > 1, "the engine has a process of its own"
    assert [process for process in family if process.is_running()] == []
    with socket.socket() as place:
        place.bind(("127.0.0.1", client.config.port))


def test_the_server_is_described(vllm, vllm_command, tiny_model):
    described = vllm.describe_service()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", described["version"])
    assert described["model"] == tiny_model
    assert described["max_model_len"] == MAX_TOKENS
    assert described["ready_after_s"] > 1
    assert described["command"].startswith(shlex.join(shlex.split(vllm_command)))


@pytest.mark.timing  # a machine that is late may get all of a stream in one piece
@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_as_many_tokens_come_as_were_asked_for(vllm, endpoint, is_streaming):
    config = replace(vllm.config, endpoint=endpoint)
    answers = ask(lambda: VLLMClient(config), PROMPTS, 40, is_streaming=is_streaming)
    for prompt, (exchange, response) in zip(PROMPTS, answers, strict=True):
        assert response.failure is None
        # Also beyond the letter z, which ends a text otherwise.
        assert "".join(response.texts) == recite(prompt, 40)
        assert (response.prompt_tokens, response.output_tokens) == (len(prompt), 40)
        assert response.finish_reason == "length"
        to_first_s, whole_s = seconds_of(exchange, response)
        if is_streaming:
            assert len(response.texts) > 1
            assert 0 < to_first_s < whole_s
        else:
            assert 0 < to_first_s <= whole_s


def test_a_text_may_end_by_itself(vllm):
    config = replace(vllm.config, ignore_eos=False)
    ((_, response),) = ask(lambda: VLLMClient(config), ["w"], 40, is_streaming=True)
    # x, y, and z, which is not shown.
    assert "".join(response.texts) == "xy"
    assert (response.output_tokens, response.finish_reason) == (3, "stop")


def test_a_request_that_is_too_long_fails(vllm):
    ((_, response),) = ask(lambda: VLLMClient(vllm.config), ["w"], 2000, is_streaming=True)
    assert response.failure.kind is FailureKind.HTTP_CLIENT_ERROR
    assert "2000" in response.failure.message


def test_a_model_that_is_not_there(vllm_command, context, tmp_path):
    model = str(tmp_path / "none")
    client = VLLMClient(VLLMConfig(model=model, vllm_command=vllm_command))
    with pytest.raises(RunError, match="vllm ended with exit code 1") as caught:
        client.start_service(context)
    client.stop_service()
    assert model in caught.value.details
