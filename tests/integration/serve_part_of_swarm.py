"""Serves some blocks of opt-125m until its standard input is closed: a swarm with a hole.

    python -m tests.integration.serve_part_of_swarm 0:4 8:12

Prints one line of JSON as soon as they are served: where to join, and who serves what. Beside it
runs a peer of a swarm of its own, which has no servers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

from flexbench.core.processes import Deadline, Item
from flexbench.core.progress import Silence
from flexbench.models.shapes import opt_shape
from flexbench.petals.model import SwarmModel
from flexbench.petals.peers import ServerSpec, run_bootstrap_peer
from flexbench.petals.swarm import _start_embedded_swarm
from flexbench.petals_runtime.crew import open_crew


def _spec(text: str) -> ServerSpec:
    start, _, end = text.partition(":")
    return ServerSpec(
        blocks=range(int(start), int(end)),
        num_threads=1,
        num_handlers=1,
        attn_cache_tokens=256,
        max_batch_size=256,
        inference_max_length=256,
    )


def main() -> None:
    model = SwarmModel(
        shape=opt_shape("opt-125m"),
        dht_prefix="hole",
        initial_peers=(),
        device="cpu",
        dtype="float32",
    )
    with open_crew() as crew:
        folder = crew.scratch_folder / "lonely"
        folder.mkdir()
        lonely = replace(model, weights_folder=str(folder))
        crew.start("lonely peer", run_bootstrap_peer, lonely)
        _, message = crew.next_message(Deadline(120, lambda: "no lonely peer"))
        assert isinstance(message, Item)
        model, view = _start_embedded_swarm(
            crew, model, [_spec(text) for text in sys.argv[1:]], timeout_s=120, phase=Silence()
        )
        facts = {
            "initial_peers": model.initial_peers,
            "servers": [asdict(server) for server in view.servers],
            "lonely_peers": message.payload.addresses,
        }
        print(json.dumps(facts), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
