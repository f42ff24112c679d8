"""What the records of all systems have in common, as a Run has it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbench.models.shapes import opt_shape
from flexbench.report.reading.fields import (
    RecordError,
    as_number,
    as_object,
    find_count,
    find_list,
    find_object,
    find_text,
    quote,
)

MOST_LATENCIES = 2000
_LONGEST_SETTING = 100
_TOO_LARGE = 2**63  # for a column of whole numbers


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a record stands."""

    path: Path
    line: int | None = None
    """Counted from 1; None where the file is one record."""
    rows_path: Path | None = None
    """The TSV that has the same run as a row."""
    record_id: str | None = None
    """The same for copies to the last byte."""


def find_machine(record: Mapping[str, Any], *, is_bound: bool = False) -> str | None:
    """CPU, number of CPUs and GPUs in words; None where the record does not say.

    CPUs are those that the run could use. With `is_bound`, the process that wrote the record had a
    part of them only, and all that the machine has are counted, if the record says how many.
    """
    machine = find_object(record, "machine")
    num_cpus = find_count(machine, "num_cpus")
    if is_bound:
        num_cpus = find_count(machine, "num_cpus_installed") or num_cpus
    parts = [find_text(machine, "cpu"), None if num_cpus is None else counted(num_cpus, "CPU")]
    gpus = Counter(find_text(as_object("each GPU", gpu), "name") or "GPU" for gpu in _gpus(machine))
    parts += [f"{number} x {name}" for name, number in gpus.items()]
    return ", ".join(part for part in parts if part) or None


def find_num_gpus_of_machine(record: Mapping[str, Any]) -> int | None:
    """How many GPUs the machine has; None where the record does not say."""
    machine = find_object(record, "machine")
    return len(_gpus(machine)) if "gpus" in machine else None


def model_name(name: str) -> str:
    """The one name of a published OPT model, so that two systems call it alike; else `name`."""
    try:
        return opt_shape(name).name
    except KeyError:
        return name


def settings(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of `names` that have a value, flat: lists as texts. Raises RecordError for objects."""
    found = {name: values.get(name) for name in names}
    return {name: _setting(name, value) for name, value in found.items() if value is not None}


def figures_of(values: Mapping[str, Any], *, without: Iterable[str] = ()) -> dict[str, float]:
    """All numbers among `values`, by their names. Raises RecordError for those not finite."""
    left_out = frozenset(without)
    return {
        name: as_number(name, value)
        for name, value in values.items()
        if name not in left_out and isinstance(value, int | float) and not isinstance(value, bool)
    }


def sample_of(latencies_s: Sequence[float]) -> list[float]:
    """At most 2000 of the latencies, spread evenly over their order: as they are distributed."""
    ordered = sorted(latencies_s)
    if len(ordered) <= MOST_LATENCIES:
        return ordered
    step = (len(ordered) - 1) / (MOST_LATENCIES - 1)
    return [ordered[round(index * step)] for index in range(MOST_LATENCIES)]


def latencies_in_details(latencies_s: Sequence[float]) -> dict[str, Any]:
    """A sample of the latencies, and how many it stands for."""
    return {"latencies_s": sample_of(latencies_s), "num_latencies": len(latencies_s)}


def counted(number: int, noun: str) -> str:
    """1 server, 2 servers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _gpus(machine: Mapping[str, Any]) -> list[Any]:
    return find_list(machine, "gpus")


def _setting(name: str, value: Any) -> str | int | float | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        number = as_number(name, value)
        return value if abs(value) < _TOO_LARGE else number
    if isinstance(value, list):
        return " ".join(str(_setting(name, one)) for one in value)
    if not isinstance(value, str):
        raise RecordError(f"{name} must be one value, not {quote(value)}")
    if len(value) <= _LONGEST_SETTING:
        return value
    # Two long texts are to stay two.
    digest = hashlib.sha256(value.encode(errors="replace")).hexdigest()
    return f"{value[:_LONGEST_SETTING]}... ({digest[:8]})"
