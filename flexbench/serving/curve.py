"""What a run gives: points, and the curves that they are on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flexbench.serving.config import Load, PromptConfig

if TYPE_CHECKING:
    from flexbench.serving.audit import Audit
    from flexbench.serving.figures import PointFigures
    from flexbench.serving.saturation import Saturation


@dataclass(kw_only=True)
class Point:
    """One measured load."""

    load: Load
    figures: PointFigures
    audit: Audit
    violations: list[str]
    """Conditions that did not hold, in words."""
    file: Path
    is_from_file: bool = False
    """It had been measured before."""
    stopped_by: str | None = None
    """Why it was ended before its time."""

    @property
    def is_client_limited(self) -> bool:
        """Whether the load generator, not the service, was the limit."""
        return self.audit.is_client_limited

    @property
    def is_timing_uncertain(self) -> bool:
        """Whether some timestamps are late by the load generator's doing."""
        return self.audit.is_timing_uncertain

    @property
    def client_busy(self) -> float | None:
        """CPU time over wall time of the busiest event loop of the load generator."""
        return self.audit.worker_busy_max


@dataclass(kw_only=True)
class Curve:
    """Points with the same prompts."""

    prompts: PromptConfig
    points: list[Point] = field(default_factory=list)
    saturation: Saturation | None = None
    file: Path | None = None
    """Where the curve is written down."""
    ended_early: str | None = None
    """Why heavier loads were not measured."""
