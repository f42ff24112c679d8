"""Records of servers that `flexbench server-config` launched: predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexbench.report.predictions import Prediction
from flexbench.report.reading.fields import (
    as_list,
    as_object,
    count_of,
    number_of,
    object_of,
    text_of,
    value_of,
)

SYSTEM = "server-config"


def predictions_of(record: Mapping[str, Any]) -> list[Prediction]:
    """The figures of a launched server. Raises RecordError for what a record cannot have."""
    predicted = object_of(record, "predicted")
    figures = as_list("comparison", value_of(record, "comparison"))
    return [
        Prediction(
            model=text_of(predicted, "model"),
            num_blocks=count_of(predicted, "num_blocks"),
            figure=text_of(figure, "name"),
            unit=text_of(figure, "unit"),
            predicted=number_of(figure, "predicted"),
            measured=number_of(figure, "measured"),
            error=number_of(figure, "error"),
        )
        for figure in (as_object("each of comparison", figure) for figure in figures)
    ]
