"""What one rank among several says to people: rank 0 speaks for all, where it can."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flexbench.core.errors import FlexbenchError, Interrupted
from flexbench.ranks.launch import Launch

if TYPE_CHECKING:
    from rich.console import Console

# How long rank 0 gets to say what is wrong on all ranks.
_PATIENCE_S = 3.0


@contextmanager
def first_rank_speaks(launch: Launch) -> Iterator[None]:
    """While options are checked: a mistake in them is the same on every rank, and told once.

    Launchers end all ranks as soon as one has ended; so the others wait until rank 0 has spoken.
    """
    try:
        yield
    except FlexbenchError as error:
        if launch.rank > 0 and not isinstance(error, Interrupted):
            try:
                time.sleep(_PATIENCE_S)
            except (Interrupted, KeyboardInterrupt):
                error.is_shown = True
        raise


def open_console(launch: Launch, *, stderr: bool = False) -> Console:
    """Where this rank prints: only rank 0 has anything to say."""
    from rich.console import Console

    # Under Open MPI standard output is a terminal of no size that goes to who knows where.
    is_terminal = False if launch.launcher == "openmpi" else None
    width = None if os.environ.get("COLUMNS") or is_terminal is None else 80
    return Console(stderr=stderr, force_terminal=is_terminal, width=width, quiet=launch.rank != 0)
