"""How the ranks of a job find rank 0, and make sure that they belong together.

Rank 0 listens; the others learn its address in one of three ways, see `choose_meeting_point`, and
shake hands with it:

    other rank → hello (rank, world size, fingerprint of the options, token)
               ← welcome, or refused
               → ready
               ← start, as soon as all are ready, or aborted

The third step makes an arrival certain: a rank that gave up waiting for its welcome, and tries
again, has not arrived twice. Nothing is pickled, every line has a greatest length, and a visitor
without the token is shown out without a word.

By default all this stays on loopback, and the token is random.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import secrets
import select
import signal
import socket
import stat
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from flexbench.core.errors import ConfigError, DeadlineError, FlexbenchError, Interrupted, RunError
from flexbench.dist.launch import Launch

LOOPBACK = "127.0.0.1"
TOKEN_VARIABLE = "FLEXBENCH_JOB_TOKEN"  # noqa: S105 - the name of the variable
KILLED = "was killed, or lost its connection"

# A hello has about 250 bytes; who is no rank of ours gets no room for more.
_MAX_HELLO_BYTES = 4096
_MAX_LINE_BYTES = 4 * 2**20
_CHUNK_BYTES = 2**16
_MAX_STRANGERS = 64
# How long each side of a handshake waits for the other's next line.
_STEP_S = 5.0
_RETRY_S = 0.05
# Rank 0 gives up first and names who is missing; so long the others wait for its word.
_VERDICT_GRACE_S = 2.0
_GOODBYE_S = 0.5
_MAX_SUMMARY_LENGTH = 500


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


class Channel:
    """JSON objects over a connected socket, one a line. It never blocks, but in `wait`."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        # Each line is short and wanted at once. Not every socket of a test is one of TCP.
        with suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connected
        self.is_closed = False
        """Nothing more comes: the other side has closed it, or sent what no rank sends."""
        self.heard_at = time.monotonic()
        self._max_line_bytes = _MAX_HELLO_BYTES
        self._inbox: deque[dict[str, Any]] = deque()
        self._received = bytearray()
        self._unsent = bytearray()

    def trust(self) -> None:
        """The other side has shown that it belongs to the job: take long lines from it."""
        self._max_line_bytes = _MAX_LINE_BYTES

    @property
    def has_unsent(self) -> bool:
        """Whether the system has not yet taken all that was sent."""
        return bool(self._unsent)

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`, as much as the system takes now; `flush` sends the rest."""
        self.send_line(encode(message))

    def send_line(self, line: bytes) -> None:
        """Send what `encode` made of a message."""
        self._unsent += line
        self.flush()

    def flush(self) -> None:
        """Send what is left of earlier messages, as much as the system takes now."""
        while self._unsent:
            try:
                del self._unsent[: self.socket.send(self._unsent)]
            except BlockingIOError:
                return
            except OSError:
                # The reason may lie in what was received before: `receive` is to find the end.
                self._unsent.clear()

    def receive(self) -> list[dict[str, Any]]:
        """All messages that are here. If `is_closed` then, they are the last ones."""
        self._read()
        messages = list(self._inbox)
        self._inbox.clear()
        return messages

    def wait(self, expires_at: float) -> dict[str, Any] | None:
        """The next message, or None if there is none until `expires_at`, or never will be."""
        while True:
            self._read()
            if self._inbox:
                return self._inbox.popleft()
            remaining = expires_at - time.monotonic()
            if self.is_closed or remaining <= 0:
                return None
            wait_for_sockets([self.socket], timeout_s=remaining)

    def close(self) -> None:
        """Close the socket, unread and unsent messages or not."""
        self.is_closed = True
        self.socket.close()

    def _read(self) -> None:
        num_bytes = 0
        # Who sends without end must not keep us here: the rest is for the next call.
        while not self.is_closed and num_bytes <= self._max_line_bytes:
            try:
                chunk = self.socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            if not chunk:
                self.is_closed = True
            num_bytes += len(chunk)
            self._received += chunk
        if num_bytes:
            self.heard_at = time.monotonic()
            self._parse()

    def _parse(self) -> None:
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        if len(rest) > self._max_line_bytes:
            self.is_closed = True
        for line in lines:
            message = self._decode(line)
            if message is None:
                self.is_closed = True
                return
            self._inbox.append(message)

    def _decode(self, line: bytearray) -> dict[str, Any] | None:
        if len(line) > self._max_line_bytes:
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):  # a thousand brackets are a message of nobody
            return None
        return message if isinstance(message, dict) else None


def encode(message: dict[str, Any]) -> bytes:
    """The line of `message`. Raises ValueError if the other side would not take it."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"a message of {len(line)} bytes; at most {_MAX_LINE_BYTES} are taken")
    return line


def wait_for_sockets(
    reading: Iterable[socket.socket], writing: Iterable[socket.socket] = (), *, timeout_s: float
) -> None:
    """Wait until one of the sockets can be read, or written, without blocking."""
    poll = select.poll()  # select() would not take the 1024th file of a large run
    for one in reading:
        poll.register(one, select.POLLIN)
    for one in writing:
        poll.register(one, select.POLLIN | select.POLLOUT)
    # Rounded up: a wait of less than a millisecond must not become a busy loop.
    poll.poll(int(min(max(timeout_s, 0), 3600) * 1000) + 1)


def close_politely(channels: Iterable[Channel]) -> None:
    """Close after all that was sent has arrived, or after half a second.

    A socket that is closed with something unread takes what it sent last with it: the other side
    would see a lost connection where we said goodbye.
    """
    expires_at = time.monotonic() + _GOODBYE_S
    open_ones = list(channels)
    try:
        for channel in open_ones:
            _end_sending(channel)
        while waiting := [channel for channel in open_ones if not channel.is_closed]:
            remaining = expires_at - time.monotonic()
            if remaining <= 0:
                break
            writing = [channel.socket for channel in waiting if channel.has_unsent]
            wait_for_sockets([c.socket for c in waiting], writing, timeout_s=remaining)
            for channel in waiting:
                if channel.has_unsent:
                    _end_sending(channel)
                channel.receive()
    finally:
        for channel in open_ones:
            channel.close()


def _end_sending(channel: Channel) -> None:
    channel.flush()
    if not channel.has_unsent:
        with suppress(OSError):  # the other side was quicker
            channel.socket.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens, and what it wants to hear."""

    host: str
    port: int
    token: str

    def __str__(self) -> str:
        return name_address(self.host, self.port)


class MeetingPoint(Protocol):
    """One way for the ranks of a job to find rank 0."""

    def listen(self) -> tuple[socket.socket, str]:
        """For rank 0: a listening socket whose address the others can look up, and the token."""

    def look_up(self) -> Address | None:
        """For the others: rank 0's address, None if it is not known yet.

        It may be that of an earlier job. Ask again, then.
        """

    def where(self) -> str:
        """Where the address is looked up, to complete "rank 0 has not told its address ..."."""

    def close(self) -> None:
        """Remove what others need no more. The listening socket is its owner's."""


def choose_meeting_point(
    launch: Launch, *, head_ip: str | None, port: int | None, timeout_s: float
) -> MeetingPoint:
    """How the ranks of this job find rank 0; raises ConfigError for options that do not suffice.

    With `port`, by that address. On one host, by a file that only we can read. On several hosts
    under torchrun, by the store of its agent.
    """
    _check_head_ip(head_ip)
    is_one_host = launch.local_world_size == launch.world_size
    if port is not None and (is_one_host or head_ip is not None):
        return FixedPoint(head_ip or LOOPBACK, port)
    if launch.launcher == "options":
        raise ConfigError("--port", "is needed together with --rank and --world-size")
    if is_one_host and launch.job_key is not None:
        return FilePoint(launch.job_key, host=head_ip or LOOPBACK)
    if launch.store_address is not None and port is None:
        return StorePoint(launch, launch.store_address, head_ip=head_ip, timeout_s=timeout_s)
    raise ConfigError(
        "--head-ip",
        "is needed together with --port when the ranks run on several hosts: an address of rank "
        "0's host that the others reach, and a free port there",
    )


def _check_head_ip(head_ip: str | None) -> None:
    if head_ip is not None and head_ip in ("", "0.0.0.0", "::", "*"):  # noqa: S104 - refused
        raise ConfigError(
            "--head-ip",
            f"must be the address of one interface of rank 0's host, not {head_ip!r}: only the "
            "job's network should reach the job",
        )


class FixedPoint:
    """The person has named host and port. No secret is shared, unless in FLEXBENCH_JOB_TOKEN."""

    def __init__(self, host: str, port: int) -> None:
        self._address = Address(host, port, os.environ.get(TOKEN_VARIABLE, ""))

    def listen(self) -> tuple[socket.socket, str]:
        """Listen there."""
        return listen_at(self._address.host, self._address.port), self._address.token

    def look_up(self) -> Address | None:
        """The address, which is known from the start."""
        return self._address

    def where(self) -> str:
        """It is never asked for."""
        return "with --head-ip and --port"

    def close(self) -> None:
        """There is nothing to remove."""


class FilePoint:
    """Rank 0 writes its address, and a random token, to a file in a folder of our own."""

    def __init__(self, job_key: str, *, host: str) -> None:
        self._host = host
        self._folder = Path(tempfile.gettempdir()) / f"flexbench-{os.getuid()}-{job_key}"
        self._path = self._folder / "address"
        self._written: Address | None = None

    def listen(self) -> tuple[socket.socket, str]:
        """Listen at a free port, and write it to the file."""
        listener = listen_at(self._host, 0)
        try:
            port = listener.getsockname()[1]
            self._written = Address(self._host, port, secrets.token_hex(16))
            self._write(self._written)
        except BaseException:
            listener.close()
            self.close()
            raise
        return listener, self._written.token

    def look_up(self) -> Address | None:
        """What the file says now."""
        try:
            self._check_folder()
            # Whoever could put a link there could as well write the file; but be plain about it.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                return Address(**json.loads(file.read(_MAX_HELLO_BYTES)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):  # not a file of ours
            return None

    def where(self) -> str:
        """The path of the file."""
        return f"in {self._path}"

    def close(self) -> None:
        """Remove the file if it is rank 0's own, and the folder if nobody else uses it."""
        if self._written is None:
            return
        with suppress(OSError, RunError):  # it is not ours any more, or another job's file is there
            if self.look_up() == self._written:
                self._path.unlink(missing_ok=True)
            self._folder.rmdir()
        self._written = None

    def _write(self, address: Address) -> None:
        try:
            with suppress(FileExistsError):
                self._folder.mkdir(mode=0o700)
            self._check_folder()
            # Nobody may ever read half of it.
            descriptor, name = tempfile.mkstemp(dir=self._folder)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(vars(address), file)
                os.replace(name, self._path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot write rank 0's address there: {error.strerror or error}"
            ) from error

    def _check_folder(self) -> None:
        """Raise RunError unless nobody but us can have put something into the folder."""
        found = os.lstat(self._folder)
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.getuid()
            or stat.S_IMODE(found.st_mode) & 0o077
        ):
            raise RunError(
                f"{self._folder}: is not a folder that only you can use, as the ranks need it to "
                "find each other; remove it, or name a --port"
            )


class StorePoint:
    """Several hosts under torchrun: rank 0's address is in the store that its agent serves."""

    def __init__(
        self, launch: Launch, address: tuple[str, int], *, head_ip: str | None, timeout_s: float
    ) -> None:
        self._address = address
        self._head_ip = head_ip
        self._timeout_s = timeout_s
        # The store outlives a restart of the ranks. The job's key counts restarts.
        self._key = f"flexbench/{launch.job_key}/address"
        self._store: Any = None

    def listen(self) -> tuple[socket.socket, str]:
        """Listen at a free port of the interface that reaches the store, and tell it there."""
        host = self._head_ip or self._own_host()
        listener = listen_at(host, 0)
        try:
            address = Address(host, listener.getsockname()[1], secrets.token_hex(16))
            self._call("set", self._key, json.dumps(vars(address)))
        except BaseException:
            listener.close()
            raise
        return listener, address.token

    def look_up(self) -> Address | None:
        """What the store says now."""
        if not self._call("check", [self._key]):
            return None
        try:
            return Address(**json.loads(self._call("get", self._key)))
        except (ValueError, TypeError):
            return None

    def where(self) -> str:
        """Where the store is."""
        return f"in torchrun's store at {name_address(*self._address)}"

    def close(self) -> None:
        """Leave the store to its agent."""
        self._store = None

    def _own_host(self) -> str:
        host = own_address_towards(*self._address)
        if host.startswith("127.") or host == "::1":
            raise ConfigError(
                "--head-ip",
                f"is needed: MASTER_ADDR, {self._address[0]}, is a loopback address on rank 0's "
                "host, which tells no address that other hosts reach",
            )
        return host

    def _call(self, method: str, *arguments: Any) -> Any:
        from torch import distributed  # it takes seconds, and only several hosts need it here

        try:
            if self._store is None:
                host, port = self._address
                self._store = distributed.TCPStore(
                    host, port, is_master=False, timeout=timedelta(seconds=self._timeout_s)
                )
            return getattr(self._store, method)(*arguments)
        except RuntimeError as error:  # all of the store's errors
            raise RunError(
                f"cannot use torchrun's store at {name_address(*self._address)} (MASTER_ADDR and "
                f"MASTER_PORT): {summarize(error)}"
            ) from error


def own_address_towards(host: str, port: int) -> str:
    """This host's address on the interface that reaches `host`. Sends nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            "--head-ip", f"{host} cannot be reached: {error.strerror or error}"
        ) from error


def listen_at(host: str, port: int) -> socket.socket:
    """A listening socket, at a free port if `port` is 0; raises ConfigError if that cannot be."""
    where = name_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError("--head-ip", f"no such host, {host}: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # The port of a job that has just ended is free; on Linux, that of a living one is not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise ConfigError(
            "--port" if is_port else "--head-ip",
            f"rank 0 cannot listen at {where}: {error.strerror or error}",
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


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
    try:
        channel = _Visitor(launch, point, digest, timeout_s).visit()
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
            or not all(type(number) is int for number in numbers)
            or not isinstance(patience, int | float)
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

    def receive_all(self) -> dict[int, Channel]:
        """Receive every other rank; a channel for each."""
        # The first one to run out of time ends it for all, so that none waits longer than it may.
        self.expires_at = time.monotonic() + self.timeout_s
        try:
            while missing := self._missing():
                if time.monotonic() > self.expires_at:
                    raise DeadlineError(_did_not_arrive(missing, self.timeout_s))
                self._turn()
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
            if guest.rank is None:
                if not self._greet(guest, message):
                    self._drop(guest)
                    return
            elif message.get("type") == "ready":
                guest.is_ready = True
            elif message.get("type") == "fail":
                reason = one_line(str(message.get("reason")))
                raise RunError(f"rank {guest.rank} {reason}")
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
        earlier = next((other for other in self.guests if other.rank == hello.rank), None)
        if earlier is not None and earlier.process == hello.process:
            self._drop(earlier)
            earlier = None
        guest.rank, guest.process = hello.rank, hello.process
        self._check(hello, is_taken=earlier is not None)
        guest.channel.trust()
        guest.expires_at = time.monotonic() + _STEP_S
        self.expires_at = min(self.expires_at, time.monotonic() + hello.patience_s)
        guest.channel.send({"type": "welcome"})
        return True

    def _check(self, hello: _Hello, *, is_taken: bool) -> None:
        """Raise RunError unless the rank belongs to this job."""
        if hello.world_size != self.launch.world_size:
            raise RunError(
                f"rank {hello.rank} was started as one of {hello.world_size} ranks, rank 0 as one "
                f"of {self.launch.world_size}"
            )
        if hello.fingerprint != self.fingerprint:
            raise RunError(
                f"rank {hello.rank} was started with other options than rank 0; all ranks need "
                "the same"
            )
        if is_taken:
            raise RunError(
                f"two processes say that they are rank {hello.rank}; is --rank given twice, or "
                "does another job use this address?"
            )

    def _dismiss(self, error: BaseException) -> None:
        """Tell those who are there why it came to nothing."""
        if isinstance(error, FlexbenchError) and not isinstance(error, Interrupted):
            reason = summarize(error)
        else:
            reason = f"rank 0 {describe_failure(error)}"
        is_late = isinstance(error, DeadlineError)
        for guest in self.guests:
            if guest.rank is None:
                guest.channel.close()
            else:
                guest.channel.send({"type": "aborted", "reason": reason, "is_late": is_late})
        close_politely(guest.channel for guest in self.guests if guest.rank is not None)


@dataclass
class _Visitor:
    """Any other rank, until rank 0 says that all are there."""

    launch: Launch
    point: MeetingPoint
    fingerprint: str
    timeout_s: float

    def visit(self) -> Channel:
        """Find rank 0 and wait for the others; the channel to it."""
        self.expires_at = time.monotonic() + self.timeout_s
        self.process = secrets.token_hex(8)
        problem = f"it has not told its address {self.point.where()}"
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
        raise DeadlineError(
            f"rank {self.launch.rank} could not reach rank 0 within {self.timeout_s:g} s "
            f"(--comm-timeout): {problem}"
        )

    def _connect(self, address: Address) -> Channel:
        timeout_s = max(0.01, min(_STEP_S, self.expires_at - time.monotonic()))
        connected = socket.create_connection((address.host, address.port), timeout=timeout_s)
        # A port where nobody listens can be given to the very socket that tries to reach it.
        if connected.getsockname() == connected.getpeername():
            connected.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return Channel(connected)

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
        except BaseException as error:
            if is_welcome and not channel.is_closed:
                channel.send({"type": "fail", "reason": describe_failure(error)})
            close_politely([channel])
            raise
        return True

    def _hello(self, address: Address) -> dict[str, Any]:
        hello = _Hello(
            rank=self.launch.rank,
            world_size=self.launch.world_size,
            fingerprint=self.fingerprint,
            token=address.token,
            process=self.process,
            patience_s=self.expires_at - time.monotonic(),
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


def _is_same_token(one: str, other: str) -> bool:
    # As bytes, because of text only ASCII can be compared; a stranger's may not even be Unicode.
    left, right = (token.encode("utf-8", "surrogatepass") for token in (one, other))
    return hmac.compare_digest(left, right)


def not_answered(timeout_s: float) -> str:
    """What is said of a rank that is connected, but silent."""
    return f"has not answered for {timeout_s:g} s (--comm-timeout)"


def _did_not_arrive(missing: Iterable[int], timeout_s: float) -> str:
    return f"{name_ranks(missing)} did not arrive within {timeout_s:g} s (--comm-timeout)"


def _raise_if_aborted(message: dict[str, Any]) -> None:
    if message.get("type") == "aborted":
        reason = one_line(str(message.get("reason")))
        raise DeadlineError(reason) if message.get("is_late") else RunError(reason)


def _describe_os_error(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)
