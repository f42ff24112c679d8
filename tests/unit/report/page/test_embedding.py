"""Data in script elements."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jinja2", reason="the page needs the plots extra")

from flexbench.report.page.embedding import content_hash, differences, printable_values, to_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_json_comes_back_and_ends_no_script(value):
    text = to_json(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()


def test_what_json_cannot_write_is_null():
    assert to_json({"a": [float("nan"), float("inf"), 1.5]}) == '{"a":[null,null,1.5]}'


def test_too_deep_is_an_error():
    value: list = []
    for _ in range(10_000):
        value = [value]
    with pytest.raises(RecursionError):
        to_json(value)


def test_the_hash_of_the_specification():
    # The example of the W3C's Content Security Policy: alert('Hello, world.');
    expected = "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='"
    assert content_hash("alert('Hello, world.');") == expected


@given(VALUES, VALUES)
def test_differences_make_one_into_the_other(one, other):
    holder = {"value": json.loads(json.dumps(one))}
    for path, value in differences(one, other):
        *before, last = ("value", *path)
        node = holder
        for key in before:
            node = node[key]
        node[last] = value
    assert holder["value"] == other


def test_only_what_differs_is_told():
    one = {"config": {"color": "black", "size": 3}, "values": [1, 2, 3], "layer": [{"a": 1}]}
    other = {"config": {"color": "white", "size": 3}, "values": [1, 2, 3], "layer": [{"b": 1}]}
    assert list(differences(one, other)) == [
        (("config", "color"), "white"),
        (("layer", 0), {"b": 1}),
    ]


def test_texts_are_printable():
    assert printable_values({"a": ["x\x1by", 1, None], "b": "z"}) == {
        "a": ["x�y", 1, None],
        "b": "z",
    }
