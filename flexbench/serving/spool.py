"""What a loop has measured, written as it goes, so that nothing is lost with a killed process.

A line of JSON a request, with the values of a RequestTrace in the order of its fields; times are
absolute here, on time.monotonic_ns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from flexbench.core.errors import InputFileError
from flexbench.serving.traces import RequestTrace

_NAMES = tuple(field.name for field in fields(RequestTrace))
_TIMES = ("scheduled_ns", "sent_ns", "connected_ns", "ended_ns")
_FLUSH_BYTES = 2**23


def _fast_encoder() -> Callable[[Any], bytes]:
    try:
        from orjson import dumps
    except ImportError:  # nothing but speed depends on it
        return lambda value: json.dumps(value, separators=(",", ":")).encode()
    return dumps


class SpoolWriter:
    """Appends rows to a file; what `flush` has written outlives this process."""

    def __init__(self, path: Path) -> None:
        """Make the file at `path`, which is not there yet."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        self._encode = _fast_encoder()
        self._rows: list[bytes] = []
        self._num_bytes = 0

    def add(self, row: Sequence[Any]) -> None:
        """Take one request's row."""
        line = self._encode(row)
        self._rows.append(line)
        self._num_bytes += len(line)
        if self._num_bytes > _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was taken. Raises OSError when that fails, as on a full disk."""
        self.write(self.take())

    def take(self) -> bytes:
        """What `write` is to write next; empty if there is nothing."""
        if not self._rows:
            return b""
        data = b"\n".join([*self._rows, b""])
        self._rows = []
        self._num_bytes = 0
        return data

    def write(self, data: bytes) -> None:
        """Write what `take` gave; in a thread, since a busy disk makes that long."""
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[os.write(self._file, remaining) :]

    def close(self) -> None:
        """Write the rest, and close the file."""
        self.flush()
        os.close(self._file)


def read_spool(path: Path, released_ns: int) -> list[RequestTrace]:
    """The traces in a spool file, with times since `released_ns`; none if there is no such file.

    The last line may have been cut off with its process: it is left out. Raises InputFileError for
    any other line that is none.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    traces = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            values = dict(zip(_NAMES, json.loads(line), strict=True))
        except ValueError as error:
            raise InputFileError(path, f"is damaged: {error}", line=number) from error
        for name in _TIMES:
            if values[name] is not None:
                values[name] -= released_ns
        values["content_ns"] = [moment - released_ns for moment in values["content_ns"]]
        traces.append(RequestTrace(**values))
    return traces
