"""One call of `generate` on one stage: does the actions of a schedule, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from flexbench.core.errors import RunError
from flexbench.dist import sampling
from flexbench.dist.attention import prefill_attention
from flexbench.dist.decoders import Decoders
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.kernels.decode_layer import Decoder
from flexbench.dist.lanes import synchronize
from flexbench.dist.layers import MLP, InputEmbed, Layer, OutputEmbed
from flexbench.dist.messages import Messages
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.policy import Policy
from flexbench.dist.prompts import Blocks, Masks, OnTokens, Tokens
from flexbench.dist.schedule import Action, Op, Step, StepAction, Unit, Workload
from flexbench.dist.task import IntArray, Task
from flexbench.dist.timing import ComputeClock, StageTimes
from flexbench.dist.transfers import Transfers
from flexbench.dist.transport import PipelineLink
from flexbench.dist.weights import LayerWeights


class Generation:
    """One call: what is computed. What is moved is in `Transfers`, what is sent in `Messages`."""

    def __init__(
        self,
        *,
        config: OptConfig,
        policy: Policy,
        env: ExecutionEnv,
        task: Task,
        workload: Workload,
        layers: Sequence[Layer],
        weights: Sequence[LayerWeights],
        link: PipelineLink | None,
        is_first: bool,
        is_last: bool,
        is_overlapped: bool,
        on_allocated: Callable[[], None],
        on_unit: Callable[[], None],
        on_tokens: OnTokens | None = None,
    ) -> None:
        """Allocate everything.

        `on_allocated` is called when all is ready to start, `on_unit` whenever a unit is done,
        `on_tokens` when this stage knows the tokens of some prompts.
        """
        self._config, self._task, self._workload = config, task, workload
        self._layers, self._link, self._is_last = layers, link, is_last
        self._spans = {span.start: span for span in workload.visits}
        self._on_allocated, self._on_unit = on_allocated, on_unit
        self._device = env.gpu.device
        self._blocks = Blocks(policy.gpu_batch_size, workload.num_batches, workload.num_iterations)
        self._tokens = Tokens(task, config.pad_token_id, on_tokens)
        self._masks = Masks(task, self._blocks, config.num_attention_heads, self._device)
        self.times = StageTimes()
        self._clock = ComputeClock(self._device, self.times)
        self._messages = Messages(
            link,
            config=config,
            policy=policy,
            task=task,
            tokens=self._tokens,
            blocks=self._blocks,
            device=self._device,
            is_first=is_first,
            is_last=is_last,
        )
        self._output: torch.Tensor | None = None
        self._new_kv: tuple[torch.Tensor, torch.Tensor] | None = None
        self._transfers = Transfers(
            config=config,
            policy=policy,
            env=env,
            task=task,
            workload=workload,
            layers=layers,
            weights=weights,
            times=self.times,
            is_overlapped=is_overlapped,
        )
        self._decoders = Decoders(layers, self._transfers)

    def run(self, actions: Iterator[Action]) -> IntArray:
        """Do all actions; returns (num_prompts, prompt_len + gen_len) where this stage knows it."""
        try:
            with torch.inference_mode():
                self._on_allocated()
                self._do(actions)
        finally:
            self._transfers.close()
        return self._tokens.ids

    def _do(self, actions: Iterator[Action]) -> None:
        if self._link is not None:
            self._link.reset(self.times.timeline)
        times = self.times
        times.started_at = time.perf_counter()
        do = {
            Op.LOAD_WEIGHT: self._load_weight,
            Op.LOAD_CACHE: self._load_cache,
            Op.LOAD_HIDDEN: self._load_hidden,
            Op.COMPUTE: self._compute,
            Op.STORE_CACHE: self._store_cache,
            Op.STORE_HIDDEN: self._store_hidden,
        }
        for action in actions:
            if isinstance(action, StepAction):
                begun_at = time.perf_counter()
                do[action.op](action.step)
                times.add_to_layer(action.step, time.perf_counter() - begun_at)
            else:
                self._messages.exchange(action)
        self._transfers.finish()
        synchronize(self._device)
        if self._link is not None:
            self._link.flush()
            times.send_s, times.receive_s = self._link.send_s, self._link.receive_s
        self._clock.harvest()
        times.wall_s = time.perf_counter() - times.started_at

    # --- loads and stores, unless there is nothing to compute with them ---

    def _load_weight(self, step: Step) -> None:
        if not self._messages.is_skipped(step.unit):
            self._transfers.load_weight(step)

    def _load_cache(self, step: Step) -> None:
        if not self._messages.is_skipped(step.unit):
            self._transfers.load_cache(step)

    def _load_hidden(self, step: Step) -> None:
        if step.layer > 0 and not self._messages.is_skipped(step.unit):
            self._transfers.load_hidden(step)

    def _store_cache(self, step: Step) -> None:
        if self._new_kv is not None:
            self._transfers.store_cache(step, *self._new_kv)
            self._new_kv = None

    def _store_hidden(self, step: Step) -> None:
        if self._output is not None:
            self._transfers.store_hidden(step, self._output)
            self._output = None

    # --- computing ---

    def _compute(self, step: Step) -> None:
        self._transfers.wait(step)
        output = None
        if not self._messages.is_skipped(step.unit):
            output = self._compute_span(step)
            if self._task.debug_mode is not None:
                # Times of single layers are wanted, not of their launches.
                synchronize(self._device)
        self._transfers.forget(step)
        if self._spans[step.layer].stop < self._workload.num_layers:
            self._output = output
        else:
            self._end_batch(step, output)

    def _compute_span(self, step: Step) -> torch.Tensor | None:
        """The output of the span that begins with the step's layer."""
        span, is_prefill = self._spans[step.layer], step.unit.token == 0
        output = None
        if len(span) > 1 and not is_prefill:
            with self._clock.running(is_prefill=False):
                decoder = self._decoders.of(step, span)
                if decoder is not None:
                    output = self._decode(step, decoder, self._input(step))
            if decoder is not None:
                for layer, seconds in self._decoders.layer_seconds(span, decoder):
                    self.times.give_to_layer(layer, step, seconds)
                return output
        for layer in span:
            begun_at = time.perf_counter()
            own = step._replace(layer=layer)
            with self._clock.running(is_prefill=is_prefill):
                output = self._compute_layer(own, output)
            if len(span) > 1:
                self._store_cache(own)
                self.times.give_to_layer(layer, step, time.perf_counter() - begun_at)
        return output

    def _compute_layer(self, step: Step, hidden: torch.Tensor | None) -> torch.Tensor:
        """The output of the step's layer alone; `hidden` is its input, if it is within a span."""
        layer = self._layers[step.layer]
        weights = self._transfers.weights(step)
        prompts, token = self._blocks.of_step(step), step.unit.token
        if isinstance(layer, InputEmbed):
            ids = self._tokens.inputs(prompts, token).to(self._device)
            return layer.forward(weights, ids, self._masks.positions(prompts, token))
        if hidden is None:
            hidden = self._input(step)
        if isinstance(layer, OutputEmbed):
            return layer.forward(weights, hidden)
        if token > 0:
            decoder = self._decoders.of(step, range(step.layer, step.layer + 1))
            if decoder is not None:
                return self._decode(step, decoder, hidden)
        if isinstance(layer, MLP):
            return layer.forward(weights, hidden)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self._attend(step, prompts, q, k, v)

        return layer.forward(weights, hidden, attend)

    def _input(self, step: Step) -> torch.Tensor:
        is_first = step.layer == 0
        return self._messages.input(step.batch) if is_first else self._transfers.hidden(step)

    def _decode(self, step: Step, decoder: Decoder, hidden_B1h: torch.Tensor) -> torch.Tensor:
        length = self._task.prompt_len + step.unit.token
        return decoder.forward(hidden_B1h, length, self._is_real(step))

    def _attend(
        self,
        step: Step,
        prompts: range,
        q_BSHD: torch.Tensor,
        k_BSHD: torch.Tensor,
        v_BSHD: torch.Tensor,
    ) -> torch.Tensor:
        token = step.unit.token
        self._new_kv = (k_BSHD, v_BSHD)
        if token == 0:
            return prefill_attention(q_BSHD, k_BSHD, v_BSHD, self._masks.padding(prompts))
        is_real = self._is_real(step)
        q_BHD, k_BHD, v_BHD = q_BSHD[:, 0], k_BSHD[:, 0], v_BSHD[:, 0]
        return self._transfers.attend(step, q_BHD, k_BHD, v_BHD, is_real)[:, None]

    def _is_real(self, step: Step) -> torch.Tensor | None:
        """Which positions until now hold no padding: (R, L); None if all do."""
        length = self._task.prompt_len + step.unit.token
        return self._masks.is_real(self._blocks.of_step(step), length)

    # --- what comes out of the last layer ---

    def _end_batch(self, step: Step, output: torch.Tensor | None) -> None:
        unit = step.unit
        if self._is_last:
            prompts = self._blocks.of_step(step)
            self._tokens.put(prompts, unit.token, self._choose(unit, prompts, output))
        elif output is not None:
            self._messages.put_output(unit, step.batch, output)
        if step.batch == self._workload.num_batches - 1:
            self._end_unit(unit)

    def _choose(self, unit: Unit, prompts: range, logits_BV: torch.Tensor | None) -> torch.Tensor:
        task = self._task
        # All prompts have ended, or some layers were left out: there is nothing to choose.
        if logits_BV is None or task.debug_mode is not None:
            return torch.full((len(prompts),), self._config.pad_token_id)
        tokens_B, highest_B = sampling.greedy(logits_BV)
        # The highest is NaN if any is.
        if not bool(torch.isfinite(highest_B).all()):
            raise RunError(
                f"the logits of token {unit.token} are not finite: {self._config.dtype} is too "
                "small for this model's activations, or its weights are damaged"
            )
        if not task.do_sample:
            return tokens_B.cpu()
        return sampling.sample(
            logits_BV,
            temperature=task.temperature,
            seed=task.seed,
            prompts=prompts,
            position=unit.token,
        ).cpu()

    def _end_unit(self, unit: Unit) -> None:
        if unit.iteration == self._workload.num_iterations - 1:
            self._clock.harvest()
            self.times.token_ends.append(time.perf_counter() - self.times.started_at)
        self._on_unit()
