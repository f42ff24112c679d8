"""Which ranks share this host, and what each may take of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from flexbench.core.environment import usable_cpus
from flexbench.ranks.clocks import host_id
from flexbench.ranks.launch import Launch
from flexbench.ranks.watch import LONGEST_RUN_S, PeerWatch


@dataclass(frozen=True)
class HostShare:
    """This rank's host: the ranks on it, and the threads that this one computes with."""

    ranks: tuple[int, ...]
    num_threads: int


def look_around(watch: PeerWatch, launch: Launch) -> HostShare:
    """Let all ranks tell each other where they are; all have to call it."""
    watch.publish("host", {"host": host_id(), "cpus": usable_cpus()})
    everyone: dict[str, Any] = {}
    if launch.rank == 0:
        collected = watch.collect("host", LONGEST_RUN_S)
        everyone = {str(rank): place for rank, place in collected.items()}
    everyone = watch.share("hosts", everyone, LONGEST_RUN_S)
    own = everyone[str(launch.rank)]
    here = sorted(int(rank) for rank, place in everyone.items() if place["host"] == own["host"])
    # A launcher may have bound each rank to CPUs of its own, or left them all together.
    sharing = sum(everyone[str(rank)]["cpus"] == own["cpus"] for rank in here)
    return HostShare(tuple(here), num_threads(len(own["cpus"]) // sharing))


def num_threads(share: int) -> int:
    """With how many a rank computes whose share of the CPUs is `share`.

    Torch would take a single one when it sees certain launchers' variables.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else max(1, share)
