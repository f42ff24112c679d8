"""A few layers of a model, run by the engine for the sake of their times."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import mean, median
from types import TracebackType

import numpy as np
import torch

from flexbench.dist.config import DUMMY_WEIGHT, DebugMode
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.layers import InputEmbed, OutputEmbed, num_whole_stored
from flexbench.dist.model import OptLM
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.policy import Policy
from flexbench.dist.policy_search.constants import Constants, kind_of
from flexbench.dist.timing import StageTimes
from flexbench.dist.weights import layout_of

_EMBEDDINGS = (InputEmbed, OutputEmbed)


@dataclass(frozen=True)
class Times:
    """What one run of a probe took, in seconds."""

    prefill_s: dict[str, float]
    """By kind of layer, one of them."""
    decode_s: dict[str, float]
    """And for one new position."""
    prefill_compute_s: float
    """Computing alone, all layers."""
    decode_compute_s: float
    """For one new position."""
    busy_s: dict[str, float]
    """By lane, of the whole run."""
    stalled_s: float
    num_decoded: int

    @classmethod
    def median(cls, runs: list[Times]) -> Times:
        """The median of each time."""

        def middle(dicts: list[dict[str, float]]) -> dict[str, float]:
            return {key: median(times[key] for times in dicts) for key in dicts[0]}

        return cls(
            prefill_s=middle([run.prefill_s for run in runs]),
            decode_s=middle([run.decode_s for run in runs]),
            prefill_compute_s=median(run.prefill_compute_s for run in runs),
            decode_compute_s=median(run.decode_compute_s for run in runs),
            busy_s=middle([run.busy_s for run in runs]),
            stalled_s=median(run.stalled_s for run in runs),
            num_decoded=runs[0].num_decoded,
        )


class Probe:
    """The model with `num_layers` transformer layers, and random weights."""

    def __init__(
        self, model: OptConfig, policy: Policy, env: ExecutionEnv, *, num_layers: int
    ) -> None:
        self.num_layers = num_layers
        config = replace(model, num_hidden_layers=num_layers)
        self._lm = OptLM(config, env, DUMMY_WEIGHT, policy)
        self._has_gpu = env.has_gpu
        self._vocab_size = model.vocab_size
        dtype: torch.dtype = getattr(torch, self._lm.config.dtype)
        layouts = [layout_of(layer.specs, policy, dtype) for layer in self._lm.layers]
        self.load_bytes = sum(layout.num_bytes - layout.load_start for layout in layouts)
        """What one pass through the layers loads into buffers."""
        self.weight_bytes = sum(layout.num_bytes for layout in layouts)

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lm.close()

    def run(self, policy: Policy, *, prompt_len: int, num_tokens: int) -> Times:
        """Generate for one block of `policy`, whose weights are where this probe's are."""
        self._lm.policy = policy
        shape = (policy.block_size, prompt_len)
        prompts = np.random.default_rng(0).integers(0, self._vocab_size, shape)
        prompts[prompts == self._lm.config.pad_token_id] = 0
        # What a GPU does is only timed by layers when each is waited for.
        is_watched = self._has_gpu and not policy.overlap
        self._lm.generate(
            prompts,
            max_new_tokens=num_tokens,
            debug_mode=DebugMode.BREAKDOWN if is_watched else None,
        )
        return self._times(self._lm.times, policy)

    def _times(self, times: StageTimes, policy: Policy) -> Times:
        num_decoded = len(times.token_ends) - 1
        batches = policy.num_gpu_batches
        prefill = self._by_kind(times.layer_seconds(is_prefill=True), batches)
        decode: dict[str, float] = {}
        if num_decoded:
            layers = times.layer_seconds(is_prefill=False)
            decode = self._by_kind(layers, batches * num_decoded)
        return Times(
            prefill_s=prefill,
            decode_s=decode,
            prefill_compute_s=times.prefill_compute_s,
            decode_compute_s=times.decode_compute_s / max(1, num_decoded),
            busy_s=dict(times.busy_s),
            stalled_s=times.stalled_s,
            num_decoded=num_decoded,
        )

    def _by_kind(self, seconds: dict[int, float], visits: int) -> dict[str, float]:
        kinds: defaultdict[str, list[float]] = defaultdict(list)
        for index, layer in enumerate(self._lm.layers):
            kinds[kind_of(layer)].append(seconds.get(index, 0.0) / visits)
        return {kind: mean(values) for kind, values in kinds.items()}

    def resident_s(self, constants: Constants, batch_size: int, context: float | None) -> float:
        """What one pass through the transformer layers takes, one by one, with all on the gpu.

        `context` is as in LayerTimes.seconds. Embeddings may be smaller in a probe than they are.
        """
        layers = (layer for layer in self._lm.layers if not isinstance(layer, _EMBEDDINGS))
        return sum(
            constants.layers[kind_of(layer)].seconds(batch_size, context, is_apart=True)
            for layer in layers
        )

    @property
    def num_hidden(self) -> int:
        """How often activations are stored and loaded in one pass of a batch."""
        return len(self._lm.layers) - 1

    @property
    def num_whole_hidden(self) -> int:
        """How often they are those of all positions of a prompt."""
        return num_whole_stored(self._lm.layers)
