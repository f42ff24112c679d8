"""Figures that were published, to be shown beside one's own, and never mixed with them.

From FlexGen's paper (arXiv 2303.06865) and its README: generation throughput with 512 prompt and
32 new tokens on T4 GPUs with 16 GB. Those of Petals are with 1, 4 and 24 GPUs and six requests at
once, divided by the number of GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SOURCE = "FlexGen, arXiv 2303.06865 and its README"
MACHINE = "T4 (16 GB)"
PROMPT_TOKENS = 512
NEW_TOKENS = 32

_SIZES = ("6.7b", "30b", "175b")
_SIZE = re.compile(r"(?:^|[^a-z0-9])opt-(?P<size>6\.7b|30b|175b)(?![a-z0-9.])", re.IGNORECASE)
_PETALS = "Petals"
_TOKENS_PER_S = {
    "FlexGen": (25.26, 7.32, 0.69),
    "FlexGen with compression": (29.12, 8.38, 1.12),
    "Accelerate": (25.12, 0.62, 0.01),
    "DeepSpeed ZeRO-Inference": (9.28, 0.60, 0.01),
    _PETALS: (8.25, 2.84, 0.08),
}
_PETALS_GPUS = (1, 4, 24)


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A throughput that others measured."""

    system: str
    model: str
    tokens_per_s_per_gpu: float
    num_gpus: int

    @property
    def remark(self) -> str | None:
        """How it was measured, where that is special."""
        return "six requests at once" if self.system == _PETALS else None


def published_figures(models: Iterable[str | None]) -> Sequence[PublishedFigure]:
    """Those of models of the same sizes as `models`; all where none of them was published."""
    found = {_size(model) for model in models} & set(_SIZES)
    return [
        PublishedFigure(
            system=system,
            model=f"facebook/opt-{size}",  # as people name them here
            tokens_per_s_per_gpu=values[place],
            num_gpus=_PETALS_GPUS[place] if system == _PETALS else 1,
        )
        for place, size in enumerate(_SIZES)
        if size in found or not found
        for system, values in _TOKENS_PER_S.items()
    ]


def _size(model: str | None) -> str | None:
    match = _SIZE.search(model or "")
    return match["size"].lower() if match else None
