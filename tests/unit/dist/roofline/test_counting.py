"""What a run computes and moves: by hand for a tiny model, and beside what the engine moved."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models are computed with torch")

import torch

from flexbench.dist.homes import DiskPart, ExecutionEnv, MemoryPart
from flexbench.dist.model import OptLM
from flexbench.dist.roofline.counting import StageWork, count_stage
from tests.unit.dist.roofline.plans import tiny_plan

# B prompts of S tokens; h, D, f and V of the model; R pairs of prompt and head.
B, S, H, D, F, V = 2, 3, 8, 4, 16, 10
R = B * 2
FLOAT = 4
ELEMENTS = 3 * H * H + H * H + 2 * H * F  # of a layer's matrices
VECTORS = 3 * H + H + F + H + 4 * H  # of its biases and norms
LAYER_BYTES = (ELEMENTS + VECTORS) * FLOAT
OUTPUT_BYTES = (2 * H + V * H) * FLOAT


def test_a_prefill_by_hand(tmp_path: Path) -> None:
    work = count_stage(tiny_plan(tmp_path, changed={"num_hidden_layers": 2}), 0).prefill

    n = B * S
    pairs = S * (S + 1) // 2
    first = 2 * n * ELEMENTS + R * pairs * 4 * D
    # Of the last layer, all keys and values, but all else for the last position of each prompt.
    keys_values = 2 * H * H
    last = 2 * n * keys_values + 2 * B * (ELEMENTS - keys_values) + R * S * 4 * D
    assert work.flops == first + last + 2 * B * H * V
    looked_up = n * (H + H) * FLOAT
    assert work.weight_bytes == 2 * LAYER_BYTES + OUTPUT_BYTES + looked_up
    assert work.cache_bytes == 0


def test_decoding_by_hand_grows_with_the_cache(tmp_path: Path) -> None:
    work = count_stage(tiny_plan(tmp_path), 0).decode

    of_attention = sum(R * (2 * D * length + 2 * D * length) for length in (4, 5))
    assert work.flops == 2 * (2 * B * ELEMENTS + 2 * B * H * V) + of_attention
    assert work.cache_bytes == sum(R * D * FLOAT * 2 * past for past in (3, 4))
    looked_up = B * (H + H) * FLOAT
    assert work.weight_bytes == 2 * (LAYER_BYTES + OUTPUT_BYTES + looked_up)


def test_a_sparse_attention_reads_all_keys_and_the_chosen_values(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, attn_sparsity=0.5)
    dense = count_stage(tiny_plan(tmp_path), 0).decode
    work = count_stage(plan, 0).decode

    # Of 3 past positions 1 is chosen, of 4 there are 2; the new one takes part anyway.
    assert work.cache_bytes == R * D * FLOAT * ((3 + 1) + (4 + 2))
    assert dense.flops - work.flops == R * 2 * D * ((3 - 1) + (4 - 2))


def test_compressed_weights_and_caches_count_as_they_are_stored(tmp_path: Path) -> None:
    changed = {"hidden_size": 128, "ffn_dim": 256, "num_attention_heads": 2}
    dense = count_stage(tiny_plan(tmp_path, changed=changed), 0)
    work = count_stage(
        tiny_plan(tmp_path, changed=changed, compress_weight=True, compress_cache=True), 0
    )

    assert work.decode.flops == dense.decode.flops
    # 64 elements of 4 bytes are 32 bytes of levels and two numbers.
    assert work.decode.cache_bytes * 64 * FLOAT == dense.decode.cache_bytes * (32 + 2 * FLOAT)
    assert 5 < dense.decode.weight_bytes / work.decode.weight_bytes < 8


@pytest.mark.parametrize("options", [{"num_gpu_batches": 3}, {"num_inner_iterations": 3}])
def test_every_batch_reads_the_weights_and_has_a_cache(
    options: dict[str, Any], tmp_path: Path
) -> None:
    one, three = (count_stage(tiny_plan(tmp_path, **more), 0) for more in ({}, options))

    for phase in ("prefill", "decode"):
        for what in ("flops", "weight_bytes", "cache_bytes", "activation_bytes"):
            single = getattr(getattr(one, phase), what)
            assert getattr(getattr(three, phase), what) == 3 * single, (phase, what)


def test_weights_are_loaded_once_for_all_batches_of_a_layer(tmp_path: Path) -> None:
    options: dict[str, Any] = {"percent": (0, 100, 100, 0, 100, 0)}
    plan = tiny_plan(tmp_path, num_gpu_batches=3, num_inner_iterations=2, **options)

    loaded = count_stage(plan, 0).weight_load

    assert loaded.cpu == plan.stages[0].weights.cpu * 3 * 2  # tokens, inner iterations
    assert (loaded.gpu, loaded.disk) == (0, 0)


def test_what_is_on_the_gpu_is_not_moved_but_for_new_keys_and_values(tmp_path: Path) -> None:
    work = count_stage(tiny_plan(tmp_path), 0)

    assert work.weight_load.total == work.cache_load.total == 0
    assert work.hidden_load.total == work.hidden_store.total == 0
    assert work.cache_store.gpu == work.cache_store.total == 2 * R * D * S * FLOAT


def test_stages_share_the_work_of_one(tmp_path: Path) -> None:
    changed = {"num_hidden_layers": 3}
    whole = count_stage(tiny_plan(tmp_path, changed=changed, num_inner_iterations=2), 0)
    plan = tiny_plan(tmp_path, changed=changed, num_stages=2)  # 2 inner iterations, too
    parts = [count_stage(plan, rank) for rank in range(2)]

    for phase in ("prefill", "decode"):
        for what in ("flops", "weight_bytes", "cache_bytes"):
            shares = [getattr(getattr(part, phase), what) for part in parts]
            assert sum(shares) == getattr(getattr(whole, phase), what)
            assert min(shares) > 0 or (phase, what) == ("prefill", "cache_bytes")


def test_tokens_that_are_projected_are_not_counted(tmp_path: Path) -> None:
    cut = count_stage(tiny_plan(tmp_path, gen_len=10, cut_gen_len=3), 0)

    assert cut == count_stage(tiny_plan(tmp_path), 0)


def test_one_token_leaves_nothing_to_decode_or_to_store(tmp_path: Path) -> None:
    work = count_stage(tiny_plan(tmp_path, gen_len=1), 0)

    assert work.decode.flops == work.cache_store.total == 0
    assert work.prefill.flops > 0


# --- beside what the engine really moved ---


class Moved:
    """Bytes that went to and from each home while it was watched."""

    def __init__(self, env: ExecutionEnv, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: Counter[str] = Counter()
        self._env = env
        for part in (MemoryPart, DiskPart):
            for way in ("read", "write"):
                monkeypatch.setattr(part, way, self._watched(getattr(part, way), way))

    def _watched(self, work: Any, way: str) -> Any:
        def watched(part: Any, start: int, rows: torch.Tensor) -> None:
            if isinstance(part, DiskPart):
                home = "disk"
            else:
                home = "gpu" if part._ledger is self._env.gpu.ledger else "cpu"
            self.bytes[f"{way} {home}"] += rows.nbytes
            work(part, start, rows)

        return watched


def counted(work: StageWork) -> Counter[str]:
    loaded = work.weight_load + work.cache_load + work.hidden_load
    stored = work.cache_store + work.hidden_store
    homes = ("gpu", "cpu", "disk")
    return Counter(
        {f"read {home}": getattr(loaded, home) for home in homes}
        | {f"write {home}": getattr(stored, home) for home in homes}
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"percent": (0, 100, 0, 100, 0, 100)},
        {"percent": (0, 0, 0, 0, 0, 0)},
        {"percent": (0, 0, 0, 0, 0, 0), "sep_layer": False},
        {"percent": (100, 0, 100, 0, 0, 100), "changed": {"num_hidden_layers": 1}},
        {"percent": (30, 30, 25, 50, 40, 30), "num_gpu_batches": 2},
        {"percent": (30, 30, 25, 50, 100, 0), "sep_layer": False, "overlap": False},
        {"percent": (100, 0, 25, 50, 100, 0), "cpu_cache_compute": True},
        {"percent": (100, 0, 25, 50, 100, 0), "attn_sparsity": 0.5},
        {"percent": (50, 0, 0, 0, 100, 0), "compress_weight": True, "compress_cache": True},
    ],
    ids=lambda options: " ".join(options) or "gpu",
)
def test_the_engine_moves_what_is_counted(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(tmp_path / "model", **{"changed": {"num_hidden_layers": 2}, **options})
    env = ExecutionEnv.create(tmp_path)
    model = OptLM(plan.model, env, plan.weights_path, plan.policy)
    try:
        moved = Moved(env, monkeypatch)
        prompts = np.full((plan.num_prompts, plan.config.prompt_len), 5)
        model.generate(prompts, max_new_tokens=plan.config.gen_len)
    finally:
        model.close()

    assert +moved.bytes == +counted(count_stage(plan, 0))


@pytest.mark.parametrize(("rank", "num_layers"), [(0, 4), (1, 1)])
def test_activations_behind_the_last_layer_are_of_one_position(
    rank: int, num_layers: int, tmp_path: Path
) -> None:
    """Four layers and the embedding before them, and a stage that has nothing but the last layer."""
    plan = tiny_plan(
        tmp_path,
        num_stages=2,
        changed={"num_hidden_layers": 5},
        percent=(100, 0, 100, 0, 0, 100),
        gen_len=1,
        num_inner_iterations=1,
        sep_layer=False,
        balance="layers",
    )
    stages = [replace(plan.stages[0].stage, rank=0, layers=range(4))]
    stages.append(replace(plan.stages[1].stage, rank=1, layers=range(4, 5)))
    plan = replace(
        plan,
        stages=tuple(
            replace(old, stage=stage) for old, stage in zip(plan.stages, stages, strict=True)
        ),
    )

    stored = count_stage(plan, rank).hidden_store

    row_bytes = H * FLOAT
    # Behind the input embedding and each layer but a stage's last; or behind the last layer alone.
    expected = num_layers * B * S * row_bytes if rank == 0 else B * row_bytes
    assert stored.cpu == stored.total == expected


def test_a_debug_mode_leaves_the_last_layer_out(tmp_path: Path) -> None:
    """Then all positions reach the output embedding, which has to get them from where they are."""
    plan = tiny_plan(
        tmp_path / "model", changed={"num_hidden_layers": 12}, percent=(100, 0, 100, 0, 0, 100)
    )
    env = ExecutionEnv.create(tmp_path)
    model = OptLM(plan.model, env, plan.weights_path, plan.policy)
    try:
        prompts = np.full((plan.num_prompts, plan.config.prompt_len), 5)
        model.generate(prompts, max_new_tokens=3, debug_mode="fewer_batch")
        assert 0 < len(model.projected_layers) < len(model.layers)
    finally:
        model.close()
