"""What is chosen: within the limits, always; with what is given, as given."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="it solves the linear programme")
pytest.importorskip("torch", reason="plans are reckoned with torch's types")

from flexbench.core.errors import ConfigError
from flexbench.dist.plan import DistPlan
from flexbench.dist.policy_search.memory import Limits, MemoryModel, find_limits, with_policy
from flexbench.dist.policy_search.request import GIB, PolicyRequest
from flexbench.dist.policy_search.search import batch_sizes, choose
from tests.unit.dist.policy_search import cases

MIB = 2**20
PLENTY = Limits(gpu=None, cpu=8 * GIB, disk=8 * GIB)
HOMES = {"cpu": cases.home(1e9), "disk": cases.home(1e8)}
DISK = {"disk": cases.home(1e8)}


def least_memory(plan: DistPlan, **sizes: int) -> int:
    """Bytes with everything on disk."""
    total = with_policy(plan, (0,) * 6, sizes.get("size", 1), 1).stages[0].total
    return total.gpu + total.cpu


def test_with_room_for_all_everything_is_on_the_gpu():
    constants = cases.constants(layer_s=1e-3, per_prompt_s=1e-4, homes=DISK)
    plan, search = choose(cases.plan(), PolicyRequest(max_batch=32), PLENTY, constants)
    assert plan.config.percent == (100, 0, 100, 0, 100, 0)
    assert plan.config.gpu_batch_size * plan.config.num_gpu_batches == 32
    assert search.prediction.decode_bound == "computing"


def test_of_batches_that_are_as_good_the_smallest_is_taken():
    """Computing in proportion to the prompts: nothing is gained by many."""
    constants = cases.constants(layer_s=0.0, per_prompt_s=1e-3, homes=DISK)
    plan, _ = choose(cases.plan(), PolicyRequest(max_batch=32), PLENTY, constants)
    assert plan.num_prompts == 1


def test_little_memory_puts_things_on_disk_and_lets_blocks_grow():
    plan = cases.plan()
    limits = Limits(gpu=None, cpu=least_memory(plan) + MIB, disk=GIB)
    constants = cases.constants(layer_s=1e-5, homes=DISK)
    chosen, search = choose(plan, PolicyRequest(max_batch=16), limits, constants)
    assert not limits.excess([stage.total for stage in chosen.stages])
    assert chosen.stages[0].total.disk > 0
    assert search.prediction.decode_bound.endswith("disk")


@given(
    extra=st.integers(0, 12 * MIB),
    gpu=st.none() | st.integers(0, 12 * MIB),
    layer_s=st.floats(1e-6, 1e-2),
    rate=st.floats(1e6, 1e10),
    has_sep_layer=st.booleans(),
    cpu_cache_compute=st.booleans(),
    compress=st.booleans(),
    num_stages=st.integers(1, 3),
)
@settings(max_examples=12, deadline=None)
def test_the_chosen_policy_fits_whatever_the_limits(
    extra, gpu, layer_s, rate, has_sep_layer, cpu_cache_compute, compress, num_stages
):
    plan = cases.plan(
        num_stages=num_stages,
        has_gpu=gpu is not None,
        sep_layer=has_sep_layer,
        cpu_cache_compute=cpu_cache_compute,
        compress_weight=compress,
    )
    limits = Limits(gpu=None if gpu is None else 4 * MIB + gpu, cpu=6 * MIB + extra, disk=100 * MIB)
    homes = {"disk": cases.home(rate)}
    if gpu is not None:
        homes["cpu"] = cases.home(10 * rate)
    request = PolicyRequest(max_batch=4)
    try:
        chosen, search = choose(
            plan, request, limits, cases.constants(layer_s=layer_s, homes=homes)
        )
    except ConfigError:
        chosen = search = None
    if chosen is None:
        smallest = with_policy(plan, (0,) * 6, 1, 1)
        tight = limits.less({"cpu": 64 * 1024, "gpu": 64 * 1024})
        assert tight.excess([stage.total for stage in smallest.stages])
        return
    assert not limits.excess([stage.total for stage in chosen.stages])
    assert chosen.num_prompts <= max(request.max_batch, num_stages)
    assert search.prediction.throughput > 0


@pytest.mark.parametrize(
    ("given_options", "request_fields"),
    [
        ({"gpu_batch_size": 3}, {"is_batch_fixed": True}),
        ({"num_gpu_batches": 2}, {"is_num_batches_fixed": True}),
        ({"percent": (50, 0, 100, 0, 100, 0)}, {"is_percent_fixed": True}),
    ],
)
def test_what_is_given_is_kept(given_options, request_fields):
    plan = cases.plan(**given_options)
    chosen, _ = choose(
        plan,
        PolicyRequest(max_batch=12, **request_fields),
        PLENTY,
        cases.constants(homes=DISK),
    )
    for name, value in given_options.items():
        assert getattr(chosen.config, name) == value
    assert 1 < chosen.num_prompts <= 12


def test_what_fits_nowhere_says_what_it_takes():
    limits = Limits(gpu=None, cpu=MIB, disk=MIB)
    with pytest.raises(ConfigError, match="1 prompts a block, with everything on disk") as raised:
        choose(cases.plan(), PolicyRequest(), limits, cases.constants(homes=DISK))
    assert raised.value.option == "--cpu-memory"
    limits = Limits(gpu=1, cpu=GIB, disk=GIB)
    plan = cases.plan(has_gpu=True)
    with pytest.raises(ConfigError, match="of a GPU") as raised:
        choose(plan, PolicyRequest(), limits, cases.constants(homes=HOMES))
    assert raised.value.option == "--gpu-memory"


@pytest.mark.parametrize("corner", [(100, 0), (0, 0), (0, 100)])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (3, 2), (8, 5)])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_model_of_memory_is_exact_in_the_corners(corner, size, count, kind):
    """Everything of a kind at one home: what the plan says, to the byte, but for rounded rows."""
    percent = [100, 0] * 3
    percent[2 * kind : 2 * kind + 2] = corner
    plan = cases.plan()
    exact = with_policy(plan, tuple(percent), size, count).stages[0].total
    (demand,) = MemoryModel(plan).demands(size, count)
    name = ("weights", "cache", "activations")[kind]
    away = corner != (100, 0)
    total = demand.fixed.total + demand.weights + demand.cache + demand.activations
    if away:
        home = "cpu" if corner[1] else "disk"
        buffers = {
            "weights": demand.weight_buffers,
            "activations": demand.activation_buffers,
            "cache": demand.cache_buffers[home],
        }
        total += buffers[name].total
    assert total == pytest.approx(exact.total, abs=4 * 128 * count)


def test_limits_are_what_is_asked_for_or_free():
    plan = cases.plan()
    assert find_limits(plan, PolicyRequest(cpu_memory=2.5)).cpu == 2.5 * GIB
    assert find_limits(plan, PolicyRequest()).cpu > 0
    assert find_limits(plan, PolicyRequest()).gpu is None
    with pytest.raises(ConfigError, match="--gpu-memory: there is no CUDA here"):
        find_limits(plan, PolicyRequest(gpu_memory=1))


def test_batch_sizes_end_at_the_most_prompts():
    assert batch_sizes(cases.plan(), PolicyRequest(max_batch=10)) == [1, 2, 3, 4, 6, 8, 10]
    plan = cases.plan(num_gpu_batches=2)
    request = PolicyRequest(max_batch=10, is_num_batches_fixed=True)
    assert batch_sizes(plan, request) == [1, 2, 3, 4, 5]


def test_the_record_of_a_search_is_json():
    constants = cases.constants(homes={"disk": cases.home(float("inf"))})
    _, search = choose(cases.plan(), PolicyRequest(max_batch=4), PLENTY, constants)
    record = json.loads(json.dumps(search.as_json(), allow_nan=False))
    assert record["constants"]["homes"]["disk"]["weight_load"] is None
    assert record["predicted"]["total_throughput"] == pytest.approx(search.prediction.throughput)
