"""What a person types to select runs."""

from __future__ import annotations

import pytest

from flexbench.core.errors import ConfigError
from flexbench.report.selection import (
    Filter,
    SortKey,
    make_selection,
    parse_filter,
    parse_sort,
    parse_stat,
    where,
)
from tests.unit.report.stores import known, point, run, store_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_processes>=4", ("num_processes", ">=", "4")),
        (" model = facebook/opt-1.3b ", ("model", "=", "facebook/opt-1.3b")),
        ("machine != AMD <EPYC> = 7", ("machine", "!=", "AMD <EPYC> = 7")),
        ("load.rate <2.5", ("load.rate", "<", "2.5")),
        ("model = ''", ("model", "=", "")),
        ('model == "a b"', ("model", "==", "a b")),
        ("model = not known", ("model", "=", "not known")),
    ],
)
def test_a_filter_is_a_column_an_operator_and_a_value(text, expected):
    column, operator, value = expected
    assert parse_filter(text) == Filter(column=column, operator=operator, value=value)


@pytest.mark.parametrize("text", ["", "model", "= 4", ">=4", "model ~ opt", "batch_size ="])
def test_what_is_no_filter_is_an_error(text):
    with pytest.raises(ConfigError, match=r"^--filter: "):
        parse_filter(text)


def selected(store, *filters: str) -> list[int]:
    condition, parameters = where(store, [parse_filter(text) for text in filters])
    return [
        row["id"]
        for row in store.rows(
            f"SELECT id FROM runs WHERE {condition} ORDER BY id",  # noqa: S608
            parameters,
        )
    ]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], [1, 2, 3, 4]),
        (["num_processes >= 4"], [1, 2, 4]),
        (["num_processes = 4.0"], [1, 2]),
        (["num_processes != 4"], [3, 4]),
        (["throughput < 20"], [1]),
        (["model = facebook/opt-6.7b"], [2, 3, 4]),
        # What is not known is not facebook/opt-6.7b either.
        (["model != facebook/opt-6.7b"], [1]),
        (["model = not known"], [1]),
        (["model != not known"], [2, 3, 4]),
        (["started_at >= 2026-11-21"], [2]),
        # Options are compared as numbers, where the value is one.
        (["concurrency > 9"], [4]),
        (["concurrency = 2.0"], [3]),
        (["api = vllm", "concurrency <= 10"], [3, 4]),
        (["overlap = true"], [2]),
        (["overlap = yes"], [2]),
        (["overlap != yes"], [1, 3, 4]),
        # By the headings of a table.
        (["procs >= 4"], [1, 2, 4]),
        (["clients > 9"], [4]),
        (["tok/s < 20"], [1]),
        # Figures by their name.
        (["ttft_p99 <= 0.2"], [3]),
        (["ttft_p99 = not known"], [1, 2]),
    ],
)
def test_filters_select_runs(filters, expected):
    with store_of(
        run(throughput=10.0),
        known(setup={"overlap": True}, started_at="2026-11-21T10:00:00+00:00"),
        point(2),
        point(10, figures={"ttft_p99": 0.5}),
    ) as store:
        assert selected(store, *filters) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("colour = red", "there is no column 'colour'; there are: source, system, .* and 19 more"),
        ("num_proceses = 4", r"there is no column 'num_proceses'; did you mean num_processes\? \(26 more"),
        ("prompts = 4", r"did you mean sequence_length"),
        ("batch_size = four", "batch_size is compared with numbers, and 'four' is none"),
        ("ttft_p99 < fast", "compared with numbers"),
        ("throughput > nan", "compared with numbers"),
        ("throughput > 1_000", "compared with numbers"),
        ("model < not known", "goes with = and != only"),
    ],
)  # fmt: skip
def test_what_cannot_be_filtered_is_an_error(text, problem):
    with (
        store_of(known(setup={"overlap": True}), point(2)) as store,
        pytest.raises(ConfigError, match=f"^--filter: .*{problem}"),
    ):
        selected(store, text)


HOSTILE = "x' OR 1=1; DROP TABLE runs; --\"$.[0]"


def test_hostile_values_and_names_stay_values_and_names():
    with store_of(run(), known(model=HOSTILE, setup={HOSTILE.replace("=", ""): HOSTILE})) as store:
        assert selected(store, f"model = {HOSTILE}") == [2]
        assert selected(store, f"{HOSTILE.replace('=', '')} = {HOSTILE}") == [2]
        assert selected(store, f"machine = {HOSTILE}") == []
        with pytest.raises(ConfigError, match="there is no column"):
            selected(store, "1 OR 1 = 1")
        assert len(store) == 2


def test_sort_keys():
    assert parse_sort("model, -throughput") == (
        SortKey(column="model"),
        SortKey(column="throughput", is_descending=True),
    )
    for text in ("", "model,", "-", ","):
        with pytest.raises(ConfigError, match=r"^--sort: "):
            parse_sort(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("mean", "mean"), ("CI", "ci"), ("p99", "p99"), ("p99.9", "p99_9"), ("p99_9", "p99_9"),
     ("p5", "p5"), ("p05", "p5"), ("p50", "median"), (" std ", "std")],
)  # fmt: skip
def test_statistics_by_name(text, expected):
    assert parse_stat(text) == expected


@pytest.mark.parametrize("text", ["p0", "p100", "p", "p-1", "p1e2", "variance", "p99.9.9", "٩"])
def test_what_is_no_statistic_is_an_error(text):
    with pytest.raises(ConfigError, match=r"^--stat: must be mean, median"):
        parse_stat(text)


def test_a_selection_from_what_was_typed():
    selection = make_selection(
        group_by=["model,dtype", "model"], sort=["-throughput"], stats=["p99,ci", "p99"]
    )
    assert selection.group_by == ("model", "dtype")
    assert selection.stats == ("p99", "ci")
    assert selection.percentiles == (5.0, 50.0, 95.0, 99.0)
    assert make_selection().group_by is None
    assert make_selection().figures is None


@pytest.mark.parametrize(
    ("options", "named"),
    [({"group_by": ["a,,b"]}, "--group-by"), ({"figures": [""]}, "--figure"),
     ({"stats": ["mean,"]}, "--stat"), ({"seed": -1}, "--seed")],
)  # fmt: skip
def test_errors_name_the_option(options, named):
    with pytest.raises(ConfigError, match=f"^{named}: "):
        make_selection(**options)
