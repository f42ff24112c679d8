"""The file of the disk: ranges at any byte, several threads, and where the cache cannot be passed."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexbench.dist import offload_file
from flexbench.dist.offload_file import BLOCK_BYTES, OffloadFile

PIECE = 256 << 10
SIZE = 3 * PIECE + 5 * BLOCK_BYTES
GUARD = 7


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_file, "_PIECE_BYTES", PIECE)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """As file systems do that know no O_DIRECT."""
    original = fcntl.fcntl

    def refuse(file: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(file, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


@pytest.fixture(params=["as it is", "page cache"])
def file(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """On whatever the temporary folder lies, and where O_DIRECT is refused."""
    if request.param == "page cache":
        refuse_direct(monkeypatch)
    opened = OffloadFile(tmp_path)
    opened.reserve(0, SIZE)
    yield opened
    opened.close()


def noise(num_bytes: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def at(num_bytes: int, misalignment: int) -> Any:
    """Memory that begins so many bytes after a multiple of a block's size."""
    memory = np.zeros(num_bytes + 2 * BLOCK_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % BLOCK_BYTES + misalignment
    return memory[start : start + num_bytes]


# Where ranges begin and end, and where memory lies: all combinations of whole blocks and not.
RANGES = [
    (0, SIZE),
    (0, BLOCK_BYTES),
    (BLOCK_BYTES, 3 * BLOCK_BYTES),
    (0, 1),
    (5, 100),
    (BLOCK_BYTES - 1, 2),
    (BLOCK_BYTES - 1, BLOCK_BYTES + 2),
    (0, offload_file._SMALL_BYTES),
    (1, offload_file._SMALL_BYTES),
    (1, offload_file._SMALL_BYTES + 1),
    (BLOCK_BYTES, 2 * PIECE),
    (3, 2 * PIECE),
    (2 * BLOCK_BYTES, SIZE - 2 * BLOCK_BYTES - 1),
    (77, SIZE - 99),
    (9, 0),
]


@pytest.mark.parametrize("misalignment", [0, 512, 64])
@pytest.mark.parametrize(("start", "num_bytes"), RANGES)
def test_any_range_at_any_address(
    file: OffloadFile, start: int, num_bytes: int, misalignment: int
) -> None:
    expected = noise(SIZE)
    file.write(0, expected)
    new = at(num_bytes, misalignment)
    new[:] = noise(num_bytes, seed=1)

    file.write(start, new)
    expected[start : start + num_bytes] = new

    everything = np.zeros(SIZE, dtype=np.uint8)
    file.read(0, everything)
    assert np.array_equal(everything, expected)
    # And nothing beside the memory that is asked to be filled.
    around = at(num_bytes + 2 * GUARD, (misalignment - GUARD) % BLOCK_BYTES)
    file.read(start, around[GUARD : GUARD + num_bytes])
    assert np.array_equal(around[GUARD : GUARD + num_bytes], new)
    assert not around[:GUARD].any()
    assert not around[GUARD + num_bytes :].any()


def test_what_was_never_written_is_zeros(file: OffloadFile) -> None:
    out = noise(SIZE)
    file.read(0, out)
    assert not out.any()


def test_pieces_cover_a_range_once() -> None:
    for start, num_bytes in RANGES:
        pieces = offload_file._pieces(start, num_bytes)
        places = [place for piece in pieces for place in (piece.start, piece.stop)]
        assert places[:1] + places[-1:] == ([start, start + num_bytes] if num_bytes else [])
        assert places[1:-1:2] == places[2::2]
        assert all(0 < len(piece) <= PIECE for piece in pieces)
        assert all(place % BLOCK_BYTES == 0 for place in places[1:-1])


def test_threads_that_write_parts_of_one_block(file: OffloadFile) -> None:
    """What one puts back around its own bytes is not what another has just replaced."""
    width, count = 96, 40
    rows = noise(4 * count * width).reshape(count, 4, width)

    def write(column: int) -> None:
        for row in range(count):
            file.write((row * 4 + column) * width, rows[row, column])

    threads = [threading.Thread(target=write, args=(column,)) for column in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    out = np.empty(rows.size, dtype=np.uint8)
    file.read(0, out)
    assert np.array_equal(out, rows.ravel())


def test_threads_that_read_at_once(file: OffloadFile) -> None:
    data = noise(SIZE)
    file.write(0, data)
    are_equal = []

    def read(start: int) -> None:
        out = at(SIZE - start, start % 1024)
        file.read(start, out)
        are_equal.append(np.array_equal(out, data[start:]))

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 4096, 100, 512)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert are_equal == [True] * 4


def test_a_disk_passes_the_cache(tmp_path: Path) -> None:
    """What was read is not in the cache: the system has read it from the disk."""
    file = direct_file(tmp_path)
    file.write(0, noise(SIZE))
    before = read_bytes()
    for _ in range(3):
        file.read(0, at(SIZE, 0))
    file.close()
    assert read_bytes() - before >= 3 * SIZE


def read_bytes() -> int:
    """Bytes that this process has had from disks, as the kernel counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))


def test_says_how_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for is_in_memory in (True, False):
        monkeypatch.setattr(offload_file, "is_memory", lambda _, told=is_in_memory: told)
        with monkeypatch.context() as changed:
            refuse_direct(changed)
            file = OffloadFile(tmp_path)
            file.reserve(0, 1)
        assert file.access == ("memory" if is_in_memory else "page cache")
        file.close()


def test_memory_has_to_lie_where_the_system_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def want_blocks(file: int, data: Any, offset: int) -> int:
        if np.frombuffer(data, np.uint8).ctypes.data % BLOCK_BYTES:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", want_blocks)
    monkeypatch.setattr(offload_file, "is_memory", lambda _: False)
    file = OffloadFile(tmp_path)
    file.reserve(0, SIZE)
    data = at(SIZE, 512)
    data[:] = noise(SIZE)
    file.write(0, data)
    out = at(SIZE, 0)
    file.read(0, out)
    assert np.array_equal(out, data)
    file.close()


# --- what goes wrong ---


@pytest.mark.parametrize("most", [1, 1000, BLOCK_BYTES, 3 * BLOCK_BYTES])
def test_short_reads_and_writes_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    refuse_direct(monkeypatch)
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, to, at: read(file, [to[0][:most]], at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:most], at))
    file = OffloadFile(tmp_path)
    file.reserve(0, 3 * BLOCK_BYTES)
    data = noise(2 * BLOCK_BYTES + 10)
    file.write(3, data)
    out = np.empty_like(data)
    file.read(3, out)
    assert np.array_equal(out, data)
    file.close()


@pytest.mark.parametrize("end", [SIZE - 7 * BLOCK_BYTES, SIZE - 7 * BLOCK_BYTES + 1])
@pytest.mark.parametrize("start", [BLOCK_BYTES, BLOCK_BYTES - 512, 1])
def test_a_large_read_is_one_call_of_the_thread_that_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, end: int
) -> None:
    """Whoever computes on all cores lets no other thread begin to read."""
    file = direct_file(tmp_path)
    data = noise(SIZE)
    file.write(0, data)
    read, calls = os.preadv, []

    def note(*arguments: Any) -> int:
        calls.append(threading.current_thread())
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", note)
    out = at(end - start, start % BLOCK_BYTES)
    file.read(start, out)
    file.close()
    assert calls == [threading.current_thread()]
    assert np.array_equal(out, data[start:end])


@pytest.mark.parametrize("most", [BLOCK_BYTES, BLOCK_BYTES + 512, 5 * BLOCK_BYTES, SIZE - 1])
def test_a_large_read_with_ragged_ends_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    file = direct_file(tmp_path)
    data = noise(SIZE)
    file.write(0, data)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: min(most, read(*arguments)))
    out = at(SIZE - 10, 5)
    file.read(5, out)
    file.close()
    assert np.array_equal(out, data[5:-5])


def direct_file(folder: Path) -> OffloadFile:
    """With SIZE bytes, and read past the cache."""
    file = OffloadFile(folder)
    file.reserve(0, SIZE)
    if file.access != "direct":
        file.close()
        pytest.skip(f"the temporary folder is read by way of: {file.access}")
    return file


def test_a_direct_read_that_stops_within_a_block_begins_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OffloadFile(tmp_path)
    file.reserve(0, 16 * BLOCK_BYTES)
    data = at(16 * BLOCK_BYTES, 0)
    data[:] = noise(len(data))
    file.write(0, data)
    read, places = os.preadv, []

    def read_less(number: int, to: Any, offset: int) -> int:
        places.append(offset)
        count = read(number, to, offset)
        return count - 100 if len(places) == 1 else count

    monkeypatch.setattr(os, "preadv", read_less)
    out = at(len(data), 0)
    file.read(0, out)
    assert np.array_equal(out, data)
    assert places == [0, 15 * BLOCK_BYTES]
    file.close()


def test_a_file_that_has_become_shorter(file: OffloadFile) -> None:
    os.truncate(file._file, SIZE // 2)
    with pytest.raises(OSError, match="the file has become shorter"):
        file.read(0, np.empty(SIZE, dtype=np.uint8))


def test_one_failing_piece_fails_the_whole_and_the_rest_is_not_begun(
    file: OffloadFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def fail(number: int, to: Any, offset: int) -> int:
        begun.append(offset)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(offload_file, "_PIECE_BYTES", 32 << 10)
    monkeypatch.setattr(os, "preadv", fail)
    threads = threading.active_count()
    with pytest.raises(OSError, match="Input/output error"):
        file.read(0, at(SIZE, 64))
    assert 1 <= len(begun) <= offload_file._MAX_PIECES_UNDER_WAY
    assert threading.active_count() == threads


def test_closing_while_something_is_under_way(
    file: OffloadFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends as if nothing had happened; then the file's number is free, and nothing is read."""
    data = noise(SIZE)
    file.write(0, data)
    number, read = file._file, os.preadv
    has_begun, may_go_on = threading.Event(), threading.Event()

    def read_slowly(*arguments: Any) -> int:
        has_begun.set()
        assert may_go_on.wait(10)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", read_slowly)
    out = np.empty(SIZE, dtype=np.uint8)
    reader = threading.Thread(target=file.read, args=(0, out))
    reader.start()
    assert has_begun.wait(10)
    file.close()
    os.fstat(number)
    with pytest.raises(OSError, match="it has been closed"):
        file.read(0, out)
    may_go_on.set()
    reader.join(10)
    assert np.array_equal(out, data)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    file.close()
