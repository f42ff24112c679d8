"""Loads a model folder and generates one token, as a short program of a user's would.

The command line is JSON: `system`, which is transformers or flexbench, `folder`, `dtype`,
`prompt_len` and `num_threads`. Each phase is told on standard output when it has ended:
benchmarks/dist_start.py notes when.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_FIRST_REAL_TOKEN = 4  # OPT's tokens 0 to 3 are special


def tell(phase: str) -> None:
    """A phase has ended."""
    print(f"{phase}: done", flush=True)


def with_transformers(request: dict[str, Any]) -> None:
    """OPTForCausalLM and its generate()."""
    import torch

    tell("import torch")
    from transformers import OPTForCausalLM

    tell("import")
    torch.set_num_threads(request["num_threads"])
    model = OPTForCausalLM.from_pretrained(
        request["folder"], dtype=getattr(torch, request["dtype"])
    ).eval()
    tell("load")
    prompt = torch.arange(request["prompt_len"])[None] + _FIRST_REAL_TOKEN
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=1,
            max_new_tokens=1,
            pad_token_id=1,
        )
    tell("first token")


def with_flexbench(request: dict[str, Any]) -> None:
    """OptLM and its generate(), with the command's defaults."""
    import torch

    tell("import torch")
    import numpy as np

    from flexbench.dist import ExecutionEnv, OptLM
    from flexbench.dist.config import DistConfig
    from flexbench.dist.opt_config import load_opt_config

    tell("import")
    torch.set_num_threads(request["num_threads"])
    folder, dtype = request["folder"], request["dtype"]
    config = DistConfig(model=folder, dtype=dtype, gpu_batch_size=1)
    model = OptLM(
        load_opt_config(Path(folder), dtype=dtype),
        ExecutionEnv.create(config.offload_dir),
        folder,
        config.policy(),
    )
    tell("load")
    model.generate(np.arange(request["prompt_len"])[None] + _FIRST_REAL_TOKEN, max_new_tokens=1)
    tell("first token")


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    {"transformers": with_transformers, "flexbench": with_flexbench}[settings["system"]](settings)
