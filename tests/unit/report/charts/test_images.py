"""Files with pictures: real ones, whole ones, and of what was asked for."""

from __future__ import annotations

import os
import re
import stat
import struct
import sys
import xml.etree.ElementTree as ET

import pytest

from flexbench.core.errors import ConfigError, MissingDependencyError
from flexbench.report.charts.images import VEGA_LITE_VERSION, save_images, to_png, to_svg
from flexbench.report.charts.vega import to_vega_lite
from tests.unit.report.charts import samples

vl_convert = pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg):
    return ET.fromstring(svg)  # noqa: S314 - our own


def texts(svg):
    return ["".join(one.itertext()) for one in parse(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("options", [{}, {"is_dark": True}, {"is_interactive": True}])
@pytest.mark.parametrize(
    "chart",
    [*samples.ALL, samples.hostile(), samples.empty(), *samples.EXTREME],
    ids=lambda chart: chart.name,
)
def test_specifications_compile_without_a_warning(chart, options, capfd):
    vega = vl_convert.vegalite_to_vega(
        to_vega_lite(chart, **options), vl_version=VEGA_LITE_VERSION, show_warnings=True
    )
    assert vega["marks"]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.parametrize("chart", samples.ALL, ids=lambda chart: chart.name)
def test_a_png_is_one_of_a_sane_size(chart):
    data = to_png(chart)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 1360 <= width <= 2000
    assert 250 <= height <= 1500


@pytest.mark.parametrize("chart", samples.ALL, ids=lambda chart: chart.name)
def test_an_svg_says_what_it_shows(chart):
    root = parse(to_svg(chart))
    label = f"{chart.title}. {chart.description}"
    assert root[0].tag == f"{SVG}title"
    assert root[0].text == label
    assert root.get("role") == "img"
    assert root.get("aria-label") == label
    assert chart.title in texts(to_svg(chart))
    assert chart.x.full_title in texts(to_svg(chart))


def test_hostile_names_are_text_in_a_well_formed_svg():
    svg = to_svg(samples.curve(names=("<script>alert(1)</script>", "a & b <i>")))
    root = parse(svg)
    assert not [one for one in root.iter() if one.tag in (f"{SVG}script", f"{SVG}image", f"{SVG}a")]
    assert "<script>alert(1)</script>" in texts(svg)
    assert "a & b <i>" in texts(svg)


@pytest.mark.parametrize("chart", samples.EXTREME, ids=lambda chart: chart.name)
def test_extreme_values_are_drawn(chart):
    assert to_png(chart).startswith(b"\x89PNG")


def test_legends_and_error_bars_are_drawn():
    svg = to_svg(samples.curve())
    assert {"first", "second"} <= set(texts(svg))
    assert svg.count("mark-rule") > to_svg(samples.curve(names=())).count("mark-rule")


def test_files_are_named_by_chart_and_replace_older_ones(tmp_path):
    folder = tmp_path / "new" / "plots"
    paths = save_images([samples.timeline()], folder)
    assert paths == [folder / "timeline-1.png", folder / "timeline-1.svg"]
    (folder / "timeline-1.svg").write_text("old")
    (only,) = save_images([samples.timeline()], folder, formats=("svg",))
    assert only.read_text().startswith("<svg")
    assert sorted(path.name for path in folder.iterdir()) == ["timeline-1.png", "timeline-1.svg"]


def test_others_may_read_the_files(tmp_path):
    mask = os.umask(0o022)
    try:
        (path,) = save_images([samples.timeline()], tmp_path, formats=("svg",))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"--save-plots: cannot write to .*file"):
        save_images([samples.timeline()], tmp_path / "file")
    (tmp_path / "file").unlink()
    (tmp_path / "timeline-1.svg").mkdir()
    with pytest.raises(ConfigError, match=r"--save-plots: cannot write to"):
        save_images([samples.timeline()], tmp_path, formats=("svg",))
    assert [path.name for path in tmp_path.iterdir()] == ["timeline-1.svg"]


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="png, svg"):
        save_images([samples.timeline()], tmp_path, formats=("gif",))


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingDependencyError, match=re.escape("flexbench[plots]")):
        save_images([samples.timeline()], tmp_path)
