"""Measuring how the engine moves data to and from one home, and what computing suffers from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flexbench.dist.cache import CacheShape
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.policy import Policy
from flexbench.dist.policy_search.constants import Constants, Curve, HomeTimes
from flexbench.dist.policy_search.placing import placed
from flexbench.dist.policy_search.probe import Probe, Times
from flexbench.dist.policy_search.turns import take_turns

_NUM_LAYERS = 4
_LONG_TOKENS = 3
_SHORT_TOKENS = 4
# Of the weights, so many bytes are put there: large models' layers take gigabytes.
_PROBED_BYTES = 256 << 20
_LEAST_PERCENT = 5.0
# The embeddings are read as all else is, and would only take time.
_SMALL_VOCABULARY = 1024
# Where loads and computing were together for less than this share of the computing, how they
# disturb each other has not been seen.
_LEAST_TOGETHER = 0.1
_SLOWEST = 0.2


@dataclass(frozen=True)
class DataTimes:
    """Of keys, values and activations; as in HomeTimes."""

    cache_load: float
    cache_store: float
    cache_append_s: Curve
    hidden: float
    hidden_step_s: Curve


@dataclass(frozen=True, kw_only=True)
class HomeCalibration:
    """What is measured: a home, and the batches and prompts to do it with."""

    model: OptConfig
    policy: Policy
    env: ExecutionEnv
    home: str
    prompt_len: int
    batch_sizes: tuple[int, int, int]
    """Of short prompts, of prompts of the run's length, and the largest of short prompts."""

    # --- cache and activations ---

    def measure_data(self, probe: Probe, constants: Constants) -> DataTimes:
        """With `probe`, whose weights are on the gpu."""
        small, long_size, large = self.batch_sizes
        moved = replace(placed(self.policy, self.home, 0), w_gpu_percent=100)
        long = probe.run(
            replace(moved, gpu_batch_size=long_size),
            prompt_len=self.prompt_len,
            num_tokens=_LONG_TOKENS,
        )
        short = {size: self._short(probe, moved, size, constants) for size in {small, large}}
        position_bytes = long_size * self.model.hidden_size * self.model.dtype_bytes
        cache_bytes = 2 * position_bytes * self._stored_share() * probe.num_layers
        past = sum(self.prompt_len + token for token in range(long.num_decoded))
        hidden_bytes = 2 * position_bytes * self.prompt_len * probe.num_whole_hidden
        cache_store = _rate(cache_bytes * self.prompt_len, long.busy_s["cache_store"])
        hidden = _rate(hidden_bytes, long.busy_s["hidden"])
        append, step = [], []
        for size, run in sorted(short.items()):
            # The prompt's keys and values are stored at once, and the last token's never.
            share = size / long_size * constants.short_context
            stored = run.busy_s["cache_store"] - share * cache_bytes / cache_store
            append.append((size, stored / max(1, (run.num_decoded - 1) * probe.num_layers)))
            kept = run.busy_s["hidden"] - share * hidden_bytes / self.prompt_len / hidden
            # Of the prompt, too, some were those of one position.
            single = probe.num_hidden - probe.num_whole_hidden
            step.append((size, kept / max(1, run.num_decoded * probe.num_hidden + single)))
        return DataTimes(
            cache_load=_rate(cache_bytes * past, long.busy_s["cache_load"]),
            cache_store=cache_store,
            cache_append_s=Curve(tuple((float(size), max(0.0, s)) for size, s in append)),
            hidden=hidden,
            hidden_step_s=Curve(tuple((float(size), max(0.0, s)) for size, s in step)),
        )

    def _stored_share(self) -> float:
        """Bytes of a stored key or value of those it has uncompressed."""
        shape = CacheShape(
            batch_size=1,
            num_heads=self.model.num_attention_heads,
            head_dim=self.model.head_dim,
            max_length=1,
            dtype=getattr(torch, self.model.dtype),
        )
        return shape.row_bytes(self.policy.cache_compression) / shape.row_bytes(None)

    # --- weights ---

    def measure_weights(self, data: DataTimes, constants: Constants) -> Constants:
        """`constants`, which have the layers' times, with this home's."""
        small, long_size, large = self.batch_sizes
        model = replace(self.model, vocab_size=min(_SMALL_VOCABULARY, self.model.vocab_size))
        model = replace(model, pad_token_id=min(model.pad_token_id, model.vocab_size - 1))
        away = placed(self.policy, self.home, self._percent())
        away = replace(
            away, cache_gpu_percent=100, cache_cpu_percent=0, act_gpu_percent=100, act_cpu_percent=0
        )
        apart = replace(away, overlap=False)
        num_layers = min(self._num_layers(), self.model.num_hidden_layers)
        with Probe(model, away, self.env, num_layers=num_layers) as probe:
            self._short(probe, away, small, constants)
            sizes = sorted({small, large})
            # Until two agree: others on the host read and write, too.
            turns = take_turns([small], lambda size: self._short(probe, away, size, constants))
            loading = turns[small]
            short = {size: self._short(probe, apart, size, constants) for size in sizes}
            long = probe.run(
                replace(apart, gpu_batch_size=long_size),
                prompt_len=self.prompt_len,
                num_tokens=1,
            )
            rate = _rate(probe.load_bytes * (1 + loading.num_decoded), loading.busy_s["weight"])
            speeds = (1.0, 1.0)
            if self.policy.overlap:
                both = self._short(probe, away, large, constants)
                speeds = _together(both, short[large], loading.busy_s["weight"])
            prefill, decode = self._loaded(probe, constants, long, long_size, short)
        times = HomeTimes(
            weight_load=rate, compute_speed=speeds[0], load_speed=speeds[1], **vars(data)
        )
        return replace(
            constants,
            loaded_prefill=prefill,
            loaded_decode=decode,
            homes=constants.homes | {self.home: times},
        )

    def _num_layers(self) -> int:
        """As many as have the bytes that are to be moved, and one that is not the last."""
        return max(2, min(_NUM_LAYERS, _PROBED_BYTES // self._layer_bytes()))

    def _percent(self) -> float:
        return min(100.0, max(_LEAST_PERCENT, 100 * _PROBED_BYTES / self._layer_bytes()))

    def _layer_bytes(self) -> int:
        num_bytes = self.model.layer_parameters() * self.model.dtype_bytes
        return num_bytes // 4 if self.policy.compress_weight else num_bytes

    def _short(self, probe: Probe, policy: Policy, size: int, constants: Constants) -> Times:
        return probe.run(
            replace(policy, gpu_batch_size=size),
            prompt_len=constants.short_context,
            num_tokens=_SHORT_TOKENS,
        )

    def _loaded(
        self,
        probe: Probe,
        constants: Constants,
        long: Times,
        long_size: int,
        short: dict[int, Times],
    ) -> tuple[Curve, Curve]:
        """By how much computing takes longer with loaded weights: prefill, decode."""
        fraction = probe.load_bytes / probe.weight_bytes
        on_gpu = probe.resident_s(constants, long_size, None)
        prefill = _factor(long.prefill_compute_s, on_gpu, fraction)
        decode = tuple(
            (
                float(size),
                _factor(run.decode_compute_s, probe.resident_s(constants, size, 0.0), fraction),
            )
            for size, run in sorted(short.items())
        )
        return Curve(((1, prefill),)), Curve(decode)


def _together(both: Times, apart: Times, loading_s: float) -> tuple[float, float]:
    """How fast computing and loading are at the same time: 1 is undisturbed.

    `both` computed and loaded at once, `apart` computed as much without, and `loading_s` is what
    the loads take beside next to no computing. While computing stood still, loads had everything
    for themselves. The rest of their time was beside computing, with both at some speed: time x
    speed is what is done apart.
    """
    computing = _compute_s(both)
    together = both.busy_s["weight"] - both.stalled_s
    if together < _LEAST_TOGETHER * computing:
        return 1.0, 1.0
    return (
        _speed(1 - (computing - _compute_s(apart)) / together),
        _speed((loading_s - both.stalled_s) / together),
    )


def _compute_s(times: Times) -> float:
    return times.prefill_compute_s + times.decode_compute_s * times.num_decoded


def _speed(value: float) -> float:
    return min(1.0, max(_SLOWEST, value))


def _rate(num_bytes: float, seconds: float) -> float:
    """Bytes a second; of what took no time, or was nothing, infinite."""
    return num_bytes / seconds if seconds > 0 and num_bytes > 0 else float("inf")


def _factor(loaded_s: float, on_gpu_s: float, fraction: float) -> float:
    """What is measured with a fraction of the weights loaded, for all of them."""
    if on_gpu_s <= 0 or fraction <= 0:
        return 1.0
    return max(0.5, 1 + (loaded_s / on_gpu_s - 1) / fraction)
