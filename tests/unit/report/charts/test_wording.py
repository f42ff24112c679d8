"""Names of configurations: short, distinct, and the whole truth in a note."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.report.charts.thinning import thin
from flexbench.report.charts.wording import (
    counted,
    interval_text,
    is_wide,
    left_out,
    name_configurations,
    to_slug,
)
from tests.unit.report.charts.runs import HOSTILE


def key(**changes):
    return {"system": "dist", "model": "m", "num_processes": 2, "max_tokens": 8, **changes}


def test_what_must_not_be_compared_unnoticed_is_always_in_a_name():
    names = name_configurations([key(weights="real"), key(model="n", weights="dummy")])
    assert names.names == ("real weights", "dummy weights")
    assert names.common == "dist, 2 ranks, 8 new"
    assert names.notes == ("They also differ in: model.",)
    names = name_configurations([key(basis="measured"), key(basis="projected", model="n")])
    assert names.names == ("measured", "projected")
    keys = [key(basis=b, model=m) for b in ("measured", "projected") for m in "mn"]
    assert name_configurations(keys).names == ("m", "n", "m, projected", "n, projected")


def test_of_the_rest_only_what_is_needed_is_in_a_name():
    names = name_configurations(
        [
            key(num_processes=1, max_tokens=8, setup={"a": 1, "ranks": 1}),
            key(num_processes=2, max_tokens=8, setup={"a": 1, "ranks": 2}),
            key(num_processes=3, max_tokens=9, setup={"a": 2, "ranks": 3}),
        ]
    )
    assert names.names == ("1 rank", "2 ranks", "3 ranks")
    # What has the same values as what is said adds nothing.
    assert names.notes == ("They also differ in: max tokens, a.",)


def test_what_is_not_known_is_said_only_where_nothing_else_can_be():
    names = name_configurations([key(dtype=None), key(model="n", dtype="float16")])
    assert names.names == ("m", "n")
    names = name_configurations([key(dtype=None), key(dtype="float16")])
    assert names.names == ("dtype not known", "float16")


def test_a_single_configuration_is_called_by_its_model():
    assert name_configurations([key()]).names == ("m",)
    assert name_configurations([key(model=None)]).names == ("dist",)
    assert name_configurations([]).names == ()


def test_settings_that_only_one_has_are_in_its_name():
    names = name_configurations(
        [key(setup={"overlap": True, "same": 1}), key(setup={"overlap": False, "same": 1})]
    )
    assert names.names == ("overlap", "no overlap")
    names = name_configurations([key(setup={"a": 0.5}), key(setup={})])
    assert names.names == ("a 0.5", "a not known")


def test_long_names_are_cut_and_told_in_full():
    long = "organization/" + "x" * 80
    names = name_configurations([key(model=long + "1"), key(model=long + "2")])
    assert len(set(names.names)) == 2
    assert all(len(name) <= 64 for name in names.names)
    assert names.notes == (
        f"“{names.names[0]}” is {long}1.",
        f"“{names.names[1]}” is {long}2.",
    )


@given(st.lists(st.text(max_size=60), min_size=1, max_size=8, unique=True))
def test_names_are_distinct_and_printable(models):
    names = name_configurations([key(model=model) for model in models]).names
    assert len(set(names)) == len(models)
    assert all(name.isprintable() for name in names)


def test_hostile_values_stay_text_on_one_line():
    names = name_configurations([key(model=HOSTILE), key(setup={HOSTILE: HOSTILE})])
    assert all(name.isprintable() for name in (*names.names, *names.notes, names.common))


@pytest.mark.parametrize(
    ("count", "word", "text"),
    [
        (1, "client", "1 client"),
        (8, "client", "8 clients"),
        (3, "process", "3 processes"),
        (6, "micro-batch", "6 micro-batches"),
        (2.5, "client", "2.5 clients"),
    ],
)
def test_counted(count, word, text):
    assert counted(count, word) == text


def test_what_is_left_out_is_named_up_to_five():
    assert left_out(["a", "b"], 2) == ["Not drawn: 2 configurations: a; b."]
    assert left_out(["a"], 1, "figure") == ["Not drawn: 1 figure: a."]
    assert left_out(list("abcdef"), 9) == ["Not drawn: 9 configurations: a; b; c; d; e; 4 more."]
    assert left_out(["a"], 1, because="as it is") == ["Not drawn: 1 configuration as it is: a."]
    assert left_out([], 0) == []
    assert left_out([], -3) == []


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("facebook/OPT-125m, 2 stages", "facebook-opt-125m-2-stages"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 50, "x" * 40),
        ("\x1b[31m\n", "31m"),
        ("模型", ""),
    ],
)
def test_slugs_are_safe_in_names_of_files(text, slug):
    assert to_slug(text) == slug


def test_intervals_without_a_width_are_one_value():
    assert interval_text(1.0, 2.5, "s") == "1 to 2.5 s"
    assert interval_text(1.0, 1.0, "s") == "1 s"


def test_is_wide():
    assert is_wide([1.0, 30.1])
    assert not is_wide([1.0, 30.0])
    assert not is_wide([0.0, 1000.0])
    assert not is_wide([])


@given(st.lists(st.integers(), max_size=50), st.integers(2, 20))
def test_thinning_keeps_order_and_ends(items, most):
    thinned = thin(items, most)
    assert len(thinned) == min(len(items), most)
    if items:
        assert (thinned[0], thinned[-1]) == (items[0], items[-1])
    remaining = iter(items)
    assert all(one in remaining for one in thinned)
