"""Who of the job's ranks is still there.

A rank that waits for a tensor of another one waits for as long as that one computes: minutes, with
good reason. So no time-out of the computation can tell a busy rank from a dead one. This does: over
a connection of its own from every rank to rank 0, a thread in each says once a second that its
process lives. Rank 0 passes on to all what happens to one.

* A connection that closes without a goodbye: that rank was killed.
* Silence for `timeout_s`: it is frozen, or its network is gone.
* A failure is told with its reason, before the process ends.

The first cause is the one that everybody is told; what follows from it is not told again.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flexbench.core.errors import DeadlineError, FlexbenchError, Interrupted, RunError
from flexbench.ranks.channel import Channel, close_politely, encode, wait_for_sockets
from flexbench.ranks.launch import Launch
from flexbench.ranks.meeting_points import check_place, choose_meeting_point
from flexbench.ranks.rendezvous import join
from flexbench.ranks.wording import (
    KILLED,
    STOPPED,
    describe_failure,
    exit_code_of,
    is_stop,
    name_ranks,
    not_answered,
    one_line,
    read_exit_code,
)

# Ranks meet at about the same time, but that may take them days; it is heartbeats that tell whether
# they are alive.
LONGEST_RUN_S = 30 * 24 * 3600.0
_MAX_HEARTBEAT_S = 1.0
_HEARTBEATS_PER_TIMEOUT = 10
_JOIN_S = 2.0
_LONGEST_WAIT_S = 3600.0
_LOOK_EVERY_S = 0.4


@dataclass(frozen=True)
class LostRank:
    """A rank that will not come to its end, and why: `reason` completes "rank 2 ..."."""

    rank: int
    reason: str
    exit_code: int = 1
    """What that rank's process ends with, as far as it could tell."""

    @property
    def message(self) -> str:
        """The whole sentence."""
        return f"rank {self.rank} {self.reason}"

    def error(self) -> FlexbenchError:
        """What ends the other ranks: with the exit code of this one."""
        error: FlexbenchError = RunError(self.message)
        if is_stop(self.exit_code):
            error = Interrupted(self.exit_code - STOPPED)
            error.message = self.message
        error.exit_code = self.exit_code
        return error


class PeerWatch:
    """While its `with` block is open, all ranks know of the loss of any.

    Entering waits until all ranks are there; see `rendezvous.join` for what it raises. `on_lost` is
    called once, from the watching thread, when another rank is lost. Leaving tells the others that
    this rank has finished or, with an exception, why it failed; ranks may leave in any order.

    Small values travel over the same connections: from all to rank 0 with `publish` and `collect`,
    from rank 0 to all with `share`.

    A single rank has nobody to watch: no socket is opened, no thread started.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        purpose: str,
        head_ip: str | None,
        port: int | None,
        timeout_s: float,
        fingerprint: str,
        on_lost: Callable[[LostRank], None],
        raise_if_stopped: Callable[[], None] = lambda: None,
    ) -> None:
        """`purpose`, the command's name, and `fingerprint` have to be the same on all ranks.

        `raise_if_stopped` is called at least twice a second while a value is waited for, by
        commands that note signals instead of raising from their handlers.
        """
        self.timeout_s = timeout_s
        """How long a rank may be silent, and how long the others wait for it at the start."""
        self.head_host: str | None = None
        """The address that rank 0 listens at, as a number; None for a single rank."""
        self.local_host: str | None = None
        """This host's own address on the interface that reaches rank 0; None for a single rank."""
        self._launch = launch
        self._fingerprint = f"{purpose}\n{fingerprint}"
        self._on_lost = on_lost
        self._raise_if_stopped = raise_if_stopped
        self._point = None
        check_place(head_ip, port)
        if launch.world_size > 1:
            self._point = choose_meeting_point(
                launch, purpose=purpose, head_ip=head_ip, port=port, timeout_s=timeout_s
            )
        self._thread: threading.Thread | None = None
        # The thread's own, once it runs.
        self._channels: dict[int, Channel] = {}
        self._beats_at = 0.0
        # What follows is shared with the thread, and changed only by who holds the condition. Its
        # lock is one that a signal's handler may take again.
        self._condition = threading.Condition()
        self._lost: LostRank | None = None
        self._left: set[int] = set()
        self._values: defaultdict[tuple[str, int], deque[Any]] = defaultdict(deque)
        self._outbox: deque[bytes] = deque()
        self._has_failed = False
        self._is_leaving = False

    @property
    def lost(self) -> LostRank | None:
        """The rank that was lost first, if one was."""
        with self._condition:
            return self._lost

    def __enter__(self) -> PeerWatch:
        if self._point is None:
            return self
        self._channels, self.local_host = join(
            self._launch, self._point, fingerprint=self._fingerprint, timeout_s=self.timeout_s
        )
        try:
            self.head_host = self.local_host
            if self._launch.rank != 0:
                self.head_host = str(self._channels[0].socket.getpeername()[0])
            self._start()
        except BaseException as error:
            self._abandon(error)
            raise
        return self

    def __exit__(self, exc_type: object, error: BaseException | None, traceback: object) -> None:
        if self._thread is None:
            return
        if error is not None:
            self.report(error)
        self._leave()

    def report(self, error: BaseException) -> None:
        """Tell the others that `error` ends this rank, as leaving with it does, but earlier.

        Says nothing when another rank was lost before: what follows from a loss is none.
        """
        with self._condition:
            if self._thread is None or self._lost or self._has_failed or self._is_leaving:
                return
            self._has_failed = True
            self._outbox.append(encode(self._failure(error)))
        self._wake()

    def wait_for_loss(self, timeout_s: float, *, or_end_of: int | None = None) -> LostRank | None:
        """Wait until a rank is lost, `timeout_s` at most; a single rank does not wait.

        Nor does anybody after the end in good order of rank `or_end_of`.
        """
        if self._launch.world_size == 1:
            return None
        with self._condition:
            self._condition.wait_for(
                lambda: self._lost is not None or or_end_of in self._left,
                min(timeout_s, _LONGEST_WAIT_S),
            )
            return self._lost

    def publish(self, key: str, value: Any) -> None:
        """Send a value to rank 0, where `collect` returns it. Any that JSON can hold, up to 4 MiB.

        What is published a second time under a key is for the second `collect` of it.
        """
        line = encode({"type": "value", "key": key, "value": value})
        with self._condition:
            if self._launch.rank == 0:
                self._values[key, 0].append(value)
                return
        self._post(line)

    def collect(self, key: str, timeout_s: float) -> dict[int, Any]:
        """On rank 0: the values of all ranks, by rank.

        Raises RunError for a lost rank, and for one that ended without a value, and DeadlineError
        naming those that have sent none within `timeout_s`.
        """
        return self._take(key, range(self._launch.world_size), timeout_s)

    def share(self, key: str, value: Any, timeout_s: float) -> Any:
        """Rank 0's `value`, on every rank; theirs is ignored. Raises as `collect` does."""
        if self._launch.rank == 0:
            self.share_now(key, value)
            return value
        return self._take(key, range(1), timeout_s)[0]

    def share_now(self, key: str, value: Any) -> None:
        """On rank 0: what the other ranks get from `share`, or `received`."""
        line = encode({"type": "value", "key": key, "value": value})
        if self._launch.world_size > 1:
            self._post(line)

    def received(self, key: str) -> dict[int, list[Any]]:
        """What has been sent under `key` and not yet been taken, by sender. Waits for nothing."""
        with self._condition:
            senders = [rank for name, rank in self._values if name == key]
            return {rank: list(self._values.pop((key, rank))) for rank in sorted(senders)}

    def _take(self, key: str, ranks: range, timeout_s: float) -> dict[int, Any]:
        expires_at = time.monotonic() + timeout_s
        with self._condition:
            while True:
                missing = {rank for rank in ranks if not self._values.get((key, rank))}
                if not missing:
                    return {rank: self._values[key, rank].popleft() for rank in ranks}
                if self._lost is not None:
                    raise RunError(self._lost.message)
                if gone := missing & self._left:
                    raise RunError(f"{name_ranks(gone)} ended without a word on {key}")
                remaining = expires_at - time.monotonic()
                if remaining <= 0:
                    raise DeadlineError(
                        f"{name_ranks(missing)} said nothing on {key} within {timeout_s:g} s"
                    )
                self._condition.wait(min(remaining, _LOOK_EVERY_S))
                self._raise_if_stopped()

    def _start(self) -> None:
        self._alarm, self._alarm_sender = socket.socketpair()
        self._alarm.setblocking(False)
        self._alarm_sender.setblocking(False)
        thread = threading.Thread(
            target=self._watch, name=f"watch of rank {self._launch.rank}", daemon=True
        )
        try:
            thread.start()
        finally:
            if thread.is_alive():
                self._thread = thread
            else:
                self._alarm.close()
                self._alarm_sender.close()

    # Orders to the thread.

    def _post(self, line: bytes) -> None:
        with self._condition:
            self._outbox.append(line)
        self._wake()

    def _wake(self) -> None:
        # Full, and so loud enough already; or closed, as nobody listens any more.
        with suppress(OSError):
            self._alarm_sender.send(b"!")

    def _leave(self) -> None:
        with self._condition:
            if not self._has_failed:
                self._outbox.append(encode({"type": "bye"}))
            self._is_leaving = True
        self._wake()
        thread = self._thread
        if thread is None or thread is threading.current_thread():  # left from on_lost
            return
        thread.join(_JOIN_S)
        if thread.is_alive():  # on_lost does not return; the others need not wait for that
            self._hang_up()

    def _abandon(self, error: BaseException) -> None:
        """Entering was interrupted after the others had been told to start."""
        if self._thread is not None:
            self.report(error)
            self._leave()
            return
        self._send_all(self._failure(error))
        close_politely(self._channels.values())

    def _failure(self, error: BaseException) -> dict[str, Any]:
        failure = {"reason": describe_failure(error), "exit_code": exit_code_of(error)}
        if self._launch.rank == 0:
            return {"type": "lost", "rank": 0, **failure}
        return {"type": "fail", **failure}

    def _hang_up(self) -> None:
        for channel in list(self._channels.values()):
            with suppress(OSError):
                channel.socket.shutdown(socket.SHUT_RDWR)

    # The thread.

    def _watch(self) -> None:
        interval_s = min(_MAX_HEARTBEAT_S, self.timeout_s / _HEARTBEATS_PER_TIMEOUT)
        for channel in self._channels.values():
            channel.heard_at = time.monotonic()
        try:
            while self._send_posted():
                self._beat(interval_s)
                # Taken before listening: time in which this process itself was frozen, with the
                # others' words waiting in its sockets, is not their silence.
                now = time.monotonic()
                self._wait(interval_s)
                self._listen()
                self._miss_the_silent(now)
            close_politely(self._channels.values())
        finally:
            for channel in self._channels.values():
                channel.close()
            self._alarm.close()
            self._alarm_sender.close()

    def _send_posted(self) -> bool:
        """Send what the other threads have posted; False after the last of it."""
        with self._condition:
            lines = list(self._outbox)
            self._outbox.clear()
            is_leaving = self._is_leaving
        for channel in self._channels.values():
            for line in lines:
                channel.send_line(line)
        return not is_leaving

    def _beat(self, interval_s: float) -> None:
        now = time.monotonic()
        if now < self._beats_at:
            return
        self._beats_at = now + interval_s
        for channel in self._channels.values():
            if not channel.has_unsent:  # who reads nothing is not to be sent ever more
                channel.send({"type": "beat"})

    def _wait(self, interval_s: float) -> None:
        channels = self._channels.values()
        wait_for_sockets(
            [self._alarm, *(channel.socket for channel in channels)],
            [channel.socket for channel in channels if channel.has_unsent],
            timeout_s=min(interval_s, self._beats_at - time.monotonic()),
        )
        with suppress(BlockingIOError):
            self._alarm.recv(4096)

    def _listen(self) -> None:
        for rank, channel in list(self._channels.items()):
            channel.flush()
            for message in channel.receive():
                self._take_message(rank, message)
            if channel.is_closed or rank in self._left:
                channel.close()
                del self._channels[rank]
                if rank not in self._left:
                    self._lose(LostRank(rank, KILLED))

    def _take_message(self, rank: int, message: dict[str, Any]) -> None:
        kind = message.get("type")
        reason = one_line(str(message.get("reason")))
        exit_code = read_exit_code(message.get("exit_code"))
        if kind == "value":
            with self._condition:
                self._values[str(message.get("key")), rank].append(message.get("value"))
                self._condition.notify_all()
        elif kind == "bye":
            with self._condition:
                self._left.add(rank)
                self._condition.notify_all()
        elif kind == "fail":
            self._lose(LostRank(rank, reason, exit_code))
        elif kind == "lost":
            lost = message.get("rank")
            if lost == self._launch.rank:
                self._lose(LostRank(rank, f"gave up on rank {lost}, which {reason}"))
            elif isinstance(lost, int):
                self._lose(LostRank(lost, reason, exit_code))

    def _miss_the_silent(self, now: float) -> None:
        for rank, channel in list(self._channels.items()):
            if now - channel.heard_at > self.timeout_s:
                self._lose(LostRank(rank, not_answered(self.timeout_s)))

    def _lose(self, lost: LostRank) -> None:
        """Rank `lost` is gone: remember it, tell all, act. Only the first time."""
        with self._condition:
            if self._lost or self._has_failed or self._is_leaving:
                return
            self._lost = lost
            self._condition.notify_all()
        if self._launch.rank == 0:
            self._send_all({"type": "lost", **vars(lost)})
        elif lost.rank == 0:
            # It may only be frozen, and go on later: it is to know that this rank was not killed.
            self._send_all({"type": "fail", "reason": f"gave up on rank 0, which {lost.reason}"})
        try:
            self._on_lost(lost)
        except Exception:  # noqa: BLE001 - whatever it is, the others are to be heard and told
            # Where there is nothing to write to, nobody reads it.
            with suppress(Exception):
                sys.stderr.write(traceback.format_exc())
                sys.stderr.flush()

    def _send_all(self, message: dict[str, Any]) -> None:
        for channel in self._channels.values():
            channel.send(message)
