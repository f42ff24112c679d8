"""OptLM: an OPT model whose weights, cache and activations may live on gpu, cpu and disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from flexbench.core.errors import ConfigError
from flexbench.dist import schedule
from flexbench.dist.config import DUMMY_WEIGHT, DebugMode
from flexbench.dist.generation import Generation
from flexbench.dist.homes import ExecutionEnv
from flexbench.dist.kernels.allocator import give_freed_memory_back, keep_freed_memory
from flexbench.dist.layers import InputEmbed, Layer, OutputEmbed, WeightSpec, layers_of
from flexbench.dist.opt_config import OptConfig
from flexbench.dist.partition import Stage
from flexbench.dist.policy import Policy
from flexbench.dist.prompts import OnTokens
from flexbench.dist.schedule import Action, Pipeline, Workload
from flexbench.dist.spans import PRODUCTS_PER_BYTE, can_be_joined, find_spans
from flexbench.dist.task import IntArray, Task, make_task
from flexbench.dist.timing import StageTimes
from flexbench.dist.transport import PipelineLink
from flexbench.dist.weight_files import (
    DummySource,
    WeightSource,
    check_weights,
    find_model,
    open_folder,
)
from flexbench.dist.weights import LayerWeights

# As many (layer, batch) steps a token are done in a debug mode.
DEBUG_STEPS = 20
_EMBEDDINGS = (InputEmbed, OutputEmbed)


class OptLM:
    """Generates with the whole model on one machine.

    `path` is a Hugging Face folder, a name on its hub, or '_DUMMY_' for random weights. Raises
    InputFileError for weights that do not fit `config`, ConfigError for what cannot work.
    """

    def __init__(
        self,
        config: OptConfig,
        env: ExecutionEnv,
        path: str,
        policy: Policy,
        *,
        weight_seed: int = 0,
        on_layer: Callable[[], None] | None = None,
    ) -> None:
        """Load the weights of this stage's layers; `on_layer` is called after each."""
        keep_freed_memory()
        self.config = config.resolve_dtype(on_gpu=env.has_gpu)
        self.env = env
        self.policy = policy
        self.stage = self._make_stage()
        self.layers: list[Layer] = layers_of(self.config, self.stage, sep_layer=policy.sep_layer)
        self.times = StageTimes()
        """Of the last call of `generate`."""
        self.on_unit: Callable[[], None] = _ignore
        """Called whenever the stage has done one token of one block of prompts."""
        self.on_tokens: OnTokens | None = None
        """Called when tokens of some prompts are there, if this stage gets to know them.

        With several stages the first does, of all but the last token, which nobody feeds back, and
        the last stage does.
        """
        self._weights: list[LayerWeights] = []
        self._weight_env = env.branch()
        source = self._open_source(path, weight_seed)
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        try:
            for layer in self.layers:
                self._weights.append(LayerWeights(layer.specs, policy, self._weight_env, dtype))
                self._weights[-1].fill(source)
                if on_layer is not None:
                    on_layer()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the weights' memory and disk space back."""
        for weights in self._weights:
            weights.close()
        self._weights = []
        self._weight_env.disk.close()
        give_freed_memory_back()

    # --- what DistOptLM does otherwise ---

    def _make_stage(self) -> Stage:
        return Stage(0, 1, range(self.config.num_hidden_layers))

    @property
    def _link(self) -> PipelineLink | None:
        return None

    @property
    def _num_inner_iterations(self) -> int:
        return 1

    @property
    def _pipeline(self) -> Pipeline:
        return Pipeline()

    def _meet(self) -> None:
        """Wait until all stages are about to start."""

    def _share_output(self, output_ids: IntArray) -> IntArray:
        return output_ids

    # --- generation ---

    def generate(
        self,
        inputs: IntArray | Sequence[Sequence[int]],
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        stop: int | None = None,
        debug_mode: str | None = None,
        cut_gen_len: int | None = None,
        verbose: int = 0,  # noqa: ARG002 - in FlexGen's signature; `times` has what it would print
        *,
        seed: int = 0,
    ) -> IntArray:
        """Continue every prompt: (num_prompts, prompt_len) to (num_prompts, prompt_len + gen_len).

        `inputs` are token ids; prompts of different lengths are padded on the left, and tokens of
        padding in front of a prompt are not attended to. A prompt that has had its `stop` token
        goes on with padding. With `cut_gen_len`, only that many tokens are generated, and padding
        follows. Raises ConfigError for what cannot work. Not for several threads at once.
        """
        task = make_task(
            self.config,
            inputs,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            stop=stop,
            debug_mode=debug_mode,
            cut_gen_len=cut_gen_len,
            seed=seed,
        )
        self._task, self._workload = task, self._make_workload(task)
        if not self.policy.overlap or task.debug_mode is DebugMode.BREAKDOWN:
            output_ids = self.generation_loop_normal()
        elif self.policy.num_gpu_batches == 1:
            output_ids = self.generation_loop_overlap_one_batch()
        else:
            output_ids = self.generation_loop_overlap_multi_batch()
        return self._share_output(output_ids)

    def generation_loop_normal(self) -> IntArray:
        """Everything after each other."""
        return self._run(schedule.normal(self._workload, self._pipeline), is_overlapped=False)

    def generation_loop_overlap_one_batch(self) -> IntArray:
        """Loads for the next layer while a layer computes."""
        return self._run(schedule.overlap_one_batch(self._workload, self._pipeline))

    def generation_loop_overlap_multi_batch(self) -> IntArray:
        """Loads for the next batch, and the next layer, while a batch computes."""
        return self._run(schedule.overlap_multi_batch(self._workload, self._pipeline))

    def _run(self, actions: Iterator[Action], *, is_overlapped: bool = True) -> IntArray:
        executed = self._executed_layers(self._task)
        generation = Generation(
            config=self.config,
            policy=self.policy,
            env=self.env,
            task=self._task,
            workload=self._workload,
            layers=[self.layers[index] for index in executed],
            weights=[self._weights[index] for index in executed],
            link=self._link,
            is_first=self.stage.is_first,
            is_last=self.stage.is_last,
            is_overlapped=is_overlapped,
            on_allocated=self._meet,
            on_unit=self.on_unit,
            on_tokens=self.on_tokens,
        )
        self.times = generation.times
        return generation.run(actions)

    def _make_workload(self, task: Task) -> Workload:
        block = self.policy.block_size * self._num_inner_iterations
        if task.num_prompts % block:
            raise ConfigError(
                "inputs",
                f"{task.num_prompts} prompts cannot be divided into blocks of {block}: "
                f"{self.policy.gpu_batch_size} (--gpu-batch-size) x "
                f"{self.policy.num_gpu_batches} (--num-gpu-batches) x "
                f"{self._num_inner_iterations} (--num-inner-iterations)",
            )
        executed = self._executed_layers(task)
        return Workload(
            num_rounds=task.num_prompts // block,
            num_tokens=task.num_tokens,
            num_iterations=self._num_inner_iterations,
            num_layers=len(executed),
            num_batches=self.policy.num_gpu_batches,
            spans=find_spans([self._joinable_bytes(index, task) for index in executed]),
        )

    def _joinable_bytes(self, index: int, task: Task) -> int | None:
        """What a new token reads in a layer, or could have read in the time of its products.

        None if the layer cannot be passed together with others.
        """
        layer, weights = self.layers[index], self._weights[index]
        is_apart = isinstance(layer, _EMBEDDINGS) or weights.load_bytes > 0
        # In a debug mode layers are left out, and looked at one by one.
        if is_apart or task.debug_mode is not None or not can_be_joined(self.policy):
            return None
        num_prompts = self.policy.gpu_batch_size
        multiplied = num_prompts * sum(math.prod(spec.shape) for spec in layer.specs)
        past = 2 * layer.num_caches * self.config.hidden_bytes(num_prompts, task.max_length)
        return max(weights.layout.num_bytes, multiplied // PRODUCTS_PER_BYTE) + past

    @property
    def projected_layers(self) -> dict[int, float]:
        """Of the last call: how many layers each executed one stands for, by its place there.

        Empty when all were executed.
        """
        executed = self._executed_layers(self._task)
        if len(executed) == len(self.layers):
            return {}
        num_inner = sum(not isinstance(layer, _EMBEDDINGS) for layer in self.layers)
        num_kept = num_inner - (len(self.layers) - len(executed))
        return {
            place: 1.0 if isinstance(self.layers[index], _EMBEDDINGS) else num_inner / num_kept
            for place, index in enumerate(executed)
        }

    def _executed_layers(self, task: Task) -> list[int]:
        """All layers; in a debug mode the embeddings, and some of what lies between."""
        indices = list(range(len(self.layers)))
        if task.debug_mode is None:
            return indices
        inner = [i for i in indices if not isinstance(self.layers[i], _EMBEDDINGS)]
        # An even number: attention and MLP may be layers of their own.
        kept = 2 * max(1, math.ceil(DEBUG_STEPS / self.policy.num_gpu_batches / 2))
        left_out = set(inner[kept:])
        return [index for index in indices if index not in left_out]

    # --- weights ---

    def _open_source(self, path: str, seed: int) -> WeightSource:
        specs: list[WeightSpec] = [spec for layer in self.layers for spec in layer.specs]
        if path == DUMMY_WEIGHT:
            return DummySource(specs, seed=seed)
        folder = find_model(path)
        source = open_folder(folder)
        check_weights(source, specs, str(folder))
        return source


def _ignore() -> None:
    """Nobody wants to know."""
