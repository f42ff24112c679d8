"""Where rank 0 listens, and how the other ranks learn its address: see `choose_meeting_point`.

By default that is on loopback, at a free port, and the token is random.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from flexbench.core.checks import check_count
from flexbench.core.errors import ConfigError, MissingDependencyError, RunError
from flexbench.ranks.launch import MAX_PORT, Launch
from flexbench.ranks.wording import name_address, summarize

LOOPBACK = "127.0.0.1"
TOKEN_VARIABLE = "FLEXBENCH_JOB_TOKEN"  # noqa: S105 - the name of the variable

# An address and its token have about 100 bytes.
_MAX_FILE_BYTES = 4096
_ADDRESS = "address"
_TEMPORARY = "new-"
# Long enough for any host of ours to refuse a connection.
_REFUSAL_S = 0.2
# No job has waited for its ranks for so long; and so long may looking for such folders take.
_OLD_S = 86400.0
_SWEEP_S = 1.0


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens, and what it wants to hear."""

    host: str
    port: int
    token: str

    def __str__(self) -> str:
        return name_address(self.host, self.port)

    @staticmethod
    def parse(text: str | bytes) -> Address | None:
        """The address in `text`, or None if it is something else."""
        try:
            found = Address(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        is_text = isinstance(found.host, str) and isinstance(found.token, str)
        is_port = type(found.port) is int and 0 < found.port <= MAX_PORT
        return found if is_text and is_port else None


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

    def clear_away(self, in_vain: Address | None) -> None:
        """For the others, when it came to nothing: remove what a killed rank 0 has left.

        That is an address where nobody listens any more; or `in_vain`, where nobody of ours did.
        """


def choose_meeting_point(
    launch: Launch, *, purpose: str, head_ip: str | None, port: int | None, timeout_s: float
) -> MeetingPoint:
    """How the ranks of this job find rank 0; raises ConfigError for options that do not suffice.

    With `port`, by that address. On one host, by a file that only we can read. On several hosts
    under torchrun, by the store of its agent. Ranks that meet for another `purpose`, fit for a
    file's name, are not found in the latter two.
    """
    check_place(head_ip, port)
    is_one_host = launch.local_world_size == launch.world_size
    if port is not None and (is_one_host or head_ip is not None):
        return FixedPoint(head_ip or LOOPBACK, port)
    if launch.launcher == "options":
        raise ConfigError("--port", "is needed together with --rank and --world-size")
    if is_one_host and launch.job_key is not None:
        return FilePoint(f"{purpose}-{launch.job_key}", host=head_ip or LOOPBACK)
    if launch.store_address is not None and port is None:
        # The job's key counts restarts.
        key = f"flexbench/{purpose}/{launch.job_key}/address"
        return StorePoint(launch.store_address, key, head_ip=head_ip, timeout_s=timeout_s)
    raise ConfigError(
        "--head-ip",
        "is needed together with --port when the ranks run on several hosts: an address of rank "
        "0's host that the others reach, and a free port there",
    )


def check_place(head_ip: str | None, port: int | None) -> None:
    """Raise ConfigError for an address, or a port, that no job can have. Asks no name server."""
    if port is not None:
        check_count("--port", port, minimum=1, maximum=MAX_PORT)
    if head_ip is None:
        return
    if head_ip in ("", "*"):
        raise _not_one_interface(head_ip)
    try:
        # "0", "0x0" and "0.0" are ways to write 0.0.0.0.
        found = socket.getaddrinfo(head_ip, None, flags=socket.AI_NUMERICHOST)
    except OSError:  # a name, for all we know
        return
    except ValueError as error:
        raise ConfigError("--head-ip", f"cannot be a host, {head_ip!r}") from error
    _refuse_unspecified(head_ip, found[0][4][0])


def _refuse_unspecified(host: str, resolved: str | int) -> None:
    address = ipaddress.ip_address(str(resolved).partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if (mapped or address).is_unspecified:
        raise _not_one_interface(host)


def _not_one_interface(host: str) -> ConfigError:
    return ConfigError(
        "--head-ip",
        f"must be the address of one interface of rank 0's host, not {host!r}: only the job's "
        "network should reach the job",
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
        """The options that tell it: said by who had no time to try that address."""
        return "with --head-ip and --port"

    def close(self) -> None:
        """There is nothing to remove."""

    def clear_away(self, in_vain: Address | None) -> None:
        """There is nothing to remove."""


class FilePoint:
    """Rank 0 writes its address, and a random token, to a file in a folder of our own."""

    def __init__(self, name: str, *, host: str) -> None:
        """`name` is the same for all who are to meet, and no others on this host."""
        self._host = host
        try:
            temporary = Path(tempfile.gettempdir())
        except FileNotFoundError as error:
            raise RunError(
                "no folder for temporary files can be written; set TMPDIR, or name a --port"
            ) from error
        self._prefix = f"flexbench-{os.getuid()}-"
        self._folder = temporary / f"{self._prefix}{name}"
        self._path = self._folder / _ADDRESS
        self._written: Address | None = None

    def listen(self) -> tuple[socket.socket, str]:
        """Listen at a free port, and write it to the file. Removes what jobs left long ago."""
        self._remove_old_folders()
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
            return _read_address(self._path)
        except OSError:  # there is none, or it is not a file of ours
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

    def clear_away(self, in_vain: Address | None) -> None:
        """Remove file and folder, if nobody listens at the address. Job keys are unique."""
        _remove_dead_folder(self._folder, in_vain)

    def _remove_old_folders(self) -> None:
        """A rank 0 that was killed while it waited, with all others, could not remove its own."""
        expires_at = time.monotonic() + _SWEEP_S
        with suppress(OSError):
            for entry in os.scandir(self._folder.parent):
                if time.monotonic() > expires_at:
                    return
                with suppress(OSError):
                    is_old = (
                        entry.name.startswith(self._prefix)
                        and entry.stat(follow_symlinks=False).st_mtime < time.time() - _OLD_S
                    )
                    if is_old and entry.name != self._folder.name:
                        _remove_dead_folder(Path(entry.path))

    def _write(self, address: Address) -> None:
        try:
            with suppress(FileExistsError):
                self._folder.mkdir(mode=0o700)
            self._check_folder()
            # Nobody may ever read half of it.
            descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._folder)
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


def _read_address(path: Path | str, folder: int | None = None) -> Address | None:
    """The address in a file, in the open `folder` if given; raises OSError if there is none."""
    # Whoever could put a link there could as well write the file; but be plain about it.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with os.fdopen(os.open(path, flags, dir_fd=folder), "rb") as file:
        return Address.parse(file.read(_MAX_FILE_BYTES))


def _remove_dead_folder(path: Path, in_vain: Address | None = None) -> None:
    """Remove a folder of ours with an address that is `in_vain`, or refuses connections.

    Nothing else is removed, no link followed, and no error raised.
    """
    with suppress(OSError), _open_folder(path) as folder:
        address = _read_address(_ADDRESS, folder)
        if address is None or not (address == in_vain or _refuses_connections(address)):
            return
        for name in os.listdir(folder):
            if name == _ADDRESS or name.startswith(_TEMPORARY):
                os.unlink(name, dir_fd=folder)
        os.rmdir(path)


@contextmanager
def _open_folder(path: Path) -> Iterator[int]:
    """A descriptor of a folder that nobody but us can use; raises OSError if it is another."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(folder)
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        yield folder
    finally:
        os.close(folder)


def _refuses_connections(address: Address) -> bool:
    for _ in range(2):
        try:
            with connect(address, timeout_s=_REFUSAL_S) as connected:
                connected.recv(1)  # who has just been killed may not be gone altogether
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            continue
        except (OSError, ValueError):  # somebody is there, or nobody can tell
            return False
    return False


class StorePoint:
    """Several hosts under torchrun: rank 0's address is in the store that its agent serves."""

    def __init__(
        self, address: tuple[str, int], key: str, *, head_ip: str | None, timeout_s: float
    ) -> None:
        """The store outlives a restart of the ranks; `key` has to be another one then."""
        self._address = address
        self._head_ip = head_ip
        self._timeout_s = timeout_s
        self._key = key
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
        return Address.parse(self._call("get", self._key))

    def where(self) -> str:
        """Where the store is."""
        return f"in torchrun's store at {name_address(*self._address)}"

    def close(self) -> None:
        """Leave the store to its agent."""
        self._store = None

    def clear_away(self, in_vain: Address | None) -> None:
        """The store ends with its agent, and the next job has another key."""

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
        try:  # it takes seconds, and only several hosts need it here
            from torch import distributed
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "ranks of torchrun on several hosts meet in its store, which needs torch; install "
                "it, or give --head-ip and --port"
            ) from error
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


def connect(address: Address, *, timeout_s: float) -> socket.socket:
    """A connection to that address; raises OSError if there is none in time."""
    connected = socket.create_connection((address.host, address.port), timeout=timeout_s)
    # A port where nobody listens can be given to the very socket that tries to reach it.
    if connected.getsockname() == connected.getpeername():
        connected.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return connected


def resolve(host: str, port: int) -> tuple[Any, ...]:
    """What socket.getaddrinfo finds first.

    Raises ConfigError for a host that does not exist, or is all interfaces at once.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError("--head-ip", f"no such host, {host}: {error.strerror}") from error
    _refuse_unspecified(host, found[0][4][0])
    return found[0]


def listen_at(host: str, port: int) -> socket.socket:
    """A listening socket, at a free port if `port` is 0; raises ConfigError if that cannot be."""
    where = name_address(host, port)
    family, kind, protocol, _, address = resolve(host, port)
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
