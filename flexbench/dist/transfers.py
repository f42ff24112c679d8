"""Loads and stores of one call of `generate`: what is under way, and where it is put."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from flexbench.dist.activations import HiddenStore
from flexbench.dist.buffers import ReusedMemory
from flexbench.dist.cache import CacheShape, LayerCache, Segment
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.kernels.decode_layer import KeysValues
from flexbench.dist.lanes import Lane, Ticket, open_lanes
from flexbench.dist.layers import Layer, num_whole_stored
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.policy import Policy
from flexbench.dist.schedule import Step, Workload
from flexbench.dist.task import Task
from flexbench.dist.timing import StageTimes
from flexbench.dist.weights import LayerWeights, ReadyWeights

LANES = ("weight", "cache_load", "cache_store", "hidden")
# Keys and values that wait to be stored are still on the gpu: more would fill it.
MAX_PENDING_STORES = 2


class Transfers:
    """Caches and hidden states at their homes, and weights, caches and hidden states in buffers.

    Loads and stores are begun by the methods that are called so, in lanes of their own if they are
    to overlap with computing. The others wait for what they return.
    """

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
        times: StageTimes,
        is_overlapped: bool,
    ) -> None:
        """Allocate everything."""
        self._device = env.gpu.device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._policy, self._task, self._times = policy, task, times
        self._hidden_size = config.hidden_size
        self._weights = weights
        self._largest_load = max(weight.load_bytes for weight in weights)
        self._is_overlapped = is_overlapped
        self._memory = ReusedMemory()
        self._nothing = torch.empty(0, dtype=torch.uint8)
        self._num_whole = num_whole_stored(layers)
        self._weight_loads: dict[int, Ticket] = {}
        self._cache_loads: dict[int, Ticket] = {}
        self._hidden_loads: dict[int, Ticket] = {}
        self._cache_stores: dict[tuple[int, int, int], Ticket] = {}
        self._pending_stores: deque[Ticket] = deque()
        self._hidden_stores: dict[int, Ticket] = {}
        self._segments: dict[int, list[Segment]] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._ready: ReadyWeights | None = None
        self._in_place_s = 0.0
        # A file of its own on disk, which is given back with it.
        self._env = env.branch()
        self._lanes: dict[str, Lane] = {}
        try:
            self._caches = self._allocate_caches(config, workload, layers)
            rows = policy.gpu_batch_size * task.prompt_len
            self._stores = [
                HiddenStore(rows, config.hidden_size, self._dtype, policy, self._env)
                for _ in range(workload.num_batches)
            ]
            self._lanes = open_lanes(LANES, self._device, are_threads=is_overlapped)
        except BaseException:
            self._env.disk.close()
            raise

    def _allocate_caches(
        self, config: OptConfig, workload: Workload, layers: Sequence[Layer]
    ) -> dict[tuple[int, int, int], LayerCache]:
        if self._task.num_tokens == 1:
            return {}  # nobody will look back
        shape = CacheShape(
            batch_size=self._policy.gpu_batch_size,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_length=self._task.max_length,
            dtype=self._dtype,
        )
        return {
            (iteration, index, batch): LayerCache(shape, self._policy, self._env)
            for iteration in range(workload.num_iterations)
            for index, layer in enumerate(layers)
            if layer.num_caches
            for batch in range(workload.num_batches)
        }

    def finish(self) -> None:
        """Wait for all stores, and note what the lanes have spent."""
        for ticket in (*self._cache_stores.values(), *self._hidden_stores.values()):
            self._wait_for("cache_store", ticket)
        self._times.busy_s = {name: lane.busy_s for name, lane in self._lanes.items()}
        self._times.busy_s["cache_store"] += self._in_place_s

    def close(self) -> None:
        """End the lanes, and give memory and disk space back."""
        for lane in self._lanes.values():
            lane.end()
        expires_at = time.monotonic() + 5.0
        for lane in self._lanes.values():
            lane.join(max(0.0, expires_at - time.monotonic()))
        for cache in self._caches.values():
            cache.close()
        for store in self._stores:
            store.close()
        self._env.disk.close()

    # --- weights ---

    def load_weight(self, step: Step) -> None:
        """Begin to load the weights of a layer that is about to be visited."""
        weights = self._weights[step.layer]
        if weights.load_bytes:
            buffer = self._weight_buffer(step)
            ticket = self._submit("weight", lambda: weights.load(buffer))
            self._weight_loads[step.visit] = ticket

    def weights(self, step: Step) -> ReadyWeights:
        """The weights of the step's layer: for all batches of a visit the same object."""
        if step.batch == 0:
            self._ready = self._weights[step.layer].ready(self._weight_buffer(step))
        assert self._ready is not None
        return self._ready

    def _weight_buffer(self, step: Step) -> torch.Tensor:
        load_bytes = self._weights[step.layer].load_bytes
        if not load_bytes:
            return self._nothing
        turn = step.visit % 2 if self._is_overlapped else 0
        size = (self._largest_load,)
        buffer = self._memory.get(("weight", turn), size, torch.uint8, self._device)
        return buffer[:load_bytes]

    # --- cache ---

    def load_cache(self, step: Step) -> None:
        """Begin to load the keys and values of the step's past."""
        key = _cache_key(step)
        cache = self._caches.get(key)
        if cache is None or cache.is_in_place or step.unit.token == 0:
            return
        past = self._length(step) - 1
        turn = step.number % 2 if self._is_overlapped else 0

        def buffer(
            name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
        ) -> torch.Tensor:
            return self._memory.get((name, turn), shape, dtype, device)

        def load() -> None:
            self._segments[step.number] = cache.load(past, buffer)

        ticket = self._submit("cache_load", load, after=self._cache_stores.get(key))
        self._cache_loads[step.number] = ticket

    def whole_cache(self, step: Step) -> KeysValues | None:
        """Keys and values of all rows and positions, if they can be read as one."""
        whole = self._caches[_cache_key(step)].whole
        return None if whole is None else KeysValues(*whole)

    def attend(
        self,
        step: Step,
        q_BHD: torch.Tensor,
        k_BHD: torch.Tensor,
        v_BHD: torch.Tensor,
        is_real_RL: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one new position over the past and itself: (B, H, D)."""
        cache = self._caches[_cache_key(step)]
        in_place = cache.in_place(self._length(step) - 1) if cache.is_in_place else None
        segments = in_place or self._segments[step.number]
        return cache.attend(segments, q_BHD, k_BHD, v_BHD, is_real_RL)

    def _length(self, step: Step) -> int:
        """Positions until now, with the step's new one."""
        return self._task.prompt_len + step.unit.token

    def store_cache(self, step: Step, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor) -> None:
        """Begin to store keys and values of the step's new positions."""
        token = step.unit.token
        if token == self._task.num_tokens - 1:
            return  # nobody will look back
        start = 0 if token == 0 else self._task.prompt_len + token - 1
        cache = self._caches[_cache_key(step)]
        if cache.is_in_place:
            self._store_in_place(cache, start, k_BSHD, v_BSHD)
            return
        ticket = self._submit("cache_store", lambda: cache.store(start, k_BSHD, v_BSHD))
        self._cache_stores[_cache_key(step)] = ticket
        self._pending_stores.append(ticket)
        if len(self._pending_stores) > MAX_PENDING_STORES:
            self._wait_for("cache_store", self._pending_stores.popleft())

    def _store_in_place(
        self, cache: LayerCache, start: int, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor
    ) -> None:
        """A copy within the memory that computes: no other thread would be quicker."""
        if start == 0:  # a single position has been written by `attend`
            started_at = time.perf_counter()
            cache.store(start, k_BSHD, v_BSHD)
            self._in_place_s += time.perf_counter() - started_at
            self._times.add_wait("cache_store", started_at)

    # --- hidden states ---

    def load_hidden(self, step: Step) -> None:
        """Begin to load the input of the step."""
        store = self._stores[step.batch]
        if store.is_kept:
            assert store.kept is not None
            self._hidden[step.number] = store.kept
            return
        is_whole = step.unit.token == 0 and step.layer <= self._num_whole
        positions = self._task.prompt_len if is_whole else 1
        shape = (self._policy.gpu_batch_size, positions, self._hidden_size)
        turn = ("hidden", step.number % 2)
        hidden = self._memory.get(turn, shape, self._dtype, self._device)
        self._hidden[step.number] = hidden
        # It is in the same lane, and so done by then; but it may have failed.
        stored = self._hidden_stores.get(step.batch)
        self._hidden_loads[step.number] = self._submit(
            "hidden", lambda: store.load(hidden), after=stored
        )

    def hidden(self, step: Step) -> torch.Tensor:
        """The input of the step: (B, S, h), or (B, 1, h) where only the last position is wanted."""
        return self._hidden[step.number]

    def store_hidden(self, step: Step, output: torch.Tensor) -> None:
        """Begin to store the output of the step."""
        store = self._stores[step.batch]
        if store.is_kept:
            store.store(output)
        else:
            ticket = self._submit("hidden", lambda: store.store(output))
            self._hidden_stores[step.batch] = ticket

    # --- waiting ---

    def wait(self, step: Step) -> None:
        """Wait for all that the step needs. Batches after a layer's first have its weights."""
        for name, loads, number in (
            ("weight", self._weight_loads, step.visit),
            ("cache_load", self._cache_loads, step.number),
            ("hidden", self._hidden_loads, step.number),
        ):
            ticket = loads.pop(number, None)
            if ticket is not None:
                self._wait_for(name, ticket)

    def forget(self, step: Step) -> None:
        """Let go of what was loaded for the step."""
        self._segments.pop(step.number, None)
        self._hidden.pop(step.number, None)

    def _submit(
        self, name: str, work: Callable[[], None], *, after: Ticket | None = None
    ) -> Ticket:
        started_at = time.perf_counter()
        ticket = self._lanes[name].submit(work, after=after)
        if not self._is_overlapped:  # then it has been done
            self._times.add_wait(name, started_at)
        return ticket

    def _wait_for(self, name: str, ticket: Ticket) -> None:
        started_at = time.perf_counter()
        ticket.wait()
        self._times.add_wait(name, started_at)


def _cache_key(step: Step) -> tuple[int, int, int]:
    return step.unit.iteration, step.layer, step.batch
