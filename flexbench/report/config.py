"""What a report is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from flexbench.core.errors import ConfigError

DEFAULT_MAX_REGRESSION = "5%"
# Those of flexbench.report.charts, which nobody is to wait for who only wants help.
PLOTS = (
    "throughput-latency",
    "throughput-clients",
    "latency-distribution",
    "timeline",
    "predicted-measured",
)
ALL_PLOTS = "all"
_SHARE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)")


class Format(StrEnum):
    """What a report can be printed as."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"
    HTML = "html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Everything but what is selected of the runs. Raises ConfigError for what cannot work."""

    paths: tuple[Path, ...]
    output_format: Format = Format.TABLE
    output: Path | None = None
    """None: standard output."""
    baseline: tuple[Path, ...] = ()
    max_regression: float = 0.05
    """As a share of the baseline's figure."""
    published: bool = False
    plots: tuple[str, ...] = ()
    """Names of PLOTS."""
    save_plots: Path | None = None
    skip_invalid: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        for name in self.plots:
            if name not in (*PLOTS, ALL_PLOTS):
                accepted = ", ".join((*PLOTS, ALL_PLOTS))
                raise ConfigError("--plot", f"there is no plot {name!r}; there are: {accepted}")
        if self.plots and self.save_plots is None and self.output_format is not Format.TABLE:
            raise ConfigError(
                "--plot", "draws in the terminal, below --format table; --save-plots makes files"
            )
        if self.output is not None and self.output.is_dir():
            raise ConfigError("--output", f"{self.output} is a folder; give it a file's name")


def parse_share(option: str, text: str) -> float:
    """'5%' or '0.05' as a share from 0 to 1. Raises ConfigError, which names `option`."""
    match = _SHARE.fullmatch(text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share < 1:
        raise ConfigError(option, f"must be a share such as 5% or 0.05, below 100%, not {text!r}")
    return share
