"""What `flexbench serving` costs beyond the least that a client can do, request by request.

A bare loop sends the same requests over the same libraries (uvloop, httptools, orjson), takes the
time of every chunk, reads it, and keeps nothing. Both have one core, the mock server the other;
they take turns. Shown are CPU time of the sending process per request, requests/s and the time to
first token, medians of --repeats, and the ratio of each pair.

    .venv/bin/python benchmarks/serving_overhead.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from time import monotonic_ns
from typing import Any

HERE = Path(__file__).parent
PROMPT_LENGTH, NUM_TOKENS = 64, 32
TTFT, ITL = "50ms", "5ms"


class BareConnection(asyncio.Protocol):
    """A connection that notes when each piece of a body came."""

    def __init__(self) -> None:
        self.times: list[int] = []
        self.pieces: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        """It is open."""
        self.transport = transport

    def send(self, request: bytes, waiter: asyncio.Future[None]) -> None:
        """Send a request; `waiter` is done when the answer has ended."""
        import httptools

        self.waiter, self.times, self.pieces = waiter, [], []
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Something of the answer."""
        self.now = monotonic_ns()
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """A chunk."""
        self.times.append(self.now)
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        """The end."""
        self.waiter.set_result(None)


def bare_loop(port: int, concurrency: int, duration_s: float) -> None:
    """Be the bare loop, and print what it measured as JSON."""
    import orjson
    import uvloop

    body = orjson.dumps(
        {
            "model": "mock",
            "prompt": "a" * PROMPT_LENGTH,
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    loop = uvloop.new_event_loop()
    ttfts: list[float] = []

    def read(times: list[int], pieces: list[bytes], sent: int) -> None:
        first = None
        for moment, piece in zip(times, pieces, strict=True):
            for line in piece.split(b"\n\n"):
                if line.startswith(b"data: {"):
                    choices = orjson.loads(line[6:])["choices"]
                    if choices and choices[0]["text"] and first is None:
                        first = moment
        if first is not None:
            ttfts.append((first - sent) / 1e6)

    async def client(stop: float) -> None:
        _, connection = await loop.create_connection(BareConnection, "127.0.0.1", port)
        while time.monotonic() < stop:
            waiter, sent = loop.create_future(), monotonic_ns()
            connection.send(request, waiter)
            await waiter
            read(connection.times, connection.pieces, sent)

    async def run() -> tuple[float, float]:
        stop = time.monotonic() + duration_s
        began, cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*(client(stop) for _ in range(concurrency)))
        return time.monotonic() - began, time.process_time() - cpu

    wall_s, cpu_s = loop.run_until_complete(run())
    print(json.dumps(summary(len(ttfts), wall_s, cpu_s, ttfts)))


def summary(count: int, wall_s: float, cpu_s: float, ttfts_ms: list[float]) -> dict[str, float]:
    """The figures of one turn."""
    ordered = sorted(ttfts_ms)
    return {
        "requests_per_s": count / wall_s,
        "cpu_ms_per_request": cpu_s / count * 1e3,
        "ttft_p50_ms": ordered[len(ordered) // 2],
        "ttft_p99_ms": ordered[len(ordered) * 99 // 100],
    }


def run_bare(url_port: int, concurrency: int, duration_s: float, core: int) -> dict[str, float]:
    """One turn of the bare loop, in a process of its own."""
    command = [sys.executable, __file__, "--bare", str(url_port)]
    command += ["--concurrency", str(concurrency), "--duration", str(duration_s)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, preexec_fn=lambda: pin(core), text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run_flexbench(port: int, concurrency: int, duration_s: float, core: int) -> dict[str, float]:
    """One turn of `flexbench serving`; its processor time is that of its event loop's process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "flexbench"), "serving", "--quiet"]
        command += ["--api-url", f"http://127.0.0.1:{port}", "--tokenizer", "byte"]
        command += ["--num-clients", str(concurrency), "--duration", f"{duration_s}s"]
        command += ["--prompt-length", str(PROMPT_LENGTH), "--prompt-length-var", "0"]
        command += ["--max-new-tokens", str(NUM_TOKENS), "--max-new-tokens-var", "0"]
        command += ["--early-stop-latency", "0", "--result-dir", folder]
        subprocess.run(command, check=True, preexec_fn=lambda: pin(core))
        (path,) = Path(folder).glob("openai-*-clients-*.json")
        record = json.loads(path.read_text())
    columns = record["requests"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in record["requests"]["rows"]]
    (loop,) = record["generators"]["loops"]
    ended = [row for row in rows if row["ended_ns"] <= loop["wall_s"] * 1e9]
    ttfts = [(row["content_ns"][0] - row["sent_ns"]) / 1e6 for row in rows]
    return summary(len(ended), loop["wall_s"], loop["cpu_s"], ttfts)


def pin(core: int) -> None:
    """Keep this process to one core."""
    os.sched_setaffinity(0, {core})


def main() -> None:
    """Take turns, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--duration", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bare", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare is not None:
        bare_loop(options.bare, options.concurrency, options.duration)
        return
    cores = sorted(os.sched_getaffinity(0))
    server = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "mock_server.py"),
            "--ttft",
            TTFT,
            "--itl",
            ITL,
            "--truth",
            os.devnull,
        ],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: pin(cores[0]),
    )
    try:
        assert server.stdout is not None
        port = json.loads(server.stdout.readline())["port"]
        turns: dict[str, list[dict[str, float]]] = {"bare loop": [], "flexbench": []}
        for _ in range(options.repeats):
            for name, run in (("bare loop", run_bare), ("flexbench", run_flexbench)):
                turns[name].append(run(port, options.concurrency, options.duration, cores[-1]))
    finally:
        server.terminate()
        server.wait()
    show(turns)


def show(turns: dict[str, list[dict[str, float]]]) -> None:
    """A line for each, and the ratio of their CPU times."""
    names = list(turns["bare loop"][0])
    print(f"{'':10}" + "".join(f"{name:>20}" for name in names))
    for who, runs in turns.items():
        medians = [statistics.median(run[name] for run in runs) for name in names]
        print(f"{who:10}" + "".join(f"{value:20.3f}" for value in medians))
    pairs = zip(turns["flexbench"], turns["bare loop"], strict=True)
    ratios = [ours["cpu_ms_per_request"] / bare["cpu_ms_per_request"] for ours, bare in pairs]
    print(f"CPU per request, flexbench / bare loop: median {statistics.median(ratios):.3f}")
    print(f"({', '.join(f'{ratio:.3f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
