"""Generates with `flexbench dist`'s engine, with the command's defaults, from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.dist_workers.protocol import Settings, serve
from flexbench import __version__
from flexbench.dist import ExecutionEnv, OptLM
from flexbench.dist.config import DistConfig
from flexbench.dist.opt_config import load_opt_config


class Flexbench:
    """OptLM with everything on 'gpu', which is the CPU where there is no other."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.num_threads)
        defaults = DistConfig(model=settings.folder, dtype=settings.dtype)
        self._model = OptLM(
            load_opt_config(Path(settings.folder), dtype=settings.dtype),
            ExecutionEnv.create(defaults.offload_dir),
            settings.folder,
            defaults.policy(),
        )
        self.versions = {"flexbench": __version__, "torch": torch.__version__}

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        """All prompts are one batch, as --gpu-batch-size would make them."""
        self._model.policy = replace(self._model.policy, gpu_batch_size=len(prompts))
        output_ids = self._model.generate(np.array(prompts), max_new_tokens=num_new_tokens)
        tokens: list[list[int]] = output_ids[:, len(prompts[0]) :].tolist()
        return tokens


if __name__ == "__main__":
    serve(Flexbench)
