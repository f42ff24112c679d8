"""How many requests a second `flexbench serving` can send and record with one core, and with more.

The server costs next to nothing: it writes the whole answer, a stream of 32 chunks, at once, from
memory. It shares the last core with a load generator; each of the others has one to itself. As many
generator processes as cores, for each number of cores in turns; shown are requests/s, how busy the
cores were with them, and the ratio to one core of the same turn (medians of --repeats).

    .venv/bin/python benchmarks/serving_cores.py
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
from pathlib import Path
from typing import Any

NUM_TOKENS = 32
CONCURRENCY_PER_CORE = 64


def answer() -> bytes:
    """A stream of 32 tokens with its end, and the count of tokens."""
    chunk = {"object": "text_completion", "choices": [{"index": 0, "text": "a"}]}
    usage = {"prompt_tokens": 64, "completion_tokens": NUM_TOKENS, "total_tokens": 64 + NUM_TOKENS}
    last = {"object": "text_completion", "choices": [], "usage": usage}
    events = [json.dumps(chunk)] * NUM_TOKENS + [json.dumps(last), "[DONE]"]
    parts = [f"data: {event}\n\n".encode() for event in events]
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


class Server(asyncio.Protocol):
    """Answers each request that has come whole. Requests are not pipelined."""

    whole_answer = answer()

    def connection_made(self, transport: Any) -> None:
        """It is open."""
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        """A part of a request, or all of it."""
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        if not separator:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        if len(body) >= length:
            self.received = b""
            self.transport.write(self.whole_answer)


def serve() -> None:
    """Be the server, and print its port."""
    import uvloop

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    uvloop.run(run())


def run_flexbench(port: int, cores: list[int], duration_s: float) -> dict[str, float]:
    """One turn on some cores."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(sys.executable).parent / "flexbench")
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), program, "serving"]
        command += [
            "--quiet",
            "--model",
            "m",
            "--api-url",
            f"http://127.0.0.1:{port}",
            "--tokenizer",
            "byte",
        ]
        command += ["--num-clients", str(CONCURRENCY_PER_CORE * len(cores))]
        command += ["--num-workers", str(len(cores)), "--duration", f"{duration_s}s"]
        command += ["--prompt-length", "64", "--prompt-length-var", "0"]
        command += ["--max-new-tokens", str(NUM_TOKENS), "--max-new-tokens-var", "0"]
        command += ["--early-stop-latency", "0", "--result-dir", folder]
        subprocess.run(command, check=True)
        (path,) = Path(folder).glob("openai-*-clients-*.json")
        record = json.loads(path.read_text())
    loops = record["generators"]["loops"]
    busy = statistics.mean(loop["cpu_s"] / loop["wall_s"] for loop in loops)
    return {"requests_per_s": record["figures"]["requests_per_s"], "busy": busy}


def main() -> None:
    """Take turns, and print medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--duration", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    cores = sorted(os.sched_getaffinity(0))
    command = ["taskset", "--cpu-list", str(cores[-1]), sys.executable, __file__, "--serve"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    turns: dict[int, list[dict[str, float]]] = {count + 1: [] for count in range(len(cores))}
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        for _ in range(options.repeats):
            for count, runs in turns.items():
                runs.append(run_flexbench(port, cores[:count], options.duration))
    finally:
        server.terminate()
        server.wait()
    print(f"{'cores':>5}{'requests/s':>12}{'busy':>7}{'ratio':>7}")
    for count, runs in turns.items():
        rate, busy = (statistics.median(run[name] for run in runs) for name in runs[0])
        pairs = zip(runs, turns[1], strict=True)
        ratio = statistics.median(a["requests_per_s"] / b["requests_per_s"] for a, b in pairs)
        print(f"{count:5}{rate:12,.0f}{busy:7.2f}{ratio:7.2f}")


if __name__ == "__main__":
    main()
