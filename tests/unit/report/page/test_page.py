"""The document as text; what a browser makes of it is in tests/browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("jinja2", reason="the page needs the plots extra")

from flexbench.report.page.page import PageContent, RunDetails, to_page
from flexbench.report.table import Column, Kind, Row, Table
from tests.unit.report.page.reading import Document

HOSTILE = [
    "<script>window.__pwned = 1</script>",
    "</script><script>window.__pwned = 1</script>",
    '"><img src=x onerror="window.__pwned = 1">',
    "javascript:alert(1)",
    "{{ 7 * 7 }}",
    "]]> --> <!-- </style>",
]


def run(number: int, title: str = "petals", source: str = "a.jsonl:1", **details) -> RunDetails:
    return RunDetails(id=number, title=title, source=source, details=details)


def content(**changes) -> PageContent:
    table = Table(
        name="runs",
        title="Runs by configuration",
        columns=[
            Column(name="system", heading="system", kind=Kind.TEXT),
            Column(name="throughput_mean", heading="tok/s\nmean", help="mean over runs"),
        ],
        rows=[
            Row(values={"system": "petals", "throughput_mean": 22.53}, run_ids=(1, 2)),
            Row(
                values={"system": "dist", "throughput_mean": 104.0},
                best=frozenset({"throughput_mean"}),
                run_ids=(3,),
            ),
        ],
        caption="All runs: 256 prompt tokens.",
        notes=["Two of them are projections."],
    )
    known = {
        "title": "Report",
        "made_at": "2026-01-02 03:04 UTC",
        "summary": ["dist is 4.6 times as fast.", "Three runs."],
        "tables": [table],
        "runs": [run(1), run(2), run(3, configuration={"load": {"concurrency": 2}})],
        "notes": ["One line was skipped."],
        "versions": {"flexbench": "1.2.3", "duckdb": "2.0"},
    }
    return PageContent(**{**known, **changes})


def test_everything_stands_in_the_order_of_reading():
    document = Document(to_page(content(verdict="No regression.", is_verdict_good=True)))
    assert document.find("title") == ["Report"]
    assert document.find("h1") == ["Report"]
    assert document.find("h2") == [
        "Summary",
        "Runs by configuration",
        "Runs",
        "Notes",
        "What the words mean",
        "How the figures are defined",
    ]
    (summary,) = document.find("section", id="summary")
    assert summary == "Summary ✓ Verdict: No regression. dist is 4.6 times as fast. Three runs."


@pytest.mark.parametrize(("is_good", "mark"), [(True, "✓"), (False, "✗"), (None, "?")])
def test_a_verdict_has_a_mark_beside_its_words(is_good, mark):
    document = Document(to_page(content(verdict="So it is.", is_verdict_good=is_good)))
    assert f"{mark} Verdict: So it is." in document.find("section", id="summary")[0]


def test_the_page_says_what_it_is_and_of_what():
    page = Document(to_page(content(introduction="It is a report.", subject="Of results/.")))
    assert page.find("p", **{"class": "introduction"}) == ["It is a report. What the words mean"]
    assert page.find("p", **{"class": "subject"}) == ["Of results/."]
    assert Document(to_page(content())).find("p", **{"class": "introduction"})[0]
    assert not Document(to_page(content())).find("p", **{"class": "subject"})


def test_words_are_explained_where_they_are_used():
    (words,) = Document(to_page(content())).find("section", id="words")
    assert "petalsA Petals swarm" in words
    assert "promptTokens of a prompt" in words
    assert "projected" not in words


def test_a_table_says_what_its_command_measures():
    about = [row for row in content().tables[0].rows if row.values["system"] == "dist"]
    table = replace(content().tables[0], rows=about)
    (found,) = Document(to_page(content(tables=[table]))).find("p", **{"class": "about"})
    assert found.startswith("OPT models whose weights")


def test_no_verdict_no_mark():
    assert 'class="verdict' not in to_page(content())


def test_a_table_has_headings_figures_and_what_they_mean():
    document = Document(to_page(content()))
    assert document.find("th", scope="col") == ["Runs", "system", "tok/s mean"]
    assert document.find("td", **{"class": "number"}) == ["22.53", "★104, best"]
    assert document.find("td", **{"data-value": "22.53"}) == ["22.53"]
    assert document.find("caption") == ["Runs by configuration"]
    assert document.find("dd")[0] == "mean over runs"
    assert "★ The best of those that can be compared." in document.find("p")


def test_every_link_leads_somewhere_in_the_page():
    document = Document(to_page(content()))
    ids = [attributes["id"] for _, attributes, _ in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for tag, a, _ in document.elements if tag == "a"]
    assert "#run-3" in links
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_nothing_is_loaded():
    document = Document(to_page(content()))
    for tag, attributes, _ in document.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert "style" not in attributes
    assert "url(" not in document.raw("style")[0]
    assert "@import" not in document.raw("style")[0]


def test_the_policy_names_exactly_the_scripts_and_styles_that_are_there():
    document = Document(to_page(content()))
    (policy,) = [a["content"] for tag, a, _ in document.elements if "http-equiv" in a]
    rules = dict(rule.split(" ", maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    assert "unsafe" not in policy
    scripts = [
        "".join(texts) for tag, a, texts in document.elements if tag == "script" and "type" not in a
    ]
    assert rules["script-src"].split() == [hashed(script) for script in scripts]
    assert rules["style-src"].split() == [hashed(style) for style in document.raw("style")]


def hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_text_wherever_it_stands(name):
    def with_name(text: str) -> PageContent:
        table = Table(
            name="runs",
            title=text,
            columns=[Column(name="model", heading=text, kind=Kind.TEXT, help=text)],
            rows=[Row(values={"model": text}, best=frozenset({"model"}), run_ids=(1,))] * 2,
            caption=text,
            notes=[text],
        )
        return content(
            title=text,
            made_at=text,
            summary=[text],
            verdict=text,
            tables=[table],
            runs=[run(1, text, text, **{text: {text: text}, "single": [text]})],
            notes=[text],
            versions={text: text},
        )

    page = to_page(with_name(name))
    document, harmless = Document(page), Document(to_page(with_name("harmless")))
    assert [tag for tag, _, _ in document.elements] == [tag for tag, _, _ in harmless.elements]
    assert [sorted(a) for _, a, _ in document.elements] == [
        sorted(a) for _, a, _ in harmless.elements
    ]
    assert document.find("title") == document.find("h1") == [name]
    assert document.find("dd").count(name) == 3  # of the column's help and of both details
    (data,) = document.raw("script", id="run-1-json")
    assert json.loads(data) == {name: {name: name}, "single": [name]}
    assert not re.search("[<>&\u2028]", data)


def test_characters_that_are_not_seen_are_not_written():
    name = "a\u202eb\u2066c\x1b[31md\x00e\nf\ud800g"
    page = to_page(content(title=name, runs=[run(1, name, name, key=name)]))
    page.encode()  # half a surrogate pair could not be
    assert not set("\u202e\u2066\x1b\x00\ud800") & set(page)
    assert Document(page).find("h1") == ["a�b�c�[31md�e f�g"]


def test_the_details_of_a_run_are_all_there():
    document = Document(to_page(content()))
    (shown,) = document.find("details", id="run-3")
    assert "petals a.jsonl:1" in shown
    assert "Configuration load.concurrency2" in shown
    (data,) = document.raw("script", id="run-3-json")
    assert json.loads(data) == {"configuration": {"load": {"concurrency": 2}}}


def test_too_many_runs_are_counted():
    runs = [run(number) for number in range(1, 502)]
    document = Document(to_page(content(runs=runs)))
    assert len(document.find("details", **{"class": "run"})) == 500
    assert "The first 500; 1 more run would make" in document.find("section", id="runs")[0]
    document = Document(to_page(content(runs=runs[:3], num_runs=1_000_003)))
    assert "The first 3; 1000000 more runs would" in document.find("section", id="runs")[0]
    assert "would make" not in to_page(content())


def test_a_row_without_details_on_the_page_links_to_none():
    document = Document(to_page(content(runs=[run(2)])))
    assert document.find("a", href="#run-2") == ["run 2"]
    assert not document.find("a", href="#run-1")


def test_without_charts_there_is_no_library():
    page = to_page(content())
    assert "<figure" not in page
    assert len(page) < 100_000


def test_definitions_are_those_of_the_figures_shown():
    (shown,) = Document(to_page(content())).find("section", id="definitions")
    assert "total_tokens / wall_clock_time" in shown
    assert "Inter-token latency" not in shown
    assert "docs/metrics.md" in shown


def test_an_empty_report_is_a_page():
    empty = replace(content(), tables=[], runs=[], notes=[], versions={}, summary=[])
    document = Document(to_page(empty))
    assert document.find("h2") == ["Summary", "How the figures are defined"]


def test_mixed_rows_and_unknown_values_are_told():
    table = Table(
        name="runs",
        title="Runs",
        columns=[
            Column(name="system", heading="system", kind=Kind.TEXT),
            Column(name="throughput", heading="tok/s"),
        ],
        rows=[Row(values={"system": "dist", "throughput": None}, is_mixed=True)],
    )
    document = Document(to_page(content(tables=[table])))
    assert document.find("td") == ["⚠ mixed dist", "-"]
    assert document.find("td", **{"class": "number"}) == ["-"]
    assert "data-unknown" in to_page(content(tables=[table]))


def test_a_hundred_thousand_cells_take_no_longer_than_a_breath():
    columns = [Column(name=f"c{number}", heading=f"c{number}") for number in range(10)]
    rows = [Row(values={column.name: 1.5 * n for column in columns}) for n in range(10_000)]
    page = to_page(content(tables=[Table(name="runs", title="T", columns=columns, rows=rows)]))
    assert page.count("<td") == 100_000


@pytest.mark.parametrize(
    ("made_at", "shown"),
    [
        ("2026-01-02T04:04:59.123+01:00", "Made 2026-01-02 03:04 UTC"),
        ("2026-01-02", "Made 2026-01-02"),
        ("this morning", "Made this morning"),
    ],
)
def test_the_moment_is_told_to_the_minute(made_at, shown):
    document = Document(to_page(content(made_at=made_at, versions={})))
    assert document.find("p", **{"class": "made"}) == [shown]
