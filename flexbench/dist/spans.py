"""Layers that are passed through at once, as nothing is loaded or stored between them. Pure.

Where all is in place, and there is little to compute, going from layer to layer takes a tenth of a
step: a token of OPT-125m passes 26 of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexbench.dist.policy import Policy

# Of what is read in a span: its layers may be one call, during which no signal is answered.
MOST_BYTES = 1 << 30
# So many multiplications take about as long as reading a byte: processors have more, or as many.
PRODUCTS_PER_BYTE = 4


def can_be_joined(policy: Policy) -> bool:
    """Whether between two layers whose weights are in place nothing is moved.

    Several batches take turns in each layer, so that they share its weights while these are in the
    processor's caches.
    """
    is_cache_in_place = policy.cache.gpu == 100 and not policy.compress_cache
    return policy.num_gpu_batches == 1 and policy.activations.gpu == 100 and is_cache_in_place


def find_spans(sizes: Sequence[int | None]) -> tuple[range, ...]:
    """All layers in order, in ranges that are passed through at once.

    `sizes` are the bytes that each layer reads; None: the layer has to be by itself.
    """
    spans: list[range] = []
    room = -1
    for index, size in enumerate(sizes):
        if size is not None and size <= room:
            spans[-1] = range(spans[-1].start, index + 1)
            room -= size
        else:
            spans.append(range(index, index + 1))
            room = -1 if size is None else MOST_BYTES - size
    return tuple(spans)
