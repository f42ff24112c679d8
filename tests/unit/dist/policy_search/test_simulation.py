"""The engine's schedule played with durations that add up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="plans are reckoned with torch's types")

from flexbench.dist.plan import plan_stages
from flexbench.dist.policy_search.durations import Durations
from flexbench.dist.policy_search.memory import with_policy
from flexbench.dist.policy_search.prediction import predict
from flexbench.dist.policy_search.simulation import COMPUTING, simulate
from tests.unit.dist.policy_search import cases

NUM_LAYERS = 10  # two embeddings, and attention and MLP of four layers
ON_DISK = (0.0, 0.0, 100.0, 0.0, 100.0, 0.0)


def units(percent, constants, size=1, count=1, **options):
    plan = with_policy(cases.plan(**options), percent, size, count)
    durations = Durations(
        model=plan.model,
        policy=plan.policy,
        stage=plan.stages[0].stage,
        constants=constants,
        prompt_len=plan.config.prompt_len,
    )
    return simulate(durations, decode_past=20), durations


def test_on_the_gpu_all_is_computing():
    times, _ = units((100, 0, 100, 0, 100, 0), cases.constants(layer_s=1e-3))
    assert times.prefill_s == pytest.approx(NUM_LAYERS * 1e-3)
    assert times.decode_s == pytest.approx(NUM_LAYERS * 1e-3)
    assert times.decode_parts == {COMPUTING: pytest.approx(times.decode_s)} | {
        name: 0 for name in times.decode_parts if name != COMPUTING
    }


def test_slow_loads_take_their_own_time_whatever_is_computed():
    constants = cases.constants(layer_s=1e-9, homes={"disk": cases.home(1e6)})
    times, durations = units(ON_DISK, constants)
    loads = sum(layer.weight.total for layer in durations.layers)
    assert times.decode_s == pytest.approx(loads, rel=1e-3)
    assert max(times.decode_parts, key=times.decode_parts.get) == "weights: disk"


def test_quick_loads_hide_behind_computing():
    constants = cases.constants(layer_s=1.0, homes={"disk": cases.home(1e9)})
    times, _ = units(ON_DISK, constants)
    assert times.decode_s == pytest.approx(NUM_LAYERS, rel=1e-3)


def test_without_overlap_both_add_up():
    constants = cases.constants(layer_s=1e-2, homes={"disk": cases.home(1e7)})
    times, durations = units(ON_DISK, constants, overlap=False)
    loads = sum(layer.weight.total for layer in durations.layers)
    assert times.decode_s == pytest.approx(NUM_LAYERS * 1e-2 + loads)


def test_several_batches_share_the_loads_of_a_layer():
    constants = cases.constants(layer_s=1e-9, homes={"disk": cases.home(1e6)})
    one, _ = units(ON_DISK, constants)
    four, _ = units(ON_DISK, constants, count=4)
    assert four.decode_s == pytest.approx(one.decode_s, rel=1e-3)


def test_disturbed_computing_goes_on_at_its_speed():
    """Loads that never end leave computing at half its speed."""
    slow = replace(cases.home(1e5), compute_speed=0.5)
    constants = cases.constants(layer_s=1e-2, homes={"disk": slow})
    times, _ = units(ON_DISK, constants)
    assert times.decode_parts[COMPUTING] == pytest.approx(NUM_LAYERS * 2e-2, rel=0.01)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_equal_stages_fill_and_drain(iterations):
    """Of T blocks in S = 2 stages, T >= S: all tokens' units one after the other, and one more."""
    plan = cases.plan(num_stages=2, num_inner_iterations=iterations, sep_layer=False)
    constants = cases.constants(layer_s=1e-3)
    found = predict(replace(plan, stages=plan_stages(plan)), constants)
    stage_s = 3e-3  # an embedding and two layers
    units_s = plan.config.gen_len * max(iterations, 2) * stage_s
    fill_s = stage_s if iterations >= 2 else 0.0
    assert found.total_s == pytest.approx(units_s + fill_s)
