"""Freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist.kernels.allocator import (  # noqa: E402
    give_freed_memory_back,
    keep_freed_memory,
)

LARGE = 128 << 20  # above what glibc would take from its heap by itself
M_MMAP_THRESHOLD = -3  # of malloc.h
libc = ctypes.CDLL(None)


class Statistics(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def mapped_bytes() -> int:
    """Bytes of blocks that are not in malloc's heap: they go back when they are freed."""
    libc.mallinfo2.restype = Statistics
    return int(libc.mallinfo2().hblkhd)


def free_bytes() -> int:
    """Bytes of malloc's heap that nobody uses: a larger block cannot be among them."""
    libc.mallinfo2.restype = Statistics
    return int(libc.mallinfo2().fordblks)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _glibc() -> None:
    if not hasattr(libc, "mallinfo2") or not keep_freed_memory():
        pytest.skip("the C library is not glibc 2.33 or newer")


def is_mapped(num_bytes: int) -> bool:
    """Whether a block of this size, which is not touched, is apart from the heap."""
    before = mapped_bytes()
    block = torch.empty(num_bytes, dtype=torch.uint8)
    found = mapped_bytes() > before
    del block
    return found


def test_large_blocks_are_from_the_heap() -> None:
    """Also after something else has asked for them apart. Sizes: none fits in what was freed."""
    assert not is_mapped(LARGE)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    assert is_mapped(free_bytes() + 4 * LARGE)
    keep_freed_memory()
    assert not is_mapped(6 * LARGE)


def test_what_was_kept_can_be_given_back() -> None:
    give_freed_memory_back()  # what tests before this one have left
    before = resident_bytes()
    torch.empty(LARGE, dtype=torch.uint8).fill_(1)
    assert resident_bytes() > before + LARGE / 2, "it was not kept"
    give_freed_memory_back()
    assert resident_bytes() < before + LARGE / 2
