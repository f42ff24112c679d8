"""Records of `flexbench dist`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbench.report.reading.fields import (
    RecordError,
    as_number,
    as_object,
    count_of,
    find_count,
    find_flag,
    find_list,
    find_object,
    find_text,
    measurement_of,
    object_of,
    quote,
    text_of,
)
from flexbench.report.reading.parts import (
    Origin,
    counted,
    figures_of,
    find_machine,
    model_name,
    settings,
)
from flexbench.report.runs import DUMMY, MEASURED, PROJECTED, REAL, Run

SYSTEM = "dist"
# Options on which figures depend, and that are in none of a run's columns.
_OPTIONS = (
    "num_gpu_batches",
    "sep_layer",
    "pin_weight",
    "cpu_cache_compute",
    "attn_sparsity",
    "compress_weight",
    "compress_cache",
    "overlap",
    "do_sample",
    "stop",
    "cut_gen_len",
    "debug_mode",
    "async_comm",
    "comm_device",
    "balance",
)
_LONG = ("prefill_layer_s", "decode_layer_s")


def run_of(record: Mapping[str, Any], origin: Origin) -> Run:
    """The run that a record tells of, projected ones included, which have no row.

    Raises RecordError for what a record cannot have.
    """
    load = object_of(record, "run")
    model = object_of(record, "model")
    figures = object_of(record, "figures")
    stages = [as_object("each of stages", one) for one in find_list(record, "stages")]
    num_stages = count_of(load, "num_pipeline_stages")
    num_batches = count_of(load, "num_gpu_batches")
    return Run(
        source=origin.path,
        line=origin.line,
        row_file=origin.rows_path,
        record_id=origin.record_id,
        system=SYSTEM,
        model=model_name(text_of(model, "name")),
        weights=_weights(text_of(model, "weights")),
        basis=PROJECTED if find_flag(figures, "projected") else MEASURED,
        dtype=find_text(model, "dtype"),
        topology=counted(num_stages, "stage"),
        machine=find_machine(record, is_bound=num_stages > 1),
        num_gpus=_num_gpus(record, num_stages),
        batch_size=count_of(load, "gpu_batch_size"),
        num_micro_batches=num_batches * count_of(load, "num_inner_iterations"),
        num_processes=num_stages,
        sequence_length=count_of(load, "prompt_len"),
        max_tokens=count_of(load, "gen_len"),
        throughput=measurement_of(figures, "total_throughput"),
        mean_latency=measurement_of(figures, "total_latency"),
        setup=_setup(record, stages),
        figures=figures_of(figures),
        details=_details(record, stages),
        started_at=find_text(record, "started_at"),
    )


def _weights(text: str) -> str:
    if text not in (DUMMY, REAL):
        raise RecordError(f"weights must be {DUMMY} or {REAL}, not {quote(text)}")
    return text


def _num_gpus(record: Mapping[str, Any], num_stages: int) -> int | None:
    """Each stage has one; on the CPU, what is called 'gpu' is memory."""
    device = find_text(record, "device")
    if device is None:
        return None
    return num_stages if device.startswith("cuda") else 0


def _setup(record: Mapping[str, Any], stages: list[Mapping[str, Any]]) -> dict[str, Any]:
    options = find_object(record, "configuration")
    found = settings(record, ("device", "backend")) | settings(options, _OPTIONS)
    if percent := find_list(options, "percent"):
        found["percent"] = " ".join(f"{as_number('percent', share):g}" for share in percent)
    if find_flag(options, "do_sample"):
        found |= settings(options, ("temperature",))
    if found.get("device") == "cpu":
        found |= _num_threads(record, stages)
    return found


def _num_threads(record: Mapping[str, Any], stages: list[Mapping[str, Any]]) -> dict[str, Any]:
    """With how many threads each stage computed; one number where all have the same."""
    by_stage = [find_count(stage, "num_threads") for stage in stages]
    known = [number for number in by_stage if number is not None]
    if not known:
        return settings(record, ("num_threads",))  # an older record has it once
    is_one = len(set(known)) == 1
    return {"num_threads": known[0] if is_one else " ".join(map(str, known))}


def _details(record: Mapping[str, Any], stages: list[Mapping[str, Any]]) -> dict[str, Any]:
    short = [
        {name: value for name, value in stage.items() if name not in _LONG} for stage in stages
    ]
    return {**record, "stages": short}
