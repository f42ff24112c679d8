"""What a worker of the load generator does with a swarm; here, for workers import by name."""

from __future__ import annotations

import asyncio
from typing import Any

from flexbench.core.endpoint import Exchange, GenerationRequest
from flexbench.core.processes import WorkerChannel
from flexbench.petals.endpoint import PetalsClient, prompt_ids

PROMPT = "Once upon a time"  # 16 bytes


def be_a_client(channel: WorkerChannel, config: Any) -> None:
    channel.queue.put(asyncio.run(_requests(config)))


def request(max_new_tokens: int, *, is_streaming: bool = True) -> GenerationRequest:
    return GenerationRequest(
        index=0,
        prompt=PROMPT,
        prompt_tokens=len(PROMPT),
        max_new_tokens=max_new_tokens,
        is_streaming=is_streaming,
    )


async def _requests(config: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"expected": None}
    first, second = PetalsClient(config), PetalsClient(config)
    await first.open(1)
    facts["expected"] = await first._connection.run(lambda: _generate(first))
    facts["streamed"] = await _send(first, request(6))
    facts["cut"] = await _cut(first)
    facts["after_cut"] = await _send(first, request(6))
    connection = first._connection
    await first.close()
    await second.open(1)
    assert second._connection is connection, "another point makes another connection"
    facts["at_once"] = await _send(second, request(6, is_streaming=False))
    await second.close()
    return facts


def _generate(client: PetalsClient) -> list[int]:
    swarm = client._connection._client
    prompt = swarm.prompt_of(prompt_ids(PROMPT, len(PROMPT)))
    output, _ = swarm.generate(prompt, 6)
    return output[0, len(PROMPT) :].tolist()


async def _send(client: PetalsClient, asked: GenerationRequest) -> dict[str, Any]:
    exchange = Exchange()
    await client.send_request(client.prepare_request(asked), exchange)
    response = client.process_response(exchange)
    return {
        "ids": [token for ids in exchange.pieces for token in ids],
        "times": response.content_times,
        "sent_at": exchange.sent_at,
        "ended_at": exchange.ended_at,
        "finish_reason": response.finish_reason,
        "failure": response.failure,
    }


async def _cut(client: PetalsClient) -> dict[str, Any]:
    exchange = Exchange()
    task = asyncio.ensure_future(
        client.send_request(client.prepare_request(request(400)), exchange)
    )
    while not exchange.arrivals:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    num_tokens = len(client.process_response(exchange).content_times)
    await asyncio.sleep(0.5)
    return {
        "num_tokens": num_tokens,
        "num_later": len(exchange.pieces),
        "ended_at": exchange.ended_at,
    }
