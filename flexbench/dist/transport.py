"""Messages between pipeline stages, over torch.distributed.

Hidden states go to the next stage, tokens from the last stage to the first. Tokens are always sent
from host memory; hidden states from the GPU where `comm_device` says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from flexbench.core.errors import WorkerError
from flexbench.core.timeline import What
from flexbench.dist.lanes import synchronize
from flexbench.dist.timeline import Timeline


class PeerError(WorkerError):
    """Another stage cannot be reached any more. `rank` is the one that was spoken to."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}", f"cannot be reached any more: {reason}")
        self.rank = rank


@dataclass(frozen=True)
class MessageSpec:
    """What a message looks like: both sides know it beforehand."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class PipelineLink:
    """One stage's connections: to the next stage, and from the one before, in a ring."""

    def __init__(
        self, rank: int, num_stages: int, comm_device: torch.device, *, is_async: bool
    ) -> None:
        self._next = (rank + 1) % num_stages
        self._previous = (rank - 1) % num_stages
        self._device = comm_device
        self._is_async = is_async
        self._sending: tuple[Any, torch.Tensor] | None
        self._posted: tuple[Any, torch.Tensor] | None
        self.reset()

    def reset(self, timeline: Timeline | None = None) -> None:
        """Forget messages that an error left behind, and count waiting times from 0.

        Waits are noted in `timeline`.
        """
        self._timeline = timeline if timeline is not None else Timeline()
        self._sending = self._posted = None
        self.send_s = 0.0
        self.receive_s = 0.0

    def send_hidden(self, message: torch.Tensor) -> None:
        """Send to the next stage. Asynchronous links wait for the message before instead."""
        self._begin_send(message)
        if not self._is_async:
            self.flush()

    def recv_hidden(self, spec: MessageSpec) -> torch.Tensor:
        """The next message of the stage before, on the comm device."""
        self._finish_own_work()
        started_at = time.perf_counter()
        if self._posted is None:
            self.post_receive(spec)
        assert self._posted is not None
        work, message = self._posted
        self._posted = None
        self._wait(work, message, self._previous)
        ended_at = time.perf_counter()
        self.receive_s += ended_at - started_at
        self._timeline.add(What.WAITING, started_at, ended_at)
        return message

    def send_recv_hidden(
        self, message: torch.Tensor | None, spec: MessageSpec | None
    ) -> torch.Tensor | None:
        """Send and receive at once: neither waits for the other, so that no order can block."""
        if message is not None:
            self._begin_send(message)
        received = self.recv_hidden(spec) if spec is not None else None
        if not self._is_async:
            self.flush()
        return received

    def post_receive(self, spec: MessageSpec) -> None:
        """Begin to receive; the message arrives while something else is done."""
        # Tokens are of no use on a GPU: they are counted and compared on the host.
        device = self._device if spec.dtype.is_floating_point else torch.device("cpu")
        message = torch.empty(spec.shape, dtype=spec.dtype, device=device)
        try:
            work = distributed.irecv(message, self._previous)
        except RuntimeError as error:
            raise PeerError(self._previous, _first_line(error)) from error
        self._posted = (work, message)

    def flush(self) -> None:
        """Wait until the last message has been taken."""
        if self._sending is None:
            return
        self._finish_own_work()
        started_at = time.perf_counter()
        work, message = self._sending
        self._sending = None
        self._wait(work, message, self._next)
        ended_at = time.perf_counter()
        self.send_s += ended_at - started_at
        self._timeline.add(What.SENDING, started_at, ended_at)

    def _finish_own_work(self) -> None:
        """Computing that is still under way is not to count as waiting for another stage."""
        synchronize(self._device)

    def _begin_send(self, message: torch.Tensor) -> None:
        self.flush()
        if message.is_floating_point():
            # To host memory this waits for the copy: the sender reads it at once.
            message = message.to(self._device)
        message = message.contiguous()
        try:
            work = distributed.isend(message, self._next)
        except RuntimeError as error:
            raise PeerError(self._next, _first_line(error)) from error
        self._sending = (work, message)

    def _wait(self, work: Any, message: torch.Tensor, peer: int) -> None:
        try:
            work.wait()
            # NCCL only makes the stream wait: the time would be lost among the computing.
            synchronize(message.device)
        except RuntimeError as error:
            raise PeerError(peer, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
