"""A run's details, however they are nested."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("jinja2", reason="the page needs the plots extra")

from flexbench.report.page.details import MOST_CHARACTERS, MOST_ENTRIES, RunDetails, to_view


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
