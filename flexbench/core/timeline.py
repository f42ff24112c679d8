"""What a record's timeline is made of: whoever writes one, and whoever draws it."""

from __future__ import annotations

from enum import StrEnum

COLUMNS = ("what", "start_s", "end_s")


class What(StrEnum):
    """What a stage of a pipeline did in a span of time."""

    COMPUTING = "computing"
    """Whatever is not one of the others."""
    LOADING = "loading"
    """Stood still for loads and stores of weights, cache and activations."""
    SENDING = "sending"
    """Waited for the next stage to take a message."""
    WAITING = "waiting"
    """Waited for the stage before."""
