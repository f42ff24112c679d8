"""Results as the commands write them, made by the code that writes them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexbench.core.results import RECORD_SCHEMA_VERSION, ResultRow, ResultsFile
from flexbench.dist.measurement import Measurement as DistMeasurement
from flexbench.dist.measurement import Projection, StageReport
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.lines import Line, StageRoofline
from flexbench.dist.schedule import Workload
from flexbench.models.shapes import opt_shape
from flexbench.petals.client import RequestLatency, RequestTrace
from flexbench.petals.measurement import Load, Measurement
from flexbench.petals.peers import Hop
from flexbench.serving.audit import AuditInput, audit
from flexbench.serving.config import Load as ServingLoad
from flexbench.serving.config import PromptConfig
from flexbench.serving.figures import compute_figures
from flexbench.serving.point_files import PointStore, result_row
from flexbench.serving.traces import RequestTrace as ServingTrace

S = 1_000_000_000
STARTED_AT = "2026-01-02T03:04:05.678+00:00"
CPU_MACHINE = {
    "os": "Linux-6.1",
    "cpu": "AMD EPYC",
    "num_cpus": 2,
    "memory_bytes": 8 * 2**30,
    "gpus": [],
}
GPU = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30}
GPU_MACHINE = CPU_MACHINE | {"num_cpus": 16, "gpus": [GPU, GPU]}


def _record(system: str, **values: Any) -> dict[str, Any]:
    return {
        "schema_version": RECORD_SCHEMA_VERSION,
        "system": system,
        "status": "ok",
        "started_at": STARTED_AT,
        "machine": CPU_MACHINE,
        **values,
    }


# --- petals ---


def petals_measurement(*, wall_s: float = 4.0) -> Measurement:
    """Two clients with two requests of 2 s each, 32 tokens a request, unless it took longer."""
    latencies = [
        RequestLatency(
            RequestTrace(
                started_at=100.0 + number * wall_s / 2,
                ended_at=100.0 + (number + 1) * wall_s / 2,
                generated_tokens=32,
                failed_attempts=0,
                route=(Hop(peer_id="A", start=0, end=12),),
            )
        )
        for number in range(2)
    ]
    return Measurement(
        load=Load(
            num_processes=2, num_micro_batches=2, batch_size=1, sequence_length=256, max_tokens=32
        ),
        warmup_s={0: 1.0, 1: 1.0},
        released_at=100.0,
        released_at_utc=STARTED_AT,
        latencies={0: list(latencies), 1: list(latencies)},
    )


def petals_record(*, wall_s: float = 4.0, **changes: Any) -> dict[str, Any]:
    """128 tokens in 4 s: 32 tokens/s, at a mean latency of 2 s."""
    measurement = petals_measurement(wall_s=wall_s)
    hops = [{"peer_id": "A", "start": 0, "end": 6}, {"peer_id": "B", "start": 6, "end": 12}]
    record = _record(
        "petals",
        run=asdict(measurement.load),
        model=asdict(opt_shape("opt-125m")) | {"dht_prefix": "facebook/opt-125m", "seed": 0},
        initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/A"],
        configuration={"device": "auto", "prefix": "facebook/opt-125m", "num_servers": 2},
        swarm={"servers": hops, "device": "cpu", "dtype": "float32", "embedded": True},
        swarm_startup_s=12.5,
        figures=measurement.figures(),
        **measurement.observations(),
    )
    return record | changes


# --- dist ---


def dist_roofline() -> list[StageRoofline]:
    """The first of two stages had its prefill at 0.4 / 0.5, the second at 0.3 / 0.5."""
    ceilings = Ceilings(
        num_threads=1,
        device="cpu",
        dtype="float32",
        memory_bytes_per_s=2e10,
        host_memory_bytes_per_s=2e10,
        matmul_flops_per_s=1e11,
        host_to_device_bytes_per_s=1e10,
        device_to_host_bytes_per_s=1e10,
    )
    return [
        StageRoofline(
            rank=rank,
            ceilings=ceilings,
            disk_access=None,
            lines=[
                Line(
                    what="prefill",
                    flops=4 * 10**10,
                    num_bytes=10**9,
                    parts={"weights": 10**9, "cache": 0, "activations": 0},
                    floor_s=0.4 - rank / 10,
                    measured_s=0.5,
                    bound_by="compute",
                )
            ],
        )
        for rank in range(2)
    ]


def dist_measurement(
    *, is_projected: bool = False, prefill_s: float = 1.0, with_roofline: bool = False
) -> DistMeasurement:
    """Two stages, 8 prompts of 64 and 4 new tokens: 1 s of prefill, 3 more of decoding."""
    stages = [
        StageReport(
            rank=rank,
            num_threads=1,
            layers=(6 * rank, 6 * rank + 6),
            wall_s=prefill_s + 3,
            compute_s=2.0,
            prefill_compute_s=0.5,
            decode_compute_s=1.5,
            weight_load_s=0.0,
            cache_load_s=0.0,
            cache_store_s=0.0,
            hidden_s=0.0,
            stalled_s=0.0,
            send_s=0.5,
            receive_s=0.5,
            gpu_peak_bytes=1000,
            cpu_peak_bytes=2000,
            disk_peak_bytes=0,
            prefill_layer_s={0: 0.5, 1: 0.5},
            decode_layer_s={0: 1.0, 1: 1.0},
            token_ends_s=(prefill_s, prefill_s + 1, prefill_s + 2, prefill_s + 3),
            timeline=(("computing", 0.0, 2.0),),
        )
        for rank in range(2)
    ]
    projection = Projection(num_tokens=4, gen_len=4, layers={}) if is_projected else None
    return DistMeasurement(
        num_prompts=8,
        gpu_batch_size=4,
        num_micro_batches=2,
        prompt_len=64,
        gen_len=4,
        generated_tokens=32,
        workload=Workload(
            num_rounds=1, num_tokens=4, num_iterations=2, num_layers=1, num_batches=1
        ),
        stages=stages,
        projection=projection,
        roofline=dist_roofline() if with_roofline else (),
    )


def dist_record(
    *, is_projected: bool = False, with_roofline: bool = False, **changes: Any
) -> dict[str, Any]:
    """32 tokens in 4 s: 8 tokens/s."""
    measurement = dist_measurement(is_projected=is_projected, with_roofline=with_roofline)
    record = _record(
        "dist",
        run={
            "gpu_batch_size": 4,
            "num_gpu_batches": 1,
            "num_inner_iterations": 2,
            "num_pipeline_stages": 2,
            "prompt_len": 64,
            "gen_len": 4,
            "num_prompts": 8,
        },
        model={"name": "facebook/opt-125m", "dtype": "float32", "weights": "dummy", "seed": 0},
        configuration={
            "model": "facebook/opt-125m",
            "percent": [100, 0, 100, 0, 62.5, 0],
            "num_gpu_batches": 1,
            "sep_layer": True,
            "do_sample": False,
            "temperature": 1.0,
            "stop": None,
            "output": "results/dist.tsv",
            "seed": 7,
        },
        device="cpu",
        backend="gloo",
        launcher="mpich",
        figures=measurement.figures(),
        **measurement.observations(),
    )
    return record | changes


# --- serving ---


def serving_traces() -> list[ServingTrace]:
    """Three answers: after 1, 2 and 3 s, with two chunks each; and a request that failed."""
    return [
        ServingTrace(
            index=index,
            worker=0,
            scheduled_ns=0,
            sent_ns=0,
            connected_ns=None,
            content_ns=[] if index == 3 else [S // 2, (index + 1) * S],
            ended_ns=(index + 1) * S,
            prompt_tokens=32,
            max_new_tokens=2,
            output_tokens=0 if index == 3 else 2,
            is_counted_by_server=False,
            server_prompt_tokens=None,
            finish_reason="length",
            is_unfinished=False,
            failure="timeout" if index == 3 else None,
            failure_message=None,
        )
        for index in range(4)
    ]


SERVING_PROMPTS = PromptConfig(model="tiny", prompt_length=32, max_new_tokens=2)


def serving_record(load: ServingLoad | None = None, **changes: Any) -> dict[str, Any]:
    """A point with the answers of `serving_traces`: 6 tokens in a window of 4 s."""
    load = load or ServingLoad(concurrency=8, num_requests=20)
    record = _record(
        "serving",
        configuration={
            "api": "openai",
            "client": {"model": "auto", "api_url": "http://localhost:1", "temperature": 0.0},
            "prompts": asdict(SERVING_PROMPTS),
            "load": asdict(load),
            "slo": [],
            "number_of_try": 1,
        },
        service={"url": "http://localhost:1/v1/completions", "model": "tiny"},
        prompts={"tokenizer": "byte"},
        figures=compute_figures(serving_traces(), window_s=4.0, is_streaming=True).as_record(),
        audit=audit(AuditInput(worker_busy=(0.99,))).as_record(),
        violations=[],
    )
    return record | changes


def write_point(folder: Path, record: dict[str, Any]) -> Path:
    """Keep a point as flexbench serving does: its file, its row, and its line. Its file."""
    store = PointStore(folder)
    path = store.write(record, serving_traces())
    load = ServingLoad(**record["configuration"]["load"])
    figures = compute_figures(serving_traces(), window_s=4.0, is_streaming=True)
    row = result_row(SERVING_PROMPTS, load, figures) if record["status"] == "ok" else None
    store.append_row(row, record, path)
    return path


def curve_record(**changes: Any) -> dict[str, Any]:
    """A curve of one point."""
    record = {
        "schema_version": 1,
        "system": "serving curve",
        "written_at": STARTED_AT,
        "configuration": {"api": "openai"},
        "points": [{"load": {"concurrency": 8, "rate_per_s": None}, "requests_per_s": 0.75}],
        "ended_early": None,
        "saturation": None,
    }
    return record | changes


# --- server-config ---


def server_record(**changes: Any) -> dict[str, Any]:
    """One figure of a launched server."""
    figure = {"name": "Weights", "unit": "bytes", "predicted": 1030.0, "measured": 1000.0}
    record = _record(
        "server-config",
        predicted={"model": "bigscience/bloom-560m", "num_blocks": 12},
        comparison=[figure | {"error": 0.03}],
    )
    return record | changes


# --- files ---


def as_row(record: dict[str, Any]) -> ResultRow:
    """The row of a petals or dist run."""
    if record["system"] == "petals":
        figures = record["figures"]
        names = ("throughput", "mean_latency")
        return ResultRow(**record["run"], **{name: figures[name] for name in names})
    return dist_measurement().row()


def append(path: Path, *records: dict[str, Any]) -> None:
    """Append runs to a TSV and to the JSON lines beside it, as the commands do."""
    path.parent.mkdir(exist_ok=True)
    file = ResultsFile(path)
    for record in records:
        file.append(as_row(record) if record["status"] == "ok" else None, record)


def write_lines(path: Path, *records: Any) -> Path:
    """Write records as lines; texts as they are."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path
