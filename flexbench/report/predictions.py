"""What `flexbench server-config` predicted of servers beside what they turned out to be.

Nothing is computed here but a mean error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

SERVER_COLUMNS: tuple[str, ...] = (
    "model",
    "num_blocks",
    "machine",
    "device",
    "dtype",
    "quantization",
    "cache_tokens",
    "adapter_bytes",
    "is_relayed",
)
"""What servers must have in common to be averaged."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One figure of one server. None: not known; of a figure, not predicted or not measured."""

    model: str
    num_blocks: int
    machine: str | None = None
    """CPU, number of CPUs, GPUs, in words."""
    device: str | None = None
    """cpu, cuda:0; several with blanks between them."""
    dtype: str | None = None
    quantization: str | None = None
    """none, int8 or nf4."""
    cache_tokens: int | None = None
    """Tokens that the attention cache of each block has room for."""
    adapter_bytes: float | None = None
    """Of adapters, per block."""
    is_relayed: bool | None = None
    """Whether clients reach it over another peer."""

    figure: str
    unit: str
    predicted: float | None
    measured: float | None
    error: float | None
    """predicted / measured - 1."""


@dataclass(frozen=True, kw_only=True)
class PredictionGroup(Prediction):
    """All servers that are alike in SERVER_COLUMNS: the means of a figure and of its error."""

    num_runs: int


def group_predictions(predictions: Sequence[Prediction]) -> list[PredictionGroup]:
    """Means over the servers that are alike, in the order of their first run."""
    groups: dict[tuple[object, ...], list[Prediction]] = {}
    for one in predictions:
        key = tuple(getattr(one, name) for name in (*SERVER_COLUMNS, "figure", "unit"))
        groups.setdefault(key, []).append(one)
    return [_group(members) for members in groups.values()]


def _group(members: Sequence[Prediction]) -> PredictionGroup:
    means = {
        name: _mean([getattr(one, name) for one in members])
        for name in ("predicted", "measured", "error")
    }
    return PredictionGroup(**(asdict(members[0]) | means), num_runs=len(members))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    # Not a sum divided at the end, which can overflow.
    return math.fsum(value / len(known) for value in known) if known else None
