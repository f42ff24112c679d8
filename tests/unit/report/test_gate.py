"""Different things are not averaged unnoticed."""

from __future__ import annotations

import pytest

from flexbench.core.errors import ConfigError
from flexbench.report.gate import in_words, joined
from flexbench.report.selection import make_selection
from flexbench.report.summary import summarize
from tests.unit.report.stores import column, known, point, run, store_of, tables_of


def problem_of(*runs, **options) -> str:
    with store_of(*runs) as store, pytest.raises(ConfigError) as error:
        summarize(store, make_selection(**options))
    assert error.value.option == "--group-by"
    return error.value.problem


def test_dummy_and_real_weights_are_not_averaged():
    runs = [known(), known(), known(weights="real"), known(), known(weights="real")]
    assert problem_of(*runs, group_by=["num_processes"]) == (
        "runs that differ in weights would be averaged in the group with system dist, num_processes "
        "4 (weights: dummy in 3 runs, real in 2 runs); add weights to --group-by, --filter them, or --allow-mixed"
    )
    # With the column there is nothing to stop for.
    (table,) = tables_of(*runs, group_by=["num_processes", "weights"])
    assert column(table, "num_runs") == [3, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "facebook/opt-30b"), ("basis", "projected"), ("dtype", "float16"),
     ("topology", "2 stages"), ("machine", "M2"), ("weights", None)],
)  # fmt: skip
def test_the_gate_stops_for_each_of_its_columns(name, value):
    problem = problem_of(known(), known(**{name: value}), group_by=["batch_size"])
    assert f"runs that differ in {name} would be averaged" in problem
    assert in_words(value) in problem


def test_what_is_not_known_is_like_what_is_not_known_only():
    (table,) = tables_of(run(), run(), group_by=["batch_size"])
    assert column(table, "num_runs") == [2]
    unknown = known(weights=None)
    problem = problem_of(unknown, known(), known(), group_by=["batch_size"])
    assert "weights: dummy in 2 runs, not known in 1 run" in problem


def test_the_group_that_is_named_is_the_mixed_one():
    problem = problem_of(
        known(batch_size=1), known(batch_size=1), known(batch_size=2, max_tokens=8),
        known(batch_size=2, dtype="float16", machine="M2", max_tokens=8),
        group_by=["batch_size,max_tokens"],
    )  # fmt: skip
    assert "runs that differ in dtype, machine" in problem
    assert "in the group with system dist, batch_size 2, max_tokens 8" in problem
    assert "add dtype,machine to --group-by" in problem


def test_groups_that_differ_may_stand_beside_each_other():
    tables = tables_of(
        known(batch_size=1), known(batch_size=2, weights="real"), group_by=["batch_size"]
    )
    assert column(tables[0], "weights") == ["dummy", "real"]
    assert not any(row.is_mixed for row in tables[0].rows)


def test_mixed_rows_are_marked_where_they_are_allowed():
    (table,) = tables_of(
        known(batch_size=1, throughput=10.0),
        known(batch_size=1, throughput=20.0, weights="real"),
        known(batch_size=2),
        group_by=["batch_size"],
        allow_mixed=True,
    )
    assert [row.is_mixed for row in table.rows] == [True, False]
    assert column(table, "weights") == ["dummy + real", "dummy"]
    assert column(table, "throughput_mean") == [15.0, 20.0]
    assert "Marked rows average runs that differ in weights." in table.notes


def test_systems_have_tables_of_their_own_however_runs_are_grouped():
    runs = (known(), known(system="petals"), known(batch_size=2), run())
    tables = tables_of(*runs, group_by=["batch_size"])
    assert [table.title for table in tables] == [
        "flexbench petals", "flexbench dist", "Runs without a record",
    ]  # fmt: skip
    assert [column(table, "num_runs") for table in tables] == [[1], [1, 1], [1]]
    assert not any(row.is_mixed for table in tables for row in table.rows)


def test_runs_without_the_figures_asked_for_do_not_count():
    runs = [point(2), point(2, figures={"ttft_p99": 0.4}), known(), known(weights="real")]
    (table,) = tables_of(*runs, group_by=["model"], figures=["ttft_p99"])
    assert column(table, "num_runs") == [2]
    assert column(table, "ttft_p99_mean") == pytest.approx([0.3])
    assert "weights" in problem_of(*runs, group_by=["model"])
    with store_of(*runs) as store, pytest.raises(ConfigError, match=r"^--figure: none of the sel"):
        summarize(store, make_selection(figures=["ttft_p99"], filters=["system = dist"]))


def test_hostile_values_in_a_message_stay_on_its_line():
    problem = problem_of(known(model="a\nb\x1b[31m" + 500 * "x"), known(), group_by=["batch_size"])
    assert problem.isprintable()
    assert len(problem) < 500


def test_many_values_are_not_all_listed():
    assert joined(["a", "b"]) == "a + b"
    assert joined([str(number) for number in range(9)]) == "0 + 1 + 2 + 3 + 5 more"
    problem = problem_of(*(known(machine=f"M{one}") for one in range(9)), group_by=["batch_size"])
    assert "M0 in 1 run, M1 in 1 run, M2 in 1 run, M3 in 1 run, 5 more" in problem
