"""Decentralized against centralized: petals and dist with the same model and lengths.

The best throughput of each, per GPU where it used any, as FlexGen's README compares them. System
and topology are what is compared; all else that must be alike is alike in a pair, or the pair is
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexbench.report.figures import MAIN_FIGURES, MEAN_LATENCY, THROUGHPUT, help_of
from flexbench.report.gate import in_words, key_in_words
from flexbench.report.grouping import read_groups
from flexbench.report.groups import Group, order_of
from flexbench.report.published import (
    MACHINE,
    NEW_TOKENS,
    PROMPT_TOKENS,
    SOURCE,
    PublishedFigure,
    published_figures,
)
from flexbench.report.runs import GATE_COLUMNS
from flexbench.report.selection import Filter, Selection
from flexbench.report.statistics import ratio_interval
from flexbench.report.store import RunStore
from flexbench.report.summary import subject_in_words
from flexbench.report.table import Column, Kind, Row, Table

DECENTRALIZED = "petals"
CENTRALIZED = "dist"
_SYSTEMS = (DECENTRALIZED, CENTRALIZED)
_TASK = ("model", "sequence_length", "max_tokens")
_COMPARED = ("system", "topology")
_ALIKE = tuple(name for name in GATE_COLUMNS if name not in (*_COMPARED, *_TASK))
_MOST_NAMED = 3
_COUNTS = ("batch_size", "num_micro_batches", "num_processes")


def compare_systems(store: RunStore, selection: Selection, *, with_published: bool) -> Table | None:
    """Petals beside dist, each with its best configuration for the same task.

    With `with_published`, published figures of models of the same sizes are rows of their own, and
    a system is shown even where the other one is missing. None where there is nothing to compare;
    without rows where everything was left out, and the notes say why.
    """
    groups = _groups(store, selection)
    if not groups:
        return None
    matches = [_match(task, sides, selection) for task, sides in _best_of_tasks(groups).items()]
    lines = [line for one in matches for line in one.lines]
    if with_published:
        lines += [_Line(group=group) for one in matches for group in one.alone]
    published = (
        published_figures([line.group.gate["model"] for line in lines]) if with_published else ()
    )
    left_out = [one.left_out for one in matches if one.left_out]
    if not lines and not left_out:
        return None
    common = _common(
        [*(line.group.gate for line in lines), *({"model": one.model} for one in published)]
    )
    rows = [*(_row(line) for line in lines), *(_published_row(one) for one in published)]
    models = list(dict.fromkeys(row.values["model"] for row in rows))
    rows.sort(key=lambda row: models.index(row.values["model"]))
    return Table(
        name="systems",
        title="Decentralized (petals) compared with centralized offloading (dist)",
        columns=_columns(common, lines, has_published=bool(published)),
        rows=rows,
        caption=subject_in_words(common),
        notes=tuple(_notes(lines, left_out, has_published=bool(published))),
    )


@dataclass(frozen=True, kw_only=True)
class _Line:
    """The best configuration of a system for a task."""

    group: Group
    ratio: float | None = None
    """petals / dist, on the line of petals."""
    interval: tuple[float, float] | None = None
    """Of the ratio, where both have repeats."""
    is_mixed: bool = False
    differing: Sequence[str] = ()
    """What the two of a marked pair should have in common."""


@dataclass(frozen=True, kw_only=True)
class _Match:
    """What can be shown of a task."""

    lines: Sequence[_Line] = ()
    alone: Sequence[Group] = ()
    """The best of systems that have no counterpart."""
    left_out: str = ""
    """Why both are there and nothing is shown."""


def _groups(store: RunStore, selection: Selection) -> list[Group]:
    systems = [row["system"] for row in store.rows("SELECT DISTINCT system FROM runs")]
    if not set(systems) & set(_SYSTEMS):
        return []
    others = tuple(
        Filter(column="system", operator="!=", value=system)
        for system in systems
        if system is not None and system not in _SYSTEMS
    )
    known = Filter(column="system", operator="!=", value="not known")
    chosen = replace(selection, group_by=None, filters=(*selection.filters, known, *others))
    groups = read_groups(store, chosen, MAIN_FIGURES, keep_samples=True)
    return [group for group in groups if group.mean(THROUGHPUT)]


_Sides = dict[str, dict[tuple[Any, ...], Group]]


def _best_of_tasks(groups: Sequence[Group]) -> dict[tuple[Any, ...], _Sides]:
    """By task, system, and all else that must be alike: the group with the best throughput."""
    tasks: dict[tuple[Any, ...], _Sides] = {}
    for group in groups:
        task = tuple(group.keys[name] for name in _TASK)
        alike = tuple(_alike(group).values())
        side = tasks.setdefault(task, {}).setdefault(group.gate["system"], {})
        if alike not in side or _speed(group) > _speed(side[alike]):
            side[alike] = group
    return dict(sorted(tasks.items(), key=lambda item: [order_of(value) for value in item[0]]))


def _alike(group: Group) -> dict[str, Any]:
    """What must be the same of both, so that one measure goes for all of them."""
    used = None if group.num_gpus is None else group.num_gpus > 0
    return {**{name: group.gate[name] for name in _ALIKE}, "GPUs used": used}


def _speed(group: Group) -> float:
    """Throughput per GPU, where it used any."""
    return (group.mean(THROUGHPUT) or 0.0) / (group.num_gpus or 1)


def _match(task: tuple[Any, ...], sides: _Sides, selection: Selection) -> _Match:
    ours, theirs = sides.get(DECENTRALIZED, {}), sides.get(CENTRALIZED, {})
    if not ours or not theirs:
        return _Match(alone=[max((ours or theirs).values(), key=_speed)])
    pairs = [(ours[alike], theirs[alike]) for alike in ours if alike in theirs]
    is_mixed = not pairs
    if is_mixed:
        best = _nearest(ours.values(), theirs.values())
        if not selection.allow_mixed:
            return _Match(alone=best, left_out=_why_left_out(task, *best))
        pairs = [best]
    return _Match(
        lines=[
            line
            for petals, dist in pairs
            for line in (
                _compared(petals, dist, is_mixed=is_mixed, seed=selection.seed),
                _Line(group=dist, is_mixed=is_mixed, differing=tuple(_differing(petals, dist))),
            )
        ]
    )


def _nearest(ours: Iterable[Group], theirs: Iterable[Group]) -> tuple[Group, Group]:
    """The best of each that differ in least."""
    return min(
        ((one, other) for one in ours for other in theirs),
        key=lambda pair: (len(_differing(*pair)), -_speed(pair[0]), -_speed(pair[1])),
    )


def _differing(petals: Group, dist: Group) -> dict[str, tuple[Any, Any]]:
    """All in which they must be alike and are not, with both values."""
    ours, theirs = _alike(petals), _alike(dist)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def _compared(petals: Group, dist: Group, *, is_mixed: bool, seed: int) -> _Line:
    """The line of petals: throughputs per GPU where both used some."""
    ours, theirs = petals.sample(THROUGHPUT), dist.sample(THROUGHPUT)
    assert ours is not None
    assert theirs is not None
    share = dist.num_gpus / petals.num_gpus if petals.num_gpus and dist.num_gpus else 1.0
    ends = ratio_interval(theirs, ours, seed=seed)
    return _Line(
        group=petals,
        ratio=share * ours.mean / theirs.mean,
        interval=None if ends is None else (share * ends[0], share * ends[1]),
        is_mixed=is_mixed,
    )


def _why_left_out(task: tuple[Any, ...], petals: Group, dist: Group) -> str:
    parts = [
        f"{name} {in_words(ours)} and {in_words(theirs)}"
        for name, (ours, theirs) in _differing(petals, dist).items()
    ]
    about = key_in_words(dict(zip(_TASK, task, strict=True)))
    return f"{about}: petals and dist differ in {', '.join(parts)}"


def _common(gates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all rows have in common, but for what is compared."""
    first = gates[0] if gates else {}
    return {
        name: value
        for name, value in first.items()
        if name not in _COMPARED
        and value is not None
        and all(name in gate and gate[name] == value for gate in gates)
    }


# --- rows and columns ---


def _row(line: _Line) -> Row:
    group = line.group
    latency = group.mean(MEAN_LATENCY)
    is_petals = group.gate["system"] == DECENTRALIZED
    low, high = line.interval or (None, None)
    values = {
        **{name: group.keys[name] for name in _TASK},
        "system": group.gate["system"],
        "throughput": group.mean(THROUGHPUT),
        "throughput_per_gpu": _speed(group) if group.num_gpus else None,
        "num_gpus": group.num_gpus,
        # A request's is not a job's: they stand in two columns.
        "mean_latency": latency if is_petals else None,
        "total_latency": None if is_petals else latency,
        "ratio": line.ratio,
        "ratio_ci_low": low,
        "ratio_ci_high": high,
        "configuration": _configuration(group),
        **{name: group.gate[name] for name in (*_ALIKE, "topology")},
        **{name: group.keys[name] for name in _COUNTS},
        "num_runs": group.num_runs,
        "source": None,
    }
    return Row(values=values, is_mixed=line.is_mixed, run_ids=group.run_ids)


def _published_row(figure: PublishedFigure) -> Row:
    values = {
        "model": figure.model,
        "sequence_length": PROMPT_TOKENS,
        "max_tokens": NEW_TOKENS,
        "system": figure.system,
        "throughput": figure.tokens_per_s_per_gpu if figure.num_gpus == 1 else None,
        "throughput_per_gpu": figure.tokens_per_s_per_gpu,
        "num_gpus": figure.num_gpus,
        "configuration": figure.remark,
        "basis": "published",
        "machine": MACHINE,
        "source": SOURCE,
    }
    return Row(values=values)


def _configuration(group: Group) -> str:
    """What the best figure was reached with, in words."""
    names = ("batch", "micro-batches", "processes")
    counts = [f"{word} {group.keys[name]}" for word, name in zip(names, _COUNTS, strict=True)]
    return ", ".join(
        [*counts, *([in_words(group.gate["topology"])] if group.gate["topology"] else [])]
    )


def _columns(
    common: Mapping[str, Any], lines: Sequence[_Line], *, has_published: bool
) -> list[Column]:
    has_gpus = has_published or any(line.group.num_gpus for line in lines)
    has_interval = any(line.interval for line in lines)
    gate = [
        Column(
            name=name,
            heading=name,
            kind=Kind.TEXT,
            is_shown=name not in common and _is_told(name, lines, has_published=has_published),
            priority=0 if name in ("basis", "weights") else 1,
        )
        for name in _ALIKE
    ]
    return [
        Column(name="model", heading="model", kind=Kind.TEXT, is_shown="model" not in common),
        Column(name="sequence_length", heading="prompt", kind=Kind.COUNT, help="prompt tokens"),
        Column(name="max_tokens", heading="new", kind=Kind.COUNT, help="new tokens of a prompt"),
        Column(name="system", heading="system", kind=Kind.TEXT),
        Column(
            name="throughput",
            heading="tok/s",
            help=f"the best configuration's mean; {help_of(THROUGHPUT)}",
        ),
        Column(
            name="throughput_per_gpu",
            heading="tok/s\nper GPU",
            is_shown=has_gpus,
            help="throughput / GPUs that were used",
        ),
        Column(name="num_gpus", heading="GPUs", kind=Kind.COUNT, is_shown=has_gpus, priority=3),
        _latency_column(MEAN_LATENCY, "mean s\nof a\nrequest", lines, DECENTRALIZED),
        _latency_column("total_latency", "total s\nof all\nprompts", lines, CENTRALIZED),
        Column(
            name="ratio",
            heading="petals\n/ dist",
            kind=Kind.RATIO,
            help="of throughputs, per GPU where both used some",
        ),
        _end_column("low", is_shown=has_interval),
        _end_column("high", is_shown=has_interval),
        Column(name="configuration", heading="best with", kind=Kind.TEXT, priority=4),
        *gate,
        Column(name="topology", heading="topology", kind=Kind.TEXT, is_shown=False),
        *(Column(name=name, heading=name, kind=Kind.COUNT, is_shown=False) for name in _COUNTS),
        Column(
            name="num_runs",
            heading="runs",
            kind=Kind.COUNT,
            help="how many runs the row stands for",
        ),
        Column(name="source", heading="source", kind=Kind.TEXT, is_shown=False),
    ]


def _latency_column(name: str, heading: str, lines: Sequence[_Line], system: str) -> Column:
    has_any = any(
        line.group.gate["system"] == system and MEAN_LATENCY in line.group.spreads for line in lines
    )
    return Column(
        name=name,
        heading=heading,
        is_shown=has_any,
        priority=3,
        help=f"of {system}; {help_of(MEAN_LATENCY, system)}",
    )


def _end_column(end: str, *, is_shown: bool) -> Column:
    which = {"low": "lower", "high": "upper"}[end]
    return Column(
        name=f"ratio_ci_{end}",
        heading=f"95 %\n{end}",
        kind=Kind.RATIO,
        is_shown=is_shown,
        priority=5,
        help=f"{which} end of the ratio's 95 % interval, by bootstrap over the runs of both",
    )


def _is_told(name: str, lines: Sequence[_Line], *, has_published: bool) -> bool:
    is_of_published = has_published and name in ("basis", "machine")
    return is_of_published or any(line.group.gate[name] is not None for line in lines)


def _notes(
    lines: Sequence[_Line], left_out: Sequence[str], *, has_published: bool
) -> Iterator[str]:
    if lines:
        yield "Of each system the configuration with the best throughput for the same task."
    if any(line.is_mixed for line in lines):
        names = dict.fromkeys(name for line in lines for name in line.differing)
        yield f"Marked rows differ in more than system and topology: {', '.join(names)}."
    if left_out:
        what = "task is" if len(left_out) == 1 else "tasks are"
        more = "; ..." if len(left_out) > _MOST_NAMED else ""
        yield (
            f"{len(left_out)} {what} left out, since runs of other kinds are not compared "
            f"(--allow-mixed does): {'; '.join(left_out[:_MOST_NAMED])}{more}."
        )
    if has_published:
        yield f"published: {SOURCE}; tokens/s on {MACHINE}, not measured here."
