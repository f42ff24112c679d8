"""Records of `flexbench petals`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbench.models.shapes import OPT_SHAPES
from flexbench.report.reading.fields import (
    as_number,
    as_object,
    count_of,
    find_flag,
    find_list,
    find_object,
    find_text,
    measurement_of,
    object_of,
    text_of,
    value_of,
)
from flexbench.report.reading.parts import (
    Origin,
    counted,
    figures_of,
    find_machine,
    find_num_gpus_of_machine,
    latencies_in_details,
    model_name,
)
from flexbench.report.runs import DUMMY, MEASURED, REAL, Run

SYSTEM = "petals"
# A DHT prefix has no dots; the functions that FlexGen's scripts call know a model by nothing else.
_BY_DHT_PREFIX = {name.replace(".", "-"): name for name in OPT_SHAPES}
_BY_DHT_PREFIX["opt6b"] = "facebook/opt-6.7b"


def run_of(record: Mapping[str, Any], origin: Origin) -> Run:
    """The run that a record tells of. Raises RecordError for what a record cannot have."""
    load = object_of(record, "run")
    figures = object_of(record, "figures")
    swarm = object_of(record, "swarm")
    clients = [as_object("each of clients", one) for one in find_list(record, "clients")]
    latencies_s = _latencies(clients)
    return Run(
        source=origin.path,
        line=origin.line,
        row_file=origin.rows_path,
        record_id=origin.record_id,
        system=SYSTEM,
        model=_model(text_of(object_of(record, "model"), "name")),
        weights=DUMMY if _is_embedded(record) else REAL,
        basis=MEASURED,
        dtype=find_text(swarm, "dtype"),
        topology=topology_of(swarm),
        machine=find_machine(record),
        num_gpus=num_gpus_of(record, find_object(record, "configuration")),
        batch_size=count_of(load, "batch_size"),
        num_micro_batches=count_of(load, "num_micro_batches"),
        num_processes=count_of(load, "num_processes"),
        sequence_length=count_of(load, "sequence_length"),
        max_tokens=count_of(load, "max_tokens", minimum=0),
        throughput=measurement_of(figures, "throughput"),
        mean_latency=measurement_of(figures, "mean_latency"),
        setup=_setup(record, swarm),
        figures=figures_of(figures, without=("throughput", "mean_latency")),
        details=_details(record, clients, latencies_s),
        started_at=find_text(record, "started_at"),
    )


def topology_of(swarm: Mapping[str, Any]) -> str:
    """How many servers the swarm has, in words."""
    return counted(len(find_list(swarm, "servers")), "server")


def num_gpus_of(record: Mapping[str, Any], options: Mapping[str, Any]) -> int | None:
    """The GPUs that a private swarm's servers share; None of another one, whose are not known."""
    swarm = find_object(record, "swarm")
    if not _is_embedded(record):
        return None
    if not (find_text(swarm, "device") or "").startswith("cuda"):
        return 0
    if (find_text(options, "device") or "").startswith("cuda:"):
        return 1  # the one that was named
    num_servers = len(find_list(swarm, "servers"))
    # More servers than GPUs take turns at them.
    return min(num_servers, find_num_gpus_of_machine(record) or num_servers)


def _is_embedded(record: Mapping[str, Any]) -> bool:
    """Whether the swarm was a private one, whose weights are random."""
    return find_flag(find_object(record, "swarm"), "embedded") is True


def _model(name: str) -> str:
    return _BY_DHT_PREFIX.get(name) or model_name(name)


def _setup(record: Mapping[str, Any], swarm: Mapping[str, Any]) -> dict[str, Any]:
    kind = "private" if _is_embedded(record) else "running"
    device = find_text(swarm, "device")
    return {"swarm": kind} | ({} if device is None else {"device": device})


def _latencies(clients: list[Mapping[str, Any]]) -> list[float]:
    return [
        as_number("latency_s", value_of(as_object("each request", request), "latency_s"))
        for client in clients
        for request in find_list(client, "requests")
    ]


def _details(
    record: Mapping[str, Any], clients: list[Mapping[str, Any]], latencies_s: list[float]
) -> dict[str, Any]:
    without_requests = [
        {name: value for name, value in client.items() if name != "requests"} for client in clients
    ]
    return {**record, "clients": without_requests, **latencies_in_details(latencies_s)}
