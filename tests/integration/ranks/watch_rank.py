"""One rank of a job: enters a PeerWatch, then does what it is told line by line.

It says "loaded", enters at the first line, and says "joined". Every answer is a line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import psutil

from flexbench.core.errors import ConfigError, FlexbenchError, Interrupted
from flexbench.ranks.launch import detect_launch
from flexbench.ranks.watch import LostRank, PeerWatch


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def listening_addresses() -> list[str]:
    connections = psutil.Process().net_connections(kind="inet")
    return sorted({c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN})


def ring(launch: Any) -> None:
    """Every rank sends its number to the next."""
    import torch
    from torch import distributed

    received = torch.empty(1)
    following = (launch.rank + 1) % launch.world_size
    sending = distributed.isend(torch.tensor([float(launch.rank)]), following)
    distributed.recv(received, (launch.rank - 1) % launch.world_size)
    sending.wait()
    say(received=received.item(), listening=listening_addresses())


def receive_from(rank: int) -> None:
    import torch
    from torch import distributed

    distributed.recv(torch.empty(1), rank)


class Rank:
    def __init__(self, options: dict[str, Any]) -> None:
        self.launch = detect_launch(
            os.environ, rank=options.get("rank"), world_size=options.get("world_size")
        )
        self.calls: list[LostRank] = []
        self.blocks_in_on_lost = options.get("blocks_in_on_lost", False)
        self.raises_in_on_lost = options.get("raises_in_on_lost", False)
        self.watch = PeerWatch(
            self.launch,
            purpose=options.get("purpose", "test"),
            head_ip=options.get("head_ip"),
            port=options.get("port"),
            timeout_s=options["timeout_s"],
            fingerprint=options.get("fingerprint", ""),
            on_lost=self.on_lost,
        )

    def on_lost(self, lost: LostRank) -> None:
        self.calls.append(lost)
        if self.blocks_in_on_lost:
            time.sleep(60)
        if self.raises_in_on_lost:
            raise OSError("nowhere to write to")

    def obey(self) -> None:
        for line in sys.stdin:
            order, *arguments = line.split()
            if order == "leave":
                return
            getattr(self, order)(*arguments)

    def await_loss(self) -> None:
        lost = self.watch.wait_for_loss(60)
        say(lost=lost.message if lost else None)

    def exit_code(self) -> None:
        lost = self.watch.wait_for_loss(60)
        say(exit_code=lost.exit_code if lost else None)

    def check(self) -> None:
        say(lost=self.watch.lost.message if self.watch.lost else None)

    def values(self) -> None:
        key = "the stage's report"
        value = {"rank": self.launch.rank, "text": "ä" * 100_000}
        for attempt in range(2):
            self.watch.publish(key, [attempt, value])
        if self.launch.rank == 0:
            first = self.watch.collect(key, 60)
            second = self.watch.collect(key, 60)
            assert [first[rank][0] for rank in first] == [0] * len(first)
            assert [second[rank][1]["rank"] for rank in second] == list(range(len(second)))
            assert second[1][1]["text"] == "ä" * 100_000
        say(shared=self.watch.share("sum", os.getppid() if self.launch.rank == 0 else None, 60))

    def threads(self) -> None:
        say(threads=num_watching())

    def collect(self, timeout_s: str) -> None:
        self.watch.collect("nothing", float(timeout_s))

    def fail(self, kind: str) -> None:
        if kind == "interrupted":
            raise Interrupted(signal.SIGTERM)
        if kind == "wrong_input":
            raise ConfigError("--percent", "is wrong")
        if kind == "told":
            self.watch.report(ValueError("two\nlines"))
            say(told=True)
            return
        raise ValueError("no such block")

    def group(self, what: str) -> None:
        from flexbench.dist.process_group import open_process_group

        with open_process_group(self.watch, self.launch, backend="gloo"):
            say(interface=os.environ.get("GLOO_SOCKET_IFNAME"))
            if what == "ring":
                ring(self.launch)
            elif self.launch.rank == int(what):
                self.obey()
            else:
                receive_from(int(what))
        say(interface=os.environ.get("GLOO_SOCKET_IFNAME"))

    def plain_group(self, port: str) -> None:
        from torch import distributed

        from flexbench.dist.process_group import initialize_distributed

        initialize_distributed(
            "127.0.0.1", int(port), self.launch.world_size, self.launch.rank, 0, "gpu"
        )
        ring(self.launch)
        distributed.destroy_process_group()


def num_watching() -> int:
    return sum(thread.name.startswith("watch") for thread in threading.enumerate())


def stop(number: int, _frame: Any) -> None:
    raise Interrupted(number)


def main() -> None:
    options = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, stop)
    if options.get("torch"):
        importlib.import_module("flexbench.dist.process_group")
    say(loaded=True)
    sys.stdin.readline()
    rank = None
    try:
        rank = Rank(options)
        with rank.watch:
            say(joined=True)
            rank.obey()
            left_at = time.monotonic()
    except (FlexbenchError, ValueError, KeyboardInterrupt) as error:
        left_at = time.monotonic()
        say(error=type(error).__name__, message=str(error))
    calls = [lost.message for lost in rank.calls] if rank else []
    say(calls=calls, threads=num_watching(), leaving_s=time.monotonic() - left_at)


if __name__ == "__main__":
    main()
