"""One rank of a job: enters a Group, does what its options say, and prints a line of JSON.

Its clock is ahead by `skew_s` for each rank before it, as if every rank had a host of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import psutil

from flexbench.core.errors import FlexbenchError
from flexbench.core.signals import SignalWatch
from flexbench.ranks.group import Group, open_ranks
from flexbench.ranks.launch import detect_launch


def say(**answer: Any) -> None:
    # At once: lines of several ranks under one launcher must not be cut in half.
    os.write(1, f"{json.dumps(answer)}\n".encode())


def listening_addresses() -> list[str]:
    connections = psutil.Process().net_connections(kind="inet")
    return sorted({c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN})


def step(group: Group, skew_ns: int) -> None:
    """What a command does: agree on points, start each together, gather what was seen."""
    points = ["a", "b"]
    moments = []
    for number in range(3):
        point = group.broadcast("point", points[number] if number < 2 and not group.rank else None)
        if point is None:
            break
        start_ns = group.start_together(0.05)
        moments.append(start_ns - skew_ns)
        time.sleep(max(0.0, (start_ns - skew_ns - time.monotonic_ns()) / 1e9))
        group.synchronize()
        gathered = group.gather_bytes("traces", f"{point}{group.rank}".encode() * 2**20)
        texts = [data[:2].decode() for data in gathered or []]
        assert all(len(data) == 2 * 2**20 for data in gathered or [])
        say(rank=group.rank, point=point, gathered=texts)
    clock = group.clocks[group.rank]
    say(
        rank=group.rank,
        moments=moments,
        offset_ns=clock.offset_ns(time.monotonic_ns() + skew_ns),
        bound_ns=clock.readings[-1].bound_ns,
        is_same=clock.is_same,
        num_readings=len(clock.readings),
        listening=listening_addresses(),
    )


def lose(group: Group, ending: str, where: str) -> None:
    """The last rank ends, after one round has gone well; the others wait for it."""
    say(rank=group.rank, gathered=[d.decode() for d in group.gather_bytes("first", b"1") or []])
    if group.rank == group.size - 1:
        if ending == "raise":
            raise ValueError("no such prompt")
        if ending == "leave":
            return
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[ending])
    if where == "bytes":
        group.gather_bytes("second", b"2" * 2**25)
        group.barrier("never")
    elif where == "start":
        group.start_together()
    else:  # busy with something else
        while True:
            group.check()
            time.sleep(0.05)


def wait_for_signal(group: Group) -> None:
    say(waits=group.rank)
    if group.rank == 0:
        while True:  # a command that generates load
            group.check()
            time.sleep(0.05)
    group.broadcast("never")


def main() -> None:
    options = json.loads(sys.argv[1])
    launch = detect_launch(os.environ)
    skew_ns = int(options.get("skew_s", 0) * 1e9) * launch.rank
    with SignalWatch() as signals:
        try:
            with open_ranks(
                launch,
                purpose="test",
                head_ip=None,
                port=None,
                timeout_s=options["timeout_s"],
                fingerprint="",
                raise_if_stopped=signals.raise_if_stopped,
                clock=lambda: time.monotonic_ns() + skew_ns,
            ) as group:
                if "ending" in options:
                    lose(group, options["ending"], options["where"])
                elif "waits" in options:
                    wait_for_signal(group)
                else:
                    step(group, skew_ns)
        except (FlexbenchError, ValueError) as error:
            code = error.exit_code if isinstance(error, FlexbenchError) else 1
            say(
                rank=launch.rank,
                error=type(error).__name__,
                message=getattr(error, "message", str(error)),
                code=code,
            )


if __name__ == "__main__":
    main()
