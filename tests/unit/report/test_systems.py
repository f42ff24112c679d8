"""Petals beside dist."""

from __future__ import annotations

import pytest

from flexbench.report.selection import make_selection
from flexbench.report.statistics import Sample, ratio_interval
from flexbench.report.systems import compare_systems
from flexbench.report.table import Table
from tests.unit.report.stores import column, known, point, run, shown, store_of


def systems_of(*runs, with_published: bool = False, **options) -> Table | None:
    with store_of(*runs) as store:
        return compare_systems(store, make_selection(**options), with_published=with_published)


def petals(**changes):
    return known(**({"system": "petals", "topology": "2 servers", "num_gpus": 0} | changes))


def dist(**changes):
    return known(**({"num_gpus": 0} | changes))


def test_the_best_of_each_for_the_same_task():
    table = systems_of(
        petals(throughput=10.0, mean_latency=3.0, num_processes=1),
        petals(throughput=30.0, mean_latency=4.0, num_processes=6),
        dist(throughput=20.0, mean_latency=9.0, batch_size=4),
        dist(throughput=40.0, mean_latency=8.0, batch_size=8),
        dist(throughput=90.0, max_tokens=8),
    )
    assert column(table, "system") == ["petals", "dist"]
    assert column(table, "throughput") == [30.0, 40.0]
    # A request's and a job's.
    assert column(table, "mean_latency") == [4.0, None]
    assert column(table, "total_latency") == [None, 8.0]
    assert column(table, "ratio_ci_low") == [None, None]
    assert "ratio_ci_low" not in shown(table)
    priorities = {one.name: one.priority for one in table.columns}
    assert (priorities["num_runs"], priorities["basis"]) == (0, 0)
    assert column(table, "ratio") == [0.75, None]
    assert column(table, "configuration") == [
        "batch 1, micro-batches 1, processes 6, 2 servers",
        "batch 8, micro-batches 1, processes 4, 4 stages",
    ]
    assert "throughput_per_gpu" not in shown(table)
    assert [row.run_ids for row in table.rows] == [(2,), (4,)]
    assert table.caption == "facebook/opt-6.7b, float32, dummy weights, measured, EPYC, 2 CPUs"


def test_a_mean_over_repeats_decides():
    table = systems_of(
        petals(throughput=100.0),
        petals(throughput=20.0),
        petals(throughput=70.0, batch_size=2),
        dist(),
    )
    assert column(table, "throughput") == [70.0, 20.0]


def test_repeats_of_both_tell_how_sure_the_ratio_is():
    ours, theirs = [10.0, 11.0, 12.0], [20.0, 21.0, 22.0]
    table = systems_of(
        *(petals(throughput=one, num_gpus=2) for one in ours),
        *(dist(throughput=one, num_gpus=1) for one in theirs),
    )
    low, high = ratio_interval(Sample.of(theirs), Sample.of(ours))
    assert column(table, "ratio") == pytest.approx([11 / 2 / 21, None])
    assert column(table, "ratio_ci_low") == pytest.approx([low / 2, None])
    assert column(table, "ratio_ci_high") == pytest.approx([high / 2, None])
    assert {"ratio_ci_low", "num_runs"} <= set(shown(table))


def test_with_gpus_it_is_throughput_per_gpu():
    table = systems_of(
        petals(throughput=40.0, num_gpus=4),
        petals(throughput=24.0, num_gpus=2, batch_size=2),
        dist(throughput=48.0, num_gpus=2),
    )
    assert column(table, "throughput") == [24.0, 48.0]
    assert column(table, "throughput_per_gpu") == [12.0, 24.0]
    assert column(table, "ratio") == [0.5, None]
    assert "throughput_per_gpu" in shown(table)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [(0, 2, "no and yes"), (4, 0, "yes and no"), (4, None, "yes and not known"),
     (None, 0, "not known and no")],
)  # fmt: skip
def test_processors_are_not_compared_with_gpus(ours, theirs, words):
    runs = petals(throughput=40.0, num_gpus=ours), dist(throughput=20.0, num_gpus=theirs)
    table = systems_of(*runs)
    assert table.rows == []
    assert table.notes[0].endswith(f"petals and dist differ in GPUs used {words}.")
    table = systems_of(*runs, allow_mixed=True)
    assert column(table, "ratio") == [2.0, None]
    assert [row.is_mixed for row in table.rows] == [True, True]
    assert "Marked rows differ in more than system and topology: GPUs used." in table.notes


def test_each_measure_has_a_best_of_its_own():
    table = systems_of(
        petals(throughput=40.0, num_gpus=4),
        petals(throughput=30.0, num_gpus=None, batch_size=2),
        dist(throughput=20.0, num_gpus=None),
        dist(throughput=80.0, num_gpus=4, batch_size=2),
        dist(throughput=25.0, num_gpus=0, batch_size=3),
    )
    by_measure = list(zip(column(table, "num_gpus"), column(table, "ratio"), strict=True))
    assert by_measure == [(4, 0.5), (4, None), (None, 1.5), (None, None)]


def test_of_pairs_that_differ_the_nearest_are_told():
    table = systems_of(
        petals(dtype="float16", num_gpus=0),
        petals(num_gpus=1, weights="real", machine="M2"),
        dist(num_gpus=0),
    )
    assert table.notes[0].endswith("petals and dist differ in dtype float16 and float32.")


@pytest.mark.parametrize(
    "runs",
    [(petals(), point(2), run()), (dist(),), (run(),), (petals(), dist(max_tokens=8)),
     (petals(), dist(model="facebook/opt-30b")), (petals(), dist(throughput=None))],
)  # fmt: skip
def test_without_a_counterpart_there_is_no_table(runs):
    assert systems_of(*runs) is None


def test_other_things_are_left_out_and_told():
    table = systems_of(
        petals(dtype="float16", throughput=10.0), dist(), petals(batch_size=2, weights="real")
    )
    assert table.rows == []
    (note,) = table.notes
    assert note == (
        "1 task is left out, since runs of other kinds are not compared (--allow-mixed does): model "
        "facebook/opt-6.7b, sequence_length 512, max_tokens 32: petals and dist differ in weights "
        "real and dummy."
    )


def test_other_things_are_marked_where_that_is_allowed():
    table = systems_of(petals(dtype="float16", throughput=10.0), dist(), allow_mixed=True)
    assert column(table, "ratio") == [0.5, None]
    assert [row.is_mixed for row in table.rows] == [True, True]
    assert "dtype" in shown(table)


def test_pairs_are_of_one_kind_each():
    table = systems_of(
        petals(dtype="float16", throughput=10.0),
        dist(dtype="float16", throughput=20.0),
        petals(throughput=4.0),
        dist(throughput=16.0),
    )
    assert column(table, "dtype") == ["float16", "float16", "float32", "float32"]
    assert column(table, "ratio") == [0.5, None, 0.25, None]


def test_filters_apply():
    runs = (petals(), dist(), petals(batch_size=2, throughput=90.0))
    assert column(systems_of(*runs, filters=["batch_size = 1"]), "throughput") == [20.0, 20.0]
    assert systems_of(*runs, filters=["system = dist"]) is None


def test_published_figures_stand_beside_and_are_marked_as_such():
    table = systems_of(petals(), dist(), with_published=True)
    assert column(table, "model")[:2] == ["facebook/opt-6.7b"] * 2
    published = table.rows[2:]
    # The names are the same, so that filters and sorting find both.
    assert {row.values["model"] for row in published} == {"facebook/opt-6.7b"}
    assert {row.values["basis"] for row in published} == {"published"}
    assert {row.values["machine"] for row in published} == {"T4 (16 GB)"}
    assert {"basis", "machine"} <= set(shown(table))
    assert table.caption == "facebook/opt-6.7b"
    by_system = {row.values["system"]: row.values["throughput_per_gpu"] for row in published}
    assert by_system["FlexGen"] == 25.26
    assert by_system["Petals"] == 8.25
    assert not any(row.best or row.run_ids for row in published)
    assert any("arXiv 2303.06865" in note for note in table.notes)
    assert column(systems_of(petals(), dist()), "basis") == ["measured", "measured"]


def test_published_figures_beside_one_system_alone():
    table = systems_of(dist(model="facebook/opt-30b"), with_published=True)
    assert column(table, "system") == [
        "dist", "FlexGen", "FlexGen with compression", "Accelerate", "DeepSpeed ZeRO-Inference", "Petals",
    ]  # fmt: skip
    assert column(table, "ratio") == [None] * 6
    petals_row = table.rows[-1].values
    # Four GPUs: published is what each of them did.
    assert (petals_row["throughput"], petals_row["throughput_per_gpu"]) == (None, 2.84)
    assert petals_row["num_gpus"] == 4


def test_published_figures_stand_with_the_runs_of_their_model():
    table = systems_of(
        dist(model="facebook/opt-6.7b"), dist(model="facebook/opt-30b"), with_published=True
    )
    assert column(table, "model") == ["facebook/opt-30b"] * 6 + ["facebook/opt-6.7b"] * 6
    assert [number for number, row in enumerate(table.rows) if row.run_ids] == [0, 6]


@pytest.mark.parametrize("runs", [(run(),), (point(2),), (dist(),)])
def test_published_figures_alone_are_no_results(runs):
    assert systems_of(*runs, with_published=True, filters=["system != dist"]) is None


def test_beside_models_that_nobody_published_all_of_them_stand():
    table = systems_of(dist(model="facebook/opt-125m"), with_published=True)
    assert len(table.rows) == 16
