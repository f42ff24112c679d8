"""What each command writes, as a run of a report."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.core.results import CONFIGURATION_COLUMNS
from flexbench.report.predictions import SERVER_COLUMNS
from flexbench.report.reading import dist, petals, server_config, serving
from flexbench.report.reading.fields import RecordError
from flexbench.report.reading.parts import (
    MOST_LATENCIES,
    Origin,
    find_machine,
    latencies_in_details,
    model_name,
    sample_of,
)
from flexbench.report.runs import DUMMY, MEASURED, PROJECTED, REAL
from flexbench.serving.config import Arrival
from flexbench.serving.config import Load as ServingLoad
from flexbench.serving.figures import compute_figures
from flexbench.serving.point_files import result_row
from tests.unit.report.reading.samples import (
    CPU_MACHINE,
    GPU_MACHINE,
    SERVING_PROMPTS,
    STARTED_AT,
    curve_record,
    dist_measurement,
    dist_record,
    petals_measurement,
    petals_record,
    server_record,
    serving_record,
    serving_traces,
)

ORIGIN = Origin(path=Path("r.jsonl"), line=3, rows_path=Path("r.tsv"))


def columns(run) -> dict:
    return {name: getattr(run, name) for name in CONFIGURATION_COLUMNS}


# --- petals ---


def test_a_petals_run():
    run = petals.run_of(petals_record(), ORIGIN)
    row = petals_measurement().row()
    assert columns(run) == {name: getattr(row, name) for name in CONFIGURATION_COLUMNS}
    assert (run.throughput, run.mean_latency) == (row.throughput, row.mean_latency) == (32.0, 2.0)
    assert (run.source, run.line, run.row_file) == (Path("r.jsonl"), 3, Path("r.tsv"))
    assert (run.system, run.model, run.weights) == ("petals", "facebook/opt-125m", DUMMY)
    assert (run.basis, run.dtype, run.topology) == (MEASURED, "float32", "2 servers")
    assert (run.machine, run.num_gpus) == ("AMD EPYC, 2 CPUs", 0)
    assert run.setup == {"swarm": "private", "device": "cpu"}
    assert run.figures == {"total_tokens": 128.0, "wall_clock_s": 4.0, "prompt_tokens": 1024.0}
    assert run.started_at == STARTED_AT
    assert run.details["latencies_s"] == [2.0, 2.0, 2.0, 2.0]
    assert run.details["clients"] == [
        {"process_index": 0, "warmup_s": 1.0},
        {"process_index": 1, "warmup_s": 1.0},
    ]


def test_weights_of_somebody_elses_swarm_are_taken_for_real_and_its_gpus_are_not_known():
    swarm = {"servers": [{"peer_id": "A", "start": 0, "end": 12}], "device": "cuda"}
    run = petals.run_of(petals_record(swarm=swarm | {"embedded": False}), ORIGIN)
    assert (run.weights, run.topology, run.num_gpus) == (REAL, "1 server", None)
    assert run.setup == {"swarm": "running", "device": "cuda"}
    # The functions of FlexGen's script do not start a swarm, and do not say that they did not.
    assert petals.run_of(petals_record(swarm=swarm), ORIGIN).weights == REAL


@pytest.mark.parametrize(
    ("num_servers", "device", "num_gpus"), [(1, "auto", 1), (2, "auto", 2), (5, "cuda", 2), (5, "cuda:1", 1)]
)  # fmt: skip
def test_gpus_of_a_private_swarm(num_servers, device, num_gpus):
    swarm = {"servers": [{}] * num_servers, "device": "cuda", "dtype": "bfloat16", "embedded": True}
    record = petals_record(
        swarm=swarm, machine=GPU_MACHINE, configuration={"device": device, "prefix": "opt-125m"}
    )
    run = petals.run_of(record, ORIGIN)
    assert run.num_gpus == num_gpus
    assert run.machine == "AMD EPYC, 16 CPUs, 2 x NVIDIA H100"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("facebook/opt-6.7b", "facebook/opt-6.7b"),
        ("opt6b", "facebook/opt-6.7b"),
        ("facebook/opt-1-3b", "facebook/opt-1.3b"),
        ("OPT-125M", "facebook/opt-125m"),
        ("bigscience/bloom", "bigscience/bloom"),
    ],
)
def test_a_model_has_one_name_in_all_systems(name, model):
    assert petals.run_of(petals_record(model={"name": name}), ORIGIN).model == model
    if "opt6b" not in name and "1-3b" not in name:  # names that only a swarm gives
        assert model_name(name) == model


# --- dist ---


def test_a_dist_run():
    run = dist.run_of(dist_record(), ORIGIN)
    row = dist_measurement().row()
    assert columns(run) == {name: getattr(row, name) for name in CONFIGURATION_COLUMNS}
    assert (run.throughput, run.mean_latency) == (row.throughput, row.mean_latency) == (8.0, 4.0)
    assert (run.system, run.model, run.weights) == ("dist", "facebook/opt-125m", DUMMY)
    assert (run.basis, run.dtype, run.topology) == (MEASURED, "float32", "2 stages")
    assert (run.machine, run.num_gpus) == ("AMD EPYC, 2 CPUs", 0)
    assert run.setup == {
        "device": "cpu", "backend": "gloo", "num_gpu_batches": 1, "sep_layer": True,
        "do_sample": False, "percent": "100 0 100 0 62.5 0", "num_threads": 1,
    }  # fmt: skip
    assert run.figures["prefill_latency"] == 1.0
    assert run.figures["bubble_fraction"] == 0.25  # (0.5 + 0.5) s of 4 s
    assert run.figures["total_throughput"] == 8.0
    assert "projected" not in run.figures
    stage = run.details["stages"][0]
    assert "prefill_layer_s" not in stage
    assert stage["timeline"]["rows"] == (("computing", 0.0, 2.0),)


def test_a_projected_dist_run_has_its_columns_from_what_was_asked_for():
    run = dist.run_of(dist_record(is_projected=True), ORIGIN)
    assert run.basis == PROJECTED
    assert tuple(columns(run).values()) == (4, 2, 2, 64, 4)


def test_each_stage_of_dist_has_a_gpu_where_it_computes_on_one():
    run = dist.run_of(dist_record(device="cuda", machine=GPU_MACHINE), ORIGIN)
    assert run.num_gpus == 2
    assert "num_threads" not in run.setup


def test_temperature_and_threads_count_where_they_change_something():
    record = dist_record()
    record["configuration"] |= {"do_sample": True, "temperature": 0.5}
    record["stages"][1]["num_threads"] = 2
    run = dist.run_of(record, ORIGIN)
    assert run.setup["temperature"] == 0.5
    assert run.setup["num_threads"] == "1 2"


def test_the_roofline_is_a_figure_and_stands_in_the_details():
    run = dist.run_of(dist_record(with_roofline=True), ORIGIN)
    assert run.figures["prefill_roofline"] == pytest.approx((0.4 + 0.3) / (0.5 + 0.5))
    assert "decode_roofline" not in run.figures
    first, second = run.details["roofline"]["stages"]
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["lines"][0]["fraction"] == pytest.approx(0.8)
    # Records from before there was one are read as they always were.
    old = dist_record()
    assert "prefill_roofline" not in dist.run_of(old, ORIGIN).figures
    assert "roofline" not in old


def test_null_figures_are_not_known():
    record = dist_record()
    record["figures"]["decode_throughput"] = None
    assert "decode_throughput" not in dist.run_of(record, ORIGIN).figures


# --- serving ---


@pytest.mark.parametrize(
    "load",
    [
        ServingLoad(concurrency=8, num_requests=20),
        ServingLoad(concurrency=8, duration_s=4.0),
        ServingLoad(rate_per_s=5.0, num_requests=20),
        ServingLoad(rate_per_s=5.0, arrival=Arrival.BURST, burst_size=4, duration_s=4.0),
    ],
)
def test_a_serving_point_has_the_columns_of_its_row(load):
    record = serving_record(load)
    run = serving.run_of(record, ORIGIN)
    figures = compute_figures(serving_traces(), window_s=4.0, is_streaming=True)
    row = result_row(SERVING_PROMPTS, load, figures)
    assert columns(run) == {name: getattr(row, name) for name in CONFIGURATION_COLUMNS}
    assert (run.throughput, run.mean_latency) == (row.throughput, row.mean_latency) == (1.5, 2.0)


def test_a_serving_point():
    run = serving.run_of(serving_record() | {"requests": [3.0, 1.0, 2.0]}, ORIGIN)
    assert (run.system, run.model, run.weights) == ("serving", "tiny", None)
    assert (run.basis, run.dtype, run.topology, run.num_gpus) == (MEASURED, None, None, None)
    assert run.setup == {
        "api": "openai", "api_url": "http://localhost:1", "temperature": 0.0, "concurrency": 8,
        "prompt_length_var": 0.3, "max_new_tokens_var": 0.3, "max_prompt_length": 4000,
        "shared_prefix": 0, "streaming": True, "tokenizer": "byte",
    }  # fmt: skip
    assert run.figures["ttft_p50"] == 0.5
    assert run.figures["e2e_mean"] == 2.0
    assert run.figures["e2e_max"] == 3.0
    assert run.figures["error_rate"] == 0.25
    assert run.figures["requests_per_s"] == 0.75  # 3 answers in 4 s
    assert "ttft_count" not in run.figures
    assert (run.figures["client_limited"], run.figures["timing_uncertain"]) == (1.0, 0.0)
    assert "requests" not in run.details
    assert run.details["latencies_s"] == [1.0, 2.0, 3.0]
    assert run.details["audit"]["reasons"]


def test_an_open_loop_says_its_rate():
    load = ServingLoad(rate_per_s=5.0, arrival=Arrival.POISSON, duration_s=4.0)
    setup = serving.run_of(serving_record(load), ORIGIN).setup
    assert (setup["rate_per_s"], setup["arrival"]) == (5.0, "poisson")
    assert "concurrency" not in setup


def test_repeats_of_a_point_are_equal_but_for_what_tells_them_apart():
    first, second = serving_record(), serving_record()
    second["started_at"] = "2026-01-02T03:05:00.000+00:00"
    second["configuration"]["number_of_try"] = 2
    second["configuration"]["prompts"]["prompt_generator_seed"] = 9
    one, two = serving.run_of(first, ORIGIN), serving.run_of(second, ORIGIN)
    assert one.setup == two.setup
    assert one.record_id != two.record_id
    assert one.record_id == serving.run_of(serving_record(point_file="x.json"), ORIGIN).record_id


def service(api: str, client: dict, described: dict | None = None, machine: dict | None = None):
    record = serving_record(service=described or {}, **({"machine": machine} if machine else {}))
    record["configuration"] |= {"api": api, "client": client}
    record["configuration"]["prompts"]["model"] = "auto"
    run = serving.run_of(record, ORIGIN)
    return run.model, run.weights, run.dtype, run.topology, run.num_gpus


def test_what_is_behind_each_client():
    swarm = {"servers": [{}, {}], "device": "cpu", "dtype": "float32", "embedded": True}
    opt = {"name": "facebook/opt-125m"}
    assert service("dummy", {"capacity": 8, "dummy_seed": 3}) == (
        "latency model", DUMMY, None, "no server", 0,
    )  # fmt: skip
    assert service("petals", {"model": "opt-125m"}, {"model": opt, "swarm": swarm}) == (
        "facebook/opt-125m", DUMMY, "float32", "2 servers", 0,
    )  # fmt: skip
    assert service("petals", {}, {"model": opt, "swarm": swarm | {"embedded": False}}) == (
        "facebook/opt-125m", REAL, "float32", "2 servers", None,
    )  # fmt: skip
    assert service("dist", {"num_stages": 2, "dtype": "auto"}, {"model": "opt-125m"}) == (
        "facebook/opt-125m", DUMMY, "float32", "2 stages", 0,
    )  # fmt: skip
    gpu = GPU_MACHINE
    assert service("dist", {"num_stages": 3, "dtype": "float16"}, {"model": "opt-125m"}, gpu) == (
        "facebook/opt-125m", DUMMY, "float16", "3 stages", 2,
    )  # fmt: skip
    assert service("dist", {"model": "/models/opt-125m"}) == (
        "facebook/opt-125m", REAL, "float32", "1 stage", 0,
    )  # fmt: skip
    assert service("dist", {"model": "opt-125m", "path": "/weights"})[1] == REAL
    assert service("dist", {"model": "tiny", "path": "_DUMMY_"})[:2] == ("tiny", DUMMY)
    vllm = {"model": "org/model", "tp_size": 2, "vllm_args": "--dtype half --load-format=dummy"}
    assert service("vllm", vllm, {}, gpu) == ("org/model", DUMMY, "half", "tensor parallel 2", 2)
    assert service("vllm", {"model": "org/model", "vllm_args": "--x 'y"})[1:] == (
        REAL, None, "tensor parallel 1", 0,
    )  # fmt: skip
    fastgen = {"model": "org/model", "tp_size": 2, "num_replicas": 3}
    assert service("fastgen", fastgen, {}, gpu) == (
        "org/model", REAL, None, "3 replicas, tensor parallel 2", 6,
    )  # fmt: skip
    # Nobody but the service knows with which weights it was started.
    assert service("openai", {"model": "auto"}) == (None, None, None, None, None)
    assert service("azureml", {"model": "x"}) == ("x", None, None, None, None)
    assert service("somebodys-own", {"model": "x"}) == ("x", None, None, None, None)


def test_a_long_setting_is_cut_and_stays_what_it_was():
    record = serving_record()
    prompts = record["configuration"]["prompts"]
    texts = []
    for end in ("a", "b"):
        prompts["prompt_text_source"] = "x" * 5000 + end
        texts.append(serving.run_of(record, ORIGIN).setup["prompt_text_source"])
    assert texts[0] != texts[1]
    assert max(map(len, texts)) < 120


def test_a_curve_is_checked():
    record = curve_record(saturation={"knee_level": 8.0, "reason": "plateau"})
    assert serving.curve_of(record) is record
    for changes in (
        {"points": None},
        {"points": [3]},
        {"points": [{"load": {"concurrency": "8"}}]},
        {"points": [{"load": {}, "requests_per_s": float("inf")}]},
        {"saturation": {"knee_level": "8"}},
        {"configuration": None},
    ):
        with pytest.raises(RecordError):
            serving.curve_of(curve_record(**changes))


# --- server-config ---


def test_predictions():
    (one,) = server_config.predictions_of(server_record())
    assert (one.model, one.num_blocks, one.figure) == ("bigscience/bloom-560m", 12, "Weights")
    assert (one.unit, one.predicted, one.measured, one.error) == ("bytes", 1030.0, 1000.0, 0.03)
    assert (one.machine, one.device, one.is_relayed) == ("AMD EPYC, 2 CPUs", None, None)


def test_predictions_know_their_server():
    predicted = {
        "model": "x",
        "num_blocks": 2,
        "device": "cuda:0",
        "devices": ["cuda:0", "cuda:1"],
        "torch_dtype": "float16",
        "quant_type": "nf4",
        "attn_cache_tokens": 8192,
        "adapter_bytes_per_block": 0,
        "network": {"relay": True},
    }
    (one,) = server_config.predictions_of(server_record(predicted=predicted, machine=GPU_MACHINE))
    assert {name: getattr(one, name) for name in SERVER_COLUMNS} == {
        "model": "x",
        "num_blocks": 2,
        "machine": "AMD EPYC, 16 CPUs, 2 x NVIDIA H100",
        "device": "cuda:0 cuda:1",
        "dtype": "float16",
        "quantization": "nf4",
        "cache_tokens": 8192,
        "adapter_bytes": 0,
        "is_relayed": True,
    }
    with pytest.raises(RecordError, match="each of devices must be a text, not 3"):
        server_config.predictions_of(server_record(predicted=predicted | {"devices": [3]}))


# --- all ---


def test_a_sample_of_latencies_says_how_many_it_is_of():
    found = latencies_in_details([float(number) for number in range(5000)])
    assert (len(found["latencies_s"]), found["num_latencies"]) == (MOST_LATENCIES, 5000)
    run = petals.run_of(petals_record(), ORIGIN)
    assert run.details["latencies_s"] == [2.0] * 4
    assert run.details["num_latencies"] == 4


def test_many_latencies_are_thinned_evenly():
    assert sample_of([3.0, 1.0, 2.0]) == [1.0, 2.0, 3.0]
    sample = sample_of([float(number) for number in range(100_001)])
    assert len(sample) == MOST_LATENCIES
    assert (sample[0], sample[-1]) == (0.0, 100_000.0)
    assert sample[1000] == pytest.approx(50_000, rel=0.001)


@pytest.mark.parametrize(
    ("adapter", "record", "path", "value", "reason"),
    [
        (petals, petals_record, "run.batch_size", 0, "batch_size must be a whole number of at least 1, not 0"),
        (petals, petals_record, "run.max_tokens", -1, "max_tokens must be a whole number of at least 0, not -1"),
        (petals, petals_record, "run.num_processes", 10**400, "num_processes must be a whole number of at least 1, not 1000"),
        (petals, petals_record, "run", None, "run must be a JSON object, not null"),
        (petals, petals_record, "figures.throughput", float("nan"), "throughput must be a finite number, not NaN"),
        (petals, petals_record, "figures.throughput", "fast", 'throughput must be a finite number, not "fast"'),
        (petals, petals_record, "figures.total_tokens", float("inf"), "total_tokens must be a finite number, not Infinity"),
        (petals, petals_record, "swarm.embedded", "yes", 'embedded must be true or false, not "yes"'),
        (petals, petals_record, "model.name", "\ud800", "name must be a text"),
        (petals, petals_record, "clients", {}, "clients must be a list, not an object"),
        (petals, petals_record, "machine.gpus", [3], "each GPU must be a JSON object, not 3"),
        (dist, dist_record, "model.weights", "some", 'weights must be dummy or real, not "some"'),
        (dist, dist_record, "figures.projected", 1, "projected must be true or false, not 1"),
        (dist, dist_record, "configuration.percent", ["x"], "percent must be a finite number"),
        (dist, dist_record, "stages", [[]], "each of stages must be a JSON object, not a list"),
        (serving, serving_record, "configuration.load.concurrency", 1.5, "concurrency must be a whole number"),
        (serving, serving_record, "figures.e2e.mean", "x", "mean must be a finite number"),
        (serving, serving_record, "figures.e2e", 3, "e2e must be a JSON object, not 3"),
        (serving, serving_record, "configuration.client.extra", {}, "extra must be one value, not an object"),
        (serving, serving_record, "audit.is_client_limited", 7, "is_client_limited must be true or false, not 7"),
    ],
)  # fmt: skip
def test_what_a_record_cannot_have_is_named(adapter, record, path, value, reason):
    changed = copy.deepcopy(record())
    *parents, name = path.split(".")
    place = changed
    for parent in parents:
        place = place[parent]
    place[name] = value
    with pytest.raises(RecordError) as caught:
        adapter.run_of(changed, ORIGIN)
    assert reason in str(caught.value)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(value, path=()):
    """All paths within a record."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = changed(value[path[0]], path[1:], new)
    return copied


@given(data=st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize(
    ("read", "record"),
    [
        (lambda one: petals.run_of(one, ORIGIN), petals_record()),
        (lambda one: dist.run_of(one, ORIGIN), dist_record()),
        (lambda one: serving.run_of(one, ORIGIN), serving_record()),
        (serving.curve_of, curve_record()),
        (server_config.predictions_of, server_record()),
    ],
    ids=["petals", "dist", "serving", "curve", "server-config"],
)
def test_whatever_stands_in_a_record_it_is_a_run_or_an_error(read, record, data):
    record = json.loads(json.dumps(record))
    path = data.draw(st.sampled_from([one for one in places(record) if one]))
    record = changed(record, path, data.draw(ODD))
    found: object = "an error"
    with suppress(RecordError):  # and nothing else
        found = read(record)
    assert found is not None


def test_ranks_of_a_pipeline_are_bound_to_parts_of_the_machine():
    """Under mpirun, the process that writes the record may use one core."""
    machine = CPU_MACHINE | {"num_cpus": 1, "num_cpus_installed": 16}
    assert find_machine({"machine": machine}) == "AMD EPYC, 1 CPU"
    assert find_machine({"machine": machine}, is_bound=True) == "AMD EPYC, 16 CPUs"
    assert find_machine({"machine": CPU_MACHINE}, is_bound=True) == "AMD EPYC, 2 CPUs"
