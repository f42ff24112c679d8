"""The engine's schedule played with durations that add up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="plans are reckoned with torch's types")

from flexbench.dist.plan import plan_stages
from flexbench.dist.policy_search.constants import Curve, LayerTimes
from flexbench.dist.policy_search.costs import pass_costs
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


def test_behind_the_last_layer_activations_are_of_one_position():
    """Of 9 times that they are stored and loaded, 7 are of a whole prompt in the prefill."""
    disk = replace(cases.home(1e6), hidden_step_s=Curve(((1, 2e-3),)))
    constants = cases.constants(layer_s=1e-2, homes={"disk": disk})
    times, durations = units((100, 0, 100, 0, 0, 0), constants, overlap=False)
    whole = 16 * 128 * 4 / 1e6
    moved = {"prefill": 7 * 2 * whole + 2 * 2e-3, "decode": 9 * 2e-3}
    assert times.prefill_s == pytest.approx(NUM_LAYERS * 1e-2 + moved["prefill"])
    assert times.decode_s == pytest.approx(NUM_LAYERS * 1e-2 + moved["decode"])

    plan = with_policy(cases.plan(overlap=False), (100, 0, 100, 0, 0, 0), 1, 1)
    costs = pass_costs(plan, durations.policy, durations.stage, constants)
    for cost, phase in zip(costs, moved, strict=True):
        loads = [load.seconds for load in cost.loads if load.kind == "activations"]
        assert loads == [pytest.approx(moved[phase])]


def test_a_stage_without_the_last_layer_moves_whole_activations_only():
    disk = replace(cases.home(1e6), hidden_step_s=Curve(((1, 2e-3),)))
    constants = cases.constants(layer_s=1e-2, homes={"disk": disk})
    times, _ = units((100, 0, 100, 0, 0, 0), constants, overlap=False, num_stages=2)
    # The input embedding, and attention and MLP of two layers.
    assert times.prefill_s == pytest.approx(5 * 1e-2 + 4 * 2 * 16 * 128 * 4 / 1e6)


def test_the_last_layer_has_times_of_its_own():
    constants = cases.constants(layer_s=1e-2)
    quick = LayerTimes(prefill=Curve(((1, 1e-3),)), decode=Curve(((1, 1e-2),)))
    kinds = dict.fromkeys(("last attention", "last MLP"), quick)
    times, _ = units((100, 0, 100, 0, 100, 0), replace(constants, layers=constants.layers | kinds))
    assert times.prefill_s == pytest.approx((NUM_LAYERS - 2) * 1e-2 + 2 * 1e-3)
    assert times.decode_s == pytest.approx(NUM_LAYERS * 1e-2)


@pytest.mark.parametrize(
    ("percent", "count", "expected"),
    [
        ((100, 0, 100, 0, 100, 0), 1, 1e-2),
        ((100, 0, 100, 0, 100, 0), 2, 4e-2),
        ((0, 0, 100, 0, 100, 0), 1, 2e-2),
        ((100, 0, 0, 0, 100, 0), 1, 2e-2),
        ((100, 0, 100, 0, 0, 0), 1, 2e-2),
    ],
    ids=["in place", "two batches", "weights away", "cache away", "activations away"],
)
def test_layers_that_are_not_joined_have_times_of_their_own(percent, count, expected):
    constants = cases.constants(homes={"disk": cases.home(1e15)})
    same = Curve(((1, 1e-2),))
    times = LayerTimes(prefill=same, decode=same, apart_s=1e-2)
    constants = replace(constants, layers=dict.fromkeys(cases.KINDS, times))
    found, _ = units(percent, constants, count=count)
    assert found.decode_s == pytest.approx(NUM_LAYERS * expected, rel=1e-3)
    assert found.prefill_s == pytest.approx(NUM_LAYERS * count * 1e-2, rel=1e-3)


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
