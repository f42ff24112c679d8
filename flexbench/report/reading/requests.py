"""The requests of a serving point, of which a report needs no more than how long they took.

They are nearly all of a point's file, which has some megabytes, and a hundred times as much once it
is lists and numbers. So they are read one after the other, and none is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flexbench.report.reading.fields import (
    RecordError,
    as_list,
    as_number,
    as_object,
    quote,
    value_of,
)

NAME = "requests"
_NS_PER_S = 1e9
_NEEDED = ("sent_ns", "content_ns", "failure", "is_unfinished")
# How flexbench writes them: as the last value of the record, without blanks.
_BEGIN = f',"{NAME}":{{"columns":'
_ROWS = ',"rows":['
_END = "]}}"
_DECODER = json.JSONDecoder()

Latency = Callable[[Any], float | None]


def load_point(text: str) -> dict[str, Any] | None:
    """The record of a point's file, with `requests` replaced by their latencies in seconds.

    None for what is not written as flexbench writes it, be it for a good reason or not.
    """
    cut = text.rfind(_BEGIN)
    if cut < 0:
        return None
    try:
        columns, index = _DECODER.raw_decode(text, cut + len(_BEGIN))
        if not text.startswith(_ROWS, index):
            return None
        latencies_s, index = _read_rows(text, index + len(_ROWS), _latency_by(columns))
        if text[index:].rstrip() != _END:
            return None
        record = json.loads(text[:cut] + "}")
    except (ValueError, RecursionError):
        return None
    return {**record, NAME: latencies_s} if isinstance(record, dict) else None


def latencies_of(requests: Any) -> list[float]:
    """From sending to the last content, in seconds, of all requests that were answered.

    Raises RecordError for what is no table of requests.
    """
    table = as_object(NAME, requests)
    latency = _latency_by(value_of(table, "columns"))
    latencies = [latency(row) for row in as_list("rows", value_of(table, "rows"))]
    return [one for one in latencies if one is not None]


def _read_rows(text: str, index: int, latency: Latency) -> tuple[list[float], int]:
    """The latencies of the rows from `index` on, and the index of what follows them."""
    found: list[float] = []
    while text.startswith("[", index):
        row, index = _DECODER.raw_decode(text, index)
        one = latency(row)
        if one is not None:
            found.append(one)
        if text.startswith(",[", index):
            index += 1
    return found, index


def _latency_by(columns: Any) -> Latency:
    """What takes the latency from a row with these columns; None: there was no answer."""
    names = as_list("columns", columns)
    for name in _NEEDED:
        if name not in names:
            raise RecordError(f"columns of {NAME} lack {name!r}")
    sent, content, failure, unfinished = map(names.index, _NEEDED)

    def latency(row: Any) -> float | None:
        if not isinstance(row, list) or len(row) != len(names):
            raise RecordError(f"each of rows must have {len(names)} values, as there are columns")
        chunks = row[content]
        if row[failure] is not None or row[unfinished] or row[sent] is None or not chunks:
            return None
        if not isinstance(chunks, list):
            raise RecordError(f"content_ns must be a list, not {quote(chunks)}")
        ended_ns = as_number("content_ns", chunks[-1])
        return (ended_ns - as_number("sent_ns", row[sent])) / _NS_PER_S

    return latency
