"""What a loop has written is there afterwards, but for a line that was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexbench.core.errors import InputFileError
from flexbench.serving.spool import SpoolWriter, read_spool

ROW = (
    3,
    1,
    1_000,
    1_010,
    None,
    [1_500, 1_600],
    1_650,
    64,
    32,
    2,
    True,
    66,
    "length",
    False,
    None,
    None,
)


def test_times_are_read_since_the_release(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "spool")
    writer.add(ROW)
    writer.close()

    (trace,) = read_spool(tmp_path / "spool", released_ns=1_000)

    assert (trace.index, trace.worker) == (3, 1)
    assert (trace.scheduled_ns, trace.sent_ns, trace.connected_ns) == (0, 10, None)
    assert (trace.content_ns, trace.ended_ns) == ([500, 600], 650)
    assert (trace.output_tokens, trace.server_prompt_tokens, trace.finish_reason) == (
        2,
        66,
        "length",
    )
    assert trace.is_ok


def test_a_request_that_was_never_sent_has_no_time_of_sending(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "spool")
    refused = (
        *ROW[:3],
        None,
        None,
        [],
        1_020,
        *ROW[7:9],
        0,
        False,
        None,
        None,
        False,
        "refused",
        "nobody",
    )
    writer.add(refused)
    writer.close()

    (trace,) = read_spool(tmp_path / "spool", released_ns=1_000)

    assert (trace.sent_ns, trace.ended_ns, trace.failure) == (None, 20, "refused")
    assert not trace.is_ok


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "spool")
    writer.add(ROW)
    writer.add(ROW)
    writer.close()
    written = (tmp_path / "spool").read_bytes()
    (tmp_path / "spool").write_bytes(written[:-7])

    assert len(read_spool(tmp_path / "spool", released_ns=0)) == 1


def test_nothing_is_lost_before_the_close(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "spool")
    writer.add(ROW)
    assert read_spool(tmp_path / "spool", released_ns=0) == []
    writer.flush()
    assert len(read_spool(tmp_path / "spool", released_ns=0)) == 1
    writer.close()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(b"[1,2]\n")
    with pytest.raises(InputFileError, match=r"spool:1: is damaged"):
        read_spool(tmp_path / "spool", released_ns=0)


def test_no_file_is_no_request(tmp_path: Path) -> None:
    assert read_spool(tmp_path / "spool", released_ns=0) == []
