"""Servers of other projects, each in an environment of its own; scripts/test-serving makes those.

A test whose server is not there is skipped.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexbench.core.endpoint import Exchange, GenerationRequest, Response, ServiceContext
from flexbench.core.progress import Silence
from flexbench.core.service_process import LOCAL_HOST, ServiceProcess, find_port
from tests.real_servers.tiny_model import MAX_TOKENS, write_tiny_model

START_TIMEOUT_S = 240


def setting(name: str) -> str:
    """The value of an environment variable that says where a server is."""
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"{name} is not set; ./scripts/test-serving sets it")
    return value


@pytest.fixture(scope="session")
def quick_servers() -> Iterator[None]:
    """What makes all servers start sooner, and keeps them from asking a hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the model that recites the alphabet; see tiny_model.py."""
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def vllm_command(quick_servers: None) -> str:
    """What starts vLLM's server, for --vllm-command."""
    return setting("FLEXBENCH_VLLM")


@pytest.fixture(scope="session")
def vllm_args() -> str:
    """Arguments with which vLLM starts sooner, for --vllm-args."""
    return f"--enforce-eager --max-num-seqs 16 --max-model-len {MAX_TOKENS}"


@pytest.fixture(scope="session")
def mii_python() -> str:
    """An interpreter whose environment has DeepSpeed-MII."""
    return setting("FLEXBENCH_MII")


@pytest.fixture(scope="session")
def transformers_serve(
    quick_servers: None, tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a running `transformers serve` with the tiny model."""
    command = shlex.split(setting("FLEXBENCH_TRANSFORMERS_SERVE"))
    port = find_port(None)
    process = ServiceProcess(
        "transformers serve",
        [*command, "serve", tiny_model, "--device", "cpu", "--host", LOCAL_HOST, "--port", str(port)],
        log_path=tmp_path_factory.mktemp("logs") / "transformers.log",
    )  # fmt: skip
    try:
        process.start()
        process.wait_until_ready(
            lambda: is_healthy(port), timeout_s=START_TIMEOUT_S, raise_if_stopped=lambda: None
        )
        yield f"http://{LOCAL_HOST}:{port}"
    finally:
        process.stop()


@pytest.fixture
def context(tmp_path: Path) -> ServiceContext:
    return service_context(tmp_path)


def service_context(folder: Path) -> ServiceContext:
    """What a client gets from the command."""
    return ServiceContext(
        progress=Silence(),
        log_folder=folder,
        scratch_folder=folder,
        timeout_s=START_TIMEOUT_S,
        raise_if_stopped=lambda: None,
        streaming=True,
        max_prompt_tokens=100,
        max_new_tokens=100,
        max_in_flight=8,
    )


def is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(LOCAL_HOST, port, timeout=0.4)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ask(
    make_client: Callable[[], Any], prompts: list[str], max_new_tokens: int, *, is_streaming: bool
) -> list[tuple[Exchange, Response]]:
    """Send all prompts at once through a client, as a worker does; what comes back, read."""

    async def run() -> list[tuple[Exchange, Response]]:
        client = make_client()
        await client.open(len(prompts))
        prepared = [
            client.prepare_request(
                GenerationRequest(
                    index=index,
                    prompt=prompt,
                    prompt_tokens=len(prompt),
                    max_new_tokens=max_new_tokens,
                    is_streaming=is_streaming,
                )
            )
            for index, prompt in enumerate(prompts)
        ]
        exchanges = [Exchange() for _ in prompts]
        try:
            sending = asyncio.gather(*map(client.send_request, prepared, exchanges))
            await asyncio.wait_for(sending, 60)
        finally:
            await client.close()
        return [(exchange, client.process_response(exchange)) for exchange in exchanges]

    return asyncio.run(run())


def seconds_of(exchange: Exchange, response: Response) -> tuple[float, float]:
    """Time to first token, and of the whole request."""
    first = response.content_times[0] - exchange.sent_at
    return first / 1e9, (exchange.ended_at - exchange.sent_at) / 1e9
