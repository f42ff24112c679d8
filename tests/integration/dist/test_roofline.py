"""`flexbench dist --roofline` with several ranks: each has its own ceilings, work and times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="flexbench dist needs torch")

from tests.integration.dist.conftest import LONG_S, MPIRUN, Job, mpirun, records_in

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not MPIRUN.exists(), reason="there is no mpirun beside this Python"),
]


def test_two_stages_measure_together(
    launch: Callable[..., Job], tiny: Path, tmp_path: Path
) -> None:
    load = ("--prompt-len", 16, "--gen-len", 4)
    job = launch(*mpirun(2, "--model", tiny, *load, "--roofline"))

    assert job.finish(LONG_S) == 0, job.stderr
    for phase in ("Ceilings before the run", "Ceilings after the run"):
        assert job.stderr.count(f"{phase}: done in") == 1
    lines = job.stdout.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.split()[1:2] == ["prefill"] for line in lines) == 2
    text = " ".join(job.stdout.split())
    assert "Ceilings of stage 0:" in text
    assert "Ceilings of stage 1:" in text
    (record,) = records_in(tmp_path)
    stages = record["roofline"]["stages"]
    assert [stage["rank"] for stage in stages] == [0, 1]
    for stage, observed in zip(stages, record["stages"], strict=True):
        assert stage["ceilings"]["num_threads"] == 1
        # No machine of today is slower, or faster.
        assert 1e8 < stage["ceilings"]["memory_bytes_per_s"] < 1e13
        assert 1e8 < stage["ceilings"]["matmul_flops_per_s"] < 1e15
        found = {line["what"]: line for line in stage["lines"]}
        assert set(found) == {"prefill", "decode", "cache_store"}
        assert found["decode"]["measured_s"] == observed["decode_compute_s"]
    floors = sum(stage["lines"][0]["floor_s"] for stage in stages)
    times = sum(stage["prefill_compute_s"] for stage in record["stages"])
    assert record["figures"]["prefill_roofline"] == pytest.approx(floors / times)
    job.assert_nothing_left()
    assert job.temporary_files() == []
