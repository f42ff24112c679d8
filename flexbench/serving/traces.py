"""What is kept of every request: the timestamps from which all figures are derived."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True, slots=True)
class RequestTrace:
    """One request. Times are in ns since the release of the point; None: it did not come to that.

    `scheduled_ns` is when the load asked for it: the arrival of an open loop, the moment at which a
    client of a closed loop was free. `sent_ns` is when its first byte was written, or when it began
    to open a connection, if it had to: `connected_ns` is then when that was open.
    """

    index: int
    worker: int
    scheduled_ns: int
    sent_ns: int | None
    connected_ns: int | None
    content_ns: list[int]
    """Arrival of each chunk with generated text."""
    ended_ns: int | None
    """Arrival of the end of the answer, or the moment it failed."""
    prompt_tokens: int
    """Length of the prompt by the run's tokenizer."""
    max_new_tokens: int
    output_tokens: int
    """By the server's own count if `is_counted_by_server`, else by the tokenizer."""
    is_counted_by_server: bool
    server_prompt_tokens: int | None
    finish_reason: str | None
    is_unfinished: bool
    """The point ended before the answer did: neither done nor failed."""
    failure: str | None
    """A FailureKind's value."""
    failure_message: str | None

    @property
    def is_ok(self) -> bool:
        """Whether the answer came to its end, and without an error."""
        return self.failure is None and not self.is_unfinished

    def as_record(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> RequestTrace:
        """The trace that `as_record` made a record of. Raises TypeError for something else."""
        return RequestTrace(**record)
