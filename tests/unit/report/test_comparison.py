"""New runs beside those of a baseline."""

from __future__ import annotations

import pytest

from flexbench.core.errors import ConfigError
from tests.unit.report.stores import (
    column,
    compared,
    known,
    point,
    repeats,
    run,
    shown,
    verdicts,
)

# --- two runs of the same configuration, and a slowed one ---


def test_two_runs_of_the_same_configuration_are_equal():
    found = compared(
        [known(throughput=20.0, mean_latency=5.0)], [known(throughput=19.5, mean_latency=5.1)]
    )
    assert verdicts(found) == ["equal", "equal"]
    assert not found.has_regression
    assert found.verdict == "No figure is worse than the baseline's by more than 5%: 2 equal."
    assert column(found.table, "ratio") == [0.975, pytest.approx(1.02)]
    assert column(found.table, "ratio_ci_low") == [None, None]
    assert "reason" not in shown(found.table)


def test_a_slowed_run_is_slower():
    found = compared(
        [known(throughput=20.0, mean_latency=5.0)], [known(throughput=14.0, mean_latency=6.5)]
    )
    assert verdicts(found) == ["slower", "slower"]
    assert found.has_regression
    assert column(found.table, "figure") == ["throughput", "mean_latency"]
    assert column(found.table, "is_regression") == [True, True]
    assert column(found.table, "reason") == ["one run each: noise not known"] * 2
    assert "reason" in shown(found.table)
    assert found.verdict == (
        "2 of 2 figures are worse than the baseline's by more than 5%; the worst: throughput is 0.7 "
        "times the baseline's."
    )


def test_a_faster_run_is_faster():
    found = compared(
        [known(throughput=20.0, mean_latency=5.0)], [known(throughput=30.0, mean_latency=4.0)]
    )
    assert verdicts(found) == ["faster", "faster"]
    assert not found.has_regression


@pytest.mark.parametrize(
    ("now", "max_regression", "expected"),
    [(19.0, 0.05, "equal"), (18.9, 0.05, "slower"), (18.9, 0.10, "equal"), (19.9, 0.0, "slower"),
     (20.0, 0.0, "equal"), (21.0, 0.05, "equal"), (21.1, 0.05, "faster")],
)  # fmt: skip
def test_what_is_accepted_is_a_share_of_the_baselines(now, max_regression, expected):
    found = compared(repeats(20.0), repeats(now), max_regression=max_regression)
    assert verdicts(found) == [expected]
    assert found.has_regression == (expected == "slower")


# --- matching ---


def test_runs_are_matched_by_their_whole_configuration():
    old = [
        *repeats(10.0, batch_size=1),
        *repeats(20.0, batch_size=1, setup={"overlap": True, "percent": "100 0"}),
        *repeats(30.0, batch_size=2),
    ]
    new = [
        *repeats(33.0, batch_size=2),
        *repeats(22.0, batch_size=1, setup={"percent": "100 0", "overlap": True}),
        *repeats(11.0, batch_size=1),
    ]
    found = compared(old, new)
    assert column(found.table, "ratio") == pytest.approx([1.1, 1.1, 1.1])
    assert shown(found.table)[:2] == ["batch_size", "overlap"]


def test_what_only_one_has_is_told():
    old = [*repeats(10.0), *repeats(10.0, batch_size=3), *repeats(10.0, batch_size=5)]
    new = [*repeats(10.0), *repeats(10.0, batch_size=7)]
    notes = compared(old, new).table.notes
    assert "Configurations only in the baseline: 2 (batch_size 3; batch_size 5)." in notes
    assert "Configurations not in the baseline: 1 (batch_size 7)." in notes


def test_nothing_in_common_is_an_error_that_tells_the_nearest():
    with pytest.raises(ConfigError) as error:
        compared(
            [known(batch_size=2, max_tokens=8), known(batch_size=4, setup={"overlap": True})],
            [known(batch_size=8, setup={"overlap": True})],
        )
    assert error.value.message == (
        "--baseline: it has no configuration in common with the new runs; those most alike differ in "
        "batch_size was 4, now 8; --group-by the columns to match by, for instance --group-by "
        "model,num_processes"
    )


def test_nothing_selected_is_an_error():
    for old, new in (([], [run()]), ([run()], [])):
        with pytest.raises(ConfigError, match=r"^--baseline: .* predicted is not compared"):
            compared(old, new)


def test_other_statistics_than_means_are_not_compared():
    with pytest.raises(ConfigError, match=r"^--stat: median does not go with --baseline"):
        compared([run()], [run()], stats=["mean", "median"])
    assert verdicts(compared([run()], [run()], stats=["mean", "ci"])) == ["equal", "equal"]


def test_another_port_is_the_same_configuration():
    old = [point(2, setup={"api_url": f"http://127.0.0.1:{port}"}) for port in (8001, 8002)]
    new = [
        point(2, setup={"api_url": f"http://127.0.0.1:{port}"}, throughput=10.0)
        for port in (8002, 9000)
    ]
    found = compared(old, new, figures=["throughput"])
    assert column(found.table, "ratio") == [0.5, 0.5]
    assert column(found.table, "api_url") == ["http://127.0.0.1:8002", "http://127.0.0.1:9000"]
    assert any("api_url (was http://127.0.0.1:8001 or" in note for note in found.table.notes)
    with pytest.raises(ConfigError, match="no configuration in common"):
        compared(old, [point(4)])
    with pytest.raises(ConfigError, match="differ in machine cannot be compared"):
        compared(old, [point(2, machine="M2", setup={"api_url": "http://127.0.0.1:1"})])


def test_an_option_that_was_changed_on_purpose():
    old, new = (
        [known(throughput=speed, setup={"overlap": overlap, "pin_weight": True})]
        for speed, overlap in ((20.0, True), (10.0, False))
    )
    with pytest.raises(ConfigError, match="overlap was yes, now no; --group-by the columns"):
        compared(old, new)
    found = compared(old, new, group_by=["model,procs"])
    assert column(found.table, "ratio")[0] == 0.5
    assert shown(found.table)[:2] == ["model", "num_processes"]
    assert (
        "Options that are not the same on both sides: overlap (was yes, now no)."
        in found.table.notes
    )


def test_configurations_that_are_left_are_followed_by_what_to_do():
    old = [*repeats(10.0), *repeats(10.0, setup={"overlap": True})]
    new = [*repeats(10.0), *repeats(10.0, setup={"overlap": False})]
    assert any("--group-by model,num_processes" in note for note in compared(old, new).table.notes)
    assert not any("--group-by" in note for note in compared(old, old).table.notes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "real"), ("basis", "projected"),
     ("topology", "2 stages"), ("dtype", "float16"), ("machine", "M2"), ("machine", None)],
)  # fmt: skip
def test_different_things_are_not_compared(name, value):
    with pytest.raises(ConfigError) as error:
        compared([known(), known(batch_size=2)], [known(**{name: value}), known(batch_size=2)])
    assert error.value.message.startswith(
        f"--baseline: runs that differ in {name} cannot be compared: {name} was "
    )
    assert "--allow-mixed" in error.value.message


@pytest.mark.parametrize(
    "changes", [{"model": "facebook/opt-30b"}, {"system": "petals"}, {"system": None}]
)
def test_other_models_and_systems_do_not_keep_the_rest_from_being_compared(changes):
    old, new = [known(), known(batch_size=2)], [known(**changes), known(batch_size=2)]
    found = compared(old, new)
    assert column(found.table, "batch_size") == [2, 2]
    assert any(
        note.startswith("Configurations only in the baseline: 1") for note in found.table.notes
    )
    assert any(
        note.startswith("Configurations not in the baseline: 1") for note in found.table.notes
    )
    assert found.verdict.endswith(" 1 configuration of the baseline is missing now.")
    with pytest.raises(ConfigError, match="cannot be compared"):
        compared(old[:1], new[:1])


def test_different_things_are_compared_with_a_mark_where_that_is_allowed():
    found = compared(
        [known(), known(batch_size=2)],
        [known(weights="real", throughput=10.0), known(batch_size=2)],
        allow_mixed=True,
        figures=["throughput"],
    )
    assert [row.is_mixed for row in found.table.rows] == [False, True]
    assert column(found.table, "weights") == ["dummy", "dummy -> real"]
    assert "weights" in shown(found.table)
    assert "Marked rows compare runs that differ in weights." in found.table.notes
    assert found.has_regression


def test_a_counterpart_that_is_alike_is_preferred():
    found = compared(
        [known(throughput=10.0), known(throughput=40.0, weights="real")],
        [known(throughput=20.0), known(throughput=80.0, machine="M2", weights="real")],
        allow_mixed=True,
        figures=["throughput"],
    )
    assert column(found.table, "ratio") == [2.0, 2.0]
    assert [row.is_mixed for row in found.table.rows] == [False, True]


def test_rows_without_a_record_are_compared_with_such_only():
    assert verdicts(compared([run()], [run()])) == ["equal", "equal"]
    with pytest.raises(ConfigError, match=r"runs that differ in system, .* not known"):
        compared([run()], [known(setup={"overlap": True})])
    found = compared([run()], [known(setup={"overlap": True})], allow_mixed=True)
    assert [row.is_mixed for row in found.table.rows] == [True, True]


def test_groups_that_were_asked_for_are_matched():
    found = compared(
        [*repeats(10.0, batch_size=1), *repeats(20.0, batch_size=2)],
        [
            *repeats(20.0, batch_size=1),
            *repeats(40.0, batch_size=2),
            *repeats(15.0, batch_size=3, max_tokens=8),
        ],
        group_by=["max_tokens"],
    )
    assert column(found.table, "max_tokens") == [32]
    assert column(found.table, "ratio") == [2.0]
    with pytest.raises(ConfigError, match="differ in weights cannot be compared"):
        compared([known()], [known(weights="real")], group_by=["max_tokens"])


def test_averages_of_other_configurations_are_not_compared():
    """Nothing got faster: the slower one of two batch sizes is missing."""
    old = [*repeats(10.0, batch_size=1), *repeats(30.0, batch_size=2)]
    new = repeats(30.0, batch_size=2)
    with pytest.raises(ConfigError) as error:
        compared(old, new, group_by=["max_tokens"])
    assert error.value.message == (
        "--baseline: averages over other values of batch_size cannot be compared: batch_size was "
        "1 + 2, now 2 (runs with system dist, max_tokens 32); add batch_size to --group-by, "
        "--filter them, or --allow-mixed"
    )
    found = compared(old, new, group_by=["max_tokens"], allow_mixed=True)
    assert [row.is_mixed for row in found.table.rows] == [True]
    assert "Marked rows compare runs that differ in batch_size." in found.table.notes
    found = compared(old, new, group_by=["max_tokens", "batch_size"])
    assert column(found.table, "ratio") == [1.0]
    options = [repeats(10.0, setup={"percent": part}) for part in ([1, 0], [0, 1])]
    with pytest.raises(ConfigError, match=r"other values of percent cannot be compared"):
        compared([*options[0], *options[1]], options[0], group_by=["model"])
    assert column(compared(*options, group_by=["model"]).table, "ratio") == [1.0]


def test_the_run_ids_are_those_of_the_new_runs():
    found = compared([known(), known()], [known(batch_size=2), known()])
    assert {row.run_ids for row in found.table.rows} == {(2,)}


def test_the_table_may_be_sorted_by_its_columns():
    old = [*repeats(10.0, batch_size=1), *repeats(10.0, batch_size=2)]
    new = [*repeats(10.0, batch_size=1), *repeats(9.9, batch_size=2)]
    assert column(compared(old, new, sort=["ratio"]).table, "batch_size") == [2, 1]
    # Figures order other tables.
    assert column(compared(old, new, sort=["throughput"]).table, "batch_size") == [1, 2]
    with pytest.raises(ConfigError, match=r"^--sort: there is no column 'colour'"):
        compared(old, new, sort=["colour"])


def test_the_verdict_names_the_worst():
    found = compared(
        [*repeats(10.0, batch_size=1), *repeats(10.0, batch_size=2)],
        [*repeats(9.0, batch_size=1), *repeats(5.0, batch_size=2)],
    )
    assert found.verdict == (
        "2 of 2 figures are worse than the baseline's by more than 5%; the worst: throughput with "
        "batch_size 2 is 0.5 times the baseline's."
    )


def test_the_verdict_names_only_what_sets_a_row_apart():
    options = [
        {"batch_size": size, "setup": {f"option_{number}": size * number for number in range(20)}}
        for size in (1, 2)
    ]
    found = compared(
        [one for changes in options for one in repeats(10.0, **changes)],
        [*repeats(5.0, **options[0]), *repeats(10.0, **options[1])],
    )
    assert "throughput with batch_size 1 is 0.5 times" in found.verdict
    assert found.verdict.startswith("1 of 2 figures is worse")
    longs = ["x" * 300, "y" * 300]
    found = compared(
        [one for name in longs for one in repeats(10.0, model=name)],
        [one for name in longs for one in repeats(5.0, model=name)],
    )
    assert len(found.verdict) < 250
