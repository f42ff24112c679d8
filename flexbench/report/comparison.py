"""New runs beside those of a baseline: what is faster, what is slower, what nobody can tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexbench.core.errors import ConfigError
from flexbench.report.columns import configuration_columns
from flexbench.report.composition import with_compositions
from flexbench.report.figures import MAIN_FIGURES, is_share, unit_of
from flexbench.report.gate import in_words, key_in_words
from flexbench.report.grouping import read_groups
from flexbench.report.groups import Group
from flexbench.report.matching import HOW_TO_MATCH, Matches, Pair, differing_options, match
from flexbench.report.names import name_of, unknown_name
from flexbench.report.noise import Noises
from flexbench.report.selection import Selection, named
from flexbench.report.store import RunStore
from flexbench.report.summary import column_of, describe, sort_rows, subject_in_words
from flexbench.report.table import Column, Kind, Row, Table
from flexbench.report.verdicts import (
    Judgement,
    Verdict,
    allow_for_number,
    in_percent,
    judge,
)

_IF_BOTH_HAVE = ("goodput", "error_rate")
_FIGURES = (*MAIN_FIGURES, "ttft_p99", *_IF_BOTH_HAVE)
_OF_COMPARISON = ("mean", "ci")
_MOST_NAMED = 3
_LONGEST_SUBJECT = 100


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
    _check_stats(selection)
    for store, what in ((old, "in it"), (new, "to compare with it")):
        if not len(store):
            raise ConfigError(
                "--baseline",
                f"there are no runs {what}; what flexbench server-config predicted is not compared",
            )
    selection = named(selection, old, new)
    befores = _read(old, selection, _figures(old, new, selection))
    nows = _read(new, selection, _figures(new, old, selection))
    if not befores:
        raise ConfigError("--baseline", "none of its runs are selected")
    if not nows:
        raise ConfigError("--baseline", "there are no selected runs to compare with it")
    matches = with_compositions(old, new, match(befores, nows, selection), selection)
    options = differing_options(old, new, matches, selection)
    groups = (*befores, *nows)
    return _Comparing(matches, groups, options, selection, max_regression).comparison()


def _check_stats(selection: Selection) -> None:
    others = [name for name in selection.stats if name not in _OF_COMPARISON]
    if others:
        raise ConfigError(
            "--stat", f"{others[0]} does not go with --baseline, which compares means of runs"
        )


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
        options: str,
        selection: Selection,
        max_regression: float,
    ) -> None:
        self._matches = matches
        self._options = options
        self._selection = selection
        self._max_regression = max_regression
        self._groups = groups
        self._noises = Noises(groups)
        lines = [line for pair in matches.pairs for line in self._of_pair(pair)]
        judgements = allow_for_number([line.judgement for line in lines])
        self._lines = [
            replace(line, judgement=one) for line, one in zip(lines, judgements, strict=True)
        ]

    def comparison(self) -> Comparison:
        describing = [_describe(pair) for pair in self._matches.pairs]
        columns = [
            *configuration_columns(describing, system="", group_by=self._selection.group_by),
            *_columns(self._lines),
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
            verdict=" ".join(self._verdict(varying)),
        )

    def _of_pair(self, pair: Pair) -> Iterator[_Line]:
        for figure in self._selection.figures or _FIGURES:
            old, new = pair.old.sample(figure), pair.new.sample(figure)
            if old is None and new is None:
                continue
            is_asked = self._selection.figures is not None
            if not is_asked and figure in _IF_BOTH_HAVE and (old is None or new is None):
                continue
            judgement = judge(
                figure,
                old,
                new,
                max_regression=self._max_regression,
                noise=self._noises.of(pair, figure),
                is_asked=is_asked,
                seed=self._selection.seed,
            )
            yield _Line(pair=pair, figure=figure, judgement=judgement)

    def _sort(self, columns: Sequence[Column]) -> list[tuple[str, Any]]:
        """By columns of this table; figures are rows here, and order other tables only."""
        known = {column.name: None for column in columns}
        keys = [(column_of(key, known), key) for key in self._selection.sort]
        for name, _ in keys:
            is_figure = any(
                name_of(name, (line.figure,)).startswith(line.figure) for line in self._lines
            )
            if name not in known and not is_figure:
                raise unknown_name("--sort", "column", name, known)
        return [(name, key) for name, key in keys if name in known]

    # --- in words ---

    def _verdict(self, varying: Sequence[str]) -> Iterator[str]:
        """What got worse, then what may have."""
        limit = in_percent(self._max_regression)
        regressions = [line for line in self._lines if line.judgement.is_regression]
        doubtful = [line for line in self._lines if line.judgement.looks_worse]
        if regressions:
            num, num_all = len(regressions), len(self._lines)
            figures = "figure" if num_all == 1 else "figures"
            yield (
                f"{num} of {num_all} {figures} {'is' if num == 1 else 'are'} worse than the "
                f"baseline's by more than {limit}; the worst: {self._worst(regressions, varying)}."
            )
        if doubtful:
            more = " more" if regressions else ""
            figures = (
                f"1{more} figure looks"
                if len(doubtful) == 1
                else f"{len(doubtful)}{more} figures look"
            )
            yield (
                f"{figures} worse by more than {limit}, but {_runs_of(doubtful)} cannot tell that "
                "from noise: repeat the runs."
            )
        many = [line for line in self._lines if line.judgement.is_one_of_many]
        if many:
            num_known = sum(line.judgement.chance is not None for line in self._lines)
            is_one = len(many) == 1
            yield (
                f"{len(many)} {'figure is' if is_one else 'figures are'} worse by more than "
                f"{limit} and by more than {'its' if is_one else 'their'} own noise, but may be so "
                f"by chance among {num_known:,} comparisons: repeat the runs."
            )
        if not regressions and not doubtful and not many:
            counts = Counter(line.judgement.verdict.replace(",", "") for line in self._lines)
            parts = ", ".join(f"{count} {word}" for word, count in counts.items())
            is_known = Verdict.NOT_SURE not in counts
            what = "No figure" if is_known else "No figure that can be compared"
            yield f"{what} is worse than the baseline's by more than {limit}: {parts}."

        missing = len(self._matches.only_old)
        if missing:
            what = (
                "configuration of the baseline is"
                if missing == 1
                else ("configurations of the baseline are")
            )
            yield f"{missing:,} {what} missing now."

    def _worst(self, regressions: Sequence[_Line], varying: Sequence[str]) -> str:
        worst = max(regressions, key=lambda line: _size(line.judgement.ratio))
        about = _telling(worst.pair, self._matches.pairs, varying)
        where = f" with {key_in_words(about)}" if about else ""
        if len(where) > _LONGEST_SUBJECT:
            where = f"{where[:_LONGEST_SUBJECT]}..."
        ratio = worst.judgement.ratio
        if ratio is not None:
            return f"{worst.figure}{where} is {ratio:.3g} times the baseline's"
        return f"{worst.figure}{where} is up by {self._rise(worst)}"

    def _rise(self, line: _Line) -> str:
        """Of what has no ratio."""
        old, new = line.pair.old.mean(line.figure) or 0.0, line.pair.new.mean(line.figure) or 0.0
        if is_share(line.figure):
            return f"{100 * (new - old):.3g} percentage points"
        return f"{in_words(new - old)} {unit_of(line.figure)}".rstrip()

    def _notes(self) -> Iterator[str]:
        yield (
            "ratio = now / before, of means, with its 95 % interval by bootstrap over the runs; a "
            f"regression: worse by more than {in_percent(self._max_regression)}, beyond the noise."
        )
        if any(pair.differing for pair in self._matches.pairs):
            names = dict.fromkeys(name for pair in self._matches.pairs for name in pair.differing)
            yield f"Marked rows compare runs that differ in {', '.join(names)}."
        if self._options:
            yield f"Options that are not the same on both sides: {self._options}."
        left = (
            (self._matches.only_old, "only in the baseline"),
            (self._matches.only_new, "not in the baseline"),
        )
        for groups, what in left:
            if groups:
                yield f"Configurations {what}: {len(groups):,} ({self._named(groups)})."
        if all(groups for groups, _ in left) and self._selection.group_by is None:
            yield f"Where an option was changed on purpose: {HOW_TO_MATCH}."

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


def _columns(lines: Sequence[_Line]) -> list[Column]:
    has_reasons = any(line.judgement.reason for line in lines)
    return [
        Column(name="figure", heading="figure", kind=Kind.TEXT),
        Column(name="unit", heading="unit", kind=Kind.TEXT, priority=8),
        Column(name="old_mean", heading="before", help="mean over the runs of the baseline"),
        Column(name="new_mean", heading="now", help="mean over the new runs"),
        Column(name="old_runs", heading="runs\nbefore", kind=Kind.COUNT, priority=5),
        Column(name="new_runs", heading="runs\nnow", kind=Kind.COUNT, priority=5),
        Column(name="ratio", heading="ratio", kind=Kind.RATIO, help="now / before"),
        Column(
            name="ratio_ci_low",
            heading="95 %\nlow",
            kind=Kind.RATIO,
            priority=7,
            help="lower end of the ratio's 95 % interval: of the runs of both, or of the noise of "
            "others, as the reason says",
        ),
        Column(
            name="ratio_ci_high",
            heading="95 %\nhigh",
            kind=Kind.RATIO,
            priority=7,
            help="upper end of the ratio's 95 % interval: of the runs of both, or of the noise of "
            "others, as the reason says",
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


def _telling(pair: Pair, pairs: Sequence[Pair], names: Sequence[str]) -> dict[str, Any]:
    """As few columns as set a row apart from all others."""
    about = _describe(pair)
    alike = [_describe(one) for one in pairs]
    found: dict[str, Any] = {}
    for name in names:
        if name not in about:
            continue
        left = [one for one in alike if one.get(name) == about[name]]
        if len(left) < len(alike):
            found[name], alike = about[name], left
    return found


def _runs_of(lines: Sequence[_Line]) -> str:
    """'2 + 1 runs'; of lines with different numbers, no number."""
    counts = {
        tuple(group.spreads[line.figure].count for group in (line.pair.old, line.pair.new))
        for line in lines
    }
    if len(counts) > 1:
        return "so few runs"
    ((old, new),) = counts
    return "one run each" if old == new == 1 else f"{old} + {new} runs"


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
