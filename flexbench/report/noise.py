"""How much runs of one configuration differ, told by those that were repeated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from flexbench.report.groups import Group
from flexbench.report.matching import Pair
from flexbench.report.statistics import Sample

# Of fewer, Student's t is so wide that no change at all would be beyond it.
_LEAST_DEGREES = 3
_LEAST_TO_COMPARE = 3
_ONE_OF_1000 = 3.09


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How much runs of one configuration differ, where a configuration has too few to tell."""

    relative_std: float
    """Of one run, as a share of the mean."""
    degrees: int
    """How many runs told it, less one for each configuration."""
    source: str = "repeated configurations"
    """Whose runs told it, in words that follow "noise of"."""

    @classmethod
    def pooled(cls, samples: Iterable[Sample]) -> Noise | None:
        """From all configurations with repeats; None where they are too few to tell anything.

        Those that are far noisier than most are left out: they would hide what happens to others.
        """
        return cls.of_all(usual(samples))

    @classmethod
    def of_all(cls, samples: Iterable[Sample]) -> Noise | None:
        """The same, and none is left out."""
        known = [one for one in samples if _tells_noise(one)]
        degrees = sum(one.count - 1 for one in known)
        if degrees < _LEAST_DEGREES:
            return None
        squares = sum((one.count - 1) * one.relative_variance for one in known)
        return cls(relative_std=(squares / degrees) ** 0.5, degrees=degrees)


class Noises:
    """The noise of each figure and system, from all repeats of both sides of a comparison."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._repeats: dict[tuple[Any, str], dict[int, Sample]] = {}
        self._unusual: dict[tuple[Any, str], set[int]] = {}
        self._pooled: dict[tuple[Any, str], Noise | None] = {}

    def of(self, pair: Pair, figure: str) -> Noise | None:
        """With the word of whose runs told it; None where these are too few."""
        key = (pair.new.gate["system"], figure)
        if key not in self._repeats:
            self._add(key)
        repeats = self._repeats[key]
        own = {id(one): repeats[id(one)] for one in (pair.old, pair.new) if id(one) in repeats}
        if any(id(sample) in self._unusual[key] for sample in own.values()):
            # What is noisier than most is judged by its own runs or, where these are few, by all.
            found = Noise.of_all(own.values())
            if found is None:
                return Noise.of_all(repeats.values())
            return replace(found, source=_whose(pair, own, figure))
        found = self._pooled[key]
        if found is None or len(repeats) > 1:
            return found
        return replace(found, source=_whose(pair, repeats, figure))

    def _add(self, key: tuple[Any, str]) -> None:
        repeats = self._of_system(*key)
        most = {id(sample) for sample in usual(repeats.values())}
        self._repeats[key] = repeats
        self._unusual[key] = {id(one) for one in repeats.values() if _tells_noise(one)} - most
        self._pooled[key] = Noise.pooled(repeats.values())

    def _of_system(self, system: Any, figure: str) -> dict[int, Sample]:
        return {
            id(group): sample
            for group in self._groups
            if group.gate["system"] == system
            and (sample := group.sample(figure)) is not None
            and sample.count > 1
        }


def _whose(pair: Pair, repeats: Mapping[int, Sample], figure: str) -> str:
    """The runs of one configuration told it, perhaps of this very one."""
    for group, words in ((pair.old, "the baseline's {} runs"), (pair.new, "the {} new runs")):
        if id(group) in repeats:
            return words.format(group.spreads[figure].count)
    return "a repeated configuration"


def usual(samples: Iterable[Sample]) -> list[Sample]:
    """Those with repeats whose noise is what one of 1,000 exceeds, or less, by the median of all.

    Of one or two nobody can tell which is unusual.
    """
    known = [one for one in samples if _tells_noise(one)]
    if len(known) < _LEAST_TO_COMPARE:
        return known
    # The median of a sample's variance is below the variance.
    middle = median(one.relative_variance / _chi_square(one.count - 1, 0.0) for one in known)
    if middle == 0:
        return known
    return [
        one
        for one in known
        if one.relative_variance <= middle * _chi_square(one.count - 1, _ONE_OF_1000)
    ]


def _tells_noise(sample: Sample) -> bool:
    return sample.std is not None and sample.count > 1 and sample.mean > 0


def _chi_square(degrees: int, z: float) -> float:
    """A quantile by degrees of freedom, by Wilson and Hilferty from that of a normal one."""
    part = 2 / (9 * degrees)
    return float((1 - part + z * part**0.5) ** 3)
