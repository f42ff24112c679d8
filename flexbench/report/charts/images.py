"""Charts as PNG and SVG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from flexbench.core.errors import ConfigError, FlexbenchError, MissingDependencyError
from flexbench.core.whole_files import replace_file
from flexbench.report.charts.chart import Chart
from flexbench.report.charts.palette import LIGHT_BACKGROUND
from flexbench.report.charts.vega import to_vega_lite

VEGA_LITE_VERSION = "5.20"
"""One of the releases that vl-convert brings with it."""
FORMATS = ("png", "svg")
_SCALE = 2.0
_OPTION = "--save-plots"
_SVG_TAG = re.compile(r"<svg\b[^>]*>")


def save_images(
    charts: Sequence[Chart], folder: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write each chart as `name`.png and `name`.svg into `folder`, which is made if it is missing.

    Files of the same names are replaced, whole. Nothing is fetched: fonts are those of this
    machine, or vl-convert's own. Raises ConfigError where `folder` cannot be written to,
    MissingDependencyError without vl-convert-python.
    """
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            for name in formats:
                path = folder / f"{chart.name}.{name}"
                replace_file(path, _draw(chart, name))
                paths.append(path)
    except OSError as error:
        where = error.filename or folder
        problem = f"cannot write to {where}: {error.strerror or error}"
        raise ConfigError(_OPTION, problem) from error
    return paths


def to_svg(chart: Chart) -> str:
    """An SVG document, with what it shows as its title for people who cannot see it."""
    svg = str(_convert("vegalite_to_svg", _on_white(chart)))
    title = f"{chart.title}. {chart.description}"
    # A <title> is what browsers and screen readers know; Vega labels an inner group alone.
    label = f'role="img" aria-label={quoteattr(title)}'
    return _SVG_TAG.sub(
        lambda tag: f"{tag[0][:-1]} {label}><title>{escape(title)}</title>", svg, count=1
    )


def to_png(chart: Chart) -> bytes:
    """A PNG with two pixels for each unit of length."""
    return bytes(_convert("vegalite_to_png", _on_white(chart), scale=_SCALE))


def _draw(chart: Chart, name: str) -> bytes:
    match name:
        case "png":
            return to_png(chart)
        case "svg":
            return to_svg(chart).encode()
    raise ValueError(f"there is no format {name!r}; there are: {', '.join(FORMATS)}")


def _on_white(chart: Chart) -> dict[str, Any]:
    return {**to_vega_lite(chart), "background": LIGHT_BACKGROUND, "padding": 14}


def _convert(function: str, spec: dict[str, Any], **options: Any) -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise MissingDependencyError(
            "Plots as files need vl-convert-python, which is not installed: "
            "pip install 'flexbench[plots]'"
        ) from error
    try:
        return getattr(vl_convert, function)(
            spec,
            vl_version=VEGA_LITE_VERSION,
            allowed_base_urls=[],  # there is nothing to fetch, whatever is in the data
            show_warnings=False,
            **options,
        )
    except ValueError as error:
        raise FlexbenchError(
            f"The chart {spec['description']!r} could not be drawn: {error}"
        ) from error
