"""Ceilings of this machine, with arrays too small to say much: what is measured, and left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is what measures")

import torch

from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.roofline import measuring
from flexbench.dist.roofline.measuring import NUM_PARTS, measure_ceilings
from tests.unit.dist.roofline.machines import ceilings


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExecutionEnv:
    for name, size in (("_ARRAY_BYTES", 2**20), ("_COPY_BYTES", 2**20), ("_DISK_BYTES", 2**20)):
        monkeypatch.setattr(measuring, name, size)
    monkeypatch.setattr(measuring, "_CPU_WIDTH", 64)
    monkeypatch.setattr(measuring, "_BUDGET_S", 0.0)
    return ExecutionEnv.create(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_is_measured(env: ExecutionEnv, dtype: torch.dtype) -> None:
    parts: list[int] = []

    found = measure_ceilings(env, dtype, with_disk=True, on_part=lambda: parts.append(1))

    assert len(parts) == NUM_PARTS
    assert (found.device, found.num_threads) == ("cpu", torch.get_num_threads())
    assert f"torch.{found.dtype}" == str(dtype)
    for speed in (
        found.memory_bytes_per_s,
        found.matmul_flops_per_s,
        found.host_to_device_bytes_per_s,
        found.disk_read_bytes_per_s,
        found.disk_write_bytes_per_s,
    ):
        assert speed is not None
        assert 1e3 < speed < 1e15
    assert found.host_memory_bytes_per_s == found.memory_bytes_per_s


def test_the_disk_is_left_alone_where_nothing_is_on_it(env: ExecutionEnv, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    env.disk.folder = tmp_path / "sub" / "missing"

    found = measure_ceilings(env, torch.float32, with_disk=False)

    assert found.disk_read_bytes_per_s is found.disk_write_bytes_per_s is None
    assert not env.disk.folder.exists()


def test_nothing_is_left_and_nothing_counts_as_the_runs(env: ExecutionEnv, tmp_path: Path) -> None:
    measure_ceilings(env, torch.float32, with_disk=True)

    assert list(tmp_path.iterdir()) == []
    assert env.disk.ledger.peak_bytes == env.gpu.ledger.peak_bytes == 0
    assert env.cpu.ledger.allocated_bytes == 0


def test_slow_tries_do_not_lower_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 0.0, 5.0, 10.0, 12.0, 20.0, 29.0])  # the deadline; three tries
    monkeypatch.setattr(measuring, "_BUDGET_S", 0.0)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(moments))

    assert measuring._best_seconds(lambda: None, torch.device("cpu")) == 2.0


def test_the_better_of_two_is_taken_one_by_one() -> None:
    before = ceilings(memory_bytes_per_s=3.0, matmul_flops_per_s=10.0, disk_read_bytes_per_s=7.0)
    after = replace(
        before, memory_bytes_per_s=5.0, matmul_flops_per_s=9.0, disk_read_bytes_per_s=6.0
    )

    assert before.better_of(after) == replace(before, memory_bytes_per_s=5.0)
    assert after.better_of(before) == before.better_of(after)
