"""Serves a swarm of two servers until its standard input is closed: for tests of running swarms.

Prints one line of JSON with the model's fields, as soon as all blocks are served.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from flexbench.core.processes import Crew
from flexbench.core.progress import Silence
from flexbench.petals.bench import work_folders
from flexbench.petals.config import PetalsConfig
from flexbench.petals.model import SwarmModel
from flexbench.petals.plan import make_plan
from flexbench.petals.swarm import start_embedded_swarm


def main() -> None:
    plan = make_plan(PetalsConfig(num_processes=4, sequence_lengths=(1600,), max_tokens=(100,)))
    with (
        work_folders() as folders,
        Crew(
            log_folder=folders.logs,
            scratch_folder=folders.scratch,
            preload=["flexbench.petals.preload"],
        ) as crew,
    ):
        model = SwarmModel(
            shape=plan.config.shape,
            dht_prefix=plan.config.effective_dht_prefix,
            initial_peers=(),
            weights_folder=str(folders.weights),
            dtype="float32",
            device="cpu",
            seed=3,
        )
        model, view = start_embedded_swarm(
            crew, model, plan.servers, timeout_s=120, phase=Silence()
        )
        facts = {
            "initial_peers": model.initial_peers,
            "weights_folder": model.weights_folder,
            "servers": [dataclasses.asdict(server) for server in view.servers],
        }
        print(json.dumps(facts), flush=True)
        sys.stdin.read()
        assert Path(folders.weights).is_dir()


if __name__ == "__main__":
    main()
