"""A pipeline behind the protocol of endpoints: real services, of one process and under mpirun."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("torch", reason="--api dist needs torch")

from flexbench.core.endpoint import (
    Exchange,
    FailureKind,
    GenerationRequest,
    Response,
    ServiceContext,
)
from flexbench.core.errors import ConfigError, Interrupted, WorkerError
from flexbench.core.progress import Silence
from flexbench.dist.endpoint import DistClient, DistEndpointConfig
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.model import OptLM
from flexbench.dist.opt_config import load_opt_config
from flexbench.dist.text import ByteCodec
from tests.integration.dist.conftest import MPIRUN, write_config, write_model
from tests.integration.dist.stage import policy

needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="there is no mpirun here")

# Of different lengths, so that they are padded, and with answers of different lengths.
PROMPTS = (("a", 5), ("to be or not", 9), ("hello", 1), ("x y z", 7), ("again", 12))
MANY_TOKENS = 30_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What OptLM generates for each prompt alone."""
    config = load_opt_config(tiny, dtype="float32")
    env = ExecutionEnv.create(tmp_path_factory.mktemp("offload"))
    model = OptLM(config, env, str(tiny), policy(1))
    codec = ByteCodec(config.vocab_size)
    texts = []
    for prompt, max_tokens in PROMPTS:
        ids = codec.encode(prompt)
        texts.append(codec.decode(model.generate([ids], max_tokens)[0, len(ids) :].tolist()))
    model.close()
    assert len(set("".join(texts))) > 3
    return texts


@contextmanager
def service(
    *,
    max_new_tokens: int = 12,
    raise_if_stopped: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[DistClient]:
    """A client whose service is there; checks that nothing of it stays."""
    others = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="fbt-") as name:
        patch.setenv("OMP_NUM_THREADS", "1")
        folder = Path(name)
        client = DistClient(DistEndpointConfig(**options))
        try:
            client.start_service(
                ServiceContext(
                    progress=Silence(),
                    log_folder=folder,
                    scratch_folder=folder,
                    timeout_s=90,
                    raise_if_stopped=raise_if_stopped,
                    streaming=True,
                    max_prompt_tokens=20,
                    max_new_tokens=max_new_tokens,
                    max_in_flight=len(PROMPTS),
                )
            )
            yield client
        finally:
            client.stop_service()
        assert set(psutil.Process().children(recursive=True)) <= others


async def send(
    client: DistClient,
    prompt: str,
    max_tokens: int,
    *,
    is_streaming: bool = True,
    exchange: Exchange | None = None,
) -> tuple[Exchange, Response]:
    request = GenerationRequest(
        index=0,
        prompt=prompt,
        prompt_tokens=len(prompt),
        max_new_tokens=max_tokens,
        is_streaming=is_streaming,
    )
    exchange = exchange or Exchange()
    await client.send_request(client.prepare_request(request), exchange)
    return exchange, client.process_response(exchange)


async def send_all(config: Any, *, is_streaming: bool) -> list[tuple[Exchange, Response]]:
    """All prompts at the same time, as a worker does it."""
    client = DistClient(config)
    await client.open(len(PROMPTS))
    try:
        return await asyncio.gather(
            *(send(client, *prompt, is_streaming=is_streaming) for prompt in PROMPTS)
        )
    finally:
        await client.close()


def assert_answers(config: Any, expected: list[str], *, is_streaming: bool) -> None:
    answers = asyncio.run(send_all(config, is_streaming=is_streaming))
    for (exchange, response), (prompt, max_tokens), text in zip(
        answers, PROMPTS, expected, strict=True
    ):
        assert response.failure is None
        assert "".join(response.texts) == text
        assert (response.prompt_tokens, response.output_tokens) == (len(prompt), max_tokens)
        assert response.finish_reason == "length"
        assert len(response.content_times) == (max_tokens if is_streaming else 1)
        assert exchange.sent_at < response.content_times[0]
        assert response.content_times == sorted(response.content_times)


def test_one_process_answers_with_the_tokens_of_optlm(tiny, expected):
    with service(model=str(tiny), gpu_batch_size=2, num_gpu_batches=2) as client:
        facts = client.describe_service()
        assert (facts["num_pipeline_stages"], facts["block_size"]) == (1, 4)
        assert facts["batching"] == "static"
        for is_streaming in (True, False):
            assert_answers(client.config, expected, is_streaming=is_streaming)
        # Longer than was planned for: refused, and the service goes on.
        _, response = asyncio.run(send_one(client.config, "x" * 21))
        assert response.failure.kind is FailureKind.HTTP_CLIENT_ERROR
        assert "21 tokens, and at most 20" in response.failure.message


async def send_one(config: Any, prompt: str) -> tuple[Exchange, Response]:
    client = DistClient(config)
    await client.open(1)
    try:
        return await send(client, prompt, 3)
    finally:
        await client.close()


@pytest.mark.mpi
@needs_mpirun
def test_two_stages_answer_with_the_tokens_of_optlm(tiny, expected):
    with service(model=str(tiny), gpu_batch_size=2, num_stages=2) as client:
        assert client.describe_service()["block_size"] == 4
        assert_answers(client.config, expected, is_streaming=True)


def rank_of(number: int) -> psutil.Process:
    """The process of a rank of the service."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one of an earlier test, which has just ended
            if process.environ().get("OMPI_COMM_WORLD_RANK") == str(number):
                return process
    raise AssertionError(f"there is no rank {number}")


async def kill_meanwhile(config: Any) -> tuple[list[tuple[Exchange, Response]], float]:
    """Two requests, of which one waits for its turn; rank 1 is killed when tokens come."""
    client = DistClient(config)
    await client.open(2)
    exchange = Exchange()
    try:
        streamed = send(client, "abc", MANY_TOKENS, exchange=exchange)
        waiting = send(client, "abc", MANY_TOKENS, is_streaming=False)
        asked = [asyncio.ensure_future(request) for request in (streamed, waiting)]
        async with asyncio.timeout(60):
            while not exchange.arrivals:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        rank_of(1).send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        answers = await asyncio.wait_for(asyncio.gather(*asked), 60)
        return answers, time.monotonic() - killed_at
    finally:
        await client.close()


@pytest.mark.mpi
@needs_mpirun
@pytest.mark.timing
def test_a_lost_rank_fails_all_requests_and_ends_the_service(tmp_path):
    write_config(tmp_path / "model", max_position_embeddings=2**16)
    with service(
        model=str(tmp_path / "model"),
        path="_DUMMY_",
        gpu_batch_size=1,
        num_stages=2,
        num_inner_iterations=1,
        max_new_tokens=MANY_TOKENS,
    ) as client:
        ((_, streamed), (_, waited)), within_s = asyncio.run(kill_meanwhile(client.config))
        assert within_s < 15
        assert 0 < len(streamed.content_times) < MANY_TOKENS
        assert streamed.failure.kind is FailureKind.SERVER_REPORTED
        assert waited.failure.kind is FailureKind.HTTP_SERVER_ERROR
        for response in (streamed, waited):
            assert "rank 1 was killed" in response.failure.message
        _, later = asyncio.run(send_one_after_the_end(client.config))
        assert later.failure.kind is FailureKind.REFUSED


async def send_one_after_the_end(config: Any) -> tuple[Exchange, Response]:
    client = DistClient(config)
    expires_at = time.monotonic() + 15
    while time.monotonic() < expires_at:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", config.port)
        except OSError:
            break
        writer.close()
        await asyncio.sleep(0.1)
    await client.open(0)
    try:
        return await send(client, "abc", 1)
    finally:
        await client.close()


def test_a_service_that_cannot_start_shows_its_last_lines(tmp_path):
    write_config(tmp_path / "model")
    with pytest.raises(WorkerError) as raised, service(model=str(tmp_path / "model")):
        pass
    assert "ended with exit code 2" in raised.value.message
    assert "Error: " in raised.value.details


def test_a_start_that_is_interrupted_leaves_nothing(tiny):
    begun_at = time.monotonic()

    def stop() -> None:
        if time.monotonic() > begun_at + 1:
            raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted), service(model=str(tiny), raise_if_stopped=stop):
        pass


def test_stages_and_lengths_that_cannot_be_start_nothing(tiny):
    problem = "--num-stages: 5 pipeline stages cannot share the 4"
    with pytest.raises(ConfigError, match=problem), service(model=str(tiny), num_stages=5):
        pass
    with (
        pytest.raises(ConfigError, match="--max-new-tokens"),
        service(model=str(tiny), max_new_tokens=128),
    ):
        pass
