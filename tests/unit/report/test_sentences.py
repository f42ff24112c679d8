"""The answer in sentences."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flexbench.report.reading import Reading
from flexbench.report.sentences import summary_of
from flexbench.report.store import RunStore
from flexbench.report.table import Column, Kind, Row, Table
from tests.unit.report.stores import run

READING = Reading(
    num_files=2,
    num_skipped=0,
    first_skipped=(),
    num_failed=0,
    num_interrupted=0,
    predictions=(),
    curves=(),
)
COLUMNS = (
    Column(name="model", heading="model", kind=Kind.TEXT),
    Column(name="num_processes", heading="procs", kind=Kind.COUNT),
    Column(name="throughput_mean", heading="tok/s\nmean"),
)


@pytest.fixture
def store() -> Iterator[RunStore]:
    with RunStore() as opened:
        yield opened


def row(model: str, procs: int, mean: float, **more) -> Row:
    is_mixed = more.pop("is_mixed", False)
    values = {"model": model, "num_processes": procs, "throughput_mean": mean, "num_runs": 1}
    return Row(values=values | more, is_mixed=is_mixed)


def sentences(store: RunStore, *rows: Row) -> list[str]:
    table = Table(name="runs", title="flexbench petals", columns=COLUMNS, rows=rows)
    return list(summary_of(store, READING, [table]))


def test_it_begins_with_what_there_is(store):
    store.add([run(system="petals"), run(system="petals"), run(system=None)])
    assert sentences(store)[0] == "3 runs from 2 files: 2 of petals, 1 without a record."


def test_the_best_row_is_told_with_what_it_took_and_how_sure_it_is(store):
    repeated = {"num_runs": 3, "throughput_ci_low": 40.0, "throughput_ci_high": 60.0}
    found = sentences(store, row("a", 1, 20.0), row("a", 4, 50.0, **repeated))
    assert found[1:] == [
        "flexbench petals: up to 50 tokens/s (mean of 3 runs, 95 % interval 40 to 60), "
        "with model a, procs 4."
    ]


def test_what_cannot_be_compared_has_a_sentence_of_its_own(store):
    found = sentences(store, row("a", 1, 20.0), row("b", 1, 900.0), row("a", 2, 30.0))
    assert [text.partition(" tokens/s")[0][-3:].strip() for text in found[1:]] == ["30", "900"]
    many = sentences(store, *(row(f"m{number}", 1, 1.0) for number in range(5)))
    assert len(many) == 1 + 3 + 1
    assert "2 more" in many[-1]


@pytest.mark.parametrize(
    "doubt", [{"basis": "projected"}, {"num_client_limited": 1}, {"is_mixed": True}]
)
def test_doubtful_rows_are_not_praised(store, doubt):
    found = sentences(store, row("a", 1, 99.0, **doubt), row("a", 4, 50.0))
    assert len(found) == 2
    assert "50 tokens/s in one run" in found[1]
    assert len(sentences(store, row("a", 1, 99.0, **doubt))) == 1
