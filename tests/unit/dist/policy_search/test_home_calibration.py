"""What follows from a probe's times, and how many layers it has: with a probe that is none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="sizes are reckoned with torch's types")

from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.opt_config import get_opt_config
from flexbench.dist.policy import Policy
from flexbench.dist.policy_search.calibration import Calibration
from flexbench.dist.policy_search.home_calibration import HomeCalibration
from flexbench.dist.policy_search.probe import Probe, Times
from tests.unit.dist.policy_search import cases

RATE, STEP_S = 1e8, 1e-4  # bytes/s of whole prompts' activations; of one position, in and out
PLAN = cases.plan()
H, FLOAT = PLAN.model.hidden_size, 4


@dataclass
class FakeProbe:
    """Moves everything at RATE, and activations of one position in STEP_S."""

    num_layers: int
    num_hidden: int
    num_whole_hidden: int

    def run(self, policy: Policy, *, prompt_len: int, num_tokens: int) -> Times:
        num_decoded = num_tokens - 1
        position = policy.gpu_batch_size * H * FLOAT
        single = self.num_hidden - self.num_whole_hidden + num_decoded * self.num_hidden
        hidden_s = 2 * self.num_whole_hidden * position * prompt_len / RATE + single * STEP_S
        cache = 2 * position * self.num_layers * prompt_len / RATE
        return Times(
            prefill_s={},
            decode_s={},
            prefill_compute_s=0.0,
            decode_compute_s=0.0,
            busy_s={"hidden": hidden_s, "cache_store": cache, "cache_load": cache * num_decoded},
            stalled_s=0.0,
            num_decoded=num_decoded,
        )


def home(**changed: Any) -> HomeCalibration:
    made = HomeCalibration(
        model=PLAN.model,
        policy=PLAN.policy,
        env=None,  # type: ignore[arg-type]
        home="disk",
        prompt_len=200,
        batch_sizes=(1, 8, 8),
    )
    return replace(made, **changed)


@pytest.mark.parametrize(("num_layers", "num_hidden", "num_whole"), [(1, 3, 1), (4, 9, 7)])
def test_activations_of_one_position_are_known_from_those_of_prompts(
    num_layers: int, num_hidden: int, num_whole: int
) -> None:
    probe: Any = FakeProbe(num_layers, num_hidden, num_whole)

    found = home().measure_data(probe, cases.constants())

    # What one position takes in a long run counts as a prompt's, too: a few percent.
    assert found.hidden == pytest.approx(RATE, rel=0.06)
    assert found.hidden_step_s.at(8) == pytest.approx(STEP_S, rel=0.06)


@pytest.mark.parametrize("name", ["opt-125m", "opt-1.3b", "opt-30b", "opt-175b"])
def test_a_probe_has_a_layer_that_is_not_the_last(name: str, tmp_path: Any) -> None:
    model = get_opt_config(name, dtype="float16")
    calibration = Calibration(
        model=model,
        config=PLAN.config,
        env=ExecutionEnv.create(tmp_path),
        batches=[1],
        homes=[],
    )
    assert calibration._num_layers() >= 2
    assert home(model=model)._num_layers() >= 2
    single = replace(calibration, model=replace(model, num_hidden_layers=1))
    assert single._num_layers() == 1


@pytest.mark.parametrize("options", [{}, {"compress_cache": True}], ids=["joined", "apart"])
def test_decoding_is_measured_joined_and_layer_by_layer(
    options: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with a compressed cache are never joined: there is nothing else to measure."""
    plan = cases.plan(**options)
    calibration = Calibration(
        model=plan.model,
        config=plan.config,
        env=ExecutionEnv.create(tmp_path),
        batches=[1, 4],
        homes=[],
    )
    run = Probe.run

    def slower(self: Probe, policy: Policy, **prompts: int) -> Times:
        times = run(self, policy, **prompts)
        if policy.num_gpu_batches == 1:
            return times
        return replace(times, decode_s={kind: s + 1.0 for kind, s in times.decode_s.items()})

    monkeypatch.setattr(Probe, "run", slower)
    layers = calibration.measure(lambda: None).layers
    assert set(layers) >= {"attention", "MLP", "input embedding", "output embedding"}
    for times in layers.values():
        assert [size for size, _ in times.decode.points] == [1, 4]
        assert times.apart_s == (0.0 if options else pytest.approx(1.0, abs=0.1))
