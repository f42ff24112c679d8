"""Constants and plans of which the answers are known beforehand."""

from __future__ import annotations

from dataclasses import replace

from flexbench.dist.config import DistConfig
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.partition import split_layers
from flexbench.dist.plan import DistPlan, plan_stages
from flexbench.dist.policy_search.constants import Constants, Curve, HomeTimes, LayerTimes

_INNER = ("attention", "MLP", "layer")
KINDS = ("input embedding", *_INNER, *(f"last {kind}" for kind in _INNER), "output embedding")


def line(start: float, slope: float) -> Curve:
    """start + slope x batch size."""
    return Curve(((1, start + slope), (2, start + 2 * slope)))


def constants(
    *, layer_s: float = 1e-3, per_prompt_s: float = 0.0, homes: dict[str, HomeTimes] | None = None
) -> Constants:
    """Every layer takes the same; nothing disturbs anything."""
    times = LayerTimes(prefill=line(layer_s, per_prompt_s), decode=line(layer_s, per_prompt_s))
    return Constants(
        num_threads=1,
        num_layers=1,
        short_context=4,
        layers=dict.fromkeys(KINDS, times),
        homes=homes or {},
    )


def home(rate: float) -> HomeTimes:
    """Everything goes at `rate` bytes/s, and small pieces take no time."""
    return HomeTimes(
        weight_load=rate,
        cache_load=rate,
        cache_store=rate,
        cache_append_s=Curve(((1, 0.0),)),
        hidden=rate,
        hidden_step_s=Curve(((1, 0.0),)),
    )


def plan(*, num_stages: int = 1, has_gpu: bool = False, **options: object) -> DistPlan:
    """Of a small model: 4 layers of 128."""
    model = OptConfig(
        name="small",
        hidden_size=128,
        num_attention_heads=4,
        num_hidden_layers=4,
        ffn_dim=512,
        vocab_size=1000,
        max_position_embeddings=256,
        dtype="float32",
    )
    values: dict[str, object] = {"prompt_len": 16, "gen_len": 8}
    config = DistConfig(**(values | options))  # type: ignore[arg-type]
    empty = DistPlan(
        config=config,
        model=model,
        policy=config.policy(),
        weights_path="_DUMMY_",
        num_inner_iterations=config.num_inner_iterations or num_stages,
        has_gpu=has_gpu,
        stages=(),
    )
    from flexbench.dist.placement import HomeBytes
    from flexbench.dist.plan import StagePlan

    none = HomeBytes()
    stages = tuple(
        StagePlan(
            stage=stage, weights=none, cache=none, activations=none, buffers=none, temporaries=none
        )
        for stage in split_layers(model, num_stages)
    )
    unsized = replace(empty, stages=stages)
    return replace(unsized, stages=plan_stages(unsized))
