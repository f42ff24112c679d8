"""Colours, shapes and dashes that tell series apart.

Every colour has a contrast of at least 3 : 1 on white and on DARK_BACKGROUND: a series has the same
in the light and in the dark. They were searched for those that are far from each other for
people who see no red, no green or no blue, too; shape and dashes tell the same as colour does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexbench.core.timeline import What
from flexbench.report.charts.timeline import REST

LIGHT_BACKGROUND = "#ffffff"
DARK_BACKGROUND = "#16181d"

COLORS = (
    "#2d78d2",
    "#e17800",
    "#964b87",
    "#878778",
    "#d2002d",
    "#00782d",
    "#b41ea5",
    "#c3785a",
)
SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
)
DASHES = (
    (1, 0),
    (6, 3),
    (2, 2),
    (9, 3, 2, 3),
    (12, 4),
    (4, 2, 2, 2, 2, 2),
    (1, 3),
    (14, 3, 4, 3),
)
BAR_COLORS: Mapping[str, str] = {
    What.COMPUTING: "#2d78d2",
    What.LOADING: "#e17800",
    What.WAITING: "#878778",
    What.SENDING: "#964b87",
    REST: "#4b783c",
}


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of what is not data."""

    text: str
    line: str
    """Of axes."""
    grid: str


LIGHT = Theme(text="#24272e", line="#6b7078", grid="#e2e4e8")
DARK = Theme(text="#e3e6eb", line="#8b919b", grid="#343840")
