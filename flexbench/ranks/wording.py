"""How ranks, addresses and failures stand in a message, for people and between ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

from flexbench.core.errors import FlexbenchError, Interrupted

KILLED = "was killed, or lost its connection"
STOPPED = 128
"""And the signal's number: the exit code of who was asked to stop."""

_MAX_SUMMARY_LENGTH = 500
_MAX_EXIT_CODE = 255


def describe_failure(error: BaseException) -> str:
    """What happened to a rank that `error` ends, in one line that follows its number."""
    if isinstance(error, Interrupted):
        number = error.signal_number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return f"was stopped by {name}"
    if isinstance(error, KeyboardInterrupt):
        return "was stopped by Ctrl-C"
    return f"failed: {summarize(error)}"


def summarize(error: BaseException) -> str:
    """`error` in one line: the message of one of ours, the type and message of any other."""
    if isinstance(error, FlexbenchError):
        return one_line(error.message)
    text = one_line(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def exit_code_of(error: BaseException) -> int:
    """The exit code of a rank that `error` ends."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED + signal.SIGINT
    return error.exit_code if isinstance(error, FlexbenchError) else 1


def read_exit_code(value: Any) -> int:
    """The exit code that another rank has told; 1 for what is none of a failure."""
    return value if type(value) is int and 1 <= value <= _MAX_EXIT_CODE else 1


def is_stop(exit_code: int) -> bool:
    """Whether a rank with this exit code was asked to stop, rather than failed."""
    return exit_code > STOPPED


def one_line(text: str) -> str:
    """The first line of `text` that says something, cut where it becomes too long for one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:_MAX_SUMMARY_LENGTH] if lines else ""


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks as they stand in a message: "rank 2", "ranks 1, 2 and 5"."""
    names = [str(rank) for rank in sorted(ranks)]
    if len(names) == 1:
        return f"rank {names[0]}"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def name_address(host: str, port: int) -> str:
    """An address as it stands in a message."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def not_answered(timeout_s: float) -> str:
    """What is said of a rank that is connected, but silent."""
    return f"has not answered for {timeout_s:g} s (--comm-timeout)"
