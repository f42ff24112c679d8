"""A file without a name, read and written past the system's cache where that is possible.

What the cache holds comes at the speed of memory, and says nothing of the disk; it would also take
the memory that offloading is to save. A file opened with O_DIRECT moves whole blocks between the
disk and memory that lies at a multiple of some power of two. Callers may ask for any range at any
address: blocks that are wanted in part, and memory that lies elsewhere, go through buffers.

To read a large range to where it fits is one call of the system, which asks the disk for all of it
at once. Other large ranges are cut into pieces, of which several are under way together.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flexbench.core.environment import is_memory

# What file systems and disks work with: ranges of a file begin and end at multiples of it.
BLOCK_BYTES = 4096
# Where memory has to lie; the first that the system takes.
_ALIGNMENTS = (512, BLOCK_BYTES)
_PIECE_BYTES = 4 << 20
_MAX_PIECES_UNDER_WAY = 4
# Up to here, copying once more is faster than asking the disk for the ragged ends by themselves.
_SMALL_BYTES = 128 << 10

Access = Literal["direct", "page cache", "memory"]
Bytes = NDArray[np.uint8]


class OffloadFile:
    """An empty file in a folder, gone when it is closed, or its process has ended.

    Several threads may use it at once. Everything raises OSError.
    """

    def __init__(self, folder: Path) -> None:
        self._users = 0
        self._is_closed = False
        self._lock = threading.Lock()
        # Whoever changes a part of a block puts the rest of it back as it was.
        self._blocks = threading.Lock()
        self._buffers: deque[Bytes] = deque()
        self._alignment: int | None = None
        self._access: Access | None = None
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._file = os.dup(file.fileno())
        if is_memory(folder):
            self._access = "memory"

    @property
    def access(self) -> Access:
        """How it is read: past the cache, through it, or in memory, where there is no disk.

        Through the cache, pages are given back after each use, as far as they have been written.
        """
        assert self._access is not None, "space is reserved first"
        return self._access

    def reserve(self, offset: int, num_bytes: int) -> None:
        """Take space on disk for the blocks from `offset` on, a multiple of BLOCK_BYTES."""
        with self._in_use() as file:
            os.posix_fallocate(file, offset, max(_round_up(num_bytes), BLOCK_BYTES))
            if self._access is None:
                self._alignment = _use_directly(file)
                self._access = "page cache" if self._alignment is None else "direct"

    def read(self, offset: int, out: Bytes) -> None:
        """Fill `out` with what lies at `offset`."""
        with self._in_use() as file:
            if self._alignment is None:
                self._read_cached(file, offset, out)
            elif self._fits(offset, out) or (
                len(out) > _SMALL_BYTES and self._may_use(offset, out)
            ):
                self._read_at_once(file, offset, out)
            else:
                _share_out(self._read_by_way_of_buffer, file, offset, out)

    def write(self, offset: int, data: Bytes) -> None:
        """Put `data` at `offset`."""
        is_cached = self._alignment is None
        with self._in_use() as file:
            _share_out(self._write_cached if is_cached else self._write_direct, file, offset, data)

    def close(self) -> None:
        """Give the space back, as soon as nothing is under way any more."""
        with self._lock:
            self._is_closed = True
            self._close_unused()

    # --- the open file ---

    @contextmanager
    def _in_use(self) -> Iterator[int]:
        """Its number stays its own as long: once it is closed, another file may get that."""
        with self._lock:
            if self._is_closed:
                raise OSError(errno.EBADF, "it has been closed")
            self._users += 1
        try:
            yield self._file
        finally:
            with self._lock:
                self._users -= 1
                self._close_unused()

    def _close_unused(self) -> None:
        if self._is_closed and self._users == 0 and self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._buffers.clear()

    # --- past the cache ---

    def _read_at_once(self, file: int, offset: int, out: Bytes) -> None:
        """With one call, by the thread that asks.

        Other threads would have to be given a core first, and those may all be computing: reading
        would begin when the computing beside it has ended.
        """
        whole = _blocks_within(offset, len(out))
        head, tail = whole.start - offset, offset + len(out) - whole.stop
        with self._buffer(2 * BLOCK_BYTES) as ends:
            first, last = ends[:BLOCK_BYTES], ends[BLOCK_BYTES:]
            parts = [out[head : head + len(whole)]]
            if head:
                parts.insert(0, first)
            if tail:
                parts.append(last)
            _read_all(file, whole.start - BLOCK_BYTES if head else offset, parts)
            out[:head] = first[BLOCK_BYTES - head :]
            out[len(out) - tail :] = last[:tail]

    def _read_by_way_of_buffer(self, file: int, offset: int, out: Bytes) -> None:
        blocks = _blocks_around(offset, len(out))
        with self._buffer(len(blocks)) as buffer:
            _read_all(file, blocks.start, [buffer])
            out[:] = buffer[offset - blocks.start :][: len(out)]

    def _write_direct(self, file: int, offset: int, data: Bytes) -> None:
        if self._fits(offset, data):
            _write_all(file, offset, data)
            return
        blocks = _blocks_around(offset, len(data))
        is_ragged = len(blocks) > len(data)
        with self._buffer(len(blocks)) as buffer, self._blocks if is_ragged else nullcontext():
            if is_ragged:
                for edge in {blocks.start, blocks.stop - BLOCK_BYTES}:
                    _read_all(file, edge, [buffer[edge - blocks.start :][:BLOCK_BYTES]])
            buffer[offset - blocks.start :][: len(data)] = data
            _write_all(file, blocks.start, buffer)

    def _fits(self, offset: int, memory: Bytes) -> bool:
        """Whether the disk may use the memory itself, and nothing else."""
        is_whole = offset % BLOCK_BYTES == 0 and len(memory) % BLOCK_BYTES == 0
        return is_whole and self._may_use(offset, memory)

    def _may_use(self, offset: int, memory: Bytes) -> bool:
        """Whether whole blocks of the range lie in memory as the disk needs it."""
        assert self._alignment is not None
        address: int = memory.ctypes.data
        return (address - offset) % self._alignment == 0

    @contextmanager
    def _buffer(self, num_bytes: int) -> Iterator[Bytes]:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = np.frombuffer(mmap.mmap(-1, _PIECE_BYTES), np.uint8)
        yield buffer[:num_bytes]
        self._buffers.append(buffer)

    # --- through the cache ---

    def _read_cached(self, file: int, offset: int, out: Bytes) -> None:
        # The system begins to read all of it, while what is there already is copied.
        os.posix_fadvise(file, offset, len(out), os.POSIX_FADV_WILLNEED)
        _read_all(file, offset, [out])
        os.posix_fadvise(file, offset, len(out), os.POSIX_FADV_DONTNEED)

    def _write_cached(self, file: int, offset: int, data: Bytes) -> None:
        _write_all(file, offset, data)
        # It begins to write them, at least; what is not written yet stays.
        os.posix_fadvise(file, offset, len(data), os.POSIX_FADV_DONTNEED)


def _use_directly(file: int) -> int | None:
    """Set O_DIRECT; where memory has to lie then. None if the file system does without.

    Its first block is written for that, with zeros.
    """
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    memory = np.frombuffer(mmap.mmap(-1, 2 * BLOCK_BYTES), np.uint8)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
        for alignment in _ALIGNMENTS:
            if _is_taken(file, memory[alignment : alignment + BLOCK_BYTES]):
                return alignment
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return None


def _is_taken(file: int, memory: Bytes) -> bool:
    try:
        return os.pwrite(file, memory.data, 0) == os.preadv(file, [memory.data], 0) == BLOCK_BYTES
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False


def _read_all(file: int, offset: int, parts: Sequence[Bytes]) -> None:
    """Fill one after the other with what follows `offset`."""
    left = sum(map(len, parts))
    while left:
        count = _advanced(os.preadv(file, [part.data for part in parts], offset), left)
        if count == 0:
            raise OSError(errno.EIO, "the file has become shorter")
        left, offset = left - count, offset + count
        parts = list(_without(count, parts))


def _without(count: int, parts: Sequence[Bytes]) -> Iterator[Bytes]:
    """The parts from their `count`-th byte on."""
    for part in parts:
        if count < len(part):
            yield part[count:]
        count = max(0, count - len(part))


def _write_all(file: int, offset: int, data: Bytes) -> None:
    while len(data):
        count = _advanced(os.pwrite(file, data.data, offset), len(data))
        if count == 0:
            raise OSError(errno.EIO, "the disk takes no more")
        data, offset = data[count:], offset + count


def _advanced(count: int, asked: int) -> int:
    """How far a short read or write has come: where the next one may begin."""
    is_ragged = asked % BLOCK_BYTES == 0 and count % BLOCK_BYTES != 0
    return count // BLOCK_BYTES * BLOCK_BYTES if is_ragged and count > BLOCK_BYTES else count


def _round_up(offset: int) -> int:
    return -(-offset // BLOCK_BYTES) * BLOCK_BYTES


def _blocks_around(offset: int, num_bytes: int) -> range:
    return range(offset // BLOCK_BYTES * BLOCK_BYTES, _round_up(offset + num_bytes))


def _blocks_within(offset: int, num_bytes: int) -> range:
    return range(_round_up(offset), (offset + num_bytes) // BLOCK_BYTES * BLOCK_BYTES)


def _pieces(offset: int, num_bytes: int) -> list[range]:
    """Ranges of the file, of whole blocks but for the first and the last."""
    end = offset + num_bytes
    if num_bytes <= _SMALL_BYTES:
        return [range(offset, end)] if num_bytes else []
    whole = _blocks_within(offset, num_bytes)
    first, last = whole.start, whole.stop
    cuts = [*{offset, first}, *range(first + _PIECE_BYTES, last, _PIECE_BYTES), *{last, end}]
    cuts.sort()
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _share_out(do: Callable[[int, int, Bytes], None], file: int, offset: int, data: Bytes) -> None:
    """Do all pieces of a range, several at once. Raises what the first that fails does.

    Threads are made anew for each transfer: that takes a tenth of a millisecond, and leaves none.
    """
    pieces = _pieces(offset, len(data))
    waiting = deque(pieces)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return
                do(file, piece.start, data[piece.start - offset : piece.stop - offset])
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            errors.append(error)
            waiting.clear()

    count = min(_MAX_PIECES_UNDER_WAY, len(pieces)) - 1
    # Daemons: a disk that hangs is not to keep a process alive that has failed.
    others = [threading.Thread(target=work, name="disk", daemon=True) for _ in range(count)]
    try:
        for thread in others:
            thread.start()
        work()
    finally:
        waiting.clear()
        for thread in others:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]
