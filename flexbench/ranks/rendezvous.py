"""How the ranks of a job join rank 0, and make sure that they belong together.

Rank 0 listens at a meeting point; the others learn its address there, and shake hands with it:

    other rank → hello (rank, world size, fingerprint of the options, token)
               ← welcome, or refused
               → ready
               ← start, as soon as all are ready, or aborted

The third step makes an arrival certain: a rank that gave up waiting for its welcome, and tries
again, has not arrived twice. A visitor without the token is shown out without a word.

Who has the token, but other options, ends the job at once. Where the job has no token, that may be
anybody on this host: it is turned away, and rank 0 goes on waiting for the one that it knows.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexbench.core.errors import DeadlineError, FlexbenchError, Interrupted, RunError
from flexbench.ranks.channel import Channel, close_politely, wait_for_sockets
from flexbench.ranks.launch import Launch
from flexbench.ranks.meeting_points import TOKEN_VARIABLE, Address, MeetingPoint, connect
from flexbench.ranks.wording import (
    KILLED,
    describe_failure,
    exit_code_of,
    is_stop,
    name_ranks,
    not_answered,
    one_line,
    read_exit_code,
    summarize,
)

_MAX_STRANGERS = 64
# How long each side of a handshake waits for the other's next line.
_STEP_S = 5.0
_RETRY_S = 0.05
# Rank 0 gives up first and names who is missing; so long the others wait for its word.
_VERDICT_GRACE_S = 2.0
# mpirun stops all ranks as soon as one is dead: so long a rank that is stopped looks for that one.
_SECOND_LOOK_S = 0.2
# No honest rank says more; and a stranger's number must not be one that nobody can reckon with.
_MAX_PATIENCE_S = 1e9
_MAX_RANKS = 10**6


def join(
    launch: Launch, point: MeetingPoint, *, fingerprint: str, timeout_s: float
) -> tuple[dict[int, Channel], str]:
    """Wait until all ranks are there; then the channels to them, and this rank's own address.

    Rank 0 gets one channel to each other rank, these get one to rank 0. Raises DeadlineError on
    all ranks that are there when one is missing after `timeout_s`, and RunError when they do not
    belong together.
    """
    # What the options are is nobody else's business, and long.
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()
    if launch.rank == 0:
        try:
            listener, token = point.listen()
            with listener:
                reception = _Reception(launch, listener, token, digest, timeout_s)
                return reception.receive_all(), str(listener.getsockname()[0])
        finally:
            point.close()
    visitor = _Visitor(launch, point, digest, timeout_s)
    try:
        channel = visitor.visit()
    except BaseException:
        point.clear_away(visitor.in_vain)
        raise
    finally:
        point.close()
    return {0: channel}, str(channel.socket.getsockname()[0])


@dataclass(eq=False)
class _Guest:
    channel: Channel
    expires_at: float
    rank: int | None = None
    process: str = ""
    is_ready: bool = False
    is_turned_away: bool = False


@dataclass(frozen=True)
class _Hello:
    rank: int
    world_size: int
    fingerprint: str
    token: str
    process: str
    """Tells a rank that comes again from another process that says it is the same rank."""
    patience_s: float
    """How much longer this rank waits for the others."""

    @staticmethod
    def parse(message: dict[str, Any]) -> _Hello | None:
        """The hello in `message`, or None if it is something else."""
        texts = [message.get(name) for name in ("fingerprint", "token", "process")]
        numbers = [message.get(name) for name in ("rank", "world_size")]
        patience = message.get("patience_s")
        if (
            message.get("type") != "hello"
            or not all(isinstance(text, str) for text in texts)
            or not all(type(number) is int and 0 <= number <= _MAX_RANKS for number in numbers)
            or isinstance(patience, bool)
            or not isinstance(patience, int | float)
            or not 0 <= patience <= _MAX_PATIENCE_S
        ):
            return None
        return _Hello(**{name: message[name] for name in _Hello.__annotations__})


@dataclass
class _Reception:
    """Rank 0, until all others are there."""

    launch: Launch
    listener: socket.socket
    token: str
    fingerprint: str
    timeout_s: float
    guests: list[_Guest] = field(default_factory=list)
    turned_away: dict[int, str] = field(default_factory=dict)
    """What those were, by the rank that they said they are."""

    def receive_all(self) -> dict[int, Channel]:
        """Receive every other rank; a channel for each."""
        # The first one to run out of time ends it for all, so that none waits longer than it may.
        self.expires_at = time.monotonic() + self.timeout_s
        try:
            while missing := self._missing():
                if time.monotonic() > self.expires_at:
                    raise DeadlineError(_did_not_arrive(missing, self.timeout_s, self.turned_away))
                self._turn()
        except Interrupted as stop:
            error = self._find_lost() or stop
            self._dismiss(error)
            raise error from (None if error is stop else stop)
        except BaseException as error:
            self._dismiss(error)
            raise
        for guest in self.guests:
            if guest.is_ready:
                guest.channel.send({"type": "start"})
            else:
                guest.channel.close()
        return {guest.rank: guest.channel for guest in self.guests if guest.rank and guest.is_ready}

    def _missing(self) -> set[int]:
        return set(range(1, self.launch.world_size)) - {g.rank for g in self.guests if g.is_ready}

    def _turn(self) -> None:
        now = time.monotonic()
        ends = [guest.expires_at for guest in self.guests if not guest.is_ready]
        wait_for_sockets(
            [self.listener, *(guest.channel.socket for guest in self.guests)],
            timeout_s=min([self.expires_at, *ends]) - now,
        )
        self._accept()
        for guest in list(self.guests):
            self._listen_to(guest)

    def _accept(self) -> None:
        try:
            connected, _ = self.listener.accept()
        except BlockingIOError:
            return
        except OSError:  # it went away again, or too many files are open
            time.sleep(_RETRY_S)
            return
        self.guests.append(_Guest(Channel(connected), time.monotonic() + _STEP_S))
        strangers = [guest for guest in self.guests if guest.rank is None]
        if len(strangers) > _MAX_STRANGERS:
            self._drop(strangers[0])

    def _drop(self, guest: _Guest) -> None:
        self.guests.remove(guest)
        guest.channel.close()

    def _listen_to(self, guest: _Guest) -> None:
        if guest not in self.guests:  # dropped for one that came again
            return
        for message in guest.channel.receive():
            if guest.is_turned_away:
                continue
            if guest.rank is None:
                if not self._greet(guest, message):
                    self._drop(guest)
                    return
            elif message.get("type") == "ready":
                guest.is_ready = True
            elif message.get("type") == "fail":
                raise _failure_of(guest, message)
        if guest.is_ready:
            if guest.channel.is_closed:
                raise RunError(f"rank {guest.rank} {KILLED}")
        elif guest.channel.is_closed or time.monotonic() > guest.expires_at:
            self._drop(guest)

    def _greet(self, guest: _Guest, message: dict[str, Any]) -> bool:
        """Answer a hello; False if it is none of this job's."""
        hello = _Hello.parse(message)
        if hello is None or not _is_same_token(hello.token, self.token):
            return False
        if not 0 < hello.rank < max(hello.world_size, self.launch.world_size):
            return False
        if (problem := self._find_difference(hello)) is not None:
            short, reason = problem
            if self.token:
                guest.rank = hello.rank  # it is of this job, and to be told like all
                raise RunError(reason)
            self._turn_away(guest, hello, short, reason)
            return True
        earlier = next((other for other in self.guests if other.rank == hello.rank), None)
        guest.rank, guest.process = hello.rank, hello.process
        if earlier is not None:
            if earlier.process != hello.process:
                raise RunError(
                    f"two processes say that they are rank {hello.rank}; is --rank given twice, or "
                    "does another job use this address?"
                )
            self._drop(earlier)
        guest.channel.trust()
        guest.expires_at = time.monotonic() + _STEP_S
        self.expires_at = min(self.expires_at, time.monotonic() + hello.patience_s)
        guest.channel.send({"type": "welcome"})
        return True

    def _find_difference(self, hello: _Hello) -> tuple[str, str] | None:
        """What keeps a rank from being of this job, in a few words and in a sentence."""
        if hello.world_size != self.launch.world_size:
            return (
                f"of {hello.world_size} ranks",
                f"rank {hello.rank} was started as one of {hello.world_size} ranks, rank 0 as one "
                f"of {self.launch.world_size}",
            )
        if hello.fingerprint != self.fingerprint:
            return (
                "with other options",
                f"rank {hello.rank} was started with other options than rank 0; all ranks need "
                "the same",
            )
        return None

    def _turn_away(self, guest: _Guest, hello: _Hello, short: str, reason: str) -> None:
        """Tell a guest why it cannot stay; it goes by itself, or when its time is over."""
        if hello.rank < self.launch.world_size:  # who else says so is missed by nobody
            self.turned_away[hello.rank] = short
        guest.is_turned_away = True
        guest.channel.send({"type": "aborted", "reason": reason, "is_late": False})

    def _find_lost(self) -> RunError | None:
        """The failure of a guest that had joined, if one becomes known in a moment.

        One that was stopped as well has not failed.
        """
        expires_at = time.monotonic() + _SECOND_LOOK_S
        guests = [guest for guest in self.guests if guest.rank is not None]
        while True:
            for guest in list(guests):
                for message in guest.channel.receive():
                    if message.get("type") == "ready":
                        guest.is_ready = True
                    elif message.get("type") == "fail":
                        if not is_stop(read_exit_code(message.get("exit_code"))):
                            return _failure_of(guest, message)
                        guest.is_ready = False
                if guest.channel.is_closed:
                    if guest.is_ready:
                        return RunError(f"rank {guest.rank} {KILLED}")
                    guests.remove(guest)
            remaining = expires_at - time.monotonic()
            if remaining <= 0:
                return None
            wait_for_sockets([guest.channel.socket for guest in guests], timeout_s=remaining)

    def _dismiss(self, error: BaseException) -> None:
        """Tell those who are there why it came to nothing."""
        if isinstance(error, FlexbenchError) and not isinstance(error, Interrupted):
            reason = summarize(error)
        else:
            reason = f"rank 0 {describe_failure(error)}"
        aborted = {
            "type": "aborted",
            "reason": reason,
            "is_late": isinstance(error, DeadlineError),
            "exit_code": exit_code_of(error),
        }
        for guest in self.guests:
            if guest.rank is None:
                guest.channel.close()
            else:
                guest.channel.send(aborted)
        close_politely(guest.channel for guest in self.guests if guest.rank is not None)


@dataclass
class _Visitor:
    """Any other rank, until rank 0 says that all are there."""

    launch: Launch
    point: MeetingPoint
    fingerprint: str
    timeout_s: float
    in_vain: Address | None = None
    """Where nobody of ours was found until the time was over."""

    def visit(self) -> Channel:
        """Find rank 0 and wait for the others; the channel to it."""
        self.expires_at = time.monotonic() + self.timeout_s
        self.process = secrets.token_hex(8)
        problem = f"it has not told its address {self.point.where()}"
        address = None
        while time.monotonic() < self.expires_at:
            address = self.point.look_up()
            if address is not None:
                try:
                    channel = self._connect(address)
                except OSError as error:
                    problem = f"{address}: {_describe_os_error(error)}"
                else:
                    if self._shake_hands(channel, address):
                        return channel
                    problem = (
                        f"{address}: it did not welcome this rank; is another program there, or "
                        f"another ${TOKEN_VARIABLE}?"
                    )
            time.sleep(_RETRY_S)
        self.in_vain = address
        raise DeadlineError(
            f"rank {self.launch.rank} could not reach rank 0 within {self.timeout_s:g} s "
            f"(--comm-timeout): {problem}"
        )

    def _connect(self, address: Address) -> Channel:
        timeout_s = max(0.01, min(_STEP_S, self.expires_at - time.monotonic()))
        return Channel(connect(address, timeout_s=timeout_s))

    def _shake_hands(self, channel: Channel, address: Address) -> bool:
        """Whether the job starts over `channel`; False if nobody of ours is at its other end."""
        is_welcome = False
        try:
            channel.send(self._hello(address))
            answer = channel.wait(min(time.monotonic() + _STEP_S, self.expires_at))
            if answer is None:
                channel.close()
                return False
            _raise_if_aborted(answer)
            if answer.get("type") != "welcome":
                channel.close()
                return False
            channel.trust()
            is_welcome = True
            channel.send({"type": "ready"})
            self._await_start(channel)
        except BaseException as raised:
            error = raised
            try:
                if is_welcome and isinstance(raised, Interrupted):
                    error = _find_failure(channel) or raised
                if is_welcome and not channel.is_closed:
                    channel.send(
                        {
                            "type": "fail",
                            "reason": describe_failure(error),
                            "exit_code": exit_code_of(error),
                        }
                    )
            finally:
                close_politely([channel])
            if error is raised:
                raise
            raise error from raised
        return True

    def _hello(self, address: Address) -> dict[str, Any]:
        hello = _Hello(
            rank=self.launch.rank,
            world_size=self.launch.world_size,
            fingerprint=self.fingerprint,
            token=address.token,
            process=self.process,
            patience_s=min(max(0.0, self.expires_at - time.monotonic()), _MAX_PATIENCE_S),
        )
        return {"type": "hello", **vars(hello)}

    def _await_start(self, channel: Channel) -> None:
        while True:
            message = channel.wait(self.expires_at + _VERDICT_GRACE_S)
            if message is None and channel.is_closed:
                raise RunError(f"rank 0 {KILLED}")
            if message is None:
                raise DeadlineError(f"rank 0 {not_answered(self.timeout_s)}")
            _raise_if_aborted(message)
            if message.get("type") == "start":
                return


def _find_failure(channel: Channel) -> RunError | None:
    """Rank 0's failure, or the one that it tells, if it becomes known in a moment.

    If rank 0 was only stopped as well, nothing has failed.
    """
    expires_at = time.monotonic() + _SECOND_LOOK_S
    while (message := channel.wait(expires_at)) is not None:
        if is_stop(read_exit_code(message.get("exit_code"))):
            return None
        try:
            _raise_if_aborted(message)
        except RunError as failure:
            return failure
    return RunError(f"rank 0 {KILLED}") if channel.is_closed else None


def _failure_of(guest: _Guest, message: dict[str, Any]) -> RunError:
    return RunError(f"rank {guest.rank} {one_line(str(message.get('reason')))}")


def _is_same_token(one: str, other: str) -> bool:
    # As bytes, because of text only ASCII can be compared; a stranger's may not even be Unicode.
    left, right = (token.encode("utf-8", "surrogatepass") for token in (one, other))
    return hmac.compare_digest(left, right)


def _did_not_arrive(
    missing: Iterable[int], timeout_s: float, turned_away: Mapping[int, str]
) -> str:
    problem = f"{name_ranks(missing)} did not arrive within {timeout_s:g} s (--comm-timeout)"
    others = [
        f"a rank {rank} {turned_away[rank]} was turned away"
        for rank in sorted(missing)
        if rank in turned_away
    ]
    return "; ".join([problem, *others])


def _raise_if_aborted(message: dict[str, Any]) -> None:
    if message.get("type") == "aborted":
        reason = one_line(str(message.get("reason")))
        raise DeadlineError(reason) if message.get("is_late") else RunError(reason)


def _describe_os_error(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)
