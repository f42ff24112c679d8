"""The ranks of a job as a command sees them that does the same on all of them, step by step.

Every rank calls the methods of `Group` in the same order; each waits for the others. That may take
as long as it takes: what ends the wait is the loss of a rank, which raises on all the others, or a
signal. A single process is a group, too, without any socket.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from flexbench.core.errors import Interrupted, RunError
from flexbench.ranks.clocks import (
    OWN_CLOCK,
    ClockReading,
    Exchange,
    RankClock,
    best_reading,
    clock_id,
)
from flexbench.ranks.launch import Launch
from flexbench.ranks.links import Link, LinkClosedError, open_links
from flexbench.ranks.watch import LONGEST_RUN_S, LostRank, PeerWatch
from flexbench.ranks.wording import is_stop

_NUM_EXCHANGES = 40
_PAUSE_S = 0.001
_PING, _PONG, _DONE = "ping", "pong", "done"
_TIMES = struct.Struct(">qq")
# A signal, or the end of a connection, may come a little before the news of the rank that was lost.
_CAUSE_S = 0.2
_CLOSED_CAUSE_S = 2.0
# Of a start that is agreed upon, all have to hear before it comes.
_MIN_NOTICE_BOUNDS = 20


class Group:
    """All ranks of the job; see `open_ranks`."""

    def __init__(
        self,
        launch: Launch,
        watch: PeerWatch,
        *,
        raise_if_stopped: Callable[[], None],
        clock: Callable[[], int],
    ) -> None:
        self.rank = launch.rank
        self.size = launch.world_size
        self.clocks: list[RankClock] = [OWN_CLOCK] * self.size
        """Of every rank, as far as `synchronize` has measured them; the same on all ranks."""
        self._launch = launch
        self._watch = watch
        self._raise_if_stopped = raise_if_stopped
        self._clock = clock
        self._readings: list[list[ClockReading]] = [[] for _ in range(self.size)]
        self._links: dict[int, Link] = {}
        self._clock_ids: dict[int, str] = {}

    def check(self) -> None:
        """Raise if a rank is lost, or this one is to stop; to be called in every other wait."""
        try:
            self._raise_if_stopped()
        except (Interrupted, KeyboardInterrupt) as error:
            self._raise_cause(error)
            raise
        if (lost := self._watch.lost) is not None:
            raise lost.error()

    def barrier(self, name: str) -> None:
        """Wait until all ranks are here."""
        self.gather(name, None)
        self.broadcast(name)

    def broadcast(self, name: str, value: Any = None) -> Any:
        """Rank 0's `value`, anything that JSON can hold in 4 MiB, on all ranks."""
        return self._await(lambda: self._watch.share(f"{name}: from 0", value, LONGEST_RUN_S))

    def gather(self, name: str, value: Any) -> list[Any] | None:
        """On rank 0: every rank's `value`, by rank. Anything that JSON can hold in 4 MiB."""
        self._watch.publish(name, value)
        if self.rank != 0:
            return None
        values = self._await(lambda: self._watch.collect(name, LONGEST_RUN_S))
        return [values[rank] for rank in range(self.size)]

    def gather_bytes(self, name: str, data: bytes) -> list[bytes] | None:
        """On rank 0: every rank's `data`, by rank. For what is large: up to 4 GiB from each."""
        kind = f"data: {name}"
        if self.rank != 0:
            with self._causes_told(0):
                self._links[0].send(kind, data)
            return None
        gathered = [data]
        for rank in range(1, self.size):
            with self._causes_told(rank):
                gathered.append(self._links[rank].receive(kind, LONGEST_RUN_S))
        return gathered

    def post(self, name: str, value: Any) -> None:
        """Send a value without waiting: from rank 0 to all others, from these to rank 0."""
        if self.size > 1:
            send = self._watch.share_now if self.rank == 0 else self._watch.publish
            send(f"{name}: post", value)

    def posted(self, name: str) -> dict[int, list[Any]]:
        """What others have posted since this was last asked, by rank. Waits for nothing."""
        return self._watch.received(f"{name}: post")

    def synchronize(self) -> None:
        """Read all clocks against rank 0's, into `clocks`. Takes about 0.1 s."""
        if self.size == 1:
            return
        if self.rank == 0:
            readings = self._read_clocks()
        else:
            readings = {}
            with self._causes_told(0):
                self._answer_pings(self._links[0])
        described = {
            str(rank): [one.at_ns, one.offset_ns, one.bound_ns] for rank, one in readings.items()
        }
        own_id = self._clock_ids.get(0)
        same = [rank for rank, found in self._clock_ids.items() if found == own_id]
        shared = self.broadcast("clocks", {"readings": described, "same": same})
        for rank in range(1, self.size):
            self._readings[rank].append(ClockReading(*shared["readings"][str(rank)]))
            self.clocks[rank] = RankClock.from_readings(
                self._readings[rank], has_same_id=rank in shared["same"]
            )

    def start_together(self, delay_s: float = 0.2) -> int:
        """Wait until all ranks are here, then agree on a moment `delay_s` later.

        Reads the clocks. The moment is one of this rank's own time.monotonic_ns. It has passed if
        the word of it took longer than that to come, which is for the caller to see; where messages
        take long, it is set later than `delay_s`.
        """
        self.barrier("ready to start")
        self.synchronize()
        bound_ns = max(clock.readings[-1].bound_ns for clock in self.clocks)
        notice_ns = max(int(delay_s * 1e9), _MIN_NOTICE_BOUNDS * bound_ns)
        head_ns: int = self.broadcast("start", self._clock() + notice_ns)
        return self.clocks[self.rank].from_head(head_ns)

    # --- inside ---

    def open(self) -> None:
        """Connect the ranks, and read their clocks."""
        if self.size == 1:
            return
        with self._causes_told(0):
            self._links, self._clock_ids = self._await(
                lambda: open_links(self._watch, self._launch, identity=clock_id(), check=self.check)
            )
        self.synchronize()

    def close(self) -> None:
        """Close the connections."""
        for link in self._links.values():
            link.close()

    def _read_clocks(self) -> dict[int, ClockReading]:
        exchanges: dict[int, list[Exchange]] = {rank: [] for rank in self._links}
        for _ in range(_NUM_EXCHANGES):
            for rank, link in self._links.items():
                with self._causes_told(rank):
                    exchanges[rank].append(self._exchange(link))
            time.sleep(_PAUSE_S)  # one disturbance shall not spoil them all
        for rank, link in self._links.items():
            with self._causes_told(rank):
                link.send(_DONE)
        return {rank: best_reading(found) for rank, found in exchanges.items()}

    def _exchange(self, link: Link) -> Exchange:
        sent_ns = self._clock()
        link.send(_PING)
        answer = link.receive(_PONG, LONGEST_RUN_S)
        received_ns = self._clock()
        rank_received_ns, rank_sent_ns = _TIMES.unpack(answer)
        return Exchange(sent_ns, rank_received_ns, rank_sent_ns, received_ns)

    def _answer_pings(self, link: Link) -> None:
        while link.receive_any((_PING, _DONE), LONGEST_RUN_S)[0] == _PING:
            received_ns = self._clock()
            link.send(_PONG, _TIMES.pack(received_ns, self._clock()))

    def _await(self, wait: Callable[[], Any]) -> Any:
        """What `wait` returns; its RunError for a lost rank becomes that rank's own."""
        self.check()
        try:
            return wait()
        except RunError as error:
            if (lost := self._watch.lost) is not None:
                raise lost.error() from error
            raise

    @contextmanager
    def _causes_told(self, peer: int) -> Iterator[None]:
        """An end of the connection becomes the error of the rank that was lost."""
        try:
            yield
        except LinkClosedError as error:
            lost = self._watch.wait_for_loss(_CLOSED_CAUSE_S, or_end_of=peer)
            if lost is not None:
                raise lost.error() from error
            raise RunError(f"rank {peer} closed its connection for data") from error

    def _raise_cause(self, error: BaseException) -> None:
        """After a signal: a launcher stops all ranks when one has died; raise for that one."""
        lost = self._watch.wait_for_loss(_CAUSE_S)
        if lost is not None and not is_stop(lost.exit_code):
            raise lost.error() from error


@contextmanager
def open_ranks(
    launch: Launch,
    *,
    purpose: str,
    head_ip: str | None,
    port: int | None,
    timeout_s: float,
    fingerprint: str,
    on_lost: Callable[[LostRank], None] = lambda lost: None,  # noqa: ARG005
    raise_if_stopped: Callable[[], None] = lambda: None,
    clock: Callable[[], int] = time.monotonic_ns,
) -> Iterator[Group]:
    """All ranks of the job as a Group, within the `with` block.

    `purpose`, the command's name, and `fingerprint`, of its options, have to be the same on all
    ranks. `timeout_s` is how long ranks wait for each other at the start, and how long one may be
    silent. `on_lost` is called at once when one is lost, in another thread. `raise_if_stopped` is
    called at least twice a second in every wait but that for the start, which ends when a signal's
    handler raises. Another `clock` is for tests.

    Raises ConfigError for options that do not tell where ranks meet, DeadlineError naming ranks
    that did not come. The loss of a rank raises RunError on all others, in whatever they wait for,
    or Interrupted if that rank was stopped, with its exit code. An exception that leaves the block
    is told to the others.
    """
    with ExitStack() as stack:
        watch = PeerWatch(
            launch,
            purpose=purpose,
            head_ip=head_ip,
            port=port,
            timeout_s=timeout_s,
            fingerprint=fingerprint,
            on_lost=on_lost,
            raise_if_stopped=raise_if_stopped,
        )
        stack.enter_context(watch)
        group = Group(launch, watch, raise_if_stopped=raise_if_stopped, clock=clock)
        stack.callback(group.close)
        try:
            group.open()
            yield group
        except (Interrupted, KeyboardInterrupt) as error:
            group._raise_cause(error)
            raise
