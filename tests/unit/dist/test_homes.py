"""Memory that files are read into."""

from __future__ import annotations

import errno
import gc

import pytest

torch = pytest.importorskip("torch", reason="flexbench dist needs torch")

from flexbench.dist import homes  # noqa: E402
from flexbench.dist.homes import aligned_empty  # noqa: E402
from flexbench.dist.offload_file import BLOCK_BYTES  # noqa: E402

HUGE = 2 << 20
CPU = torch.device("cpu")


class NoHugePages(homes.mmap.mmap):
    """Memory of a system that knows none."""

    def madvise(self, *_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK_BYTES, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE])
@pytest.mark.parametrize("has_huge_pages", [True, False])
def test_memory_begins_at_a_block_and_ends_where_it_should(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, has_huge_pages: bool
) -> None:
    if not has_huge_pages:
        monkeypatch.setattr(homes.mmap, "mmap", NoHugePages)
    memory = aligned_empty(num_bytes, CPU)
    assert memory.shape == (num_bytes,)
    assert memory.dtype == torch.uint8
    assert memory.data_ptr() % BLOCK_BYTES == 0
    # Another one does not lie in it, and it stays while anybody has a part of it.
    other, part = aligned_empty(num_bytes, CPU).fill_(2), memory.fill_(1)[num_bytes // 2 :]
    del memory
    gc.collect()
    assert bool((part == 1).all())
    assert bool((other == 2).all())


def test_large_memory_begins_at_a_huge_page() -> None:
    assert aligned_empty(HUGE, CPU).data_ptr() % HUGE == 0
    assert aligned_empty(5 * HUGE + 3, CPU).data_ptr() % HUGE == 0
