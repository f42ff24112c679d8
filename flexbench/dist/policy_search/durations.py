"""How long each load, store and computation of a policy takes by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from flexbench.dist.cache import CacheShape
from flexbench.dist.layers import layers_of, num_whole_stored
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.partition import Stage
from flexbench.dist.placement import LayerLayout
from flexbench.dist.policy import Percent, Policy
from flexbench.dist.policy_search.constants import Constants, HomeTimes, LayerTimes, kind_of
from flexbench.dist.spans import can_be_joined
from flexbench.dist.weights import layout_of

HOMES = ("cpu", "disk")


@dataclass(frozen=True)
class Transfer:
    """Seconds by the home that something comes from, or goes to, one after the other."""

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """All homes."""
        return sum(self.seconds.values())

    @property
    def link(self) -> str:
        """The home that most of the time goes to."""
        return max(self.seconds, key=lambda home: self.seconds[home])


@dataclass(frozen=True)
class LayerWork:
    """A layer's computing and weights."""

    times: LayerTimes
    loaded_share: float
    """The share of its weights that goes through a buffer."""
    weight: Transfer
    has_cache: bool


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Of one stage under one policy. Seconds; a batch is `policy.gpu_batch_size` prompts."""

    model: OptConfig
    policy: Policy
    stage: Stage
    constants: Constants
    prompt_len: int

    @cached_property
    def layers(self) -> list[LayerWork]:
        """The stage's layers in order."""
        dtype: torch.dtype = getattr(torch, self.model.dtype)
        layers = layers_of(self.model, self.stage, sep_layer=self.policy.sep_layer)
        works: dict[str, LayerWork] = {}
        for layer in layers:
            kind = kind_of(layer)
            if kind not in works:
                layout = layout_of(layer.specs, self.policy, dtype)
                works[kind] = LayerWork(
                    times=self.constants.layers[kind],
                    loaded_share=1 - layout.load_start / layout.num_bytes,
                    weight=self._weight(layout),
                    has_cache=layer.num_caches > 0,
                )
        return [works[kind_of(layer)] for layer in layers]

    @cached_property
    def num_whole_stored(self) -> int:
        """As the function of that name has it."""
        layers = layers_of(self.model, self.stage, sep_layer=self.policy.sep_layer)
        return num_whole_stored(layers)

    def _weight(self, layout: LayerLayout) -> Transfer:
        sizes = layout.home_bytes
        seconds = {"gpu": (layout.gpu_end - layout.load_start) / self.constants.copy}
        if layout.load_start >= layout.gpu_end:
            seconds["gpu"] = 0.0
        for home, size in (("cpu", sizes.cpu), ("disk", sizes.disk)):
            seconds[home] = size / self.constants.homes[home].weight_load if size else 0.0
        return Transfer(seconds)

    def compute(self, work: LayerWork, context: float | None) -> float:
        """Of one batch in one layer; `context` as in LayerTimes.seconds."""
        curves = self.constants
        size = self.policy.gpu_batch_size
        loaded = (curves.loaded_prefill if context is None else curves.loaded_decode).at(size)
        is_apart = work.loaded_share > 0 or not can_be_joined(self.policy)
        resident_s = work.times.seconds(size, context, is_apart=is_apart)
        return resident_s * (1 + (loaded - 1) * work.loaded_share)

    def cache_load(self, past: float) -> Transfer:
        """Keys and values of one layer's and batch's past."""
        size = self._position_cache_bytes * past
        return self._moved(self.policy.cache, {h: size / t.cache_load for h, t in self._homes})

    def cache_store(self, *, is_prefill: bool) -> Transfer:
        """Those of its new positions."""
        size = self._position_cache_bytes * self.prompt_len
        batch = self.policy.gpu_batch_size
        seconds = {
            home: size / times.cache_store if is_prefill else times.cache_append_s.at(batch)
            for home, times in self._homes
        }
        return self._moved(self.policy.cache, seconds)

    def hidden(self, *, is_prefill: bool) -> Transfer:
        """Activations of one batch between two layers, one way."""
        batch = self.policy.gpu_batch_size
        size = self.model.hidden_bytes(batch, self.prompt_len)
        seconds = {
            home: size / times.hidden if is_prefill else times.hidden_step_s.at(batch) / 2
            for home, times in self._homes
        }
        return self._moved(self.policy.activations, seconds)

    @property
    def _homes(self) -> list[tuple[str, HomeTimes]]:
        return list(self.constants.homes.items())

    @cached_property
    def _position_cache_bytes(self) -> int:
        shape = CacheShape(
            batch_size=self.policy.gpu_batch_size,
            num_heads=self.model.num_attention_heads,
            head_dim=self.model.head_dim,
            max_length=1,
            dtype=getattr(torch, self.model.dtype),
        )
        return 2 * shape.num_rows * shape.row_bytes(self.policy.cache_compression)

    def _moved(self, percent: Percent, whole: dict[str, float]) -> Transfer:
        shares = {"cpu": percent.cpu / 100, "disk": percent.disk / 100}
        return Transfer({home: shares[home] * whole.get(home, 0.0) for home in HOMES})
