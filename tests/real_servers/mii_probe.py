"""Run with MII's interpreter: deploys with FastGenClient, asks, stops; prints what it saw as JSON.

Arguments: the model, a folder for logs and temporary files, the number of requests at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from flexbench.core.endpoint import Exchange, GenerationRequest, ServiceContext
from flexbench.core.progress import Silence
from flexbench.serving.clients.fastgen import FastGenClient, FastGenConfig

PROMPT = "hello"


async def ask(config: FastGenConfig, num_requests: int) -> dict[str, object]:
    client = FastGenClient(config)  # as a worker makes its own
    await client.open(num_requests)
    prepared = [
        client.prepare_request(
            GenerationRequest(index=index, prompt=PROMPT, prompt_tokens=5, max_new_tokens=20, is_streaming=index % 2 == 0)
        )
        for index in range(num_requests)
    ]  # fmt: skip
    exchanges = [Exchange() for _ in prepared]
    started_at = time.monotonic()
    await asyncio.gather(*map(client.send_request, prepared, exchanges))
    took_s = time.monotonic() - started_at

    cut_off = Exchange()
    task = asyncio.ensure_future(client.send_request(prepared[0], cut_off))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    answers = []
    for exchange in exchanges:
        answer = asdict(client.process_response(exchange))
        answer["sent_at"], answer["ended_at"] = exchange.sent_at, exchange.ended_at
        answers.append(answer)
    await client.close()
    return {
        "answers": answers,
        "took_s": took_s,
        "cut_off_pieces": len(cut_off.pieces),
        "cut_off_ended_at": cut_off.ended_at,
        "cut_off": asdict(client.process_response(cut_off)),
    }


def main() -> None:
    model, folder, num_requests = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    client = FastGenClient(FastGenConfig(model=model))
    context = ServiceContext(
        progress=Silence(),
        log_folder=folder,
        scratch_folder=folder,
        timeout_s=150,
        raise_if_stopped=lambda: None,
        streaming=True,
        max_prompt_tokens=5,
        max_new_tokens=20,
        max_in_flight=num_requests,
    )
    seen: dict[str, object] = {}
    try:
        client.start_service(context)
        seen["service"] = client.describe_service()
        seen.update(asyncio.run(ask(client.config, num_requests)))
    finally:
        stopping_at = time.monotonic()
        client.stop_service()
        seen["stopped_after_s"] = time.monotonic() - stopping_at
    refused = Exchange()
    seen["refused"] = asyncio.run(ask_nobody(client.config, refused))
    print(json.dumps(seen))


async def ask_nobody(config: FastGenConfig, exchange: Exchange) -> str | None:
    from flexbench.serving.clients import fastgen

    fastgen._OPEN_TIMEOUT_S = 0.2
    client = FastGenClient(config)
    await client.open(1)
    request = GenerationRequest(index=0, prompt=PROMPT, prompt_tokens=5, max_new_tokens=2, is_streaming=True)  # fmt: skip
    await client.send_request(client.prepare_request(request), exchange)
    await client.close()
    assert exchange.failure is not None
    return f"{exchange.failure.kind}: {exchange.failure.message}"


if __name__ == "__main__":
    main()
