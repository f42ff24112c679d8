"""What flexbench server-config predicted beside what was measured, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexbench.report.gate import in_words
from flexbench.report.predictions import SERVER_COLUMNS, Prediction, group_predictions
from flexbench.report.table import Column, Kind, Row, Table

_NAMES = (*SERVER_COLUMNS, "figure", "unit", "predicted", "measured", "error", "num_runs")
_WORDS = {
    "num_blocks": "{} blocks",
    "quantization": "quantization {}",
    "cache_tokens": "{} tokens of attention cache",
    "adapter_bytes": "{} bytes of adapters in each block",
}
_RELAYED = {True: "behind a relay", False: "reached directly"}


def prediction_table(predictions: Sequence[Prediction]) -> Table:
    """A row for each figure of servers that are alike: means over these."""
    groups = group_predictions(predictions)
    rows = [Row(values={name: getattr(group, name) for name in _NAMES}) for group in groups]
    common = {
        name: rows[0].values[name]
        for name in SERVER_COLUMNS
        if rows and all(row.values[name] == rows[0].values[name] for row in rows)
    }
    return Table(
        name="predictions",
        title="flexbench server-config",
        columns=_columns(is_shown={name: name not in common for name in SERVER_COLUMNS}),
        rows=rows,
        caption=", ".join(
            _in_words(name, value) for name, value in common.items() if value is not None
        ),
    )


def _in_words(name: str, value: Any) -> str:
    if name == "is_relayed":
        return _RELAYED[value]
    return _WORDS.get(name, "{}").format(in_words(value))


def _columns(*, is_shown: dict[str, bool]) -> list[Column]:
    def server(name: str, heading: str, kind: Kind = Kind.TEXT, about: str = "") -> Column:
        return Column(name=name, heading=heading, kind=kind, is_shown=is_shown[name], help=about)

    return [
        server("model", "model"),
        server("num_blocks", "blocks", Kind.COUNT, "transformer blocks that the server held"),
        server("machine", "machine"),
        server("device", "device"),
        server("dtype", "dtype"),
        server("quantization", "quantization"),
        server("cache_tokens", "cache\ntokens", Kind.COUNT, "room of each block's attention cache"),
        server("adapter_bytes", "adapters\nbytes", Kind.FIGURE, "of adapters, in each block"),
        server("is_relayed", "relayed", about="whether clients reach it over another peer"),
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
