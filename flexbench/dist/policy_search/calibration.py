"""Measuring a search's constants: the engine runs a few layers, on every home that may be used.

The layers have the model's real dimensions, and the run's real prompt length; only their number is
small. So a step's own time, whatever the engine does in it, is what is measured, and no ceiling of
the machine stands in for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexbench.dist.config import DistConfig
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.lanes import synchronize
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.policy import Policy
from flexbench.dist.policy_search.constants import Constants, Curve, LayerTimes
from flexbench.dist.policy_search.home_calibration import HomeCalibration
from flexbench.dist.policy_search.placing import placed
from flexbench.dist.policy_search.probe import Probe, Times
from flexbench.dist.policy_search.turns import take_turns
from flexbench.dist.spans import can_be_joined

_SHORT_PROMPT = 16
_DECODE_TOKENS = 5
_LONG_TOKENS = 3
# Of the prompts of a run's length: batches grow as long as one takes no longer.
_BATCH_S = 0.6
# The last layer of a model computes less than others of a prompt, so that both have to be there.
_LEAST_LAYERS, _MOST_LAYERS = 2, 8
_LARGE_LAYER_BYTES = 1 << 30
# Enough of them that the caches of the CPU do not hold their weights from token to token, of which
# the output embedding has its share.
_CACHES = 3
_L3_BYTES = 32 << 20
_COPY_BYTES = 64 << 20
_BySize = dict[int, Times]
# Kinds of layers that look back.
_WITH_CACHE = {"attention", "last attention", "layer", "last layer"}


@dataclass(frozen=True)
class Calibration:
    """What is measured: the model, the options that change its times, and how far."""

    model: OptConfig
    config: DistConfig
    env: ExecutionEnv
    batches: Sequence[int]
    """Batch sizes that a search may choose, in order."""
    homes: Sequence[str]
    """'cpu' and 'disk', as far as anything may have to be there."""

    @property
    def num_parts(self) -> int:
        """How often `measure` calls `on_part`: for the gpu, and the weights of each home."""
        return 1 + len(self.homes)

    def measure(self, on_part: Callable[[], None]) -> Constants:
        """Run the probes with torch's current number of threads. Raises RunError as they do."""
        num_layers = self._num_layers()
        policy = replace(self.config.policy(), num_gpu_batches=1)
        on_gpu = placed(policy, "gpu", 100)
        with Probe(self.model, on_gpu, self.env, num_layers=num_layers) as probe:
            # What is done for the first time takes longer: threads, kernels, memory.
            self._run_short(probe, on_gpu, self.batches[0])
            long, short, apart = self._in_turns(probe, on_gpu)
            constants = Constants(
                num_threads=torch.get_num_threads(),
                num_layers=num_layers,
                short_context=self._short_prompt,
                layers=self._layer_times(long, short, apart),
                copy=_copy_rate(self.env.gpu.device),
            )
            sizes = (min(short), max(long), max(short))
            homes = [self._home(home, policy, sizes) for home in self.homes]
            data = [home.measure_data(probe, constants) for home in homes]
        on_part()
        for home, times in zip(homes, data, strict=True):
            constants = home.measure_weights(times, constants)
            on_part()
        return constants

    def _home(self, home: str, policy: Policy, sizes: tuple[int, int, int]) -> HomeCalibration:
        return HomeCalibration(
            model=self.model,
            policy=policy,
            env=self.env,
            home=home,
            prompt_len=self.config.prompt_len,
            batch_sizes=sizes,
        )

    @property
    def _short_prompt(self) -> int:
        return min(_SHORT_PROMPT, self.config.prompt_len)

    def _num_layers(self) -> int:
        layer_bytes = self.model.layer_parameters() * self.model.dtype_bytes
        if layer_bytes > _LARGE_LAYER_BYTES:
            return min(_LEAST_LAYERS, self.model.num_hidden_layers)  # which take long enough
        if self.config.compress_weight:
            layer_bytes //= 4
        table_bytes = self.model.vocab_size * self.model.embed_dim * self.model.dtype_bytes
        missing = _CACHES * _last_cache_bytes() - table_bytes
        enough = max(_LEAST_LAYERS, -(-missing // layer_bytes))
        return min(enough, _MOST_LAYERS, self.model.num_hidden_layers)

    def _in_turns(self, probe: Probe, policy: Policy) -> tuple[_BySize, _BySize, _BySize]:
        """Prompts of the run's length; short ones; a few of these, with layers passed one by one.

        The last is empty where this policy's always are.
        """
        # Several batches take turns in each layer. What that costs is the same for all sizes.
        apart = replace(policy, num_gpu_batches=2)
        few = _spread(self.batches)[:1] if can_be_joined(policy) else []
        runs = {
            (self._run_long, policy): self._long_sizes(probe, policy),
            (self._run_short, policy): _spread(self.batches),
            (self._run_short, apart): few,
        }
        keys = [(*how, size) for how, sizes in runs.items() for size in sizes]
        found = take_turns(keys, lambda key: key[0](probe, key[1], key[2]))
        long, short, one_by_one = (
            {size: found[*how, size] for size in sizes} for how, sizes in runs.items()
        )
        return long, short, one_by_one

    def _long_sizes(self, probe: Probe, policy: Policy) -> list[int]:
        """Ever larger batches of prompts of the run's length, until that takes too long.

        Each has been run then, and has its memory, as a run has after its warm-up.
        """
        sizes: list[int] = []
        seconds = 0.0
        for size in _spread(self.batches):
            if sizes and seconds * size / sizes[-1] > _BATCH_S:
                break
            began_at = time.perf_counter()
            self._run_long(probe, policy, size)
            seconds = time.perf_counter() - began_at
            sizes.append(size)
        return sizes

    def _run_long(self, probe: Probe, policy: Policy, size: int) -> Times:
        return probe.run(
            replace(policy, gpu_batch_size=size),
            prompt_len=self.config.prompt_len,
            num_tokens=min(_LONG_TOKENS, self.config.gen_len),
        )

    def _run_short(self, probe: Probe, policy: Policy, size: int) -> Times:
        return probe.run(
            replace(policy, gpu_batch_size=size),
            prompt_len=self._short_prompt,
            num_tokens=_DECODE_TOKENS,
        )

    def _layer_times(self, long: _BySize, short: _BySize, apart: _BySize) -> dict[str, LayerTimes]:
        first = next(iter(long.values()))
        layers = {
            kind: LayerTimes(
                prefill=Curve(
                    tuple((size, run.prefill_s[kind]) for size, run in long.items())
                ).in_proportion_beyond(),
                decode=Curve(tuple((size, run.decode_s[kind]) for size, run in short.items())),
                # What a noisy machine makes of no difference may be less than nothing.
                apart_s=max(
                    [
                        0.0,
                        *(run.decode_s[kind] - short[n].decode_s[kind] for n, run in apart.items()),
                    ]
                ),
            )
            for kind in first.prefill_s
        }
        size, run = list(long.items())[-1]
        further = self.config.prompt_len - self._short_prompt
        if not run.decode_s or further <= 0:
            return layers
        for kind in _WITH_CACHE & layers.keys():
            more = run.decode_s[kind] - layers[kind].decode.at(size)
            slope = max(0.0, more / (size * further))
            layers[kind] = replace(layers[kind], decode_per_position=slope)
        return layers


def _spread(batches: Sequence[int]) -> list[int]:
    """The smallest, the largest, and some between: each at least four times the one before."""
    chosen = [batches[0]]
    for size in batches:
        if size >= 4 * chosen[-1]:
            chosen.append(size)
    if chosen[-1] != batches[-1]:
        chosen.append(batches[-1])
    return chosen


def _last_cache_bytes() -> int:
    """Of the CPU, as the system tells it."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return _L3_BYTES  # no Linux, or no third level


def _copy_rate(device: torch.device) -> float:
    """Bytes a second within the memory of where is computed."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(4):
        synchronize(device)
        began_at = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - began_at)
    return _COPY_BYTES / best
