"""Records of servers that `flexbench server-config` launched: predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbench.report.predictions import Prediction
from flexbench.report.reading.fields import (
    as_list,
    as_object,
    as_text,
    count_of,
    find_count,
    find_flag,
    find_list,
    find_measurement,
    find_object,
    find_text,
    number_of,
    object_of,
    text_of,
    value_of,
)
from flexbench.report.reading.parts import find_machine

SYSTEM = "server-config"


def predictions_of(record: Mapping[str, Any]) -> list[Prediction]:
    """The figures of a launched server. Raises RecordError for what a record cannot have."""
    predicted = object_of(record, "predicted")
    figures = as_list("comparison", value_of(record, "comparison"))
    server = _server(record, predicted)
    return [
        Prediction(
            **server,
            figure=text_of(figure, "name"),
            unit=text_of(figure, "unit"),
            predicted=number_of(figure, "predicted"),
            measured=number_of(figure, "measured"),
            error=number_of(figure, "error"),
        )
        for figure in (as_object("each of comparison", figure) for figure in figures)
    ]


def _server(record: Mapping[str, Any], predicted: Mapping[str, Any]) -> dict[str, Any]:
    """What its figures depend on, by the names of SERVER_COLUMNS."""
    devices = [as_text("each of devices", one) for one in find_list(predicted, "devices")]
    return {
        "model": text_of(predicted, "model"),
        "num_blocks": count_of(predicted, "num_blocks"),
        "machine": find_machine(record),
        "device": " ".join(devices) or find_text(predicted, "device"),
        "dtype": find_text(predicted, "torch_dtype"),
        "quantization": find_text(predicted, "quant_type"),
        "cache_tokens": find_count(predicted, "attn_cache_tokens", minimum=0),
        "adapter_bytes": find_measurement(predicted, "adapter_bytes_per_block"),
        "is_relayed": find_flag(find_object(predicted, "network"), "relay"),
    }
