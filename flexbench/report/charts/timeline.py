"""What the stages of a pipeline did when: a lane for each rank of a run of dist."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from flexbench.core.printable import printable
from flexbench.core.timeline import What
from flexbench.report.charts.chart import MOST_POINTS, Axis, Bar, Chart, ChartKind, Series
from flexbench.report.charts.selected import KEY, SelectedRuns
from flexbench.report.charts.sweeps import is_number
from flexbench.report.charts.wording import (
    all_have,
    counted,
    left_out,
    name_configurations,
    short_model,
    to_slug,
)
from flexbench.report.formats.cells import format_figure

REST = "rest"
_MOST_CHARTS = 4
_MOST_LANES = 64
_NAMED = 5
_DESCRIBED = 2
_BUBBLES = {
    "bubble_fraction": "measured",
    "bubble_theory": "in theory",
    "bubble_of_schedule": "of the schedule that was run",
}
_HAS_PIPELINE = (
    "json_array_length(details, '$.stages') > 1"
    " AND json_array_length(details, '$.stages[0].timeline.rows') > 0"
)
# The newest run of each configuration that has stages. Those of several stages that say what they
# did when come first, then those of several stages, the newest of these first.
_NEWEST = (
    f"SELECT id, started_at, details, {KEY} AS key,"  # noqa: S608
    f" coalesce({_HAS_PIPELINE}, FALSE) AS has_pipeline,"
    " json_array_length(details, '$.stages') > 1 AS has_several FROM selected"
    " WHERE system = 'dist' AND json_array_length(details, '$.stages') > 0"
    " QUALIFY row_number() OVER (PARTITION BY key ORDER BY started_at DESC NULLS LAST, id DESC) = 1"
    " ORDER BY has_pipeline DESC, has_several DESC, started_at DESC NULLS LAST, id DESC"
)


@dataclass(frozen=True, kw_only=True)
class _Lane:
    rank: int
    bars: tuple[Bar, ...]
    wall_s: float
    """Of its own work, where it is known."""

    @property
    def end(self) -> float:
        return max(bar.end for bar in self.bars)

    @property
    def name(self) -> str:
        return f"rank {self.rank}"


def timeline_charts(runs: SelectedRuns) -> Iterator[Chart]:
    """The newest run of each configuration, at most four of them.

    Pipelines that do not say what was when are drawn where there are no others, and what is no
    pipeline where there is none.
    """
    rows = runs.rows(f"{_NEWEST} LIMIT ?", [_MOST_CHARTS + _NAMED])
    names = name_configurations([json.loads(row["key"]) for row in rows])
    num_rows = len(rows)
    if num_rows == _MOST_CHARTS + _NAMED:
        num_rows = runs.rows(f"SELECT count(*) AS num FROM ({_NEWEST})")[0]["num"]  # noqa: S608
    drawn = [row for row in rows if _tier(row) == _tier(rows[0])]
    num_drawn = min(len(drawn), _MOST_CHARTS)
    charts: list[Chart] = []
    for row, name in zip(rows[:num_drawn], names.names, strict=False):
        subject = _subject(json.loads(row["key"]), name)
        chart = _chart(json.loads(row["details"]), subject, all_have(names.common))
        if chart is not None:
            charts.append(chart)
    missing = left_out(names.names[num_drawn:], num_rows - num_drawn)
    for chart in charts:
        is_last = chart is charts[-1]
        yield replace(chart, notes=[*chart.notes, *names.notes, *missing]) if is_last else chart


def _tier(row: Mapping[str, Any]) -> tuple[bool, bool]:
    return row["has_pipeline"], row["has_several"]


def _subject(key: Mapping[str, Any], name: str) -> str:
    """The model, how many stages it has, and what else tells it from others."""
    topology = printable(str(key.get("topology") or ""))
    parts = [part for part in (short_model(key.get("model")), topology) if part]
    model = printable(str(key.get("model") or ""))
    others = [part for part in name.split(", ") if part not in (model, topology)]
    return ", ".join([*parts, *others])


def _chart(details: Mapping[str, Any], subject: str, common: Sequence[str]) -> Chart | None:
    """None: the stages do not say what they did."""
    stages = [one for one in _list(details.get("stages")) if isinstance(one, Mapping)]
    stages = stages[:_MOST_LANES]
    lanes = [lane for lane in map(_lane_of_moments, stages) if lane is not None]
    is_totals = len(lanes) < len(stages)
    if is_totals:
        lanes = [lane for lane in map(_lane_of_totals, stages) if lane is not None]
    if not lanes:
        return None
    merged, shortest_s = _merge(lanes)
    notes = _bubble_note(details.get("figures")) if len(lanes) > 1 else []
    if is_totals:
        notes.append("How long each rank did what, one after the other: not when it did so.")
    notes += ["The newest run of this configuration.", *common]
    if shortest_s:
        notes.append(f"Drawn in steps of {format_figure(shortest_s)} s: what took most of each.")
    notes += [] if is_totals else _end_note(lanes)
    num_left_out = len(_list(details.get("stages"))) - len(stages)
    notes += [f"Ranks that are not drawn: {num_left_out:,}."] if num_left_out else []
    what = "total time per rank" if is_totals else "what each rank did when"
    return Chart(
        name="-".join(part for part in ("timeline", to_slug(subject)) if part),
        kind=ChartKind.TIMELINE,
        title=f"Stages of {subject or 'a pipeline'}: {what}",
        description=_describe(lanes),
        x=Axis(title="Total time" if is_totals else "Time", unit="s"),
        y=Axis(title=""),
        series=[
            Series(name=lane.name, bars=bars) for lane, bars in zip(lanes, merged, strict=True)
        ],
        notes=notes,
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _rank(stage: Mapping[str, Any]) -> int | None:
    rank = stage.get("rank")
    return rank if isinstance(rank, int) and not isinstance(rank, bool) else None


def _lane_of_moments(stage: Mapping[str, Any]) -> _Lane | None:
    """From the rows of its timeline; None without them."""
    rank, timeline = _rank(stage), stage.get("timeline")
    if rank is None or not isinstance(timeline, Mapping):
        return None
    columns, known = timeline.get("columns"), list(What)
    if columns != ["what", "start_s", "end_s"]:
        return None
    bars = []
    for row in _list(timeline.get("rows")):
        if not isinstance(row, list) or len(row) != len(columns) or row[0] not in known:
            continue
        _, start, end = row
        if is_number(start) and is_number(end) and 0 <= start < end:
            bars.append(Bar(what=str(row[0]), start=float(start), end=float(end)))
    if not bars:
        return None
    bars.sort(key=lambda bar: bar.start)
    return _Lane(rank=rank, bars=tuple(bars), wall_s=_seconds(stage, "wall_s"))


def _lane_of_totals(stage: Mapping[str, Any]) -> _Lane | None:
    """What it did, one after the other; None where nothing is known of it."""
    rank = _rank(stage)
    if rank is None:
        return None
    parts = [
        (What.LOADING, _seconds(stage, "stalled_s")),
        (What.COMPUTING, _seconds(stage, "compute_s")),
        (What.WAITING, _seconds(stage, "receive_s")),
        (What.SENDING, _seconds(stage, "send_s")),
    ]
    wall_s = _seconds(stage, "wall_s")
    bars, reached = [], 0.0
    for what, seconds in [*parts, (REST, wall_s - sum(seconds for _, seconds in parts))]:
        if seconds > 0 and is_number(reached + seconds):
            bars.append(Bar(what=str(what), start=reached, end=reached + seconds))
            reached += seconds
    return _Lane(rank=rank, bars=tuple(bars), wall_s=wall_s) if bars else None


def _seconds(stage: Mapping[str, Any], name: str) -> float:
    value = stage.get(name)
    return float(value) if is_number(value) and value > 0 else 0.0


# --- as many bars as can be drawn ---


def _merge(lanes: Sequence[_Lane]) -> tuple[list[tuple[Bar, ...]], float]:
    """The bars of each lane, and the length of a step in s; 0: they are as they were."""
    if sum(len(lane.bars) for lane in lanes) <= MOST_POINTS:
        return [lane.bars for lane in lanes], 0.0
    num_steps = max(1, MOST_POINTS // len(lanes))
    step_s = max(lane.end for lane in lanes) / num_steps
    return [tuple(_in_steps(lane.bars, step_s, num_steps)) for lane in lanes], step_s


def _in_steps(bars: Sequence[Bar], step_s: float, num_steps: int) -> Iterator[Bar]:
    """Of each step what took most of it; steps with the same are one bar."""
    shares: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for bar in bars:
        first = min(int(bar.start / step_s), num_steps - 1)
        last = min(int(bar.end / step_s), num_steps - 1)
        for step in range(first, last + 1):
            begin, end = max(bar.start, step * step_s), min(bar.end, (step + 1) * step_s)
            shares[step][bar.what] += max(0.0, end - begin)
    most = [max(what, key=lambda one: what[one]) for _, what in sorted(shares.items())]
    numbered = zip(sorted(shares), most, strict=True)
    # Steps that follow each other and have the same: their number less their place is the same.
    runs = groupby(enumerate(numbered), key=lambda entry: (entry[1][0] - entry[0], entry[1][1]))
    for (_, what), members in runs:
        steps = [step for _, (step, _) in members]
        yield Bar(what=what, start=steps[0] * step_s, end=(steps[-1] + 1) * step_s)


# --- words ---


def _bubble_note(figures: Any) -> list[str]:
    if not isinstance(figures, Mapping):
        return []
    parts = [
        f"{100 * figures[name]:.1f} % {words}"
        for name, words in _BUBBLES.items()
        if is_number(figures.get(name))
    ]
    return [f"Bubble: {', '.join(parts)}."] if parts else []


def _end_note(lanes: Sequence[_Lane]) -> list[str]:
    """Where a record ends before the run does, since it would have become too long."""
    missing = max(lane.wall_s - lane.end for lane in lanes)
    longest = max(lane.wall_s for lane in lanes)
    if missing <= 0.01 * longest:
        return []
    return [f"Only the beginning was recorded; the run took {format_figure(longest)} s."]


def _describe(lanes: Sequence[_Lane]) -> str:
    sentences = [
        f"{counted(len(lanes), 'rank')} in {format_figure(max(lane.end for lane in lanes))} s."
    ]
    for lane in lanes[:_DESCRIBED]:
        times: dict[str, float] = defaultdict(float)
        for bar in lane.bars:
            times[bar.what] += bar.end - bar.start
        total = sum(times.values())
        ordered = sorted(times, key=lambda what: -times[what])
        ordered = [what for what in ordered if times[what] >= 0.005 * total]
        shares = ", ".join(f"{what} {100 * times[what] / total:.0f} %" for what in ordered)
        sentences.append(f"{lane.name}: {shares}.".capitalize())
    if len(lanes) > _DESCRIBED:
        sentences.append(f"{counted(len(lanes) - _DESCRIBED, 'more rank')}.")
    return " ".join(sentences)
