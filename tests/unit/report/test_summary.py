"""Runs in groups, as tables."""

from __future__ import annotations

import math
import statistics
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.core.errors import ConfigError
from flexbench.report.selection import make_selection
from flexbench.report.statistics import MOST_RESAMPLED, bootstrap_interval, t_value
from flexbench.report.store import RunStore
from flexbench.report.summary import summarize
from flexbench.report.table import Kind
from tests.unit.report.stores import (
    column,
    known,
    point,
    run,
    shown,
    store_of,
    tables_of,
)

LARGEST = sys.float_info.max


# --- statistics ---


def test_the_figures_of_a_group_by_hand():
    (table,) = tables_of(
        *(run(throughput=value, mean_latency=1 / value) for value in (10.0, 20.0, 40.0, 50.0))
    )
    (row,) = table.rows
    assert row.values["num_runs"] == 4
    assert row.values["throughput_mean"] == 30.0
    assert row.values["throughput_median"] == 30.0
    assert (row.values["throughput_min"], row.values["throughput_max"]) == (10.0, 50.0)
    assert row.values["throughput_std"] == pytest.approx(math.sqrt(1000 / 3))
    # A twentieth of the way through three gaps: 0.15 of the first one, of 10.
    assert row.values["throughput_p5"] == pytest.approx(11.5)
    assert row.values["throughput_p95"] == pytest.approx(48.5)
    interval = bootstrap_interval([10.0, 20.0, 40.0, 50.0])
    assert (row.values["throughput_ci_low"], row.values["throughput_ci_high"]) == pytest.approx(
        interval
    )
    assert row.values["mean_latency_mean"] == pytest.approx((0.1 + 0.05 + 0.025 + 0.02) / 4)


def test_a_single_run_has_no_spread():
    (table,) = tables_of(run(throughput=20.0, mean_latency=None))
    (row,) = table.rows
    assert row.values["throughput_mean"] == row.values["throughput_p95"] == 20.0
    for name in ("throughput_std", "throughput_ci_low", "mean_latency_mean", "mean_latency_max"):
        assert row.values.get(name) is None


def test_the_columns_for_programs():
    (table,) = tables_of(run())
    of_figure = ["mean", "min", "max", "median", "std", "ci_low", "ci_high", "p5", "p95"]
    assert [one.name for one in table.columns] == [
        "system", "model", "weights", "basis", "dtype", "topology", "machine",
        "batch_size", "num_micro_batches", "num_processes", "sequence_length", "max_tokens",
        *(f"throughput_{name}" for name in of_figure),
        *(f"mean_latency_{name}" for name in of_figure),
        "num_runs",
    ]  # fmt: skip


def test_asked_for_percentiles_are_columns_of_their_own():
    (table,) = tables_of(
        *(run(throughput=float(value)) for value in range(101)), stats=["p99.9", "p50", "std"]
    )
    (row,) = table.rows
    assert row.values["throughput_p99_9"] == pytest.approx(99.9)
    assert [name for name in shown(table) if name.startswith("throughput")] == [
        "throughput_median", "throughput_std", "throughput_p99_9",
    ]  # fmt: skip


def test_of_many_runs_the_interval_is_students():
    count = MOST_RESAMPLED + 1
    values = [float(number % 7) for number in range(count)]
    (table,) = tables_of(*(run(throughput=value) for value in values))
    (row,) = table.rows
    half = t_value(0.95, count - 1) * statistics.stdev(values) / math.sqrt(count)
    assert row.values["throughput_ci_high"] == pytest.approx(statistics.fmean(values) + half)


@settings(max_examples=4, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-LARGEST, LARGEST), min_size=1, max_size=5), min_size=1, max_size=30
    )
)
def test_means_lie_between_the_smallest_and_the_largest(groups):
    (table,) = tables_of(
        *(
            run(batch_size=number, throughput=value)
            for number, values in enumerate(groups, start=1)
            for value in values
        )
    )
    for row, values in zip(table.rows, groups, strict=True):
        low, high = min(values), max(values)
        for name in ("mean", "median", "p5", "p95"):
            assert low <= row.values[f"throughput_{name}"] <= high
        mean = math.fsum(value / len(values) for value in values)
        largest = max(map(abs, values))
        assert row.values["throughput_mean"] == pytest.approx(mean, rel=1e-9, abs=largest * 1e-12)
        if len(values) > 1:
            assert math.isfinite(row.values["throughput_std"])
            assert math.isfinite(row.values["throughput_ci_high"])


def test_huge_values_do_no_harm_to_others():
    (table,) = tables_of(
        run(throughput=1e308),
        run(throughput=1.7e308),
        run(batch_size=2, throughput=0.001),
        run(batch_size=2, throughput=0.003),
    )
    assert column(table, "throughput_mean") == pytest.approx([1.35e308, 0.002])
    assert column(table, "throughput_std") == pytest.approx(
        [0.35e308 * math.sqrt(2), 0.001 * math.sqrt(2)]
    )


def test_in_very_large_tables_no_interval_is_resampled(monkeypatch):
    runs = [run(throughput=10.0), run(throughput=13.0), run(throughput=10.0)]
    monkeypatch.setattr("flexbench.report.statistics.MOST_RESAMPLED_AT_ONCE", 45)
    (table,) = tables_of(*runs)
    # Two figures of three runs are 46 units of work: 11 ± t(2) * sqrt(3) / sqrt(3).
    assert table.rows[0].values["throughput_ci_high"] == pytest.approx(11 + 4.3027, abs=1e-4)
    monkeypatch.setattr("flexbench.report.statistics.MOST_RESAMPLED_AT_ONCE", 46)
    (table,) = tables_of(*runs)
    interval = bootstrap_interval([10.0, 13.0, 10.0])
    assert table.rows[0].values["throughput_ci_high"] == pytest.approx(interval[1])


def test_a_hundred_thousand_runs_at_once():
    with RunStore() as store:
        store.connection.execute(
            "INSERT INTO runs (id, source, batch_size, num_micro_batches, num_processes,"
            " sequence_length, max_tokens, throughput, mean_latency, setup, figures, details)"
            " SELECT i, 'runs.tsv', 1 + i % 50, 1, 1 + i % 4, 512, 32, i, 1, '{}', '{}', '{}'"
            " FROM range(100_000) t(i)"
        )
        (table,) = summarize(store, make_selection())
    assert len(table.rows) == 100
    assert column(table, "num_runs") == [1000] * 100
    # Of batch 1 and 1 process: 0, 100, ... 99900.
    assert table.rows[0].values["throughput_mean"] == 49950.0
    assert table.rows[0].run_ids == tuple(range(0, 1000, 100))


# --- groups ---


def test_runs_of_one_configuration_are_one_row():
    (table,) = tables_of(
        known(throughput=10.0, setup={"overlap": True, "percent": "100 0"}),
        known(throughput=20.0, setup={"percent": "100 0", "overlap": True}),
        known(throughput=30.0, setup={"percent": "50 50", "overlap": True}),
        known(throughput=40.0, max_tokens=8, setup={"percent": "100 0", "overlap": True}),
    )
    assert column(table, "throughput_mean") == [40.0, 15.0, 30.0]
    assert column(table, "max_tokens") == [8, 32, 32]
    assert column(table, "percent") == ["100 0", "100 0", "50 50"]
    assert column(table, "num_runs") == [1, 2, 1]
    assert [row.run_ids for row in table.rows] == [(4,), (1, 2), (3,)]


def test_nothing_is_mixed_unless_it_is_asked_for():
    (table,) = tables_of(
        known(), known(weights="real"), known(basis="projected"), known(machine="M2")
    )
    assert column(table, "num_runs") == [1, 1, 1, 1]
    assert not any(row.is_mixed for row in table.rows)


def test_groups_by_any_columns():
    (table,) = tables_of(
        known(batch_size=1, throughput=10.0, setup={"overlap": True}),
        known(batch_size=2, throughput=20.0, setup={"overlap": True}),
        known(batch_size=2, throughput=60.0, setup={"overlap": False}),
        group_by=["overlap,max_tokens"],
    )
    assert column(table, "overlap") == [False, True]
    assert column(table, "throughput_mean") == [60.0, 15.0]
    assert column(table, "model") == ["facebook/opt-6.7b"] * 2
    assert shown(table)[:2] == ["overlap", "max_tokens"]
    assert "facebook/opt-6.7b" in table.caption


def test_options_keep_their_types():
    values = [True, "true", 1, 1.5, "1", None]
    runs = [known(setup={"option": value} if value is not None else {}) for value in values]
    for options in ({}, {"group_by": ["option"]}):
        (table,) = tables_of(*runs, **options)
        found = column(table, "option")
        assert sorted(map(repr, found)) == sorted(map(repr, values))
    (table,) = tables_of(known(setup={"option": True}), known(setup={"option": False}))
    assert {one.name: one.kind for one in table.columns}["option"] is Kind.TEXT
    (table,) = tables_of(known(setup={"option": {"b": [1]}}))
    assert column(table, "option") == ['{"b": [1]}']


def test_columns_by_the_headings_of_a_table():
    (table,) = tables_of(
        point(2, throughput=4.0), point(16, throughput=2.0), group_by=["clients"], sort=["-tok/s"]
    )
    assert shown(table)[0] == "concurrency"
    assert column(table, "concurrency") == [2, 16]
    assert {one.name: one.kind for one in table.columns}["concurrency"] is Kind.COUNT
    (table,) = tables_of(*(known(batch_size=size) for size in (1, 2)), sort=["-batch"])
    assert column(table, "batch_size") == [2, 1]
    # A name of its own comes first.
    (table,) = tables_of(known(setup={"new": 3}), group_by=["new"])
    assert column(table, "new") == [3]


def test_filters_leave_runs_out():
    with store_of(known(), known(batch_size=4), point(2)) as store:
        tables = summarize(store, make_selection(filters=["system = dist", "batch_size > 1"]))
        assert [column(table, "batch_size") for table in tables] == [[4]]
        assert summarize(store, make_selection(filters=["system = petals"])) == []


def test_unknown_columns_and_figures_are_errors():
    with store_of(known()) as store:
        for options, problem in (
            ({"group_by": ["colour"]}, "^--group-by: there is no column 'colour'"),
            ({"figures": ["speed"]}, "^--figure: there is no figure 'speed'"),
            (
                {"sort": ["speed"]},
                "^--sort: there is no column 'speed'; there are: system, .* more: the columns",
            ),
        ):
            with pytest.raises(ConfigError, match=problem):
                summarize(store, make_selection(**options))


# --- tables ---


def test_a_table_for_each_system():
    tables = tables_of(
        run(), point(2), known(system="petals"), known(), known(system="other\nsystem")
    )
    assert [table.title for table in tables] == [
        "flexbench petals", "flexbench dist", "flexbench serving", "flexbench other system",
        "Runs without a record",
    ]  # fmt: skip
    assert {table.name for table in tables} == {"runs"}


def test_what_all_have_in_common_is_told_once():
    (table,) = tables_of(
        known(setup={"overlap": True}), known(batch_size=4, setup={"overlap": True})
    )
    assert (
        table.caption
        == "facebook/opt-6.7b, float32, dummy weights, measured, 4 stages, EPYC, 2 CPUs"
    )
    assert table.notes == ("Same for all rows: overlap yes.",)
    assert shown(table)[:5] == [
        "batch_size", "num_micro_batches", "num_processes", "sequence_length", "max_tokens",
    ]  # fmt: skip


def test_what_varies_is_a_column():
    (table,) = tables_of(
        known(setup={"overlap": True, "num_prompts": 1}),
        known(model="facebook/opt-30b", setup={"overlap": False, "num_prompts": 1}),
    )
    assert shown(table)[0] == "model"
    assert "overlap" in shown(table)
    assert "num_prompts" not in shown(table)
    assert "facebook" not in table.caption


def test_an_option_that_repeats_a_column_is_shown_once():
    (table,) = tables_of(
        known(batch_size=1, setup={"gpu_batch_size": 1}),
        known(batch_size=4, setup={"gpu_batch_size": 4}),
    )
    assert "batch_size" in shown(table)
    assert "gpu_batch_size" not in shown(table)
    assert column(table, "gpu_batch_size") == [1, 4]


def test_runs_without_a_record_have_their_five_columns():
    (table,) = tables_of(run(throughput=10.0), run(throughput=20.0))
    assert table.caption == ""
    assert shown(table) == [
        "batch_size", "num_micro_batches", "num_processes", "sequence_length", "max_tokens",
        "throughput_mean", "throughput_ci_low", "throughput_ci_high",
        "mean_latency_mean", "mean_latency_ci_low", "mean_latency_ci_high", "num_runs",
    ]  # fmt: skip
    (single,) = tables_of(run())
    assert "throughput_ci_low" not in shown(single)


def test_dist_shows_prefill_and_decode_and_a_bubble_that_is_one():
    figures = {"prefill_throughput": 100.0, "decode_throughput": 7.0, "bubble_fraction": 0.0}
    (table,) = tables_of(known(figures=figures))
    assert shown(table)[5:] == [
        "throughput_mean", "mean_latency_mean", "prefill_throughput_mean",
        "decode_throughput_mean", "num_runs",
    ]  # fmt: skip
    (table,) = tables_of(known(figures=figures | {"bubble_fraction": 0.25}))
    assert "bubble_fraction_mean" in shown(table)
    by_name = {one.name: one for one in table.columns}
    assert by_name["throughput_mean"].help == "Total throughput = total_tokens / total_latency"
    assert by_name["throughput_mean"].heading == "total\ntok/s"


def test_serving_shows_load_rates_and_latencies():
    (table,) = tables_of(
        point(2, figures={"itl_p50": 0.01}),
        point(8, figures={"itl_p50": 0.02, "client_limited": 1.0, "timing_uncertain": 1.0}),
    )
    assert shown(table) == [
        "concurrency", "requests_per_s_mean", "throughput_mean", "ttft_p50_mean", "ttft_p99_mean",
        "itl_p50_mean", "e2e_p99_mean", "num_runs", "marks",
    ]  # fmt: skip
    assert column(table, "marks") == ["", "!~"]
    assert column(table, "num_client_limited") == [0, 1]
    assert column(table, "mean_latency_mean") == [5.0, 5.0]
    assert any("load generator was the limit" in note for note in table.notes)
    by_name = {one.name: one for one in table.columns}
    assert by_name["ttft_p99_mean"].help == "p99 of time to first token = first content - sent"
    assert by_name["concurrency"].kind is Kind.COUNT


def test_without_gaps_between_chunks_serving_shows_times_per_token():
    (table,) = tables_of(point(2, figures={"tpot_p50": 0.01}))
    assert "tpot_p50_mean" in shown(table)


def test_repeats_of_an_open_loop_are_one_configuration():
    (table,) = tables_of(
        point(None, rate_per_s=5.0, num_processes=3, throughput=10.0),
        point(None, rate_per_s=5.0, num_processes=4, throughput=12.0),
    )
    assert column(table, "num_runs") == [2]
    assert column(table, "rate_per_s") == [5.0]
    assert shown(table)[0] == "rate_per_s"


def test_figures_and_statistics_that_were_asked_for():
    tables = tables_of(
        known(figures={"bubble_fraction": 0.5}),
        point(2),
        figures=["ttft_p99", "mean_latency"],
        stats=["min", "max"],
    )
    assert shown(tables[0])[5:] == ["mean_latency_min", "mean_latency_max", "num_runs"]
    assert shown(tables[1])[1:] == [
        "ttft_p99_min", "ttft_p99_max", "mean_latency_min", "mean_latency_max", "num_runs",
    ]  # fmt: skip


def test_hostile_names_stay_on_their_line():
    model = "<script>alert(1)</script>\n\x1b[31m"
    (table,) = tables_of(known(model=model, setup={"a\nb": "x\x1by", "batch_size": "9"}))
    assert "\n" not in table.caption + "".join(table.notes)
    assert "\x1b" not in table.caption + "".join(table.notes)
    assert table.rows[0].values["model"] == model
    assert table.rows[0].values["batch_size"] == 1
    assert table.rows[0].values["setup.batch_size"] == "9"


def test_very_many_options_are_not_told_in_full():
    options = {f"option_{number:03}": number for number in range(200)}
    (table,) = tables_of(known(setup=options))
    (note,) = table.notes
    assert len(note) < 400
    assert "(200 options; --format json has all)" in note


# --- order ---


def test_rows_are_ordered_by_configuration_as_numbers():
    (table,) = tables_of(
        known(batch_size=16),
        known(batch_size=4),
        known(batch_size=4, setup={"level": 10}),
        known(batch_size=4, setup={"level": 9}),
    )
    assert column(table, "batch_size") == [4, 4, 4, 16]
    assert column(table, "level") == [None, 9, 10, None]


def test_sorted_by_columns_and_figures():
    runs = [
        known(batch_size=1, throughput=5.0),
        known(batch_size=2, throughput=9.0),
        known(batch_size=3, throughput=None),
        known(batch_size=4, throughput=9.0),
    ]
    assert column(tables_of(*runs, sort=["throughput"])[0], "batch_size") == [1, 2, 4, 3]
    # What is not known comes last in either direction, and equals keep their order.
    assert column(tables_of(*runs, sort=["-throughput"])[0], "batch_size") == [2, 4, 1, 3]
    assert column(tables_of(*runs, sort=["-throughput_max,-batch_size"])[0], "batch_size") == [
        4,
        2,
        1,
        3,
    ]


def test_points_are_ordered_by_their_load():
    """Whatever else differs and is not shown."""
    (table,) = tables_of(
        point(16, num_micro_batches=1),
        point(None, rate_per_s=10.0),
        point(2, num_micro_batches=8),
        point(None, rate_per_s=9.0),
        point(4, model="facebook/opt-125m"),
    )
    assert column(table, "concurrency") == [4, 2, 16, None, None]
    assert column(table, "rate_per_s") == [None, None, None, 9.0, 10.0]


def test_what_tells_a_projection_is_never_left_out():
    (table,) = tables_of(
        known(setup={"overlap": True}),
        known(basis="projected", weights="real", machine="M2", setup={"overlap": False}),
        known(model="facebook/opt-30b"),
    )
    priorities = {one.name: one.priority for one in table.columns if one.is_shown}
    assert [priorities[name] for name in ("model", "weights", "basis")] == [0, 0, 0]
    # The highest go first.
    assert 0 < priorities["machine"] < priorities["num_runs"] < priorities["overlap"]
    (table,) = tables_of(point(2), point(2), point(4))
    priorities = {one.name: one.priority for one in table.columns}
    assert priorities["ttft_p99_mean"] < priorities["throughput_ci_low"]


def test_a_load_that_few_rows_have_goes_early():
    loads = [point(2 * number) for number in range(1, 9)]
    (table,) = tables_of(*loads, point(None, rate_per_s=5.0))
    priorities = {one.name: one.priority for one in table.columns}
    assert priorities["concurrency"] == 0
    assert priorities["rate_per_s"] > priorities["ttft_p99_mean"]
