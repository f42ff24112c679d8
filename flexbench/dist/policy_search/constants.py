"""What a search knows of the machine: the engine's own times, by layer, batch size and home."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from flexbench.dist.layers import Layer

_FAR = 1000


@dataclass(frozen=True)
class Curve:
    """A quantity by batch size: straight lines between the measured points, and beyond them."""

    points: tuple[tuple[float, float], ...]
    """(batch size, value), in order of batch sizes; at least one."""

    def at(self, batch_size: float) -> float:
        """The value for a batch size, never negative."""
        points = self.points
        if len(points) == 1:
            return points[0][1]
        index = bisect_left([size for size, _ in points], batch_size)
        index = min(max(index, 1), len(points) - 1)
        (low, low_value), (high, high_value) = points[index - 1], points[index]
        slope = (high_value - low_value) / (high - low)
        return max(0.0, low_value + slope * (batch_size - low))

    def in_proportion_beyond(self) -> Curve:
        """The same, but beyond the largest batch as much for a prompt as in that one."""
        size, value = self.points[-1]
        return Curve((*self.points, (_FAR * size, _FAR * value)))


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Seconds that a layer of one kind takes for a batch, its weights and cache on the gpu.

    All that the engine does for the layer counts: it is what stands between two layers' begins.
    """

    prefill: Curve
    """All positions of the run's prompts."""
    decode: Curve
    """One new position, after a past of `Constants.short_context` positions."""
    apart_s: float = 0.0
    """What a new position takes longer where layers are passed one by one, see `spans`."""
    decode_per_position: float = 0.0
    """What each further position of each prompt's past adds."""

    def seconds(self, batch_size: int, context: float | None, *, is_apart: bool = False) -> float:
        """For one batch; `context`: positions of the past beyond the short one, None: prefill.

        `is_apart`: the layer is not passed through together with others.
        """
        if context is None:
            return self.prefill.at(batch_size)
        past_s = self.decode_per_position * batch_size * context
        return self.decode.at(batch_size) + past_s + (self.apart_s if is_apart else 0.0)


@dataclass(frozen=True, kw_only=True)
class HomeTimes:
    """How the engine moves data between the gpu and one other home. Rates in bytes a second."""

    weight_load: float
    cache_load: float
    cache_store: float
    """Of a whole prompt's keys and values."""
    cache_append_s: Curve
    """Seconds for storing those of one new position of a batch in one layer."""
    hidden: float
    """Of a whole prompt's activations, either way."""
    hidden_step_s: Curve
    """Seconds for storing and loading those of one position of a batch."""
    compute_speed: float = 1.0
    """How fast computing is while such a load runs beside it; 1: it does not notice."""
    load_speed: float = 1.0
    """How fast such a load is while computing runs beside it."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Everything that was measured."""

    num_threads: int
    num_layers: int
    """Transformer layers that it was measured with."""
    short_context: int
    """Positions of the past in the measurements of decoding."""
    layers: dict[str, LayerTimes]
    """By kind of layer, see `kind_of`."""
    loaded_prefill: Curve = Curve(((1, 1.0),))
    """By how much computing takes longer with weights that were loaded into a buffer."""
    loaded_decode: Curve = Curve(((1, 1.0),))
    copy: float = float("inf")
    """Bytes a second copied from the gpu to the gpu: weights of which a part is elsewhere."""
    homes: dict[str, HomeTimes] = field(default_factory=dict)
    """'cpu' and 'disk', as far as anything may have to be there."""


def kind_of(layer: Layer) -> str:
    """What layers that take the same time have in common: 'attention', say, or 'last attention'."""
    return layer.name.rstrip("0123456789 ")
