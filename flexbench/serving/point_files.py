"""The points of a result folder: a JSON file each, found again by their whole configuration.

A file's name ends in a hash of the configuration, so that points that differ in anything, such as a
seed, have a file each. Every request's timestamps are in it, as rows in the order of `columns`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexbench.core.errors import ConfigError, FlexbenchError, InputFileError
from flexbench.core.results import ResultRow, ResultsFile
from flexbench.core.whole_files import replace_file
from flexbench.serving.config import Load, PromptConfig
from flexbench.serving.traces import RequestTrace

if TYPE_CHECKING:
    from flexbench.serving.figures import PointFigures

SCHEMA_VERSION = 1
SYSTEM = "serving"
CURVE_SYSTEM = "serving curve"
ROWS_FILE = "serving.tsv"
COLUMNS = tuple(field.name for field in fields(RequestTrace))
_HASH_LENGTH = 12


def configuration_hash(configuration: Mapping[str, Any]) -> str:
    """SHA-256 of the configuration as canonical JSON, in hexadecimal."""
    return hashlib.sha256(_canonical(configuration).encode()).hexdigest()


def encode_traces(traces: Iterable[RequestTrace]) -> dict[str, Any]:
    """Requests as `columns` and `rows`: the names stand there once, not with each request."""
    rows = [[getattr(trace, name) for name in COLUMNS] for trace in traces]
    return {"columns": list(COLUMNS), "rows": rows}


def decode_traces(requests: Mapping[str, Any]) -> list[RequestTrace]:
    """The requests that `encode_traces` wrote.

    Raises KeyError, TypeError or ValueError for something else.
    """
    columns = requests["columns"]
    return [
        RequestTrace.from_record(dict(zip(columns, row, strict=True))) for row in requests["rows"]
    ]


def read_point(path: Path) -> dict[str, Any]:
    """The record in a point's file. Raises InputFileError for anything else that is there."""
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(path, "is not JSON; it may have been cut off") from error
    if not isinstance(record, dict) or record.get("system") != SYSTEM:
        raise InputFileError(path, "is not a point of flexbench serving")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise InputFileError(path, f"has another schema_version than {SCHEMA_VERSION}")
    return record


def result_row(prompts: PromptConfig, load: Load, figures: PointFigures) -> ResultRow | None:
    """The point's line of the TSV; None when there is nothing to put into it.

    `num_processes` is the concurrency, in an open loop the mean number of requests in flight;
    `num_micro_batches` the requests per client that were asked for, and 1 where only time or an
    open loop limits them. So that runs of the same load are one line of a report, neither depends
    on how many requests there were in the end.
    """
    if figures.output_tokens_per_s is None or figures.e2e is None:
        return None
    num_processes = load.concurrency or max(1, round(figures.in_flight or 0))
    per_client = 1
    if load.concurrency is not None and load.num_requests is not None:
        per_client = math.ceil(load.num_requests / load.concurrency)
    return ResultRow(
        batch_size=1,
        num_micro_batches=per_client,
        num_processes=num_processes,
        sequence_length=prompts.prompt_length,
        max_tokens=prompts.max_new_tokens,
        throughput=figures.output_tokens_per_s,
        mean_latency=figures.e2e.mean,
    )


class PointStore:
    """The result folder: points by their configuration, and the TSV with a row of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = ResultsFile(folder / ROWS_FILE)

    def check(self, *, option: str = "--result-dir", create_folder: bool = True) -> None:
        """Find out now what would make a write fail later. Raises ConfigError naming `option`."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(option, f"{self.folder} is not a folder")
        self._rows.check(option=option, create_folder=create_folder)

    def path(self, configuration: Mapping[str, Any]) -> Path:
        """Where the point of this configuration is, or will be."""
        words = (str(configuration.get("api", SYSTEM)), _short_label(configuration.get("load")))
        name = "-".join(_slug(word) for word in words if word)
        return self.folder / f"{name}-{configuration_hash(configuration)[:_HASH_LENGTH]}.json"

    def find(
        self,
        configuration: Mapping[str, Any],
        *,
        tell: Callable[[str], None] = lambda _problem: None,
    ) -> dict[str, Any] | None:
        """The record of a point of this configuration that came to its end; None without one.

        `tell` gets a sentence about a file that is in its place and cannot be used.
        """
        path = self.path(configuration)
        if not path.exists():
            return None
        try:
            record = read_point(path)
            if record.get("status") != "ok":
                return None
            _check_whole(path, record, configuration)
        except InputFileError as error:
            tell(f"{error.message}; the point is measured again")
            return None
        return record

    def write(self, record: Mapping[str, Any], traces: Iterable[RequestTrace]) -> Path:
        """Keep a point with all its requests, instead of what was there; return its file.

        `record` has at least `configuration` and `status` (ok, failed or interrupted), and of a
        point that came to its end `figures` and `audit`. Nobody ever
        sees half a file. Raises FlexbenchError when it cannot be written.
        """
        configuration = record["configuration"]
        path = self.path(configuration)
        content = {
            "schema_version": SCHEMA_VERSION,
            "system": SYSTEM,
            **record,
            "configuration_hash": configuration_hash(configuration),
            "requests": encode_traces(traces),
        }
        try:
            replace_file(path, _encoded(content, separators=(",", ":")))
        except OSError as error:
            raise FlexbenchError(
                f"{path}: the point could not be kept: {error.strerror or error}"
            ) from error
        return path

    def write_curve(self, record: Mapping[str, Any]) -> Path:
        """Keep what a whole curve says, instead of what was there; return its file.

        `record` has at least `configuration`. Raises FlexbenchError when it cannot be written.
        """
        digest = configuration_hash(record["configuration"])
        api = _slug(str(record["configuration"].get("api", SYSTEM)))
        path = self.folder / f"{api}-curve-{digest[:_HASH_LENGTH]}.json"
        content = {"schema_version": SCHEMA_VERSION, "system": CURVE_SYSTEM, **record}
        try:
            replace_file(path, _encoded(content, indent=1))
        except OSError as error:
            raise FlexbenchError(
                f"{path}: the curve could not be kept: {error.strerror or error}"
            ) from error
        return path

    def append_row(self, row: ResultRow | None, record: Mapping[str, Any], path: Path) -> None:
        """Append the point to the TSV and to the JSON lines beside it: there, without its requests.

        `path` is the file that `write` gave. Raises FlexbenchError when it cannot be written.
        """
        line = {"schema_version": SCHEMA_VERSION, "system": SYSTEM, **record}
        line.pop("requests", None)
        self._rows.append(row, line | {"point_file": path.name})


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or SYSTEM


def _short_label(load: Any) -> str:
    """'8-clients', or '20-per-s-poisson': for people who look into the folder."""
    if not isinstance(load, Mapping):
        return ""
    if load.get("concurrency") is not None:
        return f"{load['concurrency']}-clients"
    rate = load.get("rate_per_s")
    return f"{rate:g}-per-s-{load.get('arrival', '')}" if isinstance(rate, int | float) else ""


def _check_whole(path: Path, record: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    """Raise InputFileError unless the record has everything, and is of this configuration."""
    if _canonical(record.get("configuration")) != _canonical(configuration):
        raise InputFileError(path, "has another configuration than its name says")
    from flexbench.serving.audit import Audit
    from flexbench.serving.figures import PointFigures

    try:
        PointFigures.from_record(record["figures"])
        Audit.from_record(record["audit"])
        list(record["violations"])
        Audit.from_record(record["audit"])
        decode_traces(record["requests"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputFileError(path, "lacks figures, audit or requests of a point") from error


def _encoded(content: Mapping[str, Any], **how: Any) -> bytes:
    return json.dumps(content, allow_nan=False, **how).encode()
