"""Generates with transformers, as its documentation shows it."""

from __future__ import annotations

import torch
import transformers

from benchmarks.dist_workers.protocol import Settings, serve


class Transformers:
    """OPTForCausalLM and its generate()."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.num_threads)
        dtype = getattr(torch, settings.dtype)
        model = transformers.OPTForCausalLM.from_pretrained(settings.folder, dtype=dtype)
        self._model = model.eval()
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        """Attention and cache are its defaults: SDPA, and a cache that grows."""
        input_ids = torch.tensor(prompts)
        with torch.inference_mode():
            output_ids = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                use_cache=True,
                min_new_tokens=num_new_tokens,
                max_new_tokens=num_new_tokens,
                eos_token_id=None,
                pad_token_id=1,
            )
        tokens: list[list[int]] = output_ids[:, input_ids.shape[1] :].tolist()
        return tokens


if __name__ == "__main__":
    serve(Transformers)
