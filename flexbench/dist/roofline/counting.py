"""Operations and bytes of a run, counted for a placement before anything is computed. Pure.

What is counted is what no program could leave out while it keeps to the policy:

- matrix products, 2 operations for each multiplication with its addition; of the last layer and the
  output embedding those for the last positions only, but for keys and values; of a prompt's
  attention those below the diagonal;
- bytes that have to come out of memory to be computed with: weights, as they are stored, once for
  each batch that passes through a layer, and keys and values of the past, as they are stored;
- bytes that are moved between the homes.

Activations are in no floor: those between two operations may stay in the caches. Norms,
activation functions and softmax count with their weights only. Prompts are counted without padding.

Letters in comments: B prompts of a batch, S positions of a prompt, h hidden size, D head size, L
positions until now with the new one, R pairs of prompt and head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from flexbench.dist.cache import CacheShape
from flexbench.dist.layers import Layer, WeightSpec, layers_of, num_whole_stored
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.placement import (
    HomeBytes,
    LayerLayout,
    RowSplit,
    TensorSpec,
    bytes_of_rows,
    split_rows,
)
from flexbench.dist.plan import DistPlan
from flexbench.dist.policy import Policy
from flexbench.dist.weights import layout_of


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One thing that is computed at once, for one batch."""

    name: str
    flops: int = 0
    weight_bytes: int = 0
    """Of weights, as they are stored."""
    cache_bytes: int = 0
    """Of keys and values of the past, as they are stored."""
    activation_bytes: int = 0
    """Of its input and output. They may stay in the caches, and are in no floor."""
    is_on_host: bool = False
    """Computed by the CPU beside a GPU, over keys and values that stay there."""

    @property
    def memory_bytes(self) -> int:
        """What has to be read from memory."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Work:
    """Operations, and how often each was done."""

    operations: Mapping[Operation, int]

    @property
    def flops(self) -> int:
        """Operations of all matrix products."""
        return sum(one.flops * count for one, count in self.operations.items())

    @property
    def weight_bytes(self) -> int:
        """Of weights that are read."""
        return sum(one.weight_bytes * count for one, count in self.operations.items())

    @property
    def cache_bytes(self) -> int:
        """Of keys and values that are read."""
        return sum(one.cache_bytes * count for one, count in self.operations.items())

    @property
    def activation_bytes(self) -> int:
        """Of inputs and outputs of all operations."""
        return sum(one.activation_bytes * count for one, count in self.operations.items())

    @property
    def memory_bytes(self) -> int:
        """What has to be read from memory."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """All that one stage computes and moves in a run, prefill and decoding of all its prompts."""

    prefill: Work
    decode: Work
    weight_load: HomeBytes
    """Bytes that are copied from each home to where is computed."""
    cache_load: HomeBytes
    """From each home, too; those of a compressed cache are decompressed on the way."""
    cache_store: HomeBytes
    """To each home."""
    hidden_load: HomeBytes
    hidden_store: HomeBytes


def count_stage(plan: DistPlan, rank: int) -> StageWork:
    """What the stage of this rank does in one round: `config.num_tokens` tokens of all prompts.

    Only for runs in which all layers take part and no prompt ends early.
    """
    stage = _Stage.of(plan, rank)
    num_tokens, blocks = plan.config.num_tokens, plan.num_inner_iterations
    batches = blocks * plan.policy.num_gpu_batches
    prefill: Counter[Operation] = Counter()
    decode: Counter[Operation] = Counter()
    cache_load, cache_store = HomeBytes(), HomeBytes()
    hidden = HomeBytes()
    for token in range(num_tokens):
        counted = prefill if token == 0 else decode
        for operation in stage.operations(token):
            counted[operation] += batches
        cache_load += stage.cache_load(token) * batches
        if token < num_tokens - 1:  # nobody looks back at the last one
            cache_store += stage.cache_store(token) * batches
        hidden += stage.hidden(token) * batches
    return StageWork(
        prefill=Work(prefill),
        decode=Work(decode),
        weight_load=stage.weight_load() * (num_tokens * blocks),
        cache_load=cache_load,
        cache_store=cache_store,
        hidden_load=hidden,
        hidden_store=hidden,
    )


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage's layers, and the sizes of what one of its batches is."""

    model: OptConfig
    policy: Policy
    prompt_len: int
    layers: Sequence[Layer]
    layouts: Sequence[LayerLayout]
    cache: CacheShape
    cache_rows: RowSplit
    num_caches: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_caches", sum(layer.num_caches for layer in self.layers))

    @classmethod
    def of(cls, plan: DistPlan, rank: int) -> _Stage:
        dtype: torch.dtype = getattr(torch, plan.model.dtype)
        policy = plan.policy
        layers = layers_of(plan.model, plan.stages[rank].stage, sep_layer=policy.sep_layer)
        cache = CacheShape(
            batch_size=policy.gpu_batch_size,
            num_heads=plan.model.num_attention_heads,
            head_dim=plan.model.head_dim,
            max_length=plan.config.prompt_len + plan.config.num_tokens - 1,
            dtype=dtype,
        )
        return cls(
            model=plan.model,
            policy=policy,
            prompt_len=plan.config.prompt_len,
            layers=layers,
            layouts=[layout_of(layer.specs, policy, dtype) for layer in layers],
            cache=cache,
            cache_rows=split_rows(cache.num_rows, policy.cache),
        )

    def positions(self, token: int) -> int:
        """New positions of a prompt: all of it, then one a token."""
        return self.prompt_len if token == 0 else 1

    # --- computing ---

    def operations(self, token: int) -> Iterator[Operation]:
        """What one batch takes in all layers."""
        for layer, layout in zip(self.layers, self.layouts, strict=True):
            for spec, tensor in zip(layer.specs, layout.tensors, strict=True):
                yield self._of_weight(spec, tensor, token)
            if layer.num_caches:
                yield from self._attention(token, is_of_last=layer.gives_last_only)

    def _of_weight(self, spec: WeightSpec, tensor: TensorSpec, token: int) -> Operation:
        """A product with a matrix, a look-up in a table, or what a vector is added to."""
        batch, size = self.policy.gpu_batch_size, self.model.dtype_bytes
        tokens = batch * self.positions(token)
        if not spec.is_matrix:
            return Operation(name=spec.name, weight_bytes=tensor.num_bytes)
        outputs, inputs = spec.shape
        if spec.is_table:
            looked_up = tokens * tensor.row_bytes
            moved = tokens * inputs * size
            return Operation(name=spec.name, weight_bytes=looked_up, activation_bytes=moved)
        of_all = outputs - spec.num_of_last
        results = tokens * of_all + batch * spec.num_of_last
        is_compressed = self.policy.weight_compression is not None
        return Operation(
            name=spec.name,
            flops=2 * inputs * results,
            # Without what a kernel's panels are filled up with.
            weight_bytes=tensor.num_bytes if is_compressed else outputs * inputs * size,
            activation_bytes=((tokens if of_all else batch) * inputs + results) * size,
        )

    def _attention(self, token: int, *, is_of_last: bool) -> Iterator[Operation]:
        """Attention of one layer; in decoding, of rows here and of rows on the host apart.

        Prefill: the i-th position looks at i, which makes S (S + 1) / 2 pairs, or S where only the
        last looks, each of 2 D operations for its score and 2 D for its value. Decoding: L scores;
        L values, or the chosen of the past and the new one.
        """
        heads, size = self.cache.head_dim, self.model.dtype_bytes
        # Queries and results, keys and values.
        queries = 1 if is_of_last else self.positions(token)
        moved = 2 * self.cache.num_rows * heads * (queries + self.positions(token)) * size
        if token == 0:
            all_pairs = self.prompt_len * (self.prompt_len + 1) // 2
            pairs = self.prompt_len if is_of_last else all_pairs
            flops = 4 * pairs * self.cache.num_rows * heads
            yield Operation(name="attention", flops=flops, activation_bytes=moved)
            return
        past = self.prompt_len + token - 1
        chosen = past if self.policy.attn_sparsity == 1 else int(self.policy.attn_sparsity * past)
        row_bytes = self.cache.row_bytes(self.policy.cache_compression)
        elsewhere = self.cache_rows.cpu + self.cache_rows.disk
        on_host = elsewhere if self.policy.cpu_cache_compute else 0
        for rows, is_on_host in ((self.cache.num_rows - on_host, False), (on_host, True)):
            if rows:
                yield Operation(
                    name="attention",
                    flops=2 * rows * heads * (past + 1 + chosen + 1),
                    cache_bytes=rows * row_bytes * (past + chosen),
                    activation_bytes=moved * rows // self.cache.num_rows,
                    is_on_host=is_on_host,
                )

    # --- moving ---

    def weight_load(self) -> HomeBytes:
        """All layers once: all of a layer that is not wholly on the gpu."""
        total = HomeBytes()
        for layout in self.layouts:
            total += HomeBytes(
                gpu=max(0, layout.gpu_end - layout.load_start),
                cpu=max(0, layout.cpu_end - max(layout.gpu_end, layout.load_start)),
                disk=max(0, layout.num_bytes - max(layout.cpu_end, layout.load_start)),
            )
        return total

    def cache_load(self, token: int) -> HomeBytes:
        """Keys and values of the past that are not used in place, of one batch in all layers."""
        if token == 0:
            return HomeBytes()
        past = self.prompt_len + token - 1
        policy, split = self.policy, self.cache_rows
        one = past * self.cache.row_bytes(policy.cache_compression)
        if policy.cache_compression is not None:
            return bytes_of_rows(split, 2 * one) * self.num_caches
        # Of a sparse attention, values in memory stay there until it is known which are wanted.
        from_cpu = 0 if policy.cpu_cache_compute else one * (1 if policy.attn_sparsity < 1 else 2)
        loaded = HomeBytes(cpu=split.cpu * from_cpu, disk=split.disk * 2 * one)
        return loaded * self.num_caches

    def cache_store(self, token: int) -> HomeBytes:
        """Keys and values of new positions, of one batch in all layers.

        Where attention uses the home in place, it has written a single position there itself.
        """
        policy, split = self.policy, self.cache_rows
        size = 2 * self.positions(token) * self.cache.row_bytes(policy.cache_compression)
        stored = bytes_of_rows(split, size)
        if token > 0 and policy.cache_compression is None:
            stored = HomeBytes(cpu=0 if policy.cpu_cache_compute else stored.cpu, disk=stored.disk)
        return stored * self.num_caches

    def hidden(self, token: int) -> HomeBytes:
        """Outputs of all layers but the last, of one batch, unless they are kept where they are."""
        percent = self.policy.activations
        if percent.gpu == 100:
            return HomeBytes()
        row_bytes = self.model.hidden_size * self.model.dtype_bytes
        whole = num_whole_stored(self.layers)
        total = HomeBytes()
        for positions, count in (
            (self.positions(token), whole),
            (1, len(self.layers) - 1 - whole),
        ):
            rows = split_rows(self.policy.gpu_batch_size * positions, percent)
            total += bytes_of_rows(rows, row_bytes) * count
        return total
