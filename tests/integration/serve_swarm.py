"""Serves a swarm of two servers until its standard input is closed: for tests of running swarms.

Prints one line of JSON, as soon as all blocks are served: where to join, and who serves what.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from flexbench.core.progress import Silence
from flexbench.petals.config import PetalsConfig
from flexbench.petals.plan import make_plan
from flexbench.petals.swarm import open_swarm


def main() -> None:
    config = PetalsConfig(
        num_processes=4, sequence_lengths=(1600,), max_tokens=(100,), dtype="float32", seed=3
    )
    with open_swarm(make_plan(config), progress=Silence()) as swarm:
        facts = {
            "initial_peers": swarm.model.initial_peers,
            "weights_folder": swarm.model.weights_folder,
            "servers": [dataclasses.asdict(server) for server in swarm.view.servers],
        }
        print(json.dumps(facts), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
