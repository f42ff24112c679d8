"""Memory that is freed stays with the process.

The C library gives large blocks back to the system at once, and the next block of that size costs a
page fault every 4 KiB: more than what is computed in it, where that is little. Each layer takes
such blocks anew.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed, up to 2 GiB; whether there was a glibc to tell."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return all(mallopt(option, _LARGEST_INT) for option in options)


def give_freed_memory_back() -> None:
    """What was kept goes to the system, as far as nothing lies above it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
