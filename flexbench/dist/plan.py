"""What a run will take of every machine, worked out before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flexbench.core.errors import ConfigError
from flexbench.dist.cache import CacheShape
from flexbench.dist.config import DUMMY_WEIGHT, DistConfig, is_folder
from flexbench.dist.layers import InputEmbed, Layer, layers_of
from flexbench.dist.opt_config import OptConfig, get_opt_config, load_opt_config
from flexbench.dist.partition import Balance, Stage, split_layers
from flexbench.dist.placement import HomeBytes, bytes_of_rows, most_rows, split_rows
from flexbench.dist.policy import Policy
from flexbench.dist.transfers import MAX_PENDING_STORES
from flexbench.dist.weight_files import find_model
from flexbench.dist.weights import layout_of

if TYPE_CHECKING:
    from flexbench.dist.policy_search.search import PolicySearch


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage's share: bytes at each home, and what computing needs beside them."""

    stage: Stage
    weights: HomeBytes
    cache: HomeBytes
    activations: HomeBytes
    buffers: HomeBytes
    """What is loaded is put here, double with overlap; messages are, too."""
    temporaries: HomeBytes
    """An estimate of what the largest layer computes at once, and of what loading takes."""

    @property
    def computing(self) -> HomeBytes:
        """What computing needs beside weights, cache and activations."""
        return self.buffers + self.temporaries

    @property
    def total(self) -> HomeBytes:
        """All of it."""
        return self.weights + self.cache + self.activations + self.computing


@dataclass(frozen=True, kw_only=True)
class DistPlan:
    """A configuration, the model it names, and the stages."""

    config: DistConfig
    model: OptConfig
    policy: Policy
    weights_path: str
    """A folder, or the word for random weights."""
    num_inner_iterations: int
    has_gpu: bool
    stages: tuple[StagePlan, ...]
    search: PolicySearch | None = None
    """How the policy was chosen, if it was; only on rank 0."""
    positions_per_token: float = 1.0
    """As in `split_layers`."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages, one a rank."""
        return len(self.stages)

    @property
    def num_prompts(self) -> int:
        """Prompts of the run: one round."""
        return self.policy.block_size * self.num_inner_iterations

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the model, and of cache and activations for all prompts, wherever they are.

        Uncompressed, and with every token of the whole run, as FlexGen reports them.
        """
        length = self.config.prompt_len + self.config.gen_len
        return {
            "model": self.model.model_bytes(),
            "cache": self.model.cache_bytes(self.num_prompts, length),
            "hidden": self.model.hidden_bytes(self.num_prompts, length),
        }

    @property
    def folder(self) -> Path:
        """The folder of the weights, if they are not random."""
        return Path(self.weights_path)

    @property
    def is_dummy(self) -> bool:
        """Whether the weights are random."""
        return self.weights_path == DUMMY_WEIGHT

    @property
    def backend(self) -> str:
        """What carries the messages, in torch.distributed's words. Tokens go by gloo."""
        is_nccl = self.has_gpu and self.config.comm_device == "gpu"
        return "cpu:gloo,cuda:nccl" if is_nccl else "gloo"


def make_plan(
    config: DistConfig,
    *,
    num_stages: int,
    has_gpu: bool,
    positions_per_token: float | None = None,
) -> DistPlan:
    """Find the model, share its layers, and add up what each stage takes.

    `positions_per_token` are those of `config` unless they are given. Raises ConfigError and
    InputFileError for what cannot work; touches nothing.
    """
    model, weights_path = _find_model(config)
    model = model.resolve_dtype(on_gpu=has_gpu)
    policy = config.policy()
    if config.debug_mode is not None and num_stages > 1:
        raise ConfigError(
            "--debug-mode",
            "projects from a part of the layers, which says nothing of several stages that wait "
            "for each other; use it with one rank",
        )
    if config.prompt_len + config.gen_len > model.max_position_embeddings:
        raise ConfigError(
            "--prompt-len",
            f"{config.prompt_len} + {config.gen_len} (--gen-len) are more than the "
            f"{model.max_position_embeddings} positions of {model.name}",
        )
    if config.stop is not None and config.stop >= model.vocab_size:
        raise ConfigError("--stop", f"must be a token below {model.vocab_size}, not {config.stop}")
    iterations = config.num_inner_iterations or num_stages
    positions = positions_per_token or config.positions_per_token
    stages = split_layers(model, num_stages, Balance(config.balance), positions_per_token=positions)
    return DistPlan(
        config=config,
        model=model,
        policy=policy,
        weights_path=weights_path,
        num_inner_iterations=iterations,
        has_gpu=has_gpu,
        positions_per_token=positions,
        stages=tuple(_plan_stage(config, model, policy, stage, iterations) for stage in stages),
    )


def plan_stages(plan: DistPlan) -> tuple[StagePlan, ...]:
    """What the stages of `plan` take under its policy: anew, for one whose policy was replaced."""
    return tuple(
        _plan_stage(plan.config, plan.model, plan.policy, stage.stage, plan.num_inner_iterations)
        for stage in plan.stages
    )


def _find_model(config: DistConfig) -> tuple[OptConfig, str]:
    """The model's dimensions, and where its weights are."""
    path = config.weights_path
    if path != DUMMY_WEIGHT:
        folder = find_model(path)
        found = load_opt_config(folder, dtype=config.dtype)
        if not is_folder(config.model) and config.model != path:
            _check_same(get_opt_config(config.model), found, folder)
        return found, str(folder)
    if is_folder(config.model):
        return load_opt_config(Path(config.model).expanduser(), dtype=config.dtype), path
    return get_opt_config(config.model, dtype=config.dtype), path


def _check_same(wanted: OptConfig, found: OptConfig, folder: Path) -> None:
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        if getattr(wanted, name) != getattr(found, name):
            raise ConfigError(
                "--path",
                f"{folder} holds a model with {name} {getattr(found, name)}, but {wanted.name} "
                f"has {getattr(wanted, name)}; name the folder in --model, too",
            )


def _plan_stage(
    config: DistConfig, model: OptConfig, policy: Policy, stage: Stage, iterations: int
) -> StagePlan:
    dtype: torch.dtype = getattr(torch, model.dtype)
    layers = layers_of(model, stage, sep_layer=policy.sep_layer)
    layouts = [layout_of(layer.specs, policy, dtype) for layer in layers]
    weights = sum((layout.home_bytes for layout in layouts), HomeBytes())
    largest_load = max(layout.num_bytes - layout.load_start for layout in layouts)
    turns = 2 if policy.overlap else 1

    cache_of_one, cache_buffers = _cache_bytes(config, model, policy, dtype)
    num_caches = sum(layer.num_caches for layer in layers)
    rows = policy.gpu_batch_size * config.prompt_len
    hidden = model.hidden_bytes(policy.gpu_batch_size, config.prompt_len)
    hidden_buffers = 0 if policy.activations.gpu == 100 else 2 * hidden
    # Received, computed and sent; asynchronously, one more is on its way in and out.
    num_messages = (5 if config.async_comm else 3) if stage.num_stages > 1 else 0
    messages = num_messages * policy.num_gpu_batches * hidden
    # All on the gpu, they are just kept where they were computed.
    is_kept = policy.activations.gpu == 100
    split = split_rows(rows, policy.activations) if is_kept else most_rows(rows, policy.activations)
    return StagePlan(
        stage=stage,
        weights=weights,
        cache=cache_of_one * (num_caches * policy.num_gpu_batches * iterations),
        activations=bytes_of_rows(split, hidden // rows) * policy.num_gpu_batches,
        buffers=cache_buffers * turns
        + HomeBytes(gpu=turns * largest_load + hidden_buffers + messages),
        temporaries=_temporaries(config, model, policy, layers),
    )


def _cache_bytes(
    config: DistConfig, model: OptConfig, policy: Policy, dtype: torch.dtype
) -> tuple[HomeBytes, HomeBytes]:
    """Keys and values of one layer and batch at their homes, and the buffers to load them into."""
    if config.num_tokens == 1:
        return HomeBytes(), HomeBytes()  # nobody looks back
    shape = CacheShape(
        batch_size=policy.gpu_batch_size,
        num_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        max_length=config.prompt_len + config.num_tokens - 1,
        dtype=dtype,
    )
    split = split_rows(shape.num_rows, policy.cache)
    row_bytes = 2 * shape.max_length * shape.row_bytes(policy.cache_compression)
    dense_bytes = 2 * shape.max_length * shape.row_bytes(None)
    elsewhere = split.cpu + split.disk
    if policy.cache_compression is not None:
        # All is decompressed, and what comes from elsewhere is there in both forms.
        on_gpu, loaded = split.gpu * dense_bytes, elsewhere * (dense_bytes + row_bytes)
    elif policy.cpu_cache_compute:
        on_gpu, loaded = 0, split.disk * dense_bytes
    else:
        on_gpu, loaded = 0, elsewhere * dense_bytes
    if policy.cpu_cache_compute:
        return bytes_of_rows(split, row_bytes), HomeBytes(gpu=on_gpu, cpu=loaded)
    return bytes_of_rows(split, row_bytes), HomeBytes(gpu=on_gpu + loaded)


def _temporaries(
    config: DistConfig, model: OptConfig, policy: Policy, layers: list[Layer]
) -> HomeBytes:
    tokens = policy.gpu_batch_size * config.prompt_len
    # Inputs and outputs, and what is between them, in the wider of attention and MLP.
    widest = max(8 * model.hidden_size, 2 * model.hidden_size + 2 * model.ffn_dim)
    # Queries, keys and values, of which the latter wait to be stored.
    widest += 3 * MAX_PENDING_STORES * model.hidden_size
    on_gpu = tokens * widest * model.dtype_bytes
    # Logits, in the model's type and float32; sampling has them four times in float64.
    on_gpu += policy.gpu_batch_size * model.vocab_size * (40 if config.do_sample else 8)
    if policy.compress_weight:
        dense = (_matrix_elements(layer) for layer in layers if not isinstance(layer, InputEmbed))
        on_gpu += 2 * max(dense) * model.dtype_bytes
    # A tensor is read in its file's type, converted, and perhaps compressed.
    largest = max(_matrix_elements(layer, largest_only=True) for layer in layers)
    return HomeBytes(gpu=on_gpu, cpu=largest * (4 + model.dtype_bytes))


def _matrix_elements(layer: Layer, *, largest_only: bool = False) -> int:
    sizes = [
        spec.source_shape[0] * spec.source_shape[1] * (1 if largest_only else len(spec.sources))
        for spec in layer.specs
        if spec.is_matrix
    ]
    return max(sizes) if largest_only else sum(sizes)
