"""Tables as text."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from flexbench.report.formats.cells import cell, format_figure
from flexbench.report.formats.flat import to_csv, to_json
from flexbench.report.formats.markdown import to_markdown
from flexbench.report.formats.terminal import MOST_ROWS, show
from flexbench.report.table import Column, Kind, Row, Table

MODEL = Column(name="model", heading="model", kind=Kind.TEXT)
CLIENTS = Column(name="num_processes", heading="clients", kind=Kind.COUNT)
MEAN = Column(name="throughput_mean", heading="tok/s\nmean")
LOW = Column(name="throughput_ci_low", heading="tok/s\nlow", priority=2)
HIDDEN = Column(name="throughput_std", heading="tok/s\nstd", is_shown=False)


def row(model: str, clients: int, mean: float, **more) -> Row:
    values = {"model": model, "num_processes": clients, "throughput_mean": mean}
    return Row(
        values=values | {"throughput_ci_low": mean / 2, "throughput_std": 0.125},
        best=more.pop("best", frozenset()),
        **more,
    )


def table(*rows: Row, **more) -> Table:
    return Table(
        name="runs",
        title="flexbench petals",
        columns=(MODEL, CLIENTS, MEAN, LOW, HIDDEN),
        rows=rows,
        **more,
    )


def shown(*tables: Table, width: int = 80) -> list[str]:
    text = io.StringIO()
    show(tables, Console(file=text, width=width))
    return text.getvalue().splitlines()


def test_json_has_every_column_of_every_table():
    predictions = Table(
        name="predictions", title="Servers", columns=(MODEL,), rows=[Row(values={"model": "b"})]
    )
    records = json.loads(to_json([table(row("a", 4, 22.5)), predictions]))
    assert records == [
        {
            "table": "runs", "model": "a", "num_processes": 4, "throughput_mean": 22.5,
            "throughput_ci_low": 11.25, "throughput_std": 0.125,
        },
        {"table": "predictions", "model": "b"},
    ]  # fmt: skip


def test_csv_has_one_header_for_all_tables_and_every_digit():
    other = Table(
        name="predictions",
        title="Servers",
        columns=(LOW,),
        rows=[Row(values={LOW.name: 0.1 + 0.2})],
    )
    rows = list(csv.DictReader(io.StringIO(to_csv([table(row("a", 4, 22.5)), other]))))
    assert rows[0]["throughput_mean"] == "22.5"
    assert rows[1]["throughput_ci_low"] == "0.30000000000000004"
    assert rows[1]["throughput_mean"] == ""


def test_rows_that_mix_runs_say_so_in_every_format():
    mixed = table(row("a", 4, 22.5, is_mixed=True), row("b", 4, 23.5))
    assert [record["mixed"] for record in json.loads(to_json([mixed]))] == [True, False]
    lines = shown(mixed)
    assert any("mixed" in line for line in lines)
    assert [line.rstrip().endswith("!") for line in lines if line.startswith(("a", "b"))] == [
        True,
        False,
    ]


def test_digits_stand_below_each_other_whether_marked_as_best_or_not():
    lines = shown(table(row("a", 4, 22.51, best=frozenset({MEAN.name})), row("b", 16, 21.43)))
    best, other = (line for line in lines if line.startswith(("a", "b")))
    assert best.index("22.51") == other.index("21.43")
    assert "*22.51" in best
    assert "* the best of those that can be compared" in lines


@pytest.mark.parametrize("width", [20, 30, 40, 80, 200])
def test_tables_fit_into_the_width_of_the_terminal(width):
    rows = [row("facebook/opt-30b", clients, 1234.5 * clients) for clients in (1, 2, 4)]
    assert max(map(len, shown(table(*rows, caption="measured"), width=width))) <= width


def test_what_does_not_fit_is_named():
    lines = shown(table(row("facebook/opt-30b", 4, 22.5)), width=34)
    assert not any("11.25" in line for line in lines)
    assert any("throughput_ci_low" in line for line in " ".join(lines).split("Hidden"))
    assert any("11.25" in line for line in shown(table(row("facebook/opt-30b", 4, 22.5))))


def test_a_terminal_gets_no_more_rows_than_somebody_reads():
    lines = shown(table(*(row("a", number, 1.0) for number in range(1, MOST_ROWS + 6))))
    assert "5 more rows" in " ".join(lines)
    assert len(lines) < MOST_ROWS + 20


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "[bold]x", "a\x07b", "\ud800"])
def test_names_from_files_cannot_command_a_terminal(name):
    lines = shown(table(row(name, 4, 22.5)))
    assert not any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for line in lines for c in line)
    assert len(lines) == len(shown(table(row("plain", 4, 22.5))))
    if name.startswith("[bold]"):
        assert any(line.startswith("[bold]x") for line in lines)


def test_markdown_has_what_people_see():
    lines = to_markdown(
        [table(row("a", 4, 22.5, best=frozenset({MEAN.name})), caption="measured", notes=("why",))]
    ).splitlines()
    assert lines == [
        "## flexbench petals",
        "",
        "measured",
        "",
        "| model | clients | tok/s mean | tok/s low |",
        "| --- | ---: | ---: | ---: |",
        "| a | 4 | **22.5** | 11.25 |",
        "",
        "- why",
    ]


def test_of_a_table_without_rows_only_its_notes_are_shown():
    empty = table(notes=("nothing can be compared",))
    assert shown(empty) == ["flexbench petals", "nothing can be compared"]
    assert "|" not in to_markdown([empty])


def test_names_are_no_markup_in_markdown():
    text = to_markdown([table(row("a|b\r\n<b>`*_[c](d)", 4, 22.5))])
    assert text.splitlines()[4].startswith("| a\\|b \\<b\\>\\`\\*\\_\\[c\\](d) | 4 |")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (22.5312, "22.53"), (0.045678, "0.04568"), (12345.6, "12346"), (1.5e7, "1.5e+07")],
)
def test_figures_have_four_digits(value, text):
    assert format_figure(value) == text


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (Kind.RATIO, 1.23456, "1.235"),
        (Kind.CHANGE, -0.0512, "-5.1%"),
        (Kind.COUNT, 12, "12"),
        (Kind.FIGURE, None, "-"),
        (Kind.QUANTITY, 3 * 2**30, "3 GiB"),
        (Kind.TEXT, "a", "a"),
    ],
)
def test_each_kind_of_value_is_written_its_way(kind, value, text):
    column = Column(name="x", heading="x", kind=kind)
    assert cell(column, Row(values={"x": value, "unit": "bytes"})) == text


def test_rows_that_look_alike_are_told_apart_instead_of_showing_more_figures():
    overlap = Column(name="overlap", heading="overlap", kind=Kind.TEXT, priority=6)
    other = Column(name="other", heading="other", kind=Kind.TEXT, priority=5)
    more = Column(name="more", heading="tok/s\nmore", priority=3)
    rows = [
        Row(values={"model": "a", "overlap": word, "other": "same", MEAN.name: 1.5, "more": 2.5})
        for word in ("true", "false")
    ]
    alike = Table(name="runs", title="t", columns=(MODEL, overlap, other, MEAN, more), rows=rows)
    wide, narrow = shown(alike, width=40), shown(alike, width=21)
    assert "same" in wide[-1]
    assert "2.5" in wide[-1]
    assert [line.split() for line in narrow if line.startswith("a ")] == [
        ["a", "true", "1.5"],
        ["a", "false", "1.5"],
    ]
    assert any("other" in line and "more" in line for line in narrow)


def test_names_in_csv_are_no_formulas_and_numbers_stay_numbers():
    text = to_csv([table(row('=cmd|" /C calc"!A0', 4, -22.5))])
    (line,) = csv.DictReader(io.StringIO(text))
    assert line["model"].startswith("'=")
    assert line["throughput_mean"] == "-22.5"
