"""What was behind the endpoint of a `flexbench serving` point, as far as its record tells.

A client says of its service what it knows: of a swarm or a pipeline of ours everything, of a server
somewhere else hardly more than the model's name.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexbench.models.shapes import OPT_SHAPES
from flexbench.report.reading import petals
from flexbench.report.reading.fields import find_count, find_flag, find_object, find_text
from flexbench.report.reading.parts import counted, find_num_gpus_of_machine, model_name
from flexbench.report.runs import DUMMY, REAL

NO_MODEL = "latency model"
_RANDOM_WEIGHTS = "_DUMMY_"  # what --path of the dist client takes for them
_UNNAMED = ("", "auto")


@dataclass(frozen=True, kw_only=True)
class Service:
    """What served the requests. None: not known."""

    model: str | None
    weights: str | None
    dtype: str | None = None
    topology: str | None = None
    num_gpus: int | None = None


def service_of(record: Mapping[str, Any], api: str) -> Service:
    """What the record of a point says of its service. Raises RecordError for wrong types."""
    options = find_object(find_object(record, "configuration"), "client")
    describe = _KNOWN.get(api)
    if describe is not None:
        return describe(record, options)
    # A server may have been started with random weights as well; its clients cannot tell.
    return Service(model=_model(record, options), weights=None)


def _model(record: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """The model's name by whoever knows it best: the service, its client, the prompts."""
    service = find_object(record, "service")
    prompts = find_object(find_object(record, "configuration"), "prompts")
    described = service.get("model")
    if isinstance(described, dict):
        service = {"model": described.get("name")}
    for values in (service, options, prompts):
        name = find_text(values, "model")
        if name is not None and name not in _UNNAMED:
            return model_name(name)
    return None


def _dummy(_record: Mapping[str, Any], _options: Mapping[str, Any]) -> Service:
    return Service(model=NO_MODEL, weights=DUMMY, topology="no server", num_gpus=0)


def _petals(record: Mapping[str, Any], options: Mapping[str, Any]) -> Service:
    service = find_object(record, "service")
    swarm = find_object(service, "swarm")
    about = {**record, "swarm": swarm}
    return Service(
        model=_model(record, options),
        weights=DUMMY if find_flag(swarm, "embedded") else REAL,
        dtype=find_text(swarm, "dtype"),
        topology=petals.topology_of(swarm) if "servers" in swarm else None,
        num_gpus=petals.num_gpus_of(about, options) if swarm else None,
    )


def _dist(record: Mapping[str, Any], options: Mapping[str, Any]) -> Service:
    num_stages = find_count(options, "num_stages") or 1
    name = _model(record, options)
    dtype = find_text(options, "dtype")
    num_gpus = find_num_gpus_of_machine(record)
    is_on_cpu = num_gpus == 0
    if dtype in (None, "auto"):
        dtype = "float32" if is_on_cpu else None
    return Service(
        model=None if name is None else model_name(_last_part(name)),
        weights=DUMMY if _is_random(find_text(options, "path"), name) else REAL,
        dtype=dtype,
        topology=counted(num_stages, "stage"),
        # Stages share GPUs where there are fewer.
        num_gpus=None if num_gpus is None else min(num_stages, num_gpus),
    )


def _vllm(record: Mapping[str, Any], options: Mapping[str, Any]) -> Service:
    arguments = _words(find_text(options, "vllm_args") or "")
    parallel = find_count(options, "tp_size") or 1
    dtype = _argument(arguments, "--dtype")
    is_dummy = _argument(arguments, "--load-format") == "dummy"
    return Service(
        model=_model(record, options),
        weights=DUMMY if is_dummy else REAL,
        dtype=None if dtype == "auto" else dtype,
        topology=f"tensor parallel {parallel}",
        num_gpus=_taken(record, parallel),
    )


def _fastgen(record: Mapping[str, Any], options: Mapping[str, Any]) -> Service:
    parallel = find_count(options, "tp_size") or 1
    replicas = find_count(options, "num_replicas") or 1
    return Service(
        model=_model(record, options),
        weights=REAL,
        topology=f"{counted(replicas, 'replica')}, tensor parallel {parallel}",
        num_gpus=_taken(record, parallel * replicas),
    )


_KNOWN: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Service]] = {
    "dummy": _dummy,
    "petals": _petals,
    "dist": _dist,
    "vllm": _vllm,
    "fastgen": _fastgen,
}


def _taken(record: Mapping[str, Any], wanted: int) -> int | None:
    """GPUs of this machine that a server on it takes; without any it runs on the CPU."""
    there = find_num_gpus_of_machine(record)
    return wanted if there else there


def _is_random(path: str | None, name: str | None) -> bool:
    """Whether dist made its weights up: without a path, for a model that is known by name only."""
    if path is not None:
        return path == _RANDOM_WEIGHTS
    is_published = name in OPT_SHAPES or (name or "").lower().rpartition("/")[2].startswith("opt-")
    return is_published and not _is_path(name or "")


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] if _is_path(name) else name


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quotation without an end
        return text.split()


def _argument(words: list[str], option: str) -> str | None:
    """The value of an option, of which the last one counts."""
    found = None
    for word, after in zip(words, [*words[1:], None], strict=True):
        if word == option:
            found = after
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found
