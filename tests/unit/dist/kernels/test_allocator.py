"""Freed memory that stays with the process.

Each test is a process of its own: what malloc does with a block depends on all that was done in it before.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

MIB = 1 << 20
LARGE = 128 * MIB  # above what glibc would take from its heap by itself


def resident_bytes() -> int:
    """Of this process, as the system counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("the C library is not glibc")


def printed_by(program: str) -> list[int]:
    """The numbers that a new process prints, in MiB."""
    before = """
        import torch
        from flexbench.dist.kernels.allocator import give_freed_memory_back, keep_freed_memory
        from tests.unit.dist.kernels.test_allocator import LARGE, MIB, resident_bytes

        def use_a_large_block():
            torch.empty(LARGE, dtype=torch.uint8).fill_(1)

        def show_resident():
            print(resident_bytes() // MIB)
    """
    source = textwrap.dedent(before) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_glibc_gives_a_large_block_back_by_itself() -> None:
    """Else nothing would have to be told to it."""
    before, after = printed_by("""
        show_resident()
        use_a_large_block()
        show_resident()
    """)
    assert after < before + LARGE // MIB // 2


def test_what_was_freed_is_kept_until_it_is_given_back() -> None:
    before, kept, given_back = printed_by("""
        assert keep_freed_memory()
        show_resident()
        use_a_large_block()
        show_resident()
        give_freed_memory_back()
        show_resident()
    """)
    assert kept > before + LARGE // MIB // 2
    assert given_back < before + LARGE // MIB // 2


def test_what_was_kept_is_used_again() -> None:
    """Not at once: a block that was freed can be a few bytes short for what is to lie aligned.

    Up to three more were seen, however often it was used.
    """
    once, often = printed_by("""
        assert keep_freed_memory()
        use_a_large_block()
        show_resident()
        for _ in range(10):
            use_a_large_block()
        show_resident()
    """)
    assert often < once + 5 * LARGE // MIB
