"""Curves and verdicts as people see them."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from flexbench.serving.config import Load
from flexbench.serving.figures import compute_figures, distribution
from flexbench.serving.saturation import Observation, RateSearch, SaturationSearch
from flexbench.serving.tables import (
    CurvePoint,
    curve_plot,
    curve_table,
    legend,
    saturation_sentences,
)

MS = 1_000_000


def show(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def point(concurrency=8, *, requests_per_s=40.0, e2e_ms=205, is_streaming=True, **changes):
    found = replace(
        compute_figures([], window_s=1.0, is_streaming=is_streaming),
        requests_per_s=requests_per_s,
        output_tokens_per_s=32 * requests_per_s,
        e2e=distribution([e2e_ms * MS]),
        in_flight=float(concurrency),
        error_rate=0.0,
    )
    if is_streaming:
        found = replace(
            found,
            ttft=distribution([50 * MS]),
            itl=distribution([5 * MS]),
            tpot=distribution([4_900_000]),
        )
    load = Load(concurrency=concurrency, duration_s=5.0)
    return CurvePoint(**{"load": load, "figures": found, "client_busy": 0.123} | changes)


def test_a_curve_fits_80_columns_with_every_figure():
    wide = point(1024, requests_per_s=12345.0, e2e_ms=123456)
    text = show(curve_table([point(), wide], title="openai [red]model[/red]"))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "openai [red]model[/red]" in text
    assert [
        line.split() for line in text.splitlines() if line.split()[:1] in (["8"], ["1024"])
    ] == [
        ["8", "40", "1280", "50", "50", "5", "4.9", "205", "205", "8", "12", "0"],
        ["1024", "12345", "395040", "50", "50", "5", "4.9", "123456", "123456", "1024", "12", "0"],
    ]


def test_without_streaming_there_are_no_columns_for_it():
    text = show(curve_table([point(is_streaming=False)]))
    assert "TTFT" not in text
    assert "ITL" not in text
    assert "E2E" in text
    assert "TTFT" not in legend([point(is_streaming=False)])


def test_a_client_limited_point_is_marked_and_explained():
    limited = point(is_client_limited=True)
    (line,) = [one for one in show(curve_table([limited])).splitlines() if "205" in one]
    assert line.split()[-1] == "!"
    assert "client-limited" in legend([limited])
    assert "client-limited" not in legend([point()])


def test_a_point_without_latencies_has_dashes():
    empty = compute_figures([], window_s=1.0, is_streaming=True)
    text = show(curve_table([CurvePoint(load=Load(rate_per_s=2.5, duration_s=1), figures=empty)]))
    assert "offered" in text
    (line,) = [one for one in text.splitlines() if "2.5" in one]
    assert line.split() == ["2.5", "0", "0", "-", "-", "0", "-", "-"]


def test_the_legend_names_the_formulas():
    text = legend([point()])
    assert "TTFT = first content - sent" in text
    assert "TPOT = (e2e - ttft) / (output tokens - 1)" in text
    assert "E2E = last content - sent" in text


def sentences(search, throughput, **observed):
    while (level := search.next_level()) is not None:
        values = {key: value(level) for key, value in observed.items()}
        search.add(
            level, Observation(requests_per_s=throughput(level), tokens_per_s=10.0, **values)
        )
    return " ".join(saturation_sentences(search.result()))


def test_a_verdict_in_sentences():
    text = sentences(SaturationSearch(), lambda level: 5.0 * min(level, 8))
    assert "Highest throughput: 40 requests/s (95 %: " in text
    assert "It saturates at 8 clients." in text
    assert "after 6 points: more load brought no more throughput." in text
    assert text.endswith("Sure: 8 reach it, 7 do not.")
    assert "conditions" not in text


@pytest.mark.parametrize(
    ("observed", "words"),
    [
        ({"meets_slo": lambda level: level <= 6}, "Within the conditions: up to 6 clients, 30 req"),
        ({"meets_slo": lambda level: False}, "No load met the conditions."),
        ({"error_rate": lambda level: 1.0}, "No saturation point: too many requests failed"),
        ({"is_client_limited": lambda level: level > 4}, "Highest throughput: at least 40 requ"),
        ({"is_client_limited": lambda level: level > 4}, "the load generator was the limit"),
    ],
)
def test_verdicts_that_other_things_ended(observed, words):
    search = SaturationSearch(has_slo="meets_slo" in observed)
    assert words in sentences(search, lambda level: 5.0 * min(level, 8), **observed)


def test_the_verdict_of_a_rate():
    text = sentences(RateSearch(max_rate=100.0), lambda rate: min(rate, 40.0))
    assert "It saturates at 39.6 requests/s offered (39.6 to 41.4)." in text


def test_the_plot_has_a_dot_for_each_point():
    points = [point(1, requests_per_s=5.0), point(8), point(16, e2e_ms=410)]
    lines = curve_plot(points).splitlines()
    assert sum(line.count("●") for line in lines) == 3
    assert lines[1].endswith("●")  # the highest latency, at the highest throughput
    assert lines[1].split()[0] == "410"
    assert lines[10].split()[0] == "205"
    assert lines[-1].endswith("40 requests/s")
    assert len(lines) == 13
    assert max(map(len, lines)) <= 80
    assert curve_plot(points[:1]) == ""
