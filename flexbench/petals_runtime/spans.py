"""Blocks as spans: what servers hold, and what is missing between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def ranges_of(blocks: Iterable[int]) -> tuple[range, ...]:
    """Numbers in ascending order as contiguous ranges."""
    ranges: list[range] = []
    for block in blocks:
        if ranges and ranges[-1].stop == block:
            ranges[-1] = range(ranges[-1].start, block + 1)
        else:
            ranges.append(range(block, block + 1))
    return tuple(ranges)


def missing_blocks(spans: Iterable[range], num_blocks: int) -> tuple[range, ...]:
    """The blocks of a model of `num_blocks` that are in none of `spans`, as contiguous ranges."""
    held = {block for span in spans for block in span}
    return ranges_of(block for block in range(num_blocks) if block not in held)


def format_spans(spans: Sequence[range]) -> str:
    """Block ranges for people: '0:6, 6:12'."""
    return ", ".join(f"{span.start}:{span.stop}" for span in spans)
