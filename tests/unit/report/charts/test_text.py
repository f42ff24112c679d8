"""Plots in a terminal: within its width, with every series in the legend."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.core.errors import MissingDependencyError
from flexbench.report.charts.text import to_text
from flexbench.report.charts.ticks import linear_ticks, log_ticks
from tests.unit.report.charts import samples

needs_plotext = pytest.mark.usefixtures("plotext")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def plotext():
    return pytest.importorskip("plotext", reason="plotext is not installed")


def draw(chart, *, width=80, height=20, has_color=False, **options):
    return to_text(chart, width=width, height=height, has_color=has_color, **options)


@needs_plotext
@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("has_color", [False, True])
@pytest.mark.parametrize("chart", [*samples.ALL, samples.hostile()], ids=lambda chart: chart.name)
def test_no_line_is_wider_than_the_terminal(chart, width, has_color):
    text = draw(chart, width=width, has_color=has_color)
    lines = [ESCAPE.sub("", line) for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert ("\x1b" in text) is has_color


@needs_plotext
@pytest.mark.parametrize("chart", [*samples.ALL, samples.hostile()], ids=lambda chart: chart.name)
def test_ascii_is_nothing_but_ascii(chart):
    assert draw(chart, is_unicode=False).isascii()


@needs_plotext
@pytest.mark.parametrize("chart", samples.EXTREME, ids=lambda chart: chart.name)
def test_extreme_values_are_drawn(chart):
    lines = draw(chart).splitlines()
    assert len(lines) >= 20
    assert max(map(len, lines)) <= 80


@needs_plotext
def test_title_axes_legend_and_notes_are_there():
    text = draw(samples.curve())
    assert text.startswith("Throughput and mean latency: petals\nMean latency (s)\n")
    assert "Throughput (tokens/s)" in text
    assert "● first   ■ second   ○ client-limited   ◉ saturation" in text
    assert text.endswith("All: petals, bigscience/bloom-560m.\nHollow points: the load generator.")


@needs_plotext
def test_points_stand_where_they_belong():
    lines = draw(samples.curve(names=("one",)), is_unicode=False).splitlines()
    places = {
        glyph: (row, line.index(glyph))
        for row, line in enumerate(lines)
        for glyph in "@!"
        if glyph in line and row < 22
    }
    (middle_row, middle_column), (last_row, last_column) = places["@"], places["!"]
    assert last_row < middle_row
    assert last_column > middle_column


@needs_plotext
def test_every_plot_is_of_its_own(plotext):
    first = draw(samples.curve())
    draw(samples.scatter())
    draw(samples.distribution(is_log=True))
    assert draw(samples.curve()) == first
    assert not plotext.figure._signals or len(list(plotext.figure._signals)) == 0


def test_a_timeline_has_a_lane_for_each_rank():
    lines = draw(samples.timeline(), width=57).splitlines()
    # 50 columns of 0.2 s: 10 loading, 30 computing, 10 sending.
    assert lines[1] == "rank 0 " + "▒" * 10 + "█" * 30 + "▚" * 10
    assert lines[2] == "rank 1 " + "·" * 25 + "█" * 25
    assert lines[4].split() == ["0", "s", "5", "s", "10", "s"]
    assert lines[5] == "▒ loading   █ computing   ▚ sending   · waiting"


def test_a_timeline_in_ascii():
    lines = draw(samples.timeline(), width=57, is_unicode=False).splitlines()
    assert lines[1] == "rank 0 " + "l" * 10 + "#" * 30 + ">" * 10


def test_a_chart_of_nothing_says_so():
    assert draw(samples.empty()) == "Empty\n(nothing to draw)"


def test_without_plotext_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotext", None)
    with pytest.raises(MissingDependencyError, match=re.escape("flexbench[plots]")):
        draw(samples.curve())


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0.0, 10.0, 6, [0, 2, 4, 6, 8, 10]),
        (0.0, 50.0, 6, [0, 10, 20, 30, 40, 50]),
        (0.0, 0.35, 4, [0, 0.1, 0.2, 0.3]),
        (-1.0, 1.0, 3, [-1, 0, 1]),
        (3.0, 3.0, 5, [3]),
    ],
)
def test_linear_ticks_are_round(low, high, most, ticks):
    assert linear_ticks(low, high, most=most) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (1.0, 10.0, 5, [1, 2, 5, 10]),
        (0.1, 10.0, 5, [0.1, 0.3, 1, 3, 10]),
        (0.01, 100.0, 5, [0.01, 0.1, 1, 10, 100]),
        (1e-6, 1e6, 4, [1e-6, 1e-2, 1e2, 1e6]),
    ],
)
def test_logarithmic_ticks_are_round(low, high, most, ticks):
    assert log_ticks(low, high, most=most) == pytest.approx(ticks)


@settings(max_examples=200)
@given(
    st.floats(min_value=1e-9, max_value=1e9),
    st.floats(min_value=1.001, max_value=1e9),
    st.integers(2, 12),
)
def test_ticks_are_few_and_within(low, ratio, most):
    high = low * ratio
    for find in (linear_ticks, log_ticks):
        ticks = find(low, high, most=most)
        assert len(ticks) <= most
        assert ticks == sorted(set(ticks))
        assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
