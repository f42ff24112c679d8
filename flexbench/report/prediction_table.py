"""What flexbench server-config predicted beside what was measured, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from flexbench.report.gate import in_words
from flexbench.report.predictions import Prediction, group_predictions
from flexbench.report.table import Column, Kind, Row, Table

_ABOUT = ("model", "num_blocks")
_NAMES = (*_ABOUT, "figure", "unit", "predicted", "measured", "error", "num_runs")


def prediction_table(predictions: Sequence[Prediction]) -> Table:
    """A row for each figure of each model and number of blocks: means over its servers."""
    groups = group_predictions(predictions)
    rows = [Row(values={name: getattr(group, name) for name in _NAMES}) for group in groups]
    common = {
        name: rows[0].values[name]
        for name in _ABOUT
        if rows and all(row.values[name] == rows[0].values[name] for row in rows)
    }
    words = {"model": "{}", "num_blocks": "{} blocks"}
    return Table(
        name="predictions",
        title="flexbench server-config",
        columns=_columns(is_shown={name: name not in common for name in _ABOUT}),
        rows=rows,
        caption=", ".join(words[name].format(in_words(common[name])) for name in common),
    )


def _columns(*, is_shown: dict[str, bool]) -> list[Column]:
    return [
        Column(name="model", heading="model", kind=Kind.TEXT, is_shown=is_shown["model"]),
        Column(
            name="num_blocks",
            heading="blocks",
            kind=Kind.COUNT,
            is_shown=is_shown["num_blocks"],
            help="transformer blocks that the server held",
        ),
        Column(name="figure", heading="figure", kind=Kind.TEXT),
        Column(name="unit", heading="unit", kind=Kind.TEXT, is_shown=False),
        Column(name="predicted", heading="predicted", kind=Kind.QUANTITY),
        Column(name="measured", heading="measured", kind=Kind.QUANTITY),
        Column(name="error", heading="error", kind=Kind.CHANGE, help="predicted / measured - 1"),
        Column(
            name="num_runs",
            heading="servers",
            kind=Kind.COUNT,
            priority=1,
            help="how many servers the means are of",
        ),
    ]
