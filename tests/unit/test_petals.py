"""The parts of the swarm benchmark that need no swarm."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.core.errors import ConfigError
from flexbench.core.progress import Silence
from flexbench.core.results import ResultsFile
from flexbench.models.shapes import OPT_SHAPES, opt_shape
from flexbench.petals import _patch_bloom_config, bench
from flexbench.petals.client import RequestLatency, RequestTrace
from flexbench.petals.config import PetalsConfig, RunShape
from flexbench.petals.measurement import Load, Measurement
from flexbench.petals.model import dht_prefix_for, split_blocks
from flexbench.petals.peers import Hop
from flexbench.petals.plan import make_plan
from flexbench.petals_runtime.spans import format_spans, missing_blocks


def trace(started_at: float, ended_at: float, tokens: int) -> RequestTrace:
    return RequestTrace(
        started_at=started_at,
        ended_at=ended_at,
        generated_tokens=tokens,
        failed_attempts=0,
        route=(Hop(peer_id="a", start=0, end=6), Hop(peer_id="b", start=6, end=12)),
    )


@pytest.mark.parametrize(
    ("name", "hidden_size", "heads", "layers", "parameters"),
    [
        # Parameters of the whole model as the OPT paper counts them, within 4 %.
        ("facebook/opt-125m", 768, 12, 12, 125e6),
        ("facebook/opt-1.3b", 2048, 32, 24, 1.3e9),
        ("facebook/opt-2.7b", 2560, 32, 32, 2.7e9),
        ("facebook/opt-6.7b", 4096, 32, 32, 6.7e9),
        ("facebook/opt-13b", 5120, 40, 40, 13e9),
        ("facebook/opt-30b", 7168, 56, 48, 30e9),
        ("facebook/opt-66b", 9216, 72, 64, 66e9),
        ("facebook/opt-175b", 12288, 96, 96, 175e9),
    ],
)
def test_opt_shapes(name, hidden_size, heads, layers, parameters):
    shape = opt_shape(name)
    assert (shape.hidden_size, shape.num_attention_heads, shape.num_hidden_layers) == (
        hidden_size, heads, layers,
    )  # fmt: skip
    assert shape.vocab_size == 50272
    total = shape.block_parameters * layers + shape.embedding_parameters
    assert total == pytest.approx(parameters, rel=0.04)


def test_opt_350m_has_narrow_embeddings_which_the_mapping_widens():
    shape = opt_shape("opt-350m")
    assert (shape.hidden_size, shape.num_attention_heads, shape.num_hidden_layers) == (1024, 16, 24)


def test_block_parameters_are_counted_by_hand():
    # opt-30b: 12 x 7168^2 + 13 x 7168
    assert opt_shape("opt-30b").block_parameters == 616_655_872


def test_heads_divide_the_hidden_size():
    assert all(s.hidden_size % s.num_attention_heads == 0 for s in OPT_SHAPES.values())


def test_the_bloom_config_gets_the_four_dimensions_and_nothing_else():
    bloom = SimpleNamespace(hidden_size=1, n_head=1, n_layer=1, vocab_size=1, other=5)
    opt = SimpleNamespace(
        hidden_size=7168, num_attention_heads=56, num_hidden_layers=48, vocab_size=50272
    )
    _patch_bloom_config(bloom, opt)
    assert vars(bloom) == {
        "hidden_size": 7168, "n_head": 56, "n_layer": 48, "vocab_size": 50272, "other": 5,
    }  # fmt: skip


def test_dht_prefixes_have_no_dots():
    assert dht_prefix_for("facebook/opt-6.7b") == "opt6b"
    assert dht_prefix_for("facebook/opt-30b") == "facebook/opt-30b"
    assert all("." not in dht_prefix_for(name) for name in OPT_SHAPES)
    assert len({dht_prefix_for(name) for name in OPT_SHAPES}) == len(OPT_SHAPES)


def test_a_short_model_name_has_the_prefix_of_the_long_one(tmp_path):
    config = PetalsConfig(prefix="opt-6.7b", output=tmp_path / "petals.tsv")
    assert config.effective_dht_prefix == "opt6b"
    assert PetalsConfig(prefix="opt-6.7b", dht_prefix="mine").effective_dht_prefix == "mine"


@given(st.integers(1, 200), st.integers(1, 200))
def test_blocks_are_split_evenly_and_completely(num_blocks, num_servers):
    shares = split_blocks(num_blocks, num_servers)
    assert [block for share in shares for block in share] == list(range(num_blocks))
    assert len(shares) == num_servers
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_split_gives_the_larger_shares_first():
    assert format_spans(split_blocks(12, 5)) == "0:3, 3:6, 6:8, 8:10, 10:12"


def test_missing_blocks_are_named_as_ranges():
    servers = [range(2, 4), range(3, 5)]
    assert missing_blocks(servers, 8) == (range(0, 2), range(5, 8))
    assert missing_blocks(servers, 5) == (range(0, 2),)
    assert missing_blocks([], 3) == (range(0, 3),)
    assert missing_blocks([range(0, 3)], 3) == ()


def test_a_latency_is_a_number_that_carries_its_trace():
    latency = RequestLatency(trace(10.0, 12.5, 32))
    assert latency == 2.5
    assert sum([latency, latency]) == 5.0
    copy = pickle.loads(pickle.dumps(latency))  # noqa: S301 - our own, as between processes
    assert (copy, copy.trace) == (latency, latency.trace)


def test_figures_of_a_run_by_hand():
    # 2 clients x 2 rounds x 3 prompts x 4 tokens = 48 tokens, released at 100, last end at 108.
    measurement = Measurement(
        load=Load(
            num_processes=2, num_micro_batches=2, batch_size=3, sequence_length=16, max_tokens=4
        )
    )
    measurement.released_at = 100.0
    measurement.warmup_s = {0: 1.5, 1: 2.5}
    measurement.latencies = {
        0: [RequestLatency(trace(100.5, 102.5, 12)), RequestLatency(trace(102.5, 105.5, 12))],
        1: [RequestLatency(trace(100.0, 104.0, 12)), RequestLatency(trace(105.0, 108.0, 12))],
    }
    row = measurement.row()
    assert row.throughput == 48 / 8
    assert row.mean_latency == (2 + 3 + 4 + 3) / 4
    assert measurement.figures() == {
        "throughput": 6.0,
        "mean_latency": 3.0,
        "total_tokens": 48,
        "wall_clock_s": 8.0,
        "prompt_tokens": 192,
    }
    clients = json.loads(json.dumps(measurement.observations()))["clients"]
    assert [client["warmup_s"] for client in clients] == [1.5, 2.5]
    assert clients[1]["requests"][1] == {
        "latency_s": 3.0,
        "started_after_release_s": 5.0,
        "generated_tokens": 12,
        "failed_attempts": 0,
        "route": [
            {"peer_id": "a", "start": 0, "end": 6},
            {"peer_id": "b", "start": 6, "end": 12},
        ],
    }


def test_a_run_that_failed_early_still_has_its_clients():
    load = Load(num_processes=2, num_micro_batches=1, batch_size=1, sequence_length=8, max_tokens=1)
    measurement = Measurement(load=load)
    measurement.warmup_s[1] = 3.0
    assert measurement.observations()["clients"] == [
        {"process_index": 0, "warmup_s": None, "requests": []},
        {"process_index": 1, "warmup_s": 3.0, "requests": []},
    ]


def test_runs_are_the_product_of_the_lengths_without_repeats():
    config = PetalsConfig(sequence_lengths=(8, 512), max_tokens=(32, 0, 32), sweep=True)
    runs = config.runs()
    assert runs[:4] == [
        RunShape(sequence_length=8, max_tokens=32),
        RunShape(sequence_length=8, max_tokens=0),
        RunShape(sequence_length=512, max_tokens=32),
        RunShape(sequence_length=512, max_tokens=0),
    ]
    assert {run.max_tokens for run in runs if run.sequence_length == 512} == set(range(33))
    assert len(runs) == len(set(runs)) == 2 + 33


def test_the_cache_holds_twice_what_is_in_flight():
    config = PetalsConfig(
        num_processes=8, batch_size=4, sequence_lengths=(256, 1024), max_tokens=(32, 0)
    )
    server = make_plan(config).servers[0]
    assert server.attn_cache_tokens == 2 * 8 * 4 * (1024 + 32)
    assert server.max_batch_size == 4 * (1024 + 32)
    assert server.inference_max_length == 2048
    assert make_plan(config).cache_bytes(server) == 2 * 768 * server.attn_cache_tokens * 6 * 4


def test_small_loads_keep_the_defaults_of_petals():
    config = PetalsConfig(sequence_lengths=(8,), max_tokens=(0,))
    server = make_plan(config).servers[0]
    assert (server.attn_cache_tokens, server.max_batch_size) == (4096, 2048)


class Notes(Silence):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_appending_to_the_results_of_another_model_is_noted(tmp_path):
    results = ResultsFile(tmp_path / "petals.tsv")
    here = {"output": results.path}
    first = make_plan(PetalsConfig(**here))
    results.append(None, {"configuration": bench._configuration(first)})
    notes = Notes()
    # Another load is another line of a report; another model is not.
    bench._warn_of_other_subject(
        results, make_plan(PetalsConfig(num_processes=4, seed=1, **here)), notes
    )
    assert notes.texts == []
    other = PetalsConfig(prefix="opt-350m", num_servers=3, **here)
    bench._warn_of_other_subject(results, make_plan(other), notes)
    assert len(notes.texts) == 1
    assert "another prefix, num_servers. Only the records beside it" in notes.texts[0]


def test_errors_name_the_option():
    with pytest.raises(ConfigError) as raised:
        PetalsConfig(num_micro_batches=0)
    assert raised.value.option == "--num-micro-batches"
