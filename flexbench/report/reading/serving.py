"""Records of `flexbench serving`: points, and the curves they are on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from flexbench.report.reading.fields import (
    MAX_COUNT,
    RecordError,
    as_list,
    as_object,
    count_of,
    find_count,
    find_flag,
    find_list,
    find_measurement,
    find_number,
    find_object,
    find_text,
    object_of,
    quote,
    text_of,
    value_of,
)
from flexbench.report.reading.parts import (
    Origin,
    figures_of,
    find_machine,
    latencies_in_details,
    settings,
)
from flexbench.report.reading.services import service_of
from flexbench.report.runs import MEASURED, Run

SYSTEM = "serving"
CURVE_SYSTEM = "serving curve"
ROWS_FILE = "serving.tsv"
_DISTRIBUTION = "p50"  # what a summary of many values has, and no other object
_NO_STATISTIC = ("count",)
_VERDICTS = ("client_limited", "timing_uncertain")
# Of a point on a curve, and of what a search found.
_POINT_FIGURES = (
    "requests_per_s",
    "steady_requests_per_s",
    "output_tokens_per_s",
    "goodput",
    "e2e_p50_s",
    "ttft_p50_s",
    "in_flight",
    "client_busy",
)
_LEVELS = (
    "knee_level",
    "knee_low",
    "knee_high",
    "highest_requests_per_s",
    "highest_low",
    "highest_high",
    "highest_tokens_per_s",
    "highest_level",
    "slo_level",
    "slo_requests_per_s",
)
_PROMPTS = (
    "prompt_length_var",
    "max_new_tokens_var",
    "max_prompt_length",
    "shared_prefix",
    "streaming",
    "prompt_text_source",
)
# What a client's options have that changes no figure, or that a run has in a column of its own.
_IN_COLUMNS = ("model", "path", "dtype", "num_servers", "num_stages", "tp_size", "num_replicas")
_OF_NO_CONSEQUENCE = (
    "seed",
    "dummy_seed",
    "port",
    "offload_dir",
    "connect_timeout",
    "stage_timeout",
    "max_retries",
    "allow_overcommit",
    "api_key_env",
    "usage_in_stream",
    "max_tokens_field",
    "ca_file",
    "tls_insecure",
    "deployment_name",
    "vllm_command",
    "initial_peers",
    "dht_prefix",
)


def run_of(record: Mapping[str, Any], origin: Origin) -> Run:
    """The point that a record tells of. Raises RecordError for what a record cannot have.

    `requests`, which only a point's own file has, are latencies in seconds by now.
    """
    configuration = object_of(record, "configuration")
    prompts = object_of(configuration, "prompts")
    load = object_of(configuration, "load")
    figures = object_of(record, "figures")
    api = text_of(configuration, "api")
    service = service_of(record, api)
    return Run(
        source=origin.path,
        line=origin.line,
        row_file=origin.rows_path,
        record_id=identity_of(record),
        system=SYSTEM,
        model=service.model,
        weights=service.weights,
        basis=MEASURED,
        dtype=service.dtype,
        topology=service.topology,
        machine=find_machine(record),
        num_gpus=service.num_gpus,
        batch_size=1,
        num_micro_batches=_requests_per_client(load),
        num_processes=_clients(load, figures),
        sequence_length=count_of(prompts, "prompt_length"),
        max_tokens=count_of(prompts, "max_new_tokens"),
        throughput=find_measurement(figures, "output_tokens_per_s"),
        mean_latency=find_measurement(find_object(figures, "e2e"), "mean"),
        setup=_setup(record, configuration, api),
        figures=_figures(figures, find_object(record, "audit")),
        details=_details(record),
        started_at=find_text(record, "started_at"),
    )


def identity_of(record: Mapping[str, Any]) -> str:
    """What the line of a point and its own file have in common, and no other point."""
    about = [record.get("started_at"), record.get("configuration")]
    try:
        text = json.dumps(about, sort_keys=True, default=str)
    except (RecursionError, ValueError) as error:
        raise RecordError("its configuration is too deep") from error
    return hashlib.sha256(text.encode()).hexdigest()


def curve_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The curve as it was written. Raises RecordError for what a curve cannot have."""
    text_of(object_of(record, "configuration"), "api")
    for point in as_list("points", value_of(record, "points")):
        about = as_object("each of points", point)
        load = object_of(about, "load")
        for name in ("concurrency", "rate_per_s"):
            find_number(load, name)
        for name in _POINT_FIGURES:
            find_number(about, name)
        for name in _VERDICTS:
            find_flag(about, f"is_{name}")
    saturation = find_object(record, "saturation")
    for name in _LEVELS:
        find_number(saturation, name)
    return record


# What follows is what flexbench serving does for its row: see docs/metrics.md.


def _clients(load: Mapping[str, Any], figures: Mapping[str, Any]) -> int:
    """The concurrency; in an open loop the mean number of requests in flight, rounded."""
    concurrency = find_count(load, "concurrency")
    if concurrency is not None:
        return concurrency
    in_flight = round(find_number(figures, "in_flight") or 0)
    if in_flight > MAX_COUNT:
        raise RecordError(f"in_flight must be at most {MAX_COUNT}, not {quote(in_flight)}")
    return max(1, in_flight)


def _requests_per_client(load: Mapping[str, Any]) -> int:
    """Those that were asked for; 1 where only time or an open loop limits them."""
    concurrency, requests = find_count(load, "concurrency"), find_count(load, "num_requests")
    if concurrency is None or requests is None:
        return 1
    return math.ceil(requests / concurrency)


def _setup(record: Mapping[str, Any], configuration: Mapping[str, Any], api: str) -> dict[str, Any]:
    options = find_object(configuration, "client")
    left_out = {*_IN_COLUMNS, *_OF_NO_CONSEQUENCE}
    prompts, load = object_of(configuration, "prompts"), object_of(configuration, "load")
    found: dict[str, Any] = {"api": api}
    found |= settings(options, (name for name in options if name not in left_out))
    # A device may be 'auto' there; the service knows which one it became.
    found |= settings(find_object(find_object(record, "service"), "swarm"), ("device",))
    found |= settings(prompts, _PROMPTS) | settings(find_object(record, "prompts"), ("tokenizer",))
    found |= settings(load, ("concurrency", "rate_per_s"))
    if load.get("rate_per_s") is not None:
        found |= settings(load, ("arrival", "burst_size"))
    if find_list(configuration, "slo"):
        found |= settings(configuration, ("slo",))
    return found


def _figures(figures: Mapping[str, Any], audit: Mapping[str, Any]) -> dict[str, float]:
    """All numbers; of distributions each statistic: ttft_p99. Verdicts are 0 or 1."""
    found = figures_of(figures)
    for name, value in figures.items():
        if isinstance(value, dict) and _DISTRIBUTION in value:
            statistics = figures_of(value, without=_NO_STATISTIC)
            found |= {f"{name}_{statistic}": number for statistic, number in statistics.items()}
    for name in _VERDICTS:
        verdict = find_flag(audit, f"is_{name}")
        if verdict is not None:
            found[name] = float(verdict)
    return found


def _details(record: Mapping[str, Any]) -> dict[str, Any]:
    details = {name: value for name, value in record.items() if name != "requests"}
    if "requests" in record:
        details |= latencies_in_details(find_list(record, "requests"))
    return details
