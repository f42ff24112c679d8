"""Which layers are computed for one new position in one call, and with what."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from flexbench.dist.kernels.decode_layer import DecodeHalf, Decoder, KeysValues
from flexbench.dist.layers import InputEmbed, Layer, OutputEmbed
from flexbench.dist.schedule import Step
from flexbench.dist.transfers import Transfers
from flexbench.dist.weights import ReadyWeights


class _Compiled(NamedTuple):
    """Halves of a decoder layer, and the weights for which they are good.

    These may go when they are not computed with: decompressed, they take far more than they did.
    """

    weights: weakref.ref[ReadyWeights]
    halves: list[DecodeHalf] | None


class _Visit(NamedTuple):
    """Layers that one batch of an inner iteration passes through: it has caches of its own."""

    span: range
    iteration: int
    batch: int


class Decoders:
    """Those of one call of `generate`, each made when it is first asked for."""

    def __init__(self, layers: Sequence[Layer], transfers: Transfers) -> None:
        self._layers, self._transfers = layers, transfers
        self._compiled: dict[int, _Compiled] = {}
        self._made: dict[_Visit, Decoder] = {}
        self._compiled_s: dict[int, float] = {}

    def of(self, step: Step, span: range) -> Decoder | None:
        """What computes these layers for the step's new position, if there are kernels for all."""
        visit = _Visit(span, step.unit.iteration, step.batch)
        known = self._made.get(visit)
        if known is not None and len(span) > 1:
            return known  # nothing is loaded for it: its weights are where they were
        halves: list[DecodeHalf] = []
        caches: list[KeysValues] = []
        for layer in span:
            own = step._replace(layer=layer)
            found = self._halves(own)
            if found is None:
                return None
            halves += found
            if self._layers[layer].num_caches:
                cache = self._transfers.whole_cache(own)
                if cache is None:
                    return None
                caches.append(cache)
        if known is None or known.halves != tuple(halves):
            known = self._made[visit] = Decoder(halves, caches)
        return known

    def _halves(self, step: Step) -> list[DecodeHalf] | None:
        """Those of the step's layer, with the weights that it has now."""
        layer, weights = self._layers[step.layer], self._transfers.weights(step)
        if isinstance(layer, InputEmbed | OutputEmbed):
            return None
        known = self._compiled.get(step.layer)
        if known is None or known.weights() is not weights:  # loaded anew, perhaps elsewhere
            begun_at = time.perf_counter()
            known = _Compiled(weakref.ref(weights), layer.compiled(weights))
            self._compiled_s[step.layer] = time.perf_counter() - begun_at
            self._compiled[step.layer] = known
        return known.halves

    def layer_seconds(self, span: range, decoder: Decoder) -> Iterator[tuple[int, float]]:
        """Each of these layers, and how long it took the last time, with what it took to be made.

        The first time, weights are laid out for the kernels.
        """
        of_halves = iter(decoder.seconds)
        for layer in span:
            halves = self._compiled[layer].halves or ()
            seconds = sum(islice(of_halves, len(halves)))
            yield layer, seconds + self._compiled_s.pop(layer, 0.0)
