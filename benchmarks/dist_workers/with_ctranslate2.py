"""Generates with CTranslate2, after its own converter has been at the folder."""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2

from benchmarks.dist_workers.protocol import Settings, serve

_CONVERTED = "model.bin"


class CTranslate2:
    """Generator.generate_batch()."""

    def __init__(self, settings: Settings) -> None:
        supported = ctranslate2.get_supported_compute_types("cpu")
        if settings.dtype not in supported:
            raise ValueError(
                f"no {settings.dtype} on this CPU; there are {', '.join(sorted(supported))}"
            )
        folder = Path(settings.converted_folder)
        if not (folder / _CONVERTED).exists():
            converter = ctranslate2.converters.TransformersConverter(
                settings.folder, low_cpu_mem_usage=True
            )
            converter.convert(str(folder), quantization=settings.dtype, force=True)
        self._generator = ctranslate2.Generator(
            str(folder),
            compute_type=settings.dtype,
            inter_threads=1,
            intra_threads=settings.num_threads,
        )
        self._words = json.loads((folder / "vocabulary.json").read_text())
        self.versions = {"ctranslate2": ctranslate2.__version__}

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        """Its tokens are words; prompts enter at once, and are kept nowhere."""
        results = self._generator.generate_batch(
            [[self._words[token] for token in prompt] for prompt in prompts],
            beam_size=1,
            sampling_topk=1,
            min_length=num_new_tokens,
            max_length=num_new_tokens,
            end_token=[],
            include_prompt_in_result=False,
            cache_static_prompt=False,
        )
        return [list(result.sequences_ids[0]) for result in results]


if __name__ == "__main__":
    serve(CTranslate2)
