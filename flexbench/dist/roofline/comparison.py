"""Puts the floors of a run beside what its stages took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from flexbench.dist.measurement import StageReport
from flexbench.dist.plan import DistPlan
from flexbench.dist.roofline.ceilings import Ceilings
from flexbench.dist.roofline.counting import StageWork, Work, count_stage
from flexbench.dist.roofline.floors import (
    Floor,
    compute_floor,
    hidden_floor,
    load_floor,
    store_floor,
)
from flexbench.dist.roofline.lines import (
    CACHE_LOAD,
    CACHE_STORE,
    DECODE,
    HIDDEN,
    PREFILL,
    WEIGHT_LOAD,
    Line,
    StageRoofline,
)


def compare(plan: DistPlan, stages: Sequence[StageReport]) -> tuple[StageRoofline, ...]:
    """The roofline of every stage whose ceilings were measured; lines of what there was to do."""
    found = []
    for stage in stages:
        if stage.ceilings is not None:
            work = count_stage(plan, stage.rank)
            found.append(
                StageRoofline(
                    rank=stage.rank,
                    ceilings=stage.ceilings,
                    disk_access=stage.disk_access,
                    lines=[
                        *_of_computing(work, stage, stage.ceilings),
                        *_of_moving(work, stage, stage.ceilings),
                    ],
                )
            )
    return tuple(found)


def _of_computing(work: StageWork, stage: StageReport, ceilings: Ceilings) -> Iterator[Line]:
    for what, phase, measured_s in (
        (PREFILL, work.prefill, stage.prefill_compute_s),
        (DECODE, work.decode, stage.decode_compute_s),
    ):
        parts = _parts_of(phase)
        num_bytes = phase.memory_bytes
        floor = compute_floor(phase, ceilings)
        yield from _line(what, floor, measured_s, num_bytes, parts, flops=phase.flops)


def _parts_of(work: Work) -> dict[str, int]:
    return {
        "weights": work.weight_bytes,
        "cache": work.cache_bytes,
        "activations": work.activation_bytes,
    }


def _of_moving(work: StageWork, stage: StageReport, ceilings: Ceilings) -> Iterator[Line]:
    loads = (
        (WEIGHT_LOAD, work.weight_load, stage.weight_load_s),
        (CACHE_LOAD, work.cache_load, stage.cache_load_s),
    )
    for what, moved, measured_s in loads:
        yield from _line(what, load_floor(moved, ceilings), measured_s, moved.total, asdict(moved))
    moved = work.cache_store
    floor = store_floor(moved, ceilings)
    yield from _line(CACHE_STORE, floor, stage.cache_store_s, moved.total, asdict(moved))
    moved = work.hidden_store + work.hidden_load
    floor = hidden_floor(work, ceilings)
    yield from _line(HIDDEN, floor, stage.hidden_s, moved.total, asdict(moved))


def _line(
    what: str,
    floor: Floor,
    measured_s: float,
    num_bytes: int,
    parts: Mapping[str, int],
    *,
    flops: int = 0,
) -> Iterator[Line]:
    """A line, unless there was nothing to do."""
    if floor.bound_by is not None:
        yield Line(
            what=what,
            flops=flops,
            num_bytes=num_bytes,
            parts=parts,
            floor_s=floor.seconds,
            measured_s=measured_s,
            bound_by=str(floor.bound_by),
        )
