"""Floors beside times: the lines of a stage, the figures of a run, and what is shown of them."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="what is counted knows torch's types")

from rich.console import Console

from flexbench.dist.measurement import StageReport
from flexbench.dist.plan import DistPlan
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.comparison import compare
from flexbench.dist.roofline.counting import count_stage
from flexbench.dist.roofline.floors import compute_floor
from flexbench.dist.roofline.lines import Line, StageRoofline, roofline_figures
from flexbench.dist.roofline.table import ceilings_text, roofline_table
from tests.unit.dist.roofline.machines import ceilings
from tests.unit.dist.roofline.plans import tiny_plan

CEILINGS = ceilings(disk_read_bytes_per_s=2e5, disk_write_bytes_per_s=1e5)


def reports(plan: DistPlan, ceilings: Ceilings | None) -> list[StageReport]:
    """Every stage took the same: 0.5 s of prefill, 1.5 s of decoding, 0.1 to 0.4 s of transfers."""
    return [
        StageReport(
            rank=rank,
            num_threads=2,
            layers=(stage.stage.layers.start, stage.stage.layers.stop),
            wall_s=3.0,
            compute_s=2.0,
            prefill_compute_s=0.5,
            decode_compute_s=1.5,
            weight_load_s=0.1,
            cache_load_s=0.2,
            cache_store_s=0.3,
            hidden_s=0.4,
            stalled_s=0.0,
            send_s=0.0,
            receive_s=0.0,
            gpu_peak_bytes=0,
            cpu_peak_bytes=0,
            disk_peak_bytes=0,
            prefill_layer_s={},
            decode_layer_s={},
            token_ends_s=(1.0, 2.0, 3.0),
            ceilings=ceilings,
            disk_access="direct",
        )
        for rank, stage in enumerate(plan.stages)
    ]


def shown(stages: list[StageRoofline]) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(roofline_table(stages))
    console.print(ceilings_text(stages))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(what: str, floor_s: float, measured_s: float) -> Line:
    return Line(
        what=what,
        flops=0,
        num_bytes=1,
        parts={},
        floor_s=floor_s,
        measured_s=measured_s,
        bound_by="memory",
    )


def stage_of(*lines: Line) -> StageRoofline:
    return StageRoofline(rank=0, ceilings=CEILINGS, disk_access=None, lines=lines)


def test_every_line_is_that_of_its_own_work_and_time(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, percent=(0, 50, 0, 0, 0, 100))
    (stage,) = compare(plan, reports(plan, CEILINGS))
    work = count_stage(plan, 0)

    lines = {line.what: line for line in stage.lines}
    assert {what: line.measured_s for what, line in lines.items()} == {
        "prefill": 0.5, "decode": 1.5, "weight_load": 0.1, "cache_load": 0.2, "cache_store": 0.3,
        "hidden": 0.4,
    }  # fmt: skip
    assert lines["decode"].flops == work.decode.flops
    assert lines["decode"].num_bytes == work.decode.weight_bytes + work.decode.cache_bytes
    assert lines["decode"].floor_s == compute_floor(work.decode, CEILINGS).seconds
    assert lines["weight_load"].parts == asdict(work.weight_load)
    assert lines["weight_load"].floor_s == work.weight_load.disk / 2e5
    assert lines["cache_load"].floor_s == work.cache_load.disk / 2e5
    assert lines["cache_store"].floor_s == work.cache_store.disk / 1e5
    assert lines["hidden"].floor_s == pytest.approx(work.hidden_load.cpu * 2 / 5e5)
    assert (lines["hidden"].bound_by, lines["cache_load"].bound_by) == ("link", "disk")
    assert lines["prefill"].fraction == lines["prefill"].floor_s / 0.5


def test_there_is_no_line_of_what_was_not_done(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, gen_len=1)
    (stage,) = compare(plan, reports(plan, CEILINGS))

    assert [line.what for line in stage.lines] == ["prefill"]


def test_without_ceilings_there_is_no_roofline(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path)

    assert compare(plan, reports(plan, None)) == ()


def test_a_figure_is_the_sum_of_floors_over_the_sum_of_times() -> None:
    stages = [
        stage_of(line("prefill", 1, 2), line("hidden", 1, 2)),
        stage_of(line("prefill", 2, 8), line("weight_load", 1, 4)),
    ]

    assert roofline_figures(stages) == {
        "prefill_roofline": 3 / 10,
        "weight_load_roofline": 1 / 4,
    }


def test_what_took_no_time_has_no_fraction() -> None:
    stages = [stage_of(line("prefill", 1, 0.0))]

    assert stages[0].lines[0].fraction is None
    assert roofline_figures(stages) == {}
    assert " - " in shown(stages)


def test_ceilings_come_back_from_another_rank_as_they_were(tmp_path: Path) -> None:
    (report,) = reports(tiny_plan(tmp_path), CEILINGS)

    assert StageReport.from_json(asdict(report)) == report


def test_the_table_fits_and_says_everything(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, num_stages=2, changed={"num_hidden_layers": 2}, percent=(0,) * 6)
    fast = replace(CEILINGS, matmul_flops_per_s=1.5e13, memory_bytes_per_s=3.25e10)
    text = shown(list(compare(plan, reports(plan, fast))))

    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = [row.split() for row in text.splitlines()]
    assert sum(row[:2] == ["0", "prefill"] or row[:2] == ["1", "prefill"] for row in rows) == 2
    assert sum(row[:2] == ["weight", "load"] for row in rows) == 2
    for said in ("memory 32.5 GB/s", "products 15 TFLOP/s", "disk (direct) reads", "2 threads"):
        assert said in " ".join(text.split())
