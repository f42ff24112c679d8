"""One call of `generate` on one stage: does the actions of a schedule, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from flexbench.core.errors import RunError
from flexbench.dist import sampling
from flexbench.dist.activations import HiddenStore
from flexbench.dist.attention import prefill_attention
from flexbench.dist.buffers import ReusedMemory
from flexbench.dist.cache import CacheShape, LayerCache, Segment
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.lanes import InlineLane, Lane, ThreadLane, Ticket, synchronize
from flexbench.dist.layers import MLP, InputEmbed, Layer, OutputEmbed
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.policy import Policy
from flexbench.dist.prompts import Masks, Tokens
from flexbench.dist.schedule import Action, Exchange, Op, Step, StepAction, Unit, Workload
from flexbench.dist.task import IntArray, Task
from flexbench.dist.timing import ComputeClock, StageTimes
from flexbench.dist.transport import MessageSpec, PipelineLink
from flexbench.dist.weights import LayerWeights

_LANES = ("weight", "cache_load", "cache_store", "hidden")

Tick = Callable[[], None]
"""Called when a unit is done."""


class Generation:
    """The state of one call: caches, hidden states, tokens, and what is being loaded or stored."""

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
        tick: Tick,
    ) -> None:
        self._config, self._policy, self._env = config, policy, env
        self._task, self._workload = task, workload
        self._layers, self._weights = layers, weights
        self._link, self._is_first, self._is_last = link, is_first, is_last
        self._is_overlapped = is_overlapped
        self._tick = tick
        self._device = env.gpu.device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._tokens = Tokens(task, config.pad_token_id)
        self._memory = ReusedMemory()
        self._masks = Masks(task, self._device)
        self.times = StageTimes()
        self._clock = ComputeClock(self._device)

        self._inbox: torch.Tensor | None = None
        self._outbox: list[torch.Tensor] = []
        self._skipped: set[int] = set()
        self._weight_tickets: dict[int, Ticket] = {}
        self._cache_tickets: dict[int, Ticket] = {}
        self._hidden_tickets: dict[int, Ticket] = {}
        self._store_tickets: dict[tuple[int, int, int], Ticket] = {}
        self._hidden_store_tickets: dict[int, Ticket] = {}
        self._segments: dict[int, list[Segment]] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._new_kv: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._layer_output: dict[int, torch.Tensor] = {}

    # --- the whole ---

    def run(self, actions: Iterator[Action]) -> IntArray:
        """Do all actions; returns (num_prompts, prompt_len + gen_len) where this stage knows it."""
        try:
            self._allocate()
            self._open_lanes()
            try:
                with torch.inference_mode():
                    self._do(actions)
            finally:
                for lane in self._lanes.values():
                    lane.close()
        finally:
            self._release()
        return self._tokens.ids

    def _do(self, actions: Iterator[Action]) -> None:
        if self._link is not None:
            self._link.reset_times()
        self.times.started_at = time.perf_counter()
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
                do[action.op](action.step)
            else:
                self._exchange(action)
        for ticket in (*self._store_tickets.values(), *self._hidden_store_tickets.values()):
            ticket.wait()
        synchronize(self._device)
        self._take_times()

    def _take_times(self) -> None:
        times = self.times
        if self._link is not None:
            self._link.flush()
            times.send_s, times.receive_s = self._link.send_s, self._link.receive_s
        times.compute_s = self._clock.total_s()
        times.busy_s = {name: lane.busy_s for name, lane in self._lanes.items()}
        times.wall_s = time.perf_counter() - times.started_at

    # --- memory ---

    def _allocate(self) -> None:
        policy, config, workload = self._policy, self._config, self._workload
        shape = CacheShape(
            batch_size=policy.gpu_batch_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_length=self._task.max_length,
            dtype=self._dtype,
        )
        self._caches = {}
        self._stores: list[HiddenStore] = []
        for iteration in range(workload.num_iterations):
            for index in range(workload.num_layers):
                if self._layers[index].num_caches:
                    for batch in range(workload.num_batches):
                        key = (iteration, index, batch)
                        self._caches[key] = LayerCache(shape, policy, self._env)
        rows = policy.gpu_batch_size * self._task.prompt_len
        for _ in range(workload.num_batches):
            store = HiddenStore(rows, config.hidden_size, self._dtype, policy, self._env)
            self._stores.append(store)

    def _open_lanes(self) -> None:
        self._lanes: dict[str, Lane] = {
            name: ThreadLane(name, self._device)
            if self._is_overlapped
            else InlineLane(self._device)
            for name in _LANES
        }

    def _release(self) -> None:
        for cache in self._caches.values():
            cache.close()
        for store in self._stores:
            store.close()

    # --- messages ---

    def _exchange(self, action: Exchange) -> None:
        link = self._link
        if link is None:
            return
        message = self._message(action.send) if action.send is not None else None
        spec = self._message_spec(action.receive) if action.receive is not None else None
        received = link.send_recv_hidden(message, spec)
        if action.receive is not None and received is not None:
            self._take(action.receive, received)
        if action.post is not None:
            link.post_receive(self._message_spec(action.post))

    def _message_spec(self, unit: Unit) -> MessageSpec:
        num_prompts = self._policy.block_size
        if self._is_first:
            return MessageSpec((num_prompts,), torch.int64)
        positions = self._task.prompt_len if unit.token == 0 else 1
        size = num_prompts * positions * self._config.hidden_size
        # One more element where prompts can end early: whether all of the unit's have.
        return MessageSpec((size + (self._task.stop is not None),), self._dtype)

    def _message(self, unit: Unit) -> torch.Tensor:
        if self._is_last:
            return self._tokens.tokens(self._prompts(unit), unit.token)
        is_skipped = unit.number in self._skipped
        if is_skipped:
            positions = self._task.prompt_len if unit.token == 0 else 1
            size = self._policy.block_size * positions * self._config.hidden_size
            hidden = torch.zeros(size, dtype=self._dtype, device=self._device)
        else:
            hidden = torch.cat([output.flatten() for output in self._outbox])
        self._outbox = []
        if self._task.stop is None:
            return hidden
        return torch.cat([hidden, hidden.new_full((1,), float(is_skipped))])

    def _take(self, unit: Unit, message: torch.Tensor) -> None:
        if self._is_first:
            self._tokens.put(self._prompts(unit), unit.token, message)
            return
        message = message.to(self._device)
        if self._task.stop is not None:
            if bool(message[-1]):
                self._skipped.add(unit.number)
            message = message[:-1]
        shape = (self._policy.num_gpu_batches, self._policy.gpu_batch_size, -1)
        self._inbox = message.view(*shape, self._config.hidden_size)

    # --- loads ---

    def _load_weight(self, step: Step) -> None:
        weights = self._weights[step.layer]
        if weights.load_bytes:
            buffer = self._weight_buffer(step)
            ticket = self._lanes["weight"].submit(lambda: weights.load(buffer))
            self._weight_tickets[step.visit] = ticket

    def _weight_buffer(self, step: Step) -> torch.Tensor:
        largest = max(weights.load_bytes for weights in self._weights)
        turn = step.visit % 2 if self._is_overlapped else 0
        buffer = self._memory.get(("weight", turn), (largest,), torch.uint8, self._device)
        return buffer[: self._weights[step.layer].load_bytes]

    def _load_cache(self, step: Step) -> None:
        cache = self._caches.get(self._cache_key(step))
        if cache is None or step.unit.token == 0:
            return
        stored = self._store_tickets.get(self._cache_key(step))
        past = self._task.prompt_len + step.unit.token - 1
        turn = step.number % 2 if self._is_overlapped else 0

        def buffer(
            name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
        ) -> torch.Tensor:
            return self._memory.get((name, turn), shape, dtype, device)

        def load() -> None:
            if stored is not None:
                stored.wait()
            self._segments[step.number] = cache.load(past, buffer)

        self._cache_tickets[step.number] = self._lanes["cache_load"].submit(load)

    def _load_hidden(self, step: Step) -> None:
        if step.layer == 0 or step.unit.number in self._skipped:
            return
        store = self._stores[step.batch]
        if store.is_kept:
            assert store.kept is not None
            self._hidden[step.number] = store.kept
            return
        positions = self._task.prompt_len if step.unit.token == 0 else 1
        shape = (self._policy.gpu_batch_size, positions, self._config.hidden_size)
        name = ("hidden", step.number % 2)
        hidden = self._memory.get(name, shape, self._dtype, self._device)
        self._hidden[step.number] = hidden
        self._hidden_tickets[step.number] = self._lanes["hidden"].submit(lambda: store.load(hidden))

    # --- computing ---

    def _compute(self, step: Step) -> None:
        started_at = time.perf_counter()
        if step.layer == 0 and step.batch == 0:
            self._begin_unit(step.unit)
        self._wait("weight", self._weight_tickets, step.visit)
        self._wait("cache_load", self._cache_tickets, step.number)
        self._wait("hidden", self._hidden_tickets, step.number)
        if step.unit.number not in self._skipped:
            with self._clock.running():
                output = self._compute_layer(step)
            self._layer_output[step.number] = output
        self._segments.pop(step.number, None)
        self._hidden.pop(step.number, None)
        if step.layer == self._workload.num_layers - 1:
            self._end_batch(step)
        self.times.layer_s[step.unit.token == 0, step.layer] += time.perf_counter() - started_at

    def _begin_unit(self, unit: Unit) -> None:
        if self._is_first and self._tokens.all_finished(self._prompts(unit)):
            self._skipped.add(unit.number)

    def _wait(self, what: str, tickets: dict[int, Ticket], number: int) -> None:
        # The weights of a layer serve all its batches: the first one waits, the others need not.
        ticket = tickets.pop(number, None)
        if ticket is not None:
            started_at = time.perf_counter()
            ticket.wait()
            self.times.waited_s[what] += time.perf_counter() - started_at

    def _compute_layer(self, step: Step) -> torch.Tensor:
        layer = self._layers[step.layer]
        weights = self._ready_weights(step)
        prompts = self._prompts(step.unit, step.batch)
        if isinstance(layer, InputEmbed):
            ids = self._tokens.inputs(prompts, step.unit.token).to(self._device)
            return layer.forward(weights, ids, self._masks.positions(prompts, step.unit.token))
        hidden = self._input(step)
        if isinstance(layer, MLP):
            return layer.forward(weights, hidden)
        if isinstance(layer, OutputEmbed):
            return layer.forward(weights, hidden)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self._attend(step, prompts, q, k, v)

        return layer.forward(weights, hidden, attend)

    def _ready_weights(self, step: Step):  # type: ignore[no-untyped-def]
        if step.batch == 0:
            weights = self._weights[step.layer]
            buffer = (
                self._weight_buffer(step)
                if weights.load_bytes
                else torch.empty(0, dtype=torch.uint8, device=self._device)
            )
            self._ready = weights.ready(buffer)
        return self._ready

    def _input(self, step: Step) -> torch.Tensor:
        if step.layer > 0:
            return self._hidden[step.number]
        assert self._inbox is not None
        return self._inbox[step.batch]

    def _attend(
        self, step: Step, prompts: range, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        token = step.unit.token
        start = 0 if token == 0 else self._task.prompt_len + token - 1
        self._new_kv[step.number] = (start, k, v)
        if token == 0:
            return prefill_attention(q, k, v, self._masks.padding(prompts))
        cache = self._caches[self._cache_key(step)]
        is_real = self._masks.is_real(prompts, start + 1)
        segments = self._segments[step.number]
        return cache.attend(segments, q[:, 0], k[:, 0], v[:, 0], is_real)[:, None]

    def _end_batch(self, step: Step) -> None:
        output = self._layer_output.pop(step.number, None)
        if self._is_last:
            prompts = self._prompts(step.unit, step.batch)
            self._tokens.put(prompts, step.unit.token, self._choose(step, prompts, output))
        elif output is not None:
            self._outbox.append(output)
        if step.batch == self._workload.num_batches - 1:
            self._end_unit(step.unit)

    def _choose(self, step: Step, prompts: range, logits: torch.Tensor | None) -> torch.Tensor:
        task = self._task
        if logits is None:  # all have ended
            return torch.full((len(prompts),), self._config.pad_token_id)
        if task.debug_mode is not None:  # some layers were left out: there is nothing to choose
            return torch.full((len(prompts),), self._config.pad_token_id)
        if not bool(torch.isfinite(logits).all()):
            raise RunError(
                f"the logits of token {step.unit.token} are not finite: {self._config.dtype} is "
                "too small for this model's activations, or its weights are damaged"
            )
        if not task.do_sample:
            return sampling.greedy(logits).cpu()
        return sampling.sample(
            logits,
            temperature=task.temperature,
            seed=task.seed,
            prompts=prompts,
            position=step.unit.token,
        ).cpu()

    def _end_unit(self, unit: Unit) -> None:
        if unit.iteration == self._workload.num_iterations - 1:
            synchronize(self._device)
            self.times.token_ends.append(time.perf_counter() - self.times.started_at)
        self._tick()

    # --- stores ---

    def _store_cache(self, step: Step) -> None:
        if step.number not in self._new_kv:
            return
        start, k, v = self._new_kv.pop(step.number)
        cache = self._caches[self._cache_key(step)]
        ticket = self._lanes["cache_store"].submit(lambda: cache.store(start, k, v))
        self._store_tickets[self._cache_key(step)] = ticket

    def _store_hidden(self, step: Step) -> None:
        output = self._layer_output.pop(step.number, None)
        if output is None:
            return
        store = self._stores[step.batch]
        if store.is_kept:
            store.store(output)
        else:
            ticket = self._lanes["hidden"].submit(lambda: store.store(output))
            self._hidden_store_tickets[step.batch] = ticket

    # --- which prompts, which cache ---

    def _prompts(self, unit: Unit, batch: int | None = None) -> range:
        block = unit.round * self._workload.num_iterations + unit.iteration
        size = self._policy.gpu_batch_size
        if batch is None:
            start = block * self._policy.block_size
            return range(start, start + self._policy.block_size)
        start = block * self._policy.block_size + batch * size
        return range(start, start + size)

    def _cache_key(self, step: Step) -> tuple[int, int, int]:
        return step.unit.iteration, step.layer, step.batch
