"""Predicted beside measured figures of servers."""

from __future__ import annotations

from flexbench.report.prediction_table import prediction_table
from flexbench.report.predictions import Prediction
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
        "model", "num_blocks", "figure", "unit", "predicted", "measured", "error", "num_runs",
    ]  # fmt: skip


def test_what_all_have_in_common_is_told_once():
    table = prediction_table([prediction(), prediction(figure="network_rps")])
    assert table.caption == "facebook/opt-6.7b, 4 blocks"
    assert shown(table) == ["figure", "predicted", "measured", "error", "num_runs"]
    table = prediction_table([prediction(), prediction(num_blocks=8)])
    assert table.caption == "facebook/opt-6.7b"
    assert shown(table)[0] == "num_blocks"


def test_units_and_changes_are_written_as_such():
    kinds = {one.name: one.kind for one in prediction_table([prediction()]).columns}
    assert (kinds["predicted"], kinds["measured"]) == (Kind.QUANTITY, Kind.QUANTITY)
    assert kinds["error"] is Kind.CHANGE


def test_no_predictions_make_no_rows():
    assert prediction_table([]).rows == []
