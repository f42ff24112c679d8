"""Predicted beside measured figures of servers."""

from __future__ import annotations

import pytest

from flexbench.report.prediction_table import prediction_table
from flexbench.report.predictions import SERVER_COLUMNS, Prediction
from flexbench.report.table import Kind
from tests.unit.report.stores import column, shown


def prediction(**changes) -> Prediction:
    values = {
        "model": "facebook/opt-6.7b",
        "num_blocks": 4,
        "figure": "forward_rps",
        "unit": "tokens/s",
        "predicted": 110.0,
        "measured": 100.0,
        "error": 0.1,
    }
    return Prediction(**(values | changes))


def test_means_over_the_servers_of_a_model():
    table = prediction_table(
        [
            prediction(),
            prediction(predicted=90.0, error=-0.1),
            prediction(
                figure="total_bytes", unit="bytes", predicted=2.0**30, measured=None, error=None
            ),
        ]
    )
    assert table.name == "predictions"
    assert column(table, "figure") == ["forward_rps", "total_bytes"]
    assert column(table, "predicted") == [100.0, 2.0**30]
    assert column(table, "measured") == [100.0, None]
    assert column(table, "error") == [0.0, None]
    assert column(table, "num_runs") == [2, 1]
    assert [one.name for one in table.columns] == [
        *SERVER_COLUMNS, "figure", "unit", "predicted", "measured", "error", "num_runs",
    ]  # fmt: skip


def test_what_all_have_in_common_is_told_once():
    table = prediction_table([prediction(), prediction(figure="network_rps")])
    assert table.caption == "facebook/opt-6.7b, 4 blocks"
    assert shown(table) == ["figure", "predicted", "measured", "error", "num_runs"]
    table = prediction_table([prediction(), prediction(num_blocks=8)])
    assert table.caption == "facebook/opt-6.7b"
    assert shown(table)[0] == "num_blocks"


SERVER = {
    "machine": "AMD EPYC, 16 CPUs, 1 x NVIDIA H100",
    "device": "cuda:0",
    "dtype": "float16",
    "quantization": "nf4",
    "cache_tokens": 8192,
    "adapter_bytes": 0.0,
    "is_relayed": False,
}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("machine", "AMD EPYC, 2 CPUs"),
        ("machine", None),  # of which nobody knows whether it is the same
        ("device", "cpu"),
        ("dtype", "float32"),
        ("quantization", "int8"),
        ("cache_tokens", 16384),
        ("adapter_bytes", 4096.0),
        ("is_relayed", True),
    ],
)
def test_servers_that_are_not_alike_are_not_averaged(name, other):
    first = prediction(**SERVER)
    second = prediction(**(SERVER | {name: other}), predicted=300.0, measured=100.0, error=2.0)
    table = prediction_table([first, second, first])
    assert column(table, "error") == [0.1, 2.0]
    assert column(table, "num_runs") == [2, 1]
    assert column(table, name) == [SERVER[name], other]
    assert shown(table)[0] == name


def test_what_is_known_of_all_servers_is_in_the_caption():
    assert prediction_table([prediction(**SERVER)]).caption == (
        "facebook/opt-6.7b, 4 blocks, AMD EPYC, 16 CPUs, 1 x NVIDIA H100, cuda:0, float16, "
        "quantization nf4, 8192 tokens of attention cache, 0 bytes of adapters in each block, "
        "reached directly"
    )


def test_units_and_changes_are_written_as_such():
    kinds = {one.name: one.kind for one in prediction_table([prediction()]).columns}
    assert (kinds["predicted"], kinds["measured"]) == (Kind.QUANTITY, Kind.QUANTITY)
    assert kinds["error"] is Kind.CHANGE


def test_no_predictions_make_no_rows():
    assert prediction_table([]).rows == []
