"""The least time of counted work, beside the formulas in docs/metrics.md."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="what is counted knows torch's types")

from flexbench.dist.placement import HomeBytes
from flexbench.dist.roofline.counting import Operation, StageWork, Work
from flexbench.dist.roofline.floors import (
    Bound,
    Floor,
    compute_floor,
    hidden_floor,
    load_floor,
    store_floor,
)
from tests.unit.dist.roofline.machines import ceilings

CEILINGS = ceilings(
    device="cuda",
    dtype="float16",
    memory_bytes_per_s=100.0,
    host_memory_bytes_per_s=10.0,
    matmul_flops_per_s=1000.0,
    host_to_device_bytes_per_s=20.0,
    device_to_host_bytes_per_s=40.0,
    disk_read_bytes_per_s=5.0,
    disk_write_bytes_per_s=2.0,
)
NOTHING = Work({})


def test_each_operation_takes_the_longer_of_computing_and_reading() -> None:
    product = Operation(name="product", flops=3000, weight_bytes=100)  # 3 s and 1 s
    attention = Operation(name="attention", flops=1000, cache_bytes=150)  # 1 s and 1.5 s

    # Not max(3 + 1, 1 + 1.5): one comes after the other.
    assert compute_floor(Work({product: 1, attention: 1}), CEILINGS).seconds == pytest.approx(4.5)


@pytest.mark.parametrize(("times", "bound"), [(1, Bound.COMPUTE), (3, Bound.MEMORY)])
def test_most_of_the_time_says_what_bounds_it(times: int, bound: Bound) -> None:
    product = Operation(name="product", flops=3000, weight_bytes=100)
    attention = Operation(name="attention", flops=1000, cache_bytes=150)

    floor = compute_floor(Work({product: 1, attention: times}), CEILINGS)

    assert floor.bound_by is bound
    assert floor.seconds == pytest.approx(3 + 1.5 * times)


def test_activations_are_in_no_floor() -> None:
    work = Work({Operation(name="product", flops=1000, activation_bytes=10**9): 1})

    assert compute_floor(work, CEILINGS) == Floor(1.0, Bound.COMPUTE)


def test_on_the_host_only_its_memory_counts() -> None:
    work = Work({Operation(name="attention", flops=10**9, cache_bytes=30, is_on_host=True): 2})

    assert compute_floor(work, CEILINGS) == Floor(6.0, Bound.MEMORY)


def test_loads_take_the_longest_of_their_ways() -> None:
    assert load_floor(HomeBytes(gpu=100, cpu=60, disk=10), CEILINGS) == Floor(3.0, Bound.LINK)
    assert load_floor(HomeBytes(gpu=100, cpu=60, disk=20), CEILINGS) == Floor(4.0, Bound.DISK)
    assert load_floor(HomeBytes(gpu=500), CEILINGS) == Floor(5.0, Bound.MEMORY)


def test_stores_have_ceilings_of_their_own() -> None:
    assert store_floor(HomeBytes(cpu=60, disk=2), CEILINGS) == Floor(1.5, Bound.LINK)
    assert store_floor(HomeBytes(cpu=60, disk=4), CEILINGS) == Floor(2.0, Bound.DISK)


def test_hidden_states_are_stored_and_then_loaded() -> None:
    moved, nothing = HomeBytes(disk=10), HomeBytes()
    work = StageWork(
        prefill=NOTHING,
        decode=NOTHING,
        weight_load=nothing,
        cache_load=nothing,
        cache_store=nothing,
        hidden_load=moved,
        hidden_store=moved,
    )

    assert hidden_floor(work, CEILINGS) == Floor(10 / 2.0 + 10 / 5.0, Bound.DISK)


def test_nothing_takes_no_time() -> None:
    assert compute_floor(NOTHING, CEILINGS) == Floor(0.0, None)
    assert load_floor(HomeBytes(), replace(CEILINGS, disk_read_bytes_per_s=None)).bound_by is None
