"""Freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import resource
import sys

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist.kernels.allocator import (  # noqa: E402
    give_freed_memory_back,
    keep_freed_memory,
)

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 64 << 20  # above what glibc would ever keep by itself


def page_faults_of(num_blocks: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_blocks):
        torch.empty(LARGE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux does")
def test_a_block_is_paged_in_once() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    page_faults_of(1)
    assert page_faults_of(8) < LARGE / 4096, "eight blocks take fewer faults than one has pages"
    give_freed_memory_back()
    assert page_faults_of(1) > 0, "it was given back, and is paged in again"


def test_it_holds_after_others_have_asked_for_something_else() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    assert keep_freed_memory()
    page_faults_of(1)
    assert page_faults_of(8) < LARGE / 4096
