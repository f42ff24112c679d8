"""A Petals swarm behind the protocol of endpoints: a private one, and clients in real workers."""

from __future__ import annotations

import pickle
import signal
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from flexbench.core.endpoint import ServiceContext
from flexbench.core.errors import Interrupted, RunError
from flexbench.core.processes import Deadline, Item
from flexbench.core.progress import Silence
from flexbench.petals.endpoint import PetalsClient, PetalsEndpointConfig
from flexbench.petals_runtime.crew import open_crew
from tests.integration.serving import petals_worker

pytestmark = pytest.mark.swarm


def context(folder: Path, raise_if_stopped=lambda: None) -> ServiceContext:
    logs, scratch = folder / "logs", folder / "tmp"
    logs.mkdir()
    scratch.mkdir()
    return ServiceContext(
        progress=Silence(),
        log_folder=logs,
        scratch_folder=scratch,
        timeout_s=120,
        raise_if_stopped=raise_if_stopped,
        streaming=True,
        max_prompt_tokens=16,
        max_new_tokens=400,
        max_in_flight=1,
    )


@pytest.fixture(scope="module")
def served() -> Iterator[PetalsClient]:
    client = PetalsClient(PetalsEndpointConfig(model="opt-125m", dtype="float32"))
    with tempfile.TemporaryDirectory(prefix="fbt-") as folder:
        try:
            client.start_service(context(Path(folder)))
            yield client
        finally:
            client.stop_service()


def test_a_worker_streams_the_tokens_of_the_swarm(served, temporary_folder):
    description = served.describe_service()
    assert [(hop["start"], hop["end"]) for hop in description["swarm"]["servers"]] == [
        (0, 6),
        (6, 12),
    ]
    assert description["swarm"]["embedded"] is True
    assert pickle.loads(pickle.dumps(served.config)) == served.config  # noqa: S301
    with open_crew() as crew:
        crew.start("client", petals_worker.be_a_client, served.config)
        deadline = Deadline(120, lambda: "no answer")
        while not isinstance((message := crew.next_message(deadline)[1]), Item):
            pass
    facts = message.payload
    # The same tokens as generated without an endpoint between.
    assert facts["streamed"]["ids"] == facts["expected"]
    assert facts["at_once"]["ids"] == facts["expected"]
    assert facts["streamed"]["finish_reason"] == facts["at_once"]["finish_reason"] == "length"
    times = facts["streamed"]["times"]
    assert len(times) == 6
    assert facts["streamed"]["sent_at"] < times[0]
    assert all(one < other for one, other in pairwise(times))
    assert times[-1] <= facts["streamed"]["ended_at"]
    assert facts["at_once"]["times"] == [facts["at_once"]["ended_at"]]
    # One of 400 tokens, cut off after its first; what it had by then is kept, and nothing comes after.
    assert 0 < facts["cut"]["num_tokens"] < 400
    assert facts["cut"]["num_later"] == facts["cut"]["num_tokens"]
    assert facts["cut"]["ended_at"] == 0
    # And the next one, sent after it has ended, is whole.
    assert facts["after_cut"]["ids"] == facts["expected"]
    assert facts["after_cut"]["failure"] is None


@pytest.mark.timing
def test_a_start_that_is_interrupted_leaves_nothing(served, temporary_folder):
    others = set(psutil.Process().children(recursive=True))

    def stop() -> None:
        # As soon as the bootstrap peer and both servers are being started.
        if len(set(psutil.Process().children(recursive=True)) - others) >= 3:
            raise Interrupted(signal.SIGINT)

    client = PetalsClient(PetalsEndpointConfig(model="opt-125m"))
    begun_at = time.monotonic()
    with pytest.raises(Interrupted):
        client.start_service(context(temporary_folder, stop))
    client.stop_service()
    assert time.monotonic() - begun_at < 30
    assert set(psutil.Process().children(recursive=True)) <= others


def test_a_running_swarm_has_to_have_all_blocks(served, temporary_folder):
    peers = " ".join(served.config.swarm.initial_peers)
    config = PetalsEndpointConfig(model="opt-125m", initial_peers=peers, dht_prefix="other")
    client = PetalsClient(config)
    try:
        with pytest.raises(RunError, match="nobody serves blocks 0:12 of 12"):
            client.start_service(context(temporary_folder))
    finally:
        client.stop_service()
