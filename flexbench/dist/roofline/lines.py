"""What is shown and kept of a roofline: a stage's work, floors and times, line by line. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexbench.dist.roofline.ceilings import Ceilings

PREFILL, DECODE = "prefill", "decode"
WEIGHT_LOAD, CACHE_LOAD, CACHE_STORE, HIDDEN = "weight_load", "cache_load", "cache_store", "hidden"
# Of these there are figures of the whole run, called prefill_roofline and so on.
_WITH_FIGURE = (PREFILL, DECODE, WEIGHT_LOAD)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One kind of work of one stage."""

    what: str
    flops: int
    """Operations of matrix products; of a transfer 0."""
    num_bytes: int
    """Read from memory to be computed with, or moved."""
    parts: Mapping[str, int]
    """Bytes by what they are of, or by the home that they come from or go to."""
    floor_s: float
    """The least that it can take under the ceilings."""
    measured_s: float
    """What it took: of prefill and decode the computing alone, without waiting for transfers."""
    bound_by: str
    """compute, memory, link or disk."""

    @property
    def fraction(self) -> float | None:
        """Floor / measured: 1 is at the roofline. None of what took no time."""
        return self.floor_s / self.measured_s if self.measured_s > 0 else None


@dataclass(frozen=True, kw_only=True)
class StageRoofline:
    """A stage's lines, and the ceilings that its floors follow from."""

    rank: int
    ceilings: Ceilings
    disk_access: str | None
    """How the offload folder was read; None: nothing was there."""
    lines: Sequence[Line]

    def to_json(self) -> dict[str, Any]:
        """For the record of a run."""
        return {
            "rank": self.rank,
            "ceilings": asdict(self.ceilings),
            "disk_access": self.disk_access,
            "lines": [asdict(line) | {"fraction": line.fraction} for line in self.lines],
        }


def roofline_figures(stages: Iterable[StageRoofline]) -> dict[str, float]:
    """Sum of the floors / sum of the times over all stages, by the names in docs/metrics.md."""
    lines = [line for stage in stages for line in stage.lines]
    figures = {}
    for what in _WITH_FIGURE:
        found = [line for line in lines if line.what == what]
        measured_s = sum(line.measured_s for line in found)
        if measured_s > 0:
            figures[f"{what}_roofline"] = sum(line.floor_s for line in found) / measured_s
    return figures
