"""The dummy client: a latency model whose saturation is known."""

from __future__ import annotations

import asyncio
import math
import statistics
import time

import pytest

from flexbench.core.endpoint import Exchange, FailureKind, GenerationRequest
from flexbench.core.errors import ConfigError
from flexbench.serving.clients.dummy import DummyClient, DummyConfig, _Places


def request(index: int = 0, tokens: int = 5, *, streaming: bool = True) -> GenerationRequest:
    return GenerationRequest(
        index=index, prompt="p", prompt_tokens=1, max_new_tokens=tokens, is_streaming=streaming
    )


def plan(config: DummyConfig, index: int = 0, tokens: int = 5):
    return DummyClient(config).prepare_request(request(index, tokens))


def exchanges(
    config: DummyConfig, requests: list[GenerationRequest]
) -> list[tuple[Exchange, DummyClient]]:
    """Send all at once and wait for the last."""

    async def send_all():
        client = DummyClient(config)
        await client.open(len(requests))
        sent = [Exchange() for _ in requests]
        await asyncio.gather(
            *(
                client.send_request(client.prepare_request(one), exchange)
                for one, exchange in zip(requests, sent, strict=True)
            )
        )
        await client.close()
        return [(exchange, client) for exchange in sent]

    return asyncio.run(send_all())


@pytest.mark.timing
def test_a_stream_has_one_piece_a_token_at_the_times_of_the_model():
    ((exchange, client),) = exchanges(DummyConfig(ttft_ms=30, itl_ms=10), [request(tokens=4)])
    response = client.process_response(exchange)
    after_ms = [(moment - exchange.sent_at) / 1e6 for moment in response.content_times]
    for moment, due in zip(after_ms, [30, 40, 50, 60], strict=True):
        assert due - 1 <= moment <= due + 60
    assert len(response.texts) == response.output_tokens == 4
    assert exchange.ended_at >= exchange.arrivals[-1]
    assert (exchange.status, response.finish_reason, response.failure) == (200, "length", None)


@pytest.mark.timing
def test_without_a_stream_the_answer_comes_at_once_and_whole():
    ((exchange, client),) = exchanges(
        DummyConfig(ttft_ms=10, itl_ms=10), [request(tokens=4, streaming=False)]
    )
    response = client.process_response(exchange)
    (moment,) = response.content_times
    assert 39 <= (moment - exchange.sent_at) / 1e6 <= 100
    assert (len(response.texts), response.output_tokens) == (1, 4)


@pytest.mark.timing
def test_what_finds_no_place_waits_in_line():
    config = DummyConfig(capacity=2, ttft_ms=20, itl_ms=0)
    done = exchanges(config, [request(index, tokens=1) for index in range(6)])
    ttft_ms = [(exchange.arrivals[0] - exchange.sent_at) / 1e6 for exchange, _ in done]
    for moment, due in zip(ttft_ms, [20, 20, 40, 40, 60, 60], strict=True):
        assert due - 1 <= moment <= due + 60
    arrivals = [exchange.arrivals[0] for exchange, _ in done]
    assert max(arrivals[:2]) < min(arrivals[2:4])
    assert max(arrivals[2:4]) < min(arrivals[4:])


@pytest.mark.timing
def test_throughput_saturates_at_capacity_over_service_time():
    # s = 6 ms + 2 * 2 ms = 10 ms, so 8 places serve 800 requests a second: 160 in 200 ms.
    config = DummyConfig(capacity=8, ttft_ms=6, itl_ms=2)
    began = time.monotonic_ns()
    done = exchanges(config, [request(index, tokens=3) for index in range(160)])
    took_s = (max(exchange.ended_at for exchange, _ in done) - began) / 1e9
    assert 0.199 <= took_s <= 0.3


def test_who_waits_is_served_from_the_moment_that_the_place_was_free():
    """However late this process gets round to it, or the model would be slower than it says."""

    async def scenario():
        places = _Places(1)
        came_at = await places.take()
        for free_at, served_from in ((came_at + 5, came_at + 5), (came_at - 5, None)):
            asked_at = time.monotonic()
            waiting = asyncio.ensure_future(places.take())
            await asyncio.sleep(0)
            places.give_back(free_at)
            begin = await waiting
            # Never before one came.
            assert begin == served_from or (
                served_from is None and asked_at <= begin <= time.monotonic()
            )

    asyncio.run(scenario())


def test_cutting_a_request_off_frees_its_place():
    async def scenario():
        client = DummyClient(DummyConfig(capacity=1, ttft_ms=10_000, itl_ms=0))
        await client.open(3)
        sent = [Exchange() for _ in range(3)]
        tasks = [
            asyncio.ensure_future(client.send_request(client.prepare_request(request(i, 1)), one))
            for i, one in enumerate(sent)
        ]
        await asyncio.sleep(0.01)
        tasks[1].cancel()  # it waits
        tasks[0].cancel()  # it is served
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        began = time.monotonic_ns()
        assert not tasks[2].done()
        quick = client.prepare_request(request(3, 1))._replace(first_s=0.005)
        tasks[2].cancel()
        exchange = Exchange()
        await asyncio.wait_for(client.send_request(quick, exchange), 5)
        assert (exchange.arrivals[0] - began) / 1e6 < 100
        assert [one.arrivals for one in sent] == [[], [], []]
        assert all(one.ended_at == 0 for one in sent)

    asyncio.run(scenario())


def test_cutting_off_who_has_just_got_a_place_hands_it_on():
    async def scenario():
        places = _Places(1)
        await places.take()
        second, third = asyncio.ensure_future(places.take()), asyncio.ensure_future(places.take())
        await asyncio.sleep(0)
        places.give_back(time.monotonic())  # second's turn, which it has not noticed yet
        second.cancel()
        await asyncio.wait_for(third, 5)
        assert second.cancelled()

    asyncio.run(scenario())


@pytest.mark.timing
def test_a_fixed_latency_is_the_time_of_the_whole_answer():
    fixed = DummyConfig(dummy_client_latency_time=0.04)
    for tokens in (1, 4, 100):
        assert plan(fixed, tokens=tokens).offset_s(tokens - 1) == pytest.approx(0.04)
    done = exchanges(fixed, [request(tokens=4)])
    assert 39 <= (done[0][0].ended_at - done[0][0].sent_at) / 1e6 <= 100


def test_jitter_is_seeded_by_the_number_of_the_request_and_keeps_the_mean():
    config = DummyConfig(ttft_ms=20, itl_ms=2, jitter=0.2)
    assert plan(config, 5) == plan(config, 5)
    assert plan(config, 5) != plan(config, 6)
    factors = [plan(config, index).first_s / 0.02 for index in range(4000)]
    # Standard error of the mean: 0.2 / sqrt(4000) = 0.003.
    assert statistics.mean(factors) == pytest.approx(1, abs=0.013)
    assert statistics.pstdev([math.log(factor) for factor in factors]) == pytest.approx(
        0.2, rel=0.06
    )
    one = plan(config, 5)
    assert one.gap_s / one.first_s == pytest.approx(0.1)
    assert plan(DummyConfig(jitter=0.2, dummy_seed=1), 5) != plan(config, 5)


def test_without_jitter_all_are_equal():
    assert len({plan(DummyConfig(), index)[:2] for index in range(50)}) == 1


def test_failures_come_as_often_as_asked_for_and_instead_of_tokens():
    config = DummyConfig(ttft_ms=1, fail_rate=0.3)
    failing = [plan(config, index).will_fail for index in range(2000)]
    # Standard error: sqrt(0.3 * 0.7 / 2000) = 0.01.
    assert sum(failing) / 2000 == pytest.approx(0.3, abs=0.04)
    ((exchange, client),) = exchanges(config, [request(failing.index(True))])
    response = client.process_response(exchange)
    assert response.failure is not None
    assert response.failure.kind is FailureKind.HTTP_SERVER_ERROR
    assert (exchange.status, response.content_times, response.finish_reason) == (500, [], None)
    assert exchange.ended_at > exchange.sent_at


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"capacity": 0}, "--capacity"),
        ({"ttft_ms": -1}, "--ttft-ms"),
        ({"itl_ms": math.nan}, "--itl-ms"),
        ({"jitter": 3}, "--jitter"),
        ({"fail_rate": 1.1}, "--fail-rate"),
        ({"dummy_client_latency_time": 0}, "--dummy-client-latency-time"),
        ({"dummy_seed": -1}, "--dummy-seed"),
    ],
)
def test_what_cannot_be_is_refused(values, option):
    with pytest.raises(ConfigError) as raised:
        DummyConfig(**values)
    assert raised.value.option == option


def test_a_record_says_what_the_model_was():
    description = DummyClient(DummyConfig(capacity=4)).describe_service()
    assert (description["capacity"], description["ttft_ms"], description["itl_ms"]) == (
        4,
        20.0,
        2.0,
    )
