"""Plans of a tiny OPT model, for counting by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexbench.dist.config import DistConfig
from flexbench.dist.plan import DistPlan, make_plan

# h hidden size, H heads, f width of the MLP, V vocabulary.
TINY = {
    "model_type": "opt",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "ffn_dim": 16,
    "vocab_size": 10,
    "max_position_embeddings": 16,
}


def tiny_plan(
    folder: Path, *, num_stages: int = 1, changed: dict[str, Any] | None = None, **options: Any
) -> DistPlan:
    """Two prompts of 3 tokens, and 3 new ones, in float32, unless told otherwise."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | (changed or {})))
    load: dict[str, Any] = {
        "dtype": "float32",
        "prompt_len": 3,
        "gen_len": 3,
        "gpu_batch_size": 2,
        "no_log": True,
    }
    config = DistConfig(model=str(folder), path="_DUMMY_", **load | options)
    return make_plan(config, num_stages=num_stages, has_gpu=False)
