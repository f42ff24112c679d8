"""New runs beside those of a baseline: what is faster, what is slower, what nobody can tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexbench.core.errors import ConfigError
from flexbench.report.columns import configuration_columns
from flexbench.report.figures import MAIN_FIGURES, unit_of
from flexbench.report.gate import in_words, key_in_words
from flexbench.report.grouping import read_groups
from flexbench.report.groups import Group
from flexbench.report.matching import Matches, Pair, match
from flexbench.report.selection import Selection
from flexbench.report.statistics import Sample
from flexbench.report.store import RunStore
from flexbench.report.summary import describe, sort_rows, subject_in_words
from flexbench.report.table import Column, Kind, Row, Table
from flexbench.report.verdicts import Judgement, Noise, judge

_FIGURES = (*MAIN_FIGURES, "ttft_p99")
_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of a comparison."""

    table: Table
    has_regression: bool
    verdict: str
    """One sentence for people."""


def compare(
    old: RunStore, new: RunStore, selection: Selection, *, max_regression: float
) -> Comparison:
    """Compare the runs of `new` with those of `old`, configuration by configuration.

    `max_regression` is the share by which a figure may get worse. Raises ConfigError where they
    have nothing in common, and for pairs that differ in what must be alike, unless the selection
    allows that.
    """
    befores = _read(old, selection, _figures(old, new, selection))
    nows = _read(new, selection, _figures(new, old, selection))
    if not befores:
        raise ConfigError("--baseline", "none of its runs are selected")
    if not nows:
        raise ConfigError("--baseline", "there are no selected runs to compare with it")
    matches = match(befores, nows, selection)
    return _Comparing(matches, (*befores, *nows), selection, max_regression).comparison()


def _figures(store: RunStore, other: RunStore, selection: Selection) -> list[str]:
    """Those to compare that this one has. Raises ConfigError for what neither of them has."""
    known = {*MAIN_FIGURES, *store.keys("figures")}
    asked = selection.figures or _FIGURES
    if selection.figures is not None:
        for name in asked:
            if name not in known:
                other.figure(name, option="--figure")
    return [name for name in asked if name in known]


def _read(store: RunStore, selection: Selection, figures: Sequence[str]) -> list[Group]:
    return read_groups(store, selection, figures, keep_samples=True)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One figure of one configuration."""

    pair: Pair
    figure: str
    judgement: Judgement


class _Comparing:
    """Makes a table of matches."""

    def __init__(
        self,
        matches: Matches,
        groups: Sequence[Group],
        selection: Selection,
        max_regression: float,
    ) -> None:
        self._matches = matches
        self._selection = selection
        self._max_regression = max_regression
        self._groups = groups
        self._noises: dict[tuple[Any, str], Noise | None] = {}
        self._lines = [line for pair in matches.pairs for line in self._of_pair(pair)]

    def comparison(self) -> Comparison:
        describing = [_describe(pair) for pair in self._matches.pairs]
        columns = [
            *configuration_columns(describing, system="", group_by=self._selection.group_by),
            *_columns(has_reasons=any(line.judgement.reason for line in self._lines)),
        ]
        varying = [column.name for column in columns if column.is_shown]
        rows = [_row(line) for line in self._lines]
        return Comparison(
            table=Table(
                name="comparison",
                title="Compared with the baseline",
                columns=columns,
                rows=sort_rows(rows, self._sort(columns)),
                caption=subject_in_words(_common(describing)),
                notes=tuple(self._notes()),
            ),
            has_regression=any(line.judgement.is_regression for line in self._lines),
            verdict=self._verdict(varying),
        )

    def _of_pair(self, pair: Pair) -> Iterator[_Line]:
        figures = self._selection.figures or _FIGURES
        for figure in figures:
            old, new = _sample(pair.old, figure), _sample(pair.new, figure)
            if old is None and new is None:
                continue
            judgement = judge(
                figure,
                old,
                new,
                max_regression=self._max_regression,
                noise=self._noise(pair.new.gate["system"], figure),
                seed=self._selection.seed,
            )
            yield _Line(pair=pair, figure=figure, judgement=judgement)

    def _noise(self, system: Any, figure: str) -> Noise | None:
        """From all repeats of a system, on both sides."""
        key = (system, figure)
        if key not in self._noises:
            samples = (
                _sample(group, figure) for group in self._groups if group.gate["system"] == system
            )
            self._noises[key] = Noise.pooled(sample for sample in samples if sample is not None)
        return self._noises[key]

    def _sort(self, columns: Sequence[Column]) -> list[tuple[str, Any]]:
        """By columns of this table; figures are rows here, and order other tables only."""
        known = {column.name for column in columns}
        for key in self._selection.sort:
            if key.column not in known and not any(
                key.column.startswith(line.figure) for line in self._lines
            ):
                raise ConfigError(
                    "--sort", f"there is no column {key.column!r}; there are: {', '.join(known)}"
                )
        return [(key.column, key) for key in self._selection.sort if key.column in known]

    # --- in words ---

    def _verdict(self, varying: Sequence[str]) -> str:
        limit = f"{100 * self._max_regression:.3g}%"
        regressions = [line for line in self._lines if line.judgement.is_regression]
        num = len(self._lines)
        if not regressions:
            counts = Counter(line.judgement.verdict.partition(",")[0] for line in self._lines)
            parts = ", ".join(f"{count} {word}" for word, count in counts.items())
            return f"No figure is worse than the baseline's by more than {limit}: {parts}."
        worst = max(regressions, key=lambda line: _size(line.judgement.ratio))
        configuration = {
            name: value for name, value in _describe(worst.pair).items() if name in varying
        }
        where = f" with {key_in_words(configuration)}" if configuration else ""
        ratio = worst.judgement.ratio
        change = "is no longer 0" if ratio is None else f"is {ratio:.3g} times the baseline's"
        figures = "figure is" if len(regressions) == 1 else "figures are"
        return (
            f"{len(regressions)} of {num} {figures} worse than the baseline's by more than "
            f"{limit}; the worst: {worst.figure}{where} {change}."
        )

    def _notes(self) -> Iterator[str]:
        yield (
            "ratio = now / before, of means, with its 95 % interval by bootstrap over the runs; a "
            f"regression: worse by more than {100 * self._max_regression:.3g}%, beyond the noise."
        )
        if any(pair.differing for pair in self._matches.pairs):
            names = dict.fromkeys(name for pair in self._matches.pairs for name in pair.differing)
            yield f"Marked rows compare runs that differ in {', '.join(names)}."
        for groups, what in (
            (self._matches.only_old, "only in the baseline"),
            (self._matches.only_new, "not in the baseline"),
        ):
            if groups:
                yield f"Configurations {what}: {len(groups):,} ({self._named(groups)})."

    def _named(self, groups: Sequence[Group]) -> str:
        """The first ones, by what sets all of them apart."""
        all_of_them = [describe(group) for group in self._groups]
        common = _common(all_of_them)
        names = [
            key_in_words(
                {n: v for n, v in describe(group).items() if n not in common and v is not None}
            )
            for group in groups[:_MOST_NAMED]
        ]
        more = ["..."] if len(groups) > _MOST_NAMED else []
        return "; ".join([*(name or in_words(None) for name in names), *more])


def _sample(group: Group, figure: str) -> Sample | None:
    spread = group.spreads.get(figure)
    if spread is None:
        return None
    return Sample(
        count=spread.count, mean=spread.mean, std=spread.std, values=group.samples.get(figure)
    )


def _columns(*, has_reasons: bool) -> list[Column]:
    return [
        Column(name="figure", heading="figure", kind=Kind.TEXT),
        Column(name="unit", heading="unit", kind=Kind.TEXT, priority=6),
        Column(name="old_mean", heading="before", help="mean over the runs of the baseline"),
        Column(name="new_mean", heading="now", help="mean over the new runs"),
        Column(name="old_runs", heading="runs\nbefore", kind=Kind.COUNT, priority=5),
        Column(name="new_runs", heading="runs\nnow", kind=Kind.COUNT, priority=5),
        Column(name="ratio", heading="ratio", kind=Kind.RATIO, help="now / before"),
        Column(
            name="ratio_ci_low",
            heading="95 %\nlow",
            kind=Kind.RATIO,
            priority=3,
            help="lower end of the ratio's 95 % interval, by bootstrap over the runs of both",
        ),
        Column(
            name="ratio_ci_high",
            heading="95 %\nhigh",
            kind=Kind.RATIO,
            priority=3,
            help="upper end of the ratio's 95 % interval, by bootstrap over the runs of both",
        ),
        Column(name="verdict", heading="verdict", kind=Kind.TEXT),
        Column(name="reason", heading="because", kind=Kind.TEXT, is_shown=has_reasons, priority=2),
        Column(name="is_regression", heading="regression", kind=Kind.TEXT, is_shown=False),
    ]


def _describe(pair: Pair) -> dict[str, Any]:
    differing = {
        name: f"{in_words(old)} -> {in_words(new)}" for name, (old, new) in pair.differing.items()
    }
    return {**describe(pair.new), **differing}


def _row(line: _Line) -> Row:
    old, new = line.pair.old, line.pair.new
    found = line.judgement
    before, now = old.spreads.get(line.figure), new.spreads.get(line.figure)
    values = {
        **_describe(line.pair),
        "figure": line.figure,
        "unit": unit_of(line.figure),
        "old_mean": before.mean if before else None,
        "new_mean": now.mean if now else None,
        "old_runs": before.count if before else 0,
        "new_runs": now.count if now else 0,
        "ratio": found.ratio,
        "ratio_ci_low": found.low,
        "ratio_ci_high": found.high,
        "verdict": str(found.verdict),
        "reason": found.reason,
        "is_regression": found.is_regression,
    }
    is_mixed = bool(line.pair.differing or old.mixed or new.mixed)
    return Row(values=values, is_mixed=is_mixed, run_ids=new.run_ids)


def _common(describing: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them have in common."""
    return {
        name: value
        for name, value in describing[0].items()
        if all(name in one and one[name] == value for one in describing)
    }


def _size(ratio: float | None) -> float:
    """How far from no change, in either direction."""
    return math.inf if not ratio else abs(math.log(ratio))
