"""Requests that wait for their turn, and the blocks of prompts that they become.

Batching is static, as in FlexGen: a block of prompts goes through the whole generation together, to
the longest answer in it, and what comes meanwhile waits. Each request is told of its own tokens
only, and has ended when it has them, even if its block goes on. A block has a fixed size: places
that nobody asked for are filled with copies, and cost what any other prompt does.

Pure but for the clock: it knows neither HTTP nor torch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flexbench.core.errors import ConfigError

_LONGEST_WAIT_S = 60


@dataclass(frozen=True)
class Token:
    """A new token of a request."""

    token_id: int


@dataclass(frozen=True)
class Failed:
    """A request will get no more tokens. `message` is for people."""

    message: str


Event = Token | Failed


@dataclass(eq=False)
class Job:
    """One request."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    is_abandoned: bool = False
    """Whoever asked does not wait for it any more."""
    num_tokens: int = field(default=0, init=False)
    """How many it has been told of."""

    @property
    def is_complete(self) -> bool:
        """Whether it has all its tokens."""
        return self.num_tokens >= self.max_new_tokens


Deliver = Callable[[list[tuple[Job, Event]]], None]
"""Passes on what happened to some requests; called from the thread that computes."""


class JobQueue:
    """Requests in the order in which they came. For several threads."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed_because: str | None = None

    def put(self, job: Job) -> str | None:
        """Add a request; or, if there will be no more tokens, the reason."""
        with self._changed:
            if self._closed_because is None:
                self._waiting.append(job)
                self._changed.notify()
            return self._closed_because

    def take(self, most: int, *, fill_s: float, timeout_s: float) -> list[Job]:
        """Up to `most` requests, in order; none if none came within `timeout_s`.

        Once there is one, others are waited for during `fill_s`, unless there are enough: after a
        block has ended, those who got its answers send their next requests at about the same time.
        """
        with self._changed:
            if not self._changed.wait_for(self._has_one, timeout_s):
                return []
            expires_at = time.monotonic() + fill_s
            while len(self._waiting) < most:
                remaining_s = expires_at - time.monotonic()
                if remaining_s <= 0:
                    break
                self._changed.wait(remaining_s)
            taken: list[Job] = []
            while self._has_one() and len(taken) < most:
                taken.append(self._waiting.popleft())
            return taken

    def close(self, reason: str) -> list[Job]:
        """Take no more requests; those that still wait."""
        with self._changed:
            self._closed_because = self._closed_because or reason
            left = list(self._waiting)
            self._waiting.clear()
            return left

    def _has_one(self) -> bool:
        while self._waiting and self._waiting[0].is_abandoned:
            self._waiting.popleft()
        return bool(self._waiting)


class Batch:
    """Requests that are generated together, as one block of prompts."""

    def __init__(self, jobs: Sequence[Job], deliver: Deliver) -> None:
        assert jobs, "somebody has to ask for it"
        self._jobs = list(jobs)
        self._deliver = deliver

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts that were asked for."""
        return [list(job.prompt_ids) for job in self._jobs]

    @property
    def max_new_tokens(self) -> int:
        """What the longest answer takes."""
        return max(job.max_new_tokens for job in self._jobs)

    def put(self, prompts: range, token: int, ids: Sequence[int]) -> None:
        """Token number `token` of these prompts of the block is there."""
        events: list[tuple[Job, Event]] = []
        for place, token_id in zip(prompts, ids, strict=True):
            if place < len(self._jobs):
                job = self._jobs[place]
                if not job.is_complete and token == job.num_tokens:
                    job.num_tokens += 1
                    events.append((job, Token(int(token_id))))
        if events:
            self._deliver(events)

    def finish(self, new_ids: Sequence[Sequence[int]]) -> None:
        """Everything has been generated: pass on the tokens that nobody was told of on the way.

        `new_ids` has the new tokens of every prompt of the block.
        """
        events: list[tuple[Job, Event]] = []
        for job, ids in zip(self._jobs, new_ids, strict=False):
            for token_id in ids[job.num_tokens : job.max_new_tokens]:
                job.num_tokens += 1
                events.append((job, Token(int(token_id))))
        if events:
            self._deliver(events)


def fill_up(prompts: Sequence[Sequence[int]], block_size: int) -> list[list[int]]:
    """`block_size` prompts: those there are, then copies of them."""
    return [list(prompts[place % len(prompts)]) for place in range(block_size)]


def check_batch_wait(seconds: float) -> None:
    """Raise ConfigError unless a block can wait so long for more prompts."""
    if not 0 <= seconds <= _LONGEST_WAIT_S:
        raise ConfigError(
            "--batch-wait", f"must be from 0 to {_LONGEST_WAIT_S} seconds, not {seconds:g}"
        )
