"""DeepSpeed-MII: all of it but the model, which would need a GPU; see mii_without_gpu."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.real_servers.tiny_model import recite

FOLDER = Path(__file__).parent
NUM_REQUESTS = 8
pytestmark = pytest.mark.timeout(300)


@pytest.mark.timing
def test_a_deployment_is_started_asked_and_ended(mii_python, tiny_model, tmp_path):
    paths = (FOLDER.parents[1], FOLDER / "mii_without_gpu")
    done = subprocess.run(
        [mii_python, FOLDER / "mii_probe.py", tiny_model, tmp_path, str(NUM_REQUESTS)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])

    assert seen["service"]["version"]
    assert len(seen["answers"]) == NUM_REQUESTS
    for number, answer in enumerate(seen["answers"]):
        assert answer["failure"] is None
        # As mii_without_gpu recites, whatever the prompt.
        assert "".join(answer["texts"]) == recite("!", 20)
        assert (answer["prompt_tokens"], answer["output_tokens"]) == (5, 20)
        assert answer["finish_reason"] == "length"
        assert len(answer["content_times"]) == (20 if number % 2 == 0 else 1)
        # A token every 10 ms; all requests at the same time.
        whole_s = (answer["ended_at"] - answer["sent_at"]) / 1e9
        assert whole_s >= 0.2
        if number % 2 == 0:
            assert answer["content_times"][0] - answer["sent_at"] < whole_s * 1e9 / 2
    assert seen["took_s"] < 0.2 * NUM_REQUESTS / 2

    assert 0 < seen["cut_off_pieces"] < 20
    assert seen["cut_off_ended_at"] == 0
    assert seen["refused"].startswith("refused: gRPC UNAVAILABLE")
