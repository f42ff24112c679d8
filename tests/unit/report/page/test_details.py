"""A run's details, however they are nested."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("jinja2", reason="the page needs the plots extra")

from flexbench.report.page.details import (
    MOST_BYTES,
    MOST_CHARACTERS,
    MOST_ENTRIES,
    MOST_JSON,
    MOST_RUNS,
    RunDetails,
    to_view,
    to_views,
)
from flexbench.report.page.page import PageContent, to_page


def view(details):
    return to_view(RunDetails(id=1, title="t", source="s", details=details))


def groups(details):
    return {group.heading: list(group.entries) for group in view(details).groups}


def test_values_stand_under_their_outermost_name():
    found = groups(
        {
            "system": "serving",
            "configuration": {"load": {"concurrency": 2, "rate_per_s": None}, "slo": []},
            "client_figures": {"is_late": False, "error": 0.125},
            "status": "ok",
        }
    )
    assert found == {
        "Run": [("system", "serving"), ("status", "ok")],
        "Configuration": [("load.concurrency", "2"), ("load.rate_per_s", "none"), ("slo", "none")],
        "Client figures": [("is_late", "no"), ("error", "0.125")],
    }


def test_lists_of_values_are_one_line_and_lists_of_objects_are_numbered():
    found = groups({"a": {"sizes": [1, 2.5, None], "stages": [{"rank": 0}, {"rank": 1, "x": {}}]}})
    assert found == {
        "A": [
            ("sizes", "1, 2.5, none"),
            ("stages.0.rank", "0"),
            ("stages.1.rank", "1"),
            ("stages.1.x", "none"),
        ]
    }


def test_a_command_can_be_copied_into_a_shell():
    found = groups(
        {"command": ["flexbench", "dist", "--model", "my model"], "a": {"command": "x y"}}
    )
    assert found == {
        "Run": [("command", "flexbench dist --model 'my model'")],
        "A": [("command", "x y")],
    }


def test_what_is_too_much_is_counted():
    found = view({"many": {str(number): number for number in range(MOST_ENTRIES + 7)}})
    assert len(found.groups[0].entries) == MOST_ENTRIES
    assert found.num_left_out == 7
    assert len(json.loads(found.json)["many"]) == MOST_ENTRIES + 7


def test_a_long_text_is_cut_and_says_so():
    ((_, text),) = groups({"log": "x" * (MOST_CHARACTERS + 1)})["Run"]
    assert text == "x" * MOST_CHARACTERS + f" … ({MOST_CHARACTERS + 1} characters)"


def test_what_no_function_could_go_into_is_still_shown():
    details: dict = {"deepest": 1}
    for _ in range(10_000):
        details = {"b": 2, "a": details}
    found = view(details)
    assert found.json is None
    assert found.groups[0].entries[0] == ("b", "2")
    assert found.num_left_out == 10_001 - MOST_ENTRIES


def test_no_details_no_groups():
    assert view({}).groups == []


def test_what_was_measured_each_time_is_counted():
    timeline = {"columns": ["what", "start_s", "end_s"], "rows": [["computing", 0.0, 1.0]] * 1234}
    details = {
        "stages": [{"rank": 0, "timeline": timeline}],
        "latencies_s": [0.5],
        "none": {"latencies_s": [], "timeline": None},
        "sizes": list(range(51)),
        "few": list(range(50)),
        "command": ["flexbench"] + ["-v"] * 50,
    }
    assert json.loads(view(details).json) == {
        "stages": [{"rank": 0, "timeline": "1,234 entries, not on this page"}],
        "latencies_s": "1 entry, not on this page",
        "none": {"latencies_s": [], "timeline": None},
        "sizes": "51 entries, not on this page",
        "few": list(range(50)),
        "command": ["flexbench"] + ["-v"] * 50,
    }
    found = groups(details)
    assert found["Stages"] == [("0.rank", "0"), ("0.timeline", "1,234 entries, not on this page")]
    assert ("sizes", "51 entries, not on this page") in found["Run"]


def test_a_page_of_many_runs_has_a_size():
    text = "<" * 20_000  # 2,000 of them are shown, as &lt;, and all are in the JSON, as \u003c
    runs = [RunDetails(id=n, title="t", source="s", details={"a": text}) for n in range(200)]
    num_shown = len(to_views(runs))
    # 8,000,000 / (2,000 * 4 + 20,000 * 6 and what is around them)
    assert num_shown == 62
    page = to_page(PageContent(title="t", made_at="now", summary=["s"], runs=runs))
    empty = to_page(PageContent(title="t", made_at="now", summary=["s"]))
    assert 0.95 * MOST_BYTES < len(page.encode()) - len(empty.encode()) < 1.01 * MOST_BYTES
    assert "The first 62; 138 more runs would make" in page


def test_200_runs_of_8_stages_with_timelines_are_all_there():
    timeline = {"columns": ["what", "start_s", "end_s"], "rows": [["computing", 0.125, 1.5]] * 100}
    stages = [{"rank": rank, "wall_s": 1.5, "timeline": timeline} for rank in range(8)]
    runs = [RunDetails(id=n, title="t", source="s", details={"stages": stages}) for n in range(200)]
    assert len(to_views(runs)) == 200


def test_runs_without_much_to_say_are_limited_by_number():
    runs = [RunDetails(id=n, title="t", source="s", details={}) for n in range(MOST_RUNS + 1)]
    assert len(to_views(runs)) == MOST_RUNS


def test_a_huge_run_leaves_room_for_others():
    huge = RunDetails(id=1, title="t", source="s", details={"log": "x" * 9_000_000})
    other = RunDetails(id=2, title="t", source="s", details={"log": "x" * (MOST_JSON // 2)})
    views = to_views([huge, other])
    assert [(one.id, one.json is None) for one in views] == [(1, True), (2, False)]
    assert views[0].groups[0].entries[0][1].endswith("(9000000 characters)")
